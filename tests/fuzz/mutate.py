"""Hostile inputs made from good ones, and a watch over what is done with them; every choice is drawn from `rng`.

content = mutated_bytes(good, random.Random("7/coco"))
content = as_json(mutated_tree(json.loads(good), rng), rng)
with watch(outside) as seen:
    kind, result = outcome(lambda: load(file))
assert not seen
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, CHARACTERS = 20, 400

# What json.dumps cannot write, or would take long to: it is put into the text.
_RAW = {
    "@integer@": "7" * 5000,
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@twice@": '{"id": 1, "id": 2, "name": "a", "name": "b"}',
}

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.0, 1e308, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**4000),
    *("", " ", "0", "1", "-1", "nan", "\0", "a\0b.jpg", "..", "../outside/secret.jpg", "/etc/hostname", "./a.jpg"),
    *("outside.jpg", "link/secret.jpg", "C:\\a.jpg", "~/a.jpg", "a/" * 2000, "x" * 10_000, "\ud800", "\u202e\u0000"),
    *("é" * 300, "two\nlines", "{}", "[1, 2]", "$(id)", "%s%n", "../" * 40 + "etc/hostname"),
    *([], {}, [[]], [None], {"": None}, [1, "1"], ["x"] * 5000, {str(i): i for i in range(3000)}),
    *_RAW,
]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content after one to four accidents: bytes flipped, written over, cut off, left out, repeated, inserted."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 100)), len(data) - place)
        kind = rng.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind == 2:
            data = data[:place] if rng.random() < 0.8 else data[place:]
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length] * rng.choice((1, 2, 1000))
        elif kind == 5:
            data[place:place] = _inserted(rng)
        else:
            data[place : place + length] = _inserted(rng)
    return bytes(data)


def _inserted(rng: random.Random) -> bytes:
    texts = [*_RAW.values(), *(value for value in HOSTILE if isinstance(value, str))]
    texts += ["[", "{", "<", "&lol;", "<!DOCTYPE x [<!ENTITY a 'b'>]>", '"', "'", ",", "\n", "\r\n", "\t", ": "]
    texts += ["*a", "&a ", "!!timestamp ", "!!bool ", "? ", "- "]
    return rng.choice(texts).encode("utf-8", "surrogatepass") if rng.random() < 0.8 else rng.randbytes(8)


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of lists, dicts and plain values in which one to three nodes are replaced, left out, doubled or moved."""
    tree = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        nodes = [(parent, key) for parent, key in _nodes(tree)]
        parent, key = rng.choice(nodes)
        kind = rng.randrange(6)
        if kind < 3 or parent is tree:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            other, place = rng.choice(nodes)
            parent[key] = copy.deepcopy(other[place]) if place in _keys(other) else None
    return tree[0]


def _nodes(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in _keys(node):
        yield node, key
        yield from _nodes(node[key])


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def as_json(tree: Any) -> bytes:
    """JSON of a mutated tree, with what stands for texts that no JSON writer writes."""
    text = json.dumps(tree)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """("right", what `call` returned) or ("refused", the error); any other end or message is an AssertionError."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    start = time.monotonic()
    try:
        result: tuple[str, Any] = ("right", call())
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        assert 0 < len(message) < CHARACTERS, f"a message of {len(message)} characters: {message[:1000]}"
        assert "\n" not in message, message
        result = ("refused", error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < SECONDS
    return result


_watched: list[tuple[str, list[str]]] = []
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "socket.connect"}


@contextmanager
def watch(outside: Path) -> Iterator[list[str]]:
    """A list of the files in the folder `outside` that Python opens in the block, and of what it starts or calls."""
    if not _watched:
        sys.addaudithook(_hook)
    seen: list[str] = []
    _watched.append((os.path.realpath(outside), seen))
    try:
        yield seen
    finally:
        _watched[-1] = ("", [])  # a hook stays for good


def _hook(event: str, args: tuple[Any, ...]) -> None:
    folder, seen = _watched[-1]
    if not folder:
        return
    if event in _STARTS:
        seen.append(f"{event} {args[0]!r}")
    elif event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith(folder):
            seen.append(f"{event} {path}")
