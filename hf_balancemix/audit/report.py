"""The audit to look at and to decide on: a folder with a page that opens from disk, without a server or a network.

The page stands in one HTML file, `index.html`, with its style, its script and the audit as JSON; beside it are the
thumbnails. Its Content-Security-Policy lets it load images of its own folder and run its own script, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import jinja2
import numpy as np
import yaml
from huggingface_hub import HfApi
from markupsafe import Markup
from PIL import Image
from tqdm.auto import tqdm

from hf_balancemix.audit.corrections import Decided, label_positions
from hf_balancemix.audit.label_audit import KINDS, ClassAudit, LabelAudit
from hf_balancemix.data.images import MAX_IMAGE_PIXELS, decode
from hf_balancemix.data.labels import stored_labels
from hf_balancemix.data.views import undecoded_images

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAGE_FILE = "index.html"
_CARD_FILE = "README.md"
_THUMBNAILS = "thumbs"
_THUMBNAIL_SIZE = 256  # pixels of the longer side
_SUREST = 8  # thumbnails of a class and kind on the sheet
_TEMPLATES = Path(__file__).parent / "templates"
_CARD = """---
{front_matter}---

The label audit that `index.html` shows: labels that are probably wrong, to look at and to decide on. It was written by
hf_balancemix; open `index.html` in a browser. Decisions stay in that browser until they are saved as `decisions.csv`.
"""


@dataclass(frozen=True)
class _Direction:
    """What the summary says of the given positive, or of the given negative labels."""

    kind: str
    given: int
    classes: list[tuple[int, tuple[float, float, float] | None, Any]]  # labels, rate and histogram of each
    precision: np.ndarray  # over the rank; empty where clean labels are not known

    @property
    def scale(self) -> float:
        """Of the pictures of the rates: the highest upper end."""
        return max((rate[2] for _, rate, _ in self.classes if rate), default=0) or 1


def write_report(
    audit: LabelAudit,
    folder: str | os.PathLike[str],
    dataset: datasets.Dataset | None = None,
    *,
    title: str = "Label audit",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Path:
    """Write a folder whose `index.html` shows an audit and takes down decisions; it appears only when whole.

    The page has a summary of each class (labels, estimated noise, losses, the surest suggestions) and a review of each
    suspicious label by mouse or keyboard. Decisions survive closing the page in the browser's own storage, and are
    saved as `decisions.csv` with the columns image_id, class, given, decision ("wrong": the given label is wrong,
    "right" or "unsure"), reviewer and time (ISO 8601, UTC); the page reads such a file, too. Nothing is loaded from
    outside the folder. Of the images' paths the page holds the file names alone.

    Args:
        audit: The audit; without rows the page says so.
        folder: New or empty.
        dataset: The audited data set, to make the thumbnails from; by default they are made from the files that the
            audit names. An image that cannot be read is warned of and has none. Where it has `clean_labels`, the
            page shows which share of the first rows is wrong indeed.
        title: Of the page.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`.

    Returns:
        The path of `index.html`.

    Raises:
        ValueError: The folder is not empty, or the data set lacks an image or a label of the audit.
        OSError: The folder cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        problem = f"folder is {folder}, which exists and is not empty"
        raise ValueError(f"{problem}; it must be a new or empty folder; remove it or pass another.")
    rows: dict[str, Any] = read_rows(audit)
    paths = dict(zip(rows["image_id"], rows["image"], strict=True))  # one an image
    images: Any = list(paths.values())
    rows["wrong"] = None
    if dataset is not None:
        place, label_class = places(dataset, rows)
        if "clean_labels" in dataset.column_names:
            rows["wrong"] = wrong_indeed(dataset, rows, place, label_class)
        row_of = dict(zip(rows["image_id"], place.tolist(), strict=True))
        images = undecoded_images(dataset).select([row_of[image_id] for image_id in paths])["image"]

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        build = Path(scratch) / folder.name
        (build / _THUMBNAILS).mkdir(parents=True)

        def write(number: int, image: Image.Image) -> str:
            name = f"{_THUMBNAILS}/{number:06d}.jpg"
            image.save(build / name, quality=85)
            return name

        made = thumbnails(images, list(paths), _THUMBNAIL_SIZE, write, max_image_pixels)
        names = dict(zip(paths, made, strict=True))
        rows["thumbnail"] = [names[image_id] for image_id in rows["image_id"]]
        (build / PAGE_FILE).write_text(_page(audit.classes, rows, title), encoding="utf-8")
        space = {"title": title, "sdk": "static", "app_file": PAGE_FILE}
        card = _CARD.format(front_matter=yaml.safe_dump(space, sort_keys=False, allow_unicode=True))
        (build / _CARD_FILE).write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # Windows renames to no folder that exists, not even an empty one
        os.rename(build, folder)
    return folder / PAGE_FILE


def push_report(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool = True, token: str | None = None
) -> str:
    """Upload a folder of `write_report` as a static Space to the Hub, new or not, in one commit.

    Decisions are no part of it: they stay in each reader's browser until they are saved.

    Args:
        folder: The folder.
        repo_id: "user/name".
        private: Only for those who may see the Space. False: for everybody, with the thumbnails.
        token: Access token; by default the one that is logged in.

    Returns:
        The address of the Space.

    Raises:
        FileNotFoundError: The folder is no report.
        ValueError: It must be private, and the Space is there already and is public.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
    """
    folder = Path(folder).expanduser()
    for name in (PAGE_FILE, _CARD_FILE):
        if not (folder / name).is_file():
            problem = f"folder is {folder}, which has no {name}"
            raise FileNotFoundError(f"{problem}; it must be what write_report wrote; check the path.")
    api = HfApi(token=token)
    space = api.create_repo(repo_id, repo_type="space", space_sdk="static", private=private, exist_ok=True)
    if private and not api.repo_info(space.repo_id, repo_type="space").private:
        problem = f"the Space {space.repo_id} is public and private is True"
        raise ValueError(f"{problem}; a private report needs a private Space; make it private, or pass private=False.")
    api.upload_folder(
        folder_path=folder,
        repo_id=space.repo_id,
        repo_type="space",
        commit_message="Upload label audit",
        delete_patterns=f"{_THUMBNAILS}/*",  # of the report before
    )
    return str(space)


def read_rows(audit: LabelAudit) -> dict[str, list[Any]]:
    """The columns of the rows of an audit, with each image_id as text."""
    rows = audit.rows.with_format(None)[:]
    return rows | {"image_id": list(map(str, rows["image_id"]))}


def places(dataset: datasets.Dataset, rows: dict[str, list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Row and class in the data set of each row of the audit; ValueError unless the audit is of this data."""
    if "image_id" not in dataset.column_names:
        dataset = dataset.add_column("image_id", np.arange(len(dataset)))  # as the audit numbered them
    labels = zip(rows["image_id"], rows["class"], rows["given"], rows["suggested"], strict=True)
    return label_positions(dataset, [Decided(*label, by="", time="") for label in labels], "the audit")


def wrong_indeed(
    dataset: datasets.Dataset, rows: Mapping[str, list[Any]], place: np.ndarray, label_class: np.ndarray
) -> np.ndarray:
    """`(rows,)`: 1 where the given label is not the clean one of the data set, 0 where it is, NaN where unknown."""
    clean = stored_labels(dataset, "clean_labels").numpy()[place, label_class]
    return np.where(clean < 0, np.nan, clean != rows["given"])


def thumbnails(
    images: Sequence[Any],
    image_ids: Sequence[str],
    size: int,
    keep: Callable[[int, Image.Image], T],
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> list[T | None]:
    """What `keep` makes of the number and the thumbnail of each image; None, and a warning, for one without.

    Args:
        images: What :func:`~hf_balancemix.data.decode` takes, or None.
        image_ids: What to call them.
        size: Pixels of a thumbnail's longer side, at most.
        keep: Called from several threads.
        max_image_pixels: As there.
    """

    def make(number: int) -> T | None:
        try:
            if images[number] is None:
                raise ValueError("it has no file; pass the data set")
            image = decode(images[number], max_image_pixels=max_image_pixels)
            image.thumbnail((size, size))
        except (ValueError, OSError) as error:
            problems[number] = error
            return None
        return keep(number, image)

    problems: dict[int, Exception] = {}
    with ThreadPoolExecutor() as pool:  # decoding and scaling leave the interpreter free
        made = pool.map(make, range(len(images)))
        kept = list(tqdm(made, total=len(images), desc="Thumbnails", unit="image", dynamic_ncols=True))
    if problems:
        first = min(problems)
        logger.warning(
            "%d of %d images cannot be shown and have a placeholder, such as image_id %r: %s",
            len(problems), len(images), image_ids[first], problems[first],
        )  # fmt: skip
    return kept


def _page(classes: Sequence[ClassAudit], rows: dict[str, list[Any]], title: str) -> str:
    position = {c.name: k for k, c in enumerate(classes)}
    columns = {
        "id": rows["image_id"],  # text: JavaScript rounds integers above 2^53
        # The last part alone: where somebody keeps their files is not the reader's business.
        "file": [path and path.replace("\\", "/").rpartition("/")[2] for path in rows["image"]],
        "class": [position[name] for name in rows["class"]],
        "given": rows["given"],
        "score": _rounded(rows["score"]),
        "prediction": _rounded(rows["prediction"]),
        "p_clean": _rounded(rows["p_clean"]),
        "epochs": rows["epochs_distrusted"],
        "rank": rows["rank"],
        "thumbnail": rows["thumbnail"],
    }
    # Under this name the browser keeps the decisions, so it follows from the labels that are decided on.
    labels = [list(position), *(columns[name] for name in ("id", "class", "given", "score"))]
    digest = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(columns["class"], columns["given"], strict=True)):
        rows_of[key].append(row)
    positive = [(c.positives, c.wrong, c.histogram_positive) for c in classes]
    negative = [(c.negatives, c.missing, c.histogram_negative) for c in classes]
    directions = [
        _Direction(KINDS[1], 1, positive, _precision(rows, 1)),
        _Direction(KINDS[0], 0, negative, _precision(rows, 0)),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": _rate, "bars": _bars, "curve": _curve, "points": _points}
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        title=title,
        names=list(position),
        directions=directions,
        columns=columns,
        rows_of=rows_of,
        surest=_SUREST,
        content={"classes": list(position), "columns": columns, "digest": digest},
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _precision(rows: dict[str, Any], given: int) -> np.ndarray:
    """Of the first 1, 2, ... rows of a kind, the share that is wrong; empty without clean labels."""
    if rows["wrong"] is None:
        return np.zeros(0)
    return mean_over_rank(rows["wrong"][np.asarray(rows["given"]) == given])


def mean_over_rank(values: np.ndarray) -> np.ndarray:
    """The mean of the first 1, 2, ... values, of those that are not NaN: the precision, if they are 1 and 0."""
    known = values[~np.isnan(values)]
    return known.cumsum() / np.arange(1, len(known) + 1)


def drawn_ranks(length: int) -> np.ndarray:
    """At most 200 of the ranks 1 to `length`, evenly on a logarithmic scale."""
    return np.unique(np.geomspace(1, length, 200).round().astype(int))


def _points(precision: np.ndarray, longest: int) -> str:
    """The line of a picture of 300 x 100, its ranks from 1 to `longest` on a logarithmic scale."""
    ranks = drawn_ranks(len(precision))
    x = 300 * np.log(ranks) / np.log(max(longest, 2))
    return " ".join(f"{left:.1f},{100 - 100 * share:.1f}" for left, share in zip(x, precision[ranks - 1], strict=True))


def _bars(counts: Sequence[float]) -> list[tuple[float, float, float]]:
    """Left edge, width and height of each bar in a picture of 100 x 30, its counts on a logarithmic scale.

    The bars are equally wide: the bins of losses grow with the loss, so that axis is logarithmic, too.
    """
    width, most = 100 / len(counts), math.log1p(max(counts))
    return [(i * width, width, 30 * math.log1p(count) / most) for i, count in enumerate(counts) if count > 0]


def _curve(expected: Sequence[float], counts: Sequence[float]) -> str:
    """Points of a line over :func:`_bars` of `counts`."""
    width, most = 100 / len(counts), math.log1p(max(counts))
    heights = [30 - min(30, 30 * math.log1p(value) / most) for value in expected]
    return " ".join(f"{(i + 0.5) * width:.2f},{height:.2f}" for i, height in enumerate(heights))


def _rate(share: float) -> str:
    """A share in per cent with two digits that count."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1 if share >= 0.00995 or share == 0 else 2}f} %"


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    """Four decimals; None for NaN, which JSON does not know."""
    return [None if value is None or math.isnan(value) else round(value, 4) for value in values]
