"""Tags of instances, as people's files have them, to class ids."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from hf_balancemix.data.files import first_few, first_repeat
from hf_balancemix.files import quote

_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def split_tags(text: str, separator: str | None, where: Callable[[], str]) -> list[str]:
    """The tags in a string: the values of a list that Python, NumPy or JSON wrote, else what `separator` stands
    between.

    Spaces around a tag and empty tags are dropped. `where` names the string, for the ValueError that is raised where
    it begins like a list and is none, or is no list and there is no separator.
    """
    text = text.strip()
    if text == "set()":
        return []
    if _BRACKETS.get(text[:1]) == text[-1:] and (values := _written_list(text)) is not None:
        return [tag for tag in map(str.strip, map(_as_text, values)) if tag]
    if text.startswith(("[", "{", "array(")):
        needed = "it must be a list such as ['a', 'b'] or plain tags"
        raise ValueError(f"{where()} is {quote(text)}; {needed}; correct the list.")
    if separator:
        return [tag for tag in map(str.strip, text.split(separator)) if tag]
    if text:
        raise ValueError(
            f"separator is {quote(separator)} and {where()} is {quote(text)}; pass what stands between its tags."
        )
    return []


def _written_list(text: str) -> list[Any] | None:
    """The values of a written list, tuple or set of texts and numbers; None where it is something else."""
    try:
        values = json.loads(text)
        plain = isinstance(values, list) and all(isinstance(value, str | int | float) for value in values)
        return values if plain else None
    except (ValueError, RecursionError):
        pass
    # By tokens, not by literal_eval, to which NumPy's ['a' 'b'], without commas, would be the one text 'ab'.
    values = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NUMBER and len(token.string) > 1000:
                return None  # which Python would refuse to write as a text
            if token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in ("True", "False"):
                values.append(ast.literal_eval(token.string))
            elif token.string not in [*"[](){},"] and token.string.strip():
                return None
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError):  # the last is ast's own
        return None
    return values


def _as_text(value: Any) -> str:
    """A number as its shortest text, so that 1, 1.0 and True are the same tag."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else str(value)


def class_lists(
    tags: Sequence[Sequence[Any] | None],
    names: list[str] | None,
    where: Callable[[int], str],
    name_of: dict[int, str] | None = None,
    zeros_and_ones: bool = True,
) -> tuple[list[str], list[list[int]]]:
    """Names of the K classes (those that occur, sorted, unless they are given), and each row's in ascending order.

    The tags are names, or ids if there is a `name_of` to look them up in; `where` names a row, for messages. Rows of
    K zeros and ones are read as multi-hot ones, but where `zeros_and_ones` is false: several objects are of one class.
    """
    ids_names = names if name_of is None else list(name_of.values())
    if zeros_and_ones and ids_names and is_multi_hot(tags, ids_names, where):
        bits = [[bit_of(value) for value in row or ()] for row in tags]
        for row, found in enumerate(bits):
            if -1 in found:
                needed = "it must be zeros and ones; use a column for each class, which may have unknown labels"
                raise ValueError(f"{where(row)} is {quote(list(tags[row] or ()))}; {needed}.")
        tags = [[name for name, bit in zip(ids_names, found, strict=True) if bit == 1] for found in bits]
        name_of = None
    elif zeros_and_ones and not ids_names:
        is_multi_hot(tags, None, where)  # refuses what may be
    rows: list[set[str]] = []
    for row, classes in enumerate(tags):
        if classes is None or (name_of is None and not all(classes)):
            needed = "it must be a list of class names, empty where there is none"
            raise ValueError(f"{where(row)} is {quote(classes)}; {needed}; drop the row.")
        try:
            rows.append(set(classes) if name_of is None else {name_of[_id(value)] for value in classes})
        except KeyError:
            wrong = next(value for value in classes if _id(value) not in (name_of or ()))
            needed = f"it must be a class id, a whole number from 0 to {len(name_of or ()) - 1}"
            raise ValueError(f"{where(row)} has {quote(wrong)}; {needed}; correct it.") from None
    names = sorted(set().union(*rows)) if names is None else names
    if not names:
        raise ValueError(f"{where(0)} and all after are without a class; there must be one; pass names=[...].")
    index = {name: k for k, name in enumerate(names)}
    for row, present in enumerate(rows):
        if other := present - index.keys():
            needed = f"it must be one of the {len(names)} classes {first_few(names)}"
            raise ValueError(f"{where(row)} has {quote(min(other))}; {needed}; add it to names.")
    return names, [sorted(index[name] for name in present) for present in rows]


def is_multi_hot(
    tags: Sequence[Sequence[Any] | None], names: Sequence[str] | None, where: Callable[[int], str]
) -> bool:
    """Whether each row has a 0 or 1 (or -1, NaN or None: unknown) for each of the K classes, rather than ids or names.

    No class is listed twice by ids: where nothing but 0 and 1 occurs and a row repeats one, the rows are multi-hot.

    Raises:
        ValueError: Nothing but 0 and 1 occurs, and it cannot be told what they are; the message names the row.
    """
    if not all(
        bit_of(value) in (0, 1, -1) for row in tags for value in row or ()
    ):  # ends at the first name of a class
        return False
    bits = [[bit_of(value) for value in row or ()] for row in tags]
    values = set(chain.from_iterable(bits))
    if not values or not values.isdisjoint(map(bit_of, names or ())):
        return False
    lengths = set(map(len, bits))
    # What is neither an id nor a list of different classes.
    other = next((i for i, row in enumerate(bits) if len(set(row)) < len(row) or (len(row) > 1 and -1 in row)), None)
    full = names is not None and lengths == {len(names)}
    if full and (other is not None or (len(names or ()) == 1 and values != {0})):
        return True
    if other is None and not full and not (names is None and lengths == {2}):
        return False  # ids, or classes whose names are numbers
    row = other or 0
    if names is None:
        needed = "a class must be there once, or the K classes of a multi-hot row must have names; pass names=[...]"
    elif full:
        needed = "it must be clear whether they are ids or multi-hot; use a column for each class"
    else:
        needed = f"it must be a class once, or a 0 or 1 for each of the {len(names)} classes; correct the row"
    raise ValueError(f"{where(row)} is {quote(list(tags[row] or ()))}, and so are all of 0 and 1; {needed}.")


def bit_of(value: Any) -> int | None:
    """0, 1 or -1 (also NaN and None) of such a number or boolean, as a value or as text; None of anything else."""
    if value is None:
        return -1
    try:
        number = float({"True": 1, "False": 0}.get(value, value) if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError):
        return None
    if isinstance(value, str) and number != number:
        return None  # the text nan
    return -1 if number != number else int(number) if number in (0, 1, -1) else None


def _id(value: Any) -> Any:
    """The whole number that a text stands for, also pandas' "2.0"; anything else as it is."""
    try:
        number = float(value) if isinstance(value, str) else value
        return int(number) if number == int(number) else value
    except (ValueError, OverflowError, TypeError):
        return value


def checked_names(names: Sequence[str] | None) -> list[str] | None:
    """`names` as a list; a TypeError or ValueError unless they are different class names."""
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or len(names) == 0:
        raise TypeError(
            f"names is {quote(names)}; it must be a list of class names; pass for instance ['cat', 'dog']."
        )
    if repeat := first_repeat(names):
        raise ValueError(
            f"names has {quote(names[repeat[0]])} more than once; each class must be there once; remove one."
        )
    return list(names)
