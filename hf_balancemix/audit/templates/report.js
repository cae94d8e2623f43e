"use strict";
(() => {
  const audit = JSON.parse(document.getElementById("audit").textContent);
  const { columns } = audit;
  const total = columns.id.length;
  const decisions = new Array(total); // of each row {decision, reviewer, time}, or undefined
  const history = []; // lists of [row, what was decided before]
  const DECISIONS = { wrong: "✗", right: "✓", unsure: "?" };
  const HEADER = ["image_id", "class", "given", "decision", "reviewer", "time"];
  const WORDS = ["absent", "present"];
  const GAP = 8, CAPTION = 44, HEADING = 46, MARGIN = 500; // pixels
  const get = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en");
  const grid = get("grid"), canvas = get("canvas");

  // Text from the audit goes into the page by textContent alone: it is never markup.
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  let silence;
  function say(text, lasting = false) {
    get("message").textContent = text;
    clearTimeout(silence);
    if (!lasting) silence = setTimeout(() => say(""), 8000);
  }

  // What the browser keeps: one entry a decision, so that one costs the same however many there are.

  const KEY = `hf_balancemix audit ${audit.digest} `;
  let kept = true;

  function keep(name, value) {
    try {
      if (value === undefined) localStorage.removeItem(name);
      else localStorage.setItem(name, value);
    } catch {
      kept = false;
      say("This browser keeps no more decisions: save them as a file before you close the page.", true);
    }
  }

  function set(row, made) {
    decisions[row] = made;
    keep(KEY + row, made && JSON.stringify([made.decision, made.reviewer, made.time]));
  }

  function restore() {
    try {
      for (let i = 0; i < localStorage.length; i++) {
        const name = localStorage.key(i);
        if (!name.startsWith(KEY)) continue;
        const [decision, reviewer, time] = JSON.parse(localStorage.getItem(name));
        const row = Number(name.slice(KEY.length));
        if (row in columns.id && decision in DECISIONS) decisions[row] = { decision, reviewer, time };
      }
      get("reviewer").value = localStorage.getItem("hf_balancemix reviewer") ?? "";
    } catch {
      kept = false;
      say("This browser keeps no decisions: save them as a file before you close the page.", true);
    }
  }

  // The rows that the filters leave, grouped by class, in lines of which those near the view are drawn.

  let shown = []; // rows
  let at = 0; // position of the selected one in it
  let lines = []; // {top, height, first, end} of cards, positions in `shown`, or {top, height, heading: class}
  let lineOf = []; // of each position
  const drawn = new Map(); // line → element
  const cards = new Map(); // row → element
  const order = [...columns.id.keys()].sort((a, b) => columns.class[a] - columns.class[b] || a - b);

  function filter(wanted = shown[at]) {
    const [k, given, decision] = ["by-class", "by-given", "by-decision"].map((id) => get(id).value);
    const least = Number(get("by-score").value);
    get("least").textContent = least.toFixed(2);
    shown = order.filter((row) =>
      (k === "" || columns.class[row] === Number(k)) && (given === "" || columns.given[row] === Number(given))
      && columns.score[row] >= least && (decision === "" || (decisions[row]?.decision ?? "none") === decision));
    get("shown").textContent = `${number(shown.length)} label${shown.length === 1 ? "" : "s"} shown`;
    lay();
    grid.scrollTop = 0;
    const position = shown.indexOf(wanted);
    select(position >= 0 ? position : Math.max(0, nextUndecided(0)));
  }

  function nextUndecided(from) {
    return shown.findIndex((row, position) => position >= from && !decisions[row]);
  }

  function lay() {
    const width = canvas.clientWidth, across = Math.max(3, Math.floor((width + GAP) / 158));
    const height = (width - GAP * (across - 1)) / across + CAPTION;
    let top = 0;
    lines = [];
    lineOf = [];
    for (let first = 0; first < shown.length;) {
      const k = columns.class[shown[first]];
      if (first === 0 || columns.class[shown[first - 1]] !== k) {
        lines.push({ top, height: HEADING, heading: k });
        top += HEADING;
      }
      let end = first;
      while (end < shown.length && end < first + across && columns.class[shown[end]] === k) lineOf[end++] = lines.length;
      lines.push({ top, height, first, end });
      top += height + GAP;
      first = end;
    }
    canvas.style.height = `${top}px`;
    canvas.style.setProperty("--columns", across);
    canvas.replaceChildren(...(shown.length ? [] : [make("p", { className: "none" }, "No label matches these filters.")]));
    drawn.clear();
    cards.clear();
  }

  function draw() {
    const from = grid.scrollTop - MARGIN, to = grid.scrollTop + grid.clientHeight + MARGIN;
    let low = 0, high = lines.length; // the first line that ends below `from`
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lines[middle].top + lines[middle].height < from) low = middle + 1;
      else high = middle;
    }
    let end = low;
    while (end < lines.length && lines[end].top < to) end++;
    for (const [line, element] of drawn) {
      if (line >= low && line < end) continue;
      element.remove();
      drawn.delete(line);
      for (let position = lines[line].first; position < lines[line].end; position++) cards.delete(shown[position]);
    }
    for (let line = end - 1; line >= low; line--) { // backwards, so that each finds the one it comes before
      if (drawn.has(line)) continue;
      drawn.set(line, drawLine(lines[line]));
      canvas.insertBefore(drawn.get(line), drawn.get(line + 1) ?? null);
    }
  }

  function drawLine({ top, height, heading, first, end }) {
    const line = make("div", { className: "line" });
    line.style.cssText = `top: ${top}px; height: ${height}px`;
    if (heading !== undefined) {
      line.append(make("h2", {}, make("bdi", {}, audit.classes[heading]), make("span", {}, ofClass(heading))));
      return line;
    }
    line.style.gridTemplateColumns = "repeat(var(--columns), minmax(0, 1fr))";
    for (let position = first; position < end; position++) {
      const row = shown[position];
      const card = make("button", { type: "button", className: "card", tabIndex: -1 }, picture(row),
        make("span", { className: "text" },
          make("span", {}, `${WORDS[columns.given[row]]} → ${WORDS[1 - columns.given[row]]}`),
          make("span", {}, `${columns.score[row].toFixed(2)} · `, make("bdi", {}, columns.file[row] ?? columns.id[row]))));
      card.addEventListener("click", () => select(position));
      cards.set(row, card);
      dress(row);
      line.append(card);
    }
    return line;
  }

  function picture(row) {
    const none = () => make("span", { className: "no-image" }, "no image");
    if (columns.thumbnail[row] === null) return none();
    const image = make("img", { loading: "lazy", decoding: "async", alt: "", src: columns.thumbnail[row] });
    image.addEventListener("error", () => image.replaceWith(none()));
    return image;
  }

  // A card as it is selected and decided now.
  function dress(row) {
    const card = cards.get(row);
    if (!card) return;
    const selected = row === shown[at], decision = decisions[row]?.decision;
    card.tabIndex = selected ? 0 : -1;
    card.ariaCurrent = selected ? "true" : null;
    card.querySelector(".mark")?.remove();
    if (decision) card.append(make("span", { className: `mark ${decision}`, "aria-hidden": "true" }, DECISIONS[decision]));
    card.setAttribute("aria-label", `${audit.classes[columns.class[row]]}, image ${columns.id[row]}, given `
      + `${WORDS[columns.given[row]]}, score ${columns.score[row].toFixed(2)}, ${decision ?? "undecided"}`);
  }

  function ofClass(k) {
    let all = 0, done = 0;
    for (const row of shown) {
      if (columns.class[row] !== k) continue;
      all++;
      if (decisions[row]) done++;
    }
    return `${number(done)} of ${number(all)} decided`;
  }

  function select(position) {
    const before = shown[at];
    at = position;
    if (!shown.length) {
      draw();
      tell();
      return;
    }
    const { top, height } = lines[lineOf[at]];
    const room = lines[lineOf[at] - 1].heading === undefined ? GAP : HEADING; // show the heading, too
    if (top - room < grid.scrollTop) grid.scrollTop = top - room;
    else if (top + height + GAP > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + height + GAP - grid.clientHeight;
    const focused = document.activeElement?.classList.contains("card");
    draw();
    dress(before);
    dress(shown[at]);
    if (focused) cards.get(shown[at]).focus({ preventScroll: true });
    tell();
  }

  // The panel beside the grid, and the progress.
  function tell() {
    const row = shown[at];
    get("panel").hidden = row === undefined;
    if (row !== undefined) {
      const given = columns.given[row], made = decisions[row];
      get("picture").replaceChildren(picture(row));
      get("name").textContent = audit.classes[columns.class[row]];
      get("change").replaceChildren("Given: ", make("b", {}, WORDS[given]), " · Suggested: ", make("b", {}, WORDS[1 - given]));
      get("state").className = made?.decision ?? "quiet";
      get("state").textContent = made ? `${DECISIONS[made.decision]} The given label is ${made.decision === "unsure"
        ? "left open" : made.decision}` : "Undecided";
      const details = [
        ["score", columns.score[row]], ["kind", given ? "wrong positive" : "missing label"],
        ["prediction", columns.prediction[row]], ["p clean", columns.p_clean[row]],
        ["distrusted", columns.epochs[row] ? `in ${columns.epochs[row]} epoch${columns.epochs[row] === 1 ? "" : "s"}` : null],
        ["rank", `${columns.rank[row]} in its class`], ["image", columns.id[row]], ["file", columns.file[row]],
      ].filter(([, value]) => value !== null);
      get("details").replaceChildren(...details.flatMap(([name, value]) => [
        make("dt", {}, name), make("dd", {}, make("bdi", {}, typeof value === "number" ? value.toFixed(2) : value))]));
      for (const button of get("decide").querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button.dataset.do === made?.decision));
      }
    }
    let done = 0, left = 0;
    for (let i = 0; i < total; i++) {
      if (decisions[i]) done++;
      else left += columns.score[i];
    }
    get("bar").value = done;
    get("progress").textContent = `${number(done)} of ${number(total)} decided, about ${number(Math.round(left))} wrong left`;
    for (const [line, element] of drawn) {
      if (lines[line].heading !== undefined) element.querySelector("span").textContent = ofClass(lines[line].heading);
    }
  }

  // What a reviewer does

  function change(changes) {
    history.push(changes.map(([row]) => [row, decisions[row]]));
    for (const [row, made] of changes) {
      set(row, made);
      dress(row);
    }
  }

  const actions = {
    previous: () => at > 0 && select(at - 1),
    next: () => at + 1 < shown.length && select(at + 1),
    undecided() {
      const after = nextUndecided(at + 1), position = after >= 0 ? after : nextUndecided(0);
      if (position >= 0) select(position);
      else say("Everything shown is decided.");
    },
    undo() {
      const changes = history.pop();
      if (!changes) return say("There is nothing to undo.");
      for (const [row, made] of changes) {
        set(row, made);
        dress(row);
      }
      const position = shown.indexOf(changes[0][0]);
      if (position >= 0) select(position);
      else tell();
      if (kept) say(changes.length === 1 ? "" : `${number(changes.length)} decisions undone.`);
    },
  };
  for (const decision of Object.keys(DECISIONS)) {
    actions[decision] = () => {
      if (!shown.length) return;
      if (kept) say("");
      const reviewer = get("reviewer").value.trim();
      change([[shown[at], { decision, reviewer, time: new Date().toISOString() }]]);
      if (at + 1 < shown.length) select(at + 1);
      else tell();
    };
  }

  // The decisions as a file

  function save() {
    const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const records = [HEADER];
    decisions.forEach((made, row) => {
      if (!made) return;
      const { decision, reviewer, time } = made;
      records.push([columns.id[row], audit.classes[columns.class[row]], String(columns.given[row]), decision, reviewer, time]);
    });
    if (records.length === 1) return say("Nothing is decided yet.");
    const text = records.map((record) => record.map(quoted).join(",") + "\n").join("");
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "decisions.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`${number(records.length - 1)} decisions saved as decisions.csv.`);
  }

  function parse(text) {
    const records = [], header = text.split(/[\r\n]/, 1)[0];
    const often = (c) => header.split(c).length;
    const comma = [",", ";", "\t"].reduce((a, b) => (often(b) > often(a) ? b : a)); // Excel's differs by country
    let record = [], field = "", quoted = false;
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      if (quoted) {
        if (c !== '"') field += c;
        else if (text[i + 1] === '"') field += text[++i];
        else quoted = false;
      } else if (c === '"') quoted = true;
      else if (c === comma) {
        record.push(field);
        field = "";
      } else if (c === "\n" || c === "\r") {
        if (c === "\r" && text[i + 1] === "\n") i++;
        records.push([...record, field]);
        record = [];
        field = "";
      } else field += c;
    }
    if (field || record.length) records.push([...record, field]);
    return records.filter((values) => values.length > 1 || values[0]);
  }

  function load(text, name) {
    const [header, ...records] = parse(text);
    const places = HEADER.map((column) => header?.indexOf(column) ?? -1);
    if (places.slice(0, 4).includes(-1)) {
      return say(`${name} has not the columns image_id, class, given and decision: load a file that was saved here.`);
    }
    const label = (...parts) => JSON.stringify(parts);
    const rows = new Map(order.map((row) =>
      [label(columns.id[row], audit.classes[columns.class[row]], String(columns.given[row])), row]));
    const changes = new Map();
    for (const record of records) {
      const [id, k, given, decision, reviewer = "", time = ""] = places.map((place) => record[place]);
      const row = rows.get(label(id, k, given));
      if (row !== undefined && decision in DECISIONS) changes.set(row, { decision, reviewer, time });
    }
    if (changes.size) change([...changes]);
    filter();
    const others = records.length - changes.size;
    say(`${number(changes.size)} decisions loaded from ${name}`
      + (others ? `; ${number(others)} are not about labels of this audit and were left out.` : "."));
  }

  // Wiring

  function show() {
    const review = location.hash === "#review";
    get("summary").hidden = review;
    get("review").hidden = !review;
    get("to-summary").ariaCurrent = review ? null : "page";
    get("to-review").ariaCurrent = review ? "page" : null;
    if (!review) return;
    filter();
    cards.get(shown[at])?.focus({ preventScroll: true }); // so that Page Down and the like scroll the grid
  }

  audit.classes.forEach((name, k) => {
    if (columns.class.includes(k)) get("by-class").append(make("option", { value: String(k) }, name));
  });
  restore();
  let pointer = false; // whether the mouse or a finger was used last
  addEventListener("pointerdown", () => { pointer = true; }, true);
  for (const id of ["by-class", "by-given", "by-decision", "by-score"]) {
    get(id).addEventListener("input", () => filter());
    // After a choice by mouse the keys are for the review again; one who moves by keyboard keeps their place.
    get(id).addEventListener("change", () => pointer && get(id).blur());
  }
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  get("reviewer").addEventListener("input", () => keep("hf_balancemix reviewer", get("reviewer").value));
  get("reviewer").addEventListener("keydown", (event) => event.key === "Enter" && get("reviewer").blur());
  get("save").addEventListener("click", save);
  get("load").addEventListener("click", () => get("file").click());
  get("file").addEventListener("change", async () => {
    const [file] = get("file").files;
    if (file) load(await file.text(), file.name);
    get("file").value = ""; // the same file can be loaded again
  });
  for (const button of document.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => actions[button.dataset.do]());
  }
  for (const link of document.querySelectorAll("#summary [data-class], #summary [data-row]")) {
    link.addEventListener("click", () => {
      const { row } = link.dataset;
      get("by-class").value = row === undefined ? link.dataset.class : columns.class[row];
      get("by-given").value = row === undefined ? link.dataset.given : columns.given[row];
      get("by-decision").value = "";
      get("by-score").value = 0;
      filter(row === undefined ? undefined : Number(row));
    });
  }
  const keys = { w: "wrong", r: "right", u: "unsure", z: "undo", n: "undecided", ArrowLeft: "previous", ArrowRight: "next" };
  addEventListener("keydown", (event) => {
    pointer = false;
    // Where the layout has no Latin letters, a key goes by its place.
    const key = event.key.length === 1 ? (event.key < "\x80" ? event.key : event.code.slice(3)).toLowerCase() : event.key;
    const undo = key === "z" && (event.ctrlKey || event.metaKey);
    if (get("review").hidden || !(key in keys) || event.altKey || ((event.ctrlKey || event.metaKey) && !undo)) return;
    if (event.target.closest("select, input[type=text]") || (event.target === get("by-score") && key.length > 1)) return;
    event.preventDefault();
    if (event.repeat && keys[key] in DECISIONS) return; // a key that is held down decides once
    actions[keys[key]]();
  });
  grid.addEventListener("scroll", draw, { passive: true });
  let width = 0;
  new ResizeObserver(() => {
    if (canvas.clientWidth === width || get("review").hidden) return draw();
    width = canvas.clientWidth;
    lay();
    select(at);
  }).observe(grid);
  addEventListener("hashchange", show);
  addEventListener("beforeunload", (event) => {
    if (!kept && decisions.some(Boolean)) event.preventDefault();
  });
  show();
  tell();
})();
