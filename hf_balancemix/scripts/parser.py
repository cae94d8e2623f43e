"""Command lines from dataclasses, with a config file: flag > config file > preset > default."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_balancemix.core.distributed import leave_process_group


def parse_arguments(
    types: Sequence[type], argv: Sequence[str] | None = None, description: str = ""
) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config FILE` (YAML or JSON) gives values that flags override.

    Args:
        types: Dataclasses; each field is a flag.
        argv: Arguments without the program's name; default `sys.argv[1:]`.
        description: First lines of `--help`.

    Returns:
        An instance of each type.

    Raises:
        FileNotFoundError: The config file does not exist.
        ValueError: The config file cannot be read, is no mapping or has a key that is no flag; a flag is not known; or
            a value that the dataclasses refuse.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(argv)
    parser = HfArgumentParser(
        types,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",  # not all flags, before every error
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # one letter less must not set something else
    )
    for action in parser._actions:
        if action.type is string_to_bool:  # also those whose default a preset sets: --flag alone means true
            action.nargs, action.const = "?", True
    parser.add_argument("--config", type=Path, help="YAML or JSON file with values of these flags; flags win.")
    if known.config is not None:
        # Through text, so that a value from a file is converted and checked as the flag's would be.
        rest = [*_as_flags(_read(known.config), parser, known.config), *rest]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            rest, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:  # what the dataclasses' own checks say
        raise ValueError(str(error)) from error
    if unknown:
        names = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See --help for the names."
        raise ValueError(f"not understood on the command line: {' '.join(unknown)}. {hint}")
    return tuple(part for part in parsed if not isinstance(part, argparse.Namespace))


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input ends it with one line on stderr, `error: ...`, and exit status 2.

    Only this package's own messages are shown like that. Any other exception keeps its traceback. After `main`, a rank
    of several leaves the process group.
    """
    try:
        main()
        leave_process_group()
    except (ValueError, TypeError, FileNotFoundError) as error:
        message = _own_message(error, getattr(main, "__globals__", {}).get("__package__") or "__main__")
        if message is None:
            raise
        print(f"\nerror: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
        sys.exit(2)


def _own_message(error: Exception, script: str) -> str | None:
    """The message of an error that this package or the script, of the package `script`, raised; None for any other."""
    text = str(error)
    if "in DataLoader worker process" in text:  # then the message is the worker's traceback
        trace, _, text = text.rpartition(f"\n{type(error).__name__}: ")
        file = Path(trace.rpartition('File "')[2].partition('"')[0])
        return text if Path(__file__).parents[1] in file.parents else None
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
    return text if module in (__name__.split(".")[0], script.split(".")[0], "__main__") else None


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's booleans, true and false only: `save_strategy: no` means the word."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), "tTfF")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"config file {file} does not exist; pass a YAML or JSON file.")
    try:
        text = file.read_text(encoding="utf-8")
        # JSON is YAML, but for tabs between its tokens.
        values = json.loads(text) if file.suffix == ".json" else yaml.load(text, _Yaml)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"config file {file} cannot be read as YAML or JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {file} holds a {type(values).__name__}; it must map flag names to values.")
    return values


def _as_flags(values: dict[str, Any], parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The command line that says the same; an empty value or list leaves the default."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first of a name, not its --no_ form
    unknown = sorted(str(name) for name in values if name not in actions or name in ("help", "config"))
    if unknown:
        near = difflib.get_close_matches(unknown[0], actions, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See --help for the names."
        raise ValueError(f"{file} has keys that are no flags: {', '.join(unknown)}. {hint}")
    flags: list[str] = []
    for name, value in values.items():
        many = actions[name].nargs == "+"
        if value is None or value == []:
            continue
        if many:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            raise ValueError(f"{file}: {name} takes one value, but is the list {value}.")
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
