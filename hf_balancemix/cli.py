"""Command lines from dataclasses, with a config file: flag > config file > preset > default."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


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
        ValueError: The config file cannot be read, is no mapping or has a key that is no flag.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(argv)
    parser = HfArgumentParser(types, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML or JSON file with values of these flags; flags win.")
    if known.config is not None:
        values = _read(known.config)
        flags = {action.dest for action in parser._actions}
        unknown = sorted(set(values) - flags)
        if unknown:
            raise ValueError(
                f"{known.config} has keys that are no flags: {', '.join(unknown)}. See --help for the names."
            )
        # Through text, so that a value from a file is converted and checked as the flag's would be.
        rest = [*_as_flags(values), *rest]
    parsed = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    return tuple(part for part in parsed if not isinstance(part, argparse.Namespace))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"config file {file} does not exist; pass a YAML or JSON file.")
    try:
        values = yaml.safe_load(file.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {file} holds a {type(values).__name__}; it must map flag names to values.")
    return values


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, list):
            flags += [str(v) for v in value]
        else:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags
