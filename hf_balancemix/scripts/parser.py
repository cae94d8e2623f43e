"""Command lines from dataclasses, with a config file: flag > config file > preset > default."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_balancemix.core.distributed import leave_process_group
from hf_balancemix.data.files import first_repeat, parse_json
from hf_balancemix.files import one_line, quote
from hf_balancemix.trainer import TrainingInterrupted
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments, MultiLabelTrainingArguments

_OTHER, _INHERITED = "options", "other arguments of transformers"
_GROUPS = (_OTHER, "data", "noise", "model", "method", "BalanceMix", "training", "output", _INHERITED)
_GROUP_OF_CLASS = {
    BalanceMixTrainingArguments: "BalanceMix",
    MultiLabelTrainingArguments: "training",
    TrainingArguments: _INHERITED,
}
# Of the arguments of transformers, those that `--help` shows, in this order; `--help-all` shows them all.
_INHERITED_IN_HELP = {
    "training": "max_steps per_device_eval_batch_size gradient_accumulation_steps lr_scheduler_kwargs bf16 seed "
    "use_cpu dataloader_num_workers dataloader_persistent_workers ddp_backend",
    "output": "save_steps eval_steps run_name disable_tqdm push_to_hub hub_model_id hub_strategy",
}
_YAML_BYTES = 2**18  # PyYAML reads 50 KB a second
_METAVARS = {int: "INT", float: "NUMBER", dict: "JSON", string_to_bool: "true|false"}


def parse_arguments(
    types: Sequence[type], argv: Sequence[str] | None = None, description: str = "", prog: str | None = None
) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config FILE` (YAML or JSON) gives values that flags override.

    Args:
        types: Dataclasses; each field is a flag. `help_group` of a class is the part of `--help` that its fields
            stand in.
        argv: Arguments without the program's name; default `sys.argv[1:]`.
        description: First lines of `--help`, shown as they are.
        prog: The program's name in `--help` and in errors; default that of the script.

    Returns:
        An instance of each type.

    Raises:
        FileNotFoundError: The config file does not exist.
        ValueError: The config file is no readable mapping of flags, or has a value that is none of its flag's; a flag
            is not known; or the dataclasses refuse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(types, description, prog, everything="--help-all" in argv)
    file = given_values(["config"], argv)["config"]
    if file is not None:
        # Through text, so that a value from a file is converted and checked as the flag's would be.
        in_file = _as_flags(_read(file), parser, file)
        parser.file = file
        parser.parse_known_args(in_file)
        parser.file = None
        argv = [*in_file, *argv]
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [flag for action in parser._actions for flag in action.option_strings]
        hint = _hint(unknown[0].split("=")[0], names)
        raise ValueError(f"not understood on the command line: {one_line(' '.join(unknown))}. {hint}")
    try:
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # what the dataclasses' own checks say
        raise ValueError(str(error)) from error
    return tuple(parsed[: len(types)])  # what follows is --config


def given_values(names: Sequence[str], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What a command line, or else its config file, says of a few flags: for what must be known to parse the others.

    Each of `names`, flags without dashes, has a value, None where neither says anything. `argv` and errors are as for
    :func:`parse_arguments`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in {"config", *names}:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    flags = vars(parser.parse_known_args(argv)[0])
    in_file = {} if flags["config"] is None else _read(flags["config"])
    return {name: in_file.get(name) if flags[name] is None else flags[name] for name in names}


def flag(default: Any, help_text: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass's field with what `--help` says of it."""
    metadata = {"help": help_text} if choices is None else {"help": help_text, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def json_mapping(name: str, value: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The mapping that a flag holds as JSON, or that a config file or a program gave as one.

    Raises:
        ValueError: It is no JSON, or no mapping.
    """
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        mapping = value
    if mapping is not None and not isinstance(mapping, Mapping):
        raise ValueError(f"{name} is {quote(value)}; it must be a JSON mapping, such as '{{\"name\": 1}}'.")
    return None if mapping is None else dict(mapping)


def number(text: str) -> float:
    """The finite number that a flag's text stands for; its name is what argparse calls it in errors."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


class _Parser(HfArgumentParser):
    """A parser whose `--help` is in groups and says what the defaults are, also those that a preset sets."""

    def __init__(self, types: Sequence[type], description: str, prog: str | None, *, everything: bool) -> None:
        super().__init__(
            types,
            prog=prog,
            usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",  # not all flags, before every error
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
            allow_abbrev=False,  # one letter less must not set something else
        )
        self.everything = everything
        self.file: str | None = None  # the config file whose values are checked, before the command line's
        presets = {name: values for cls in types for name, values in getattr(cls, "PRESETS", {}).items()}
        self._places = {f.name: _place_in_help(cls, f.name) for cls in types for f in dataclasses.fields(cls)}
        negations = {a.dest: a for a in self._actions if a.nargs == 0 and a.const is False}  # --no_FLAG
        for action in self._actions:
            if action.type is string_to_bool:  # also those whose default a preset sets: --flag alone means true
                action.nargs, action.const = "?", True
            negation = negations.get(action.dest)
            if action is negation:
                action.help = argparse.SUPPRESS  # said beside the flag itself
            elif action.dest != "help":
                action.option_strings = action.option_strings[:1]  # in help and errors not also the form with dashes
                action.metavar = None if action.choices else _METAVARS.get(action.type, "TEXT")
                action.type = number if action.type is float else action.type
                said = [_default(action, presets), negation and f"{negation.option_strings[0]}: false"]
                default = "; ".join(filter(None, said)).replace("%", "%%")
                action.help = f"{action.help or ''} ({default})" if default else action.help
        self.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML or JSON file with values of these flags; flags win."
        )
        if any(issubclass(cls, TrainingArguments) for cls in types):
            self.add_argument("--help-all", action="help", help="Show the other arguments of transformers, too.")

    def error(self, message: str) -> Any:
        if self.file is None:
            return super().error(one_line(message, 300))
        if message.startswith("argument "):  # not what is required: that may be on the command line
            raise ValueError(
                f"config is {self.file}; it has a value that is none of its flag's: {one_line(message, 200)}."
            )
        return None

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        places = [self._places.get(action.dest, (_OTHER, 0, 0)) for action in self._actions]
        for group in _GROUPS if self.everything else _GROUPS[:-1]:
            inside = [(place, i) for i, place in enumerate(places) if place[0] == group]
            formatter.start_section(group)
            formatter.add_arguments([self._actions[i] for _, i in sorted(inside)])
            formatter.end_section()
        return formatter.format_help()


def _place_in_help(cls: type, name: str) -> tuple[str, int, int]:
    """The group of the class that brings a field in, and the field's place there: those of a subclass come first."""
    for group, names in _INHERITED_IN_HELP.items() if issubclass(cls, TrainingArguments) else ():
        if name in names.split():
            return group, len(cls.__mro__), names.split().index(name)
    owners = [owner for owner in reversed(cls.__mro__) if name in inspect.get_annotations(owner)]
    owner = next((owner for owner in owners if owner is not TrainingArguments), TrainingArguments)
    group = _GROUP_OF_CLASS.get(owner) or getattr(owner, "help_group", _OTHER)
    return group, cls.__mro__.index(owner), [*inspect.get_annotations(owner)].index(name)


def _default(action: argparse.Action, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """What a flag is when it is not given, for people; empty where there is nothing to say."""
    if action.default not in (None, "", [], argparse.SUPPRESS):
        return f"default: {_text(action.default)}"
    values = {preset: _text(own[action.dest]) for preset, own in presets.items() if action.dest in own}
    usual = values.get("default")
    return "; ".join(f"{preset}: {value}" for preset, value in values.items() if preset == "default" or value != usual)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))  # of an Enum


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input ends it with one line on stderr, `error: ...`, and exit status 2.

    This package's own messages are shown like that, and what the system says of files and disks. Any other exception
    keeps its traceback. After `main`, a rank of several leaves the process group; so it does where a signal stopped
    the training.
    """
    try:
        main()
        leave_process_group()
    except TrainingInterrupted as stop:  # on all ranks
        leave_process_group(stop.code)
        raise
    except (ValueError, TypeError, OSError) as error:
        message = _own_message(error, getattr(main, "__globals__", {}).get("__package__") or "__main__")
        if isinstance(error, OSError) and (message is None or error.errno is not None):
            message = _of_the_system(error)
        if message is None:
            raise
        print(f"\nerror: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
        sys.exit(2)


def _of_the_system(error: OSError) -> str:
    """What an error of the system says: which file, what is wrong, and what to do."""
    if error.strerror is None or error.filename is None:
        return one_line(error, 300)
    fix = "it must be there to be read or written; check the path, its permissions and the space on the disk"
    return f"{one_line(error.filename, 150)}: {one_line(error.strerror)}; {fix}."


def _own_message(error: Exception, script: str) -> str | None:
    """The message of an error that this package or the script, of the package `script`, raised; None for any other."""
    text = str(error)
    if "in DataLoader worker process" in text:  # then the message is the worker's traceback
        trace, _, text = text.rpartition(f"\n{type(error).__name__}: ")
        file = Path(trace.rpartition('File "')[2].partition('"')[0])
        return text if Path(__file__).parents[1] in file.parents else None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "").split(".")[0]
    return text if module in (__name__.split(".")[0], script.split(".")[0], "__main__") else None


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's booleans, true and false only: `save_strategy: no` means the word. No aliases, of which a few lines
    make values without end, and no key twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{one_line(event.anchor, 40)} stands there; there must be none; write out its value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeat := first_repeat(keys):
            problem = f"the key {quote(keys[repeat[0]])} stands there twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.value[repeat[1]][0].start_mark)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), "tTfF")


def _read(config: str) -> dict[str, Any]:
    file = Path(config)
    if not file.is_file():
        raise FileNotFoundError(f"config is {file}; it must be a YAML or JSON file; check the path.")
    is_json, size = file.suffix == ".json", file.stat().st_size
    if size > _YAML_BYTES and not is_json:
        needed = f"it must have {_YAML_BYTES:,} at most as YAML; write it as JSON, to a file that ends in .json"
        raise ValueError(f"config is {file}, of {size:,} bytes; {needed}.")
    try:
        content = file.read_bytes()
        # JSON is YAML, but for tabs between its tokens.
        values = parse_json(content, "it") if is_json else yaml.load(content.decode("utf-8-sig"), _Yaml)
    except RecursionError:
        raise ValueError(f"config is {file}; it must be readable as YAML or JSON: it is nested too deeply.") from None
    except Exception as error:  # a tag that does not fit its value gets a KeyError, an AttributeError, ... of PyYAML
        problem = one_line(error, 200)
        raise ValueError(f"config is {file}; it must be readable as YAML or JSON: {problem}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config is {file}, a {type(values).__name__}; it must map the names of flags to values.")
    return values


def _hint(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word[:80], names, n=1)
    return f"Did you mean {near[0]}?" if near else "See --help for the names."


def _as_flags(values: dict[str, Any], parser: argparse.ArgumentParser, file: str) -> list[str]:
    """The command line that says the same; an empty value or list leaves the default."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first of a name, not its --no_ form
    unknown = sorted(
        name if isinstance(name, str) else quote(name)
        for name in values
        if name not in actions or name in ("help", "help_all", "config")
    )
    if unknown:
        names = one_line(", ".join(unknown))
        raise ValueError(f"{file} has keys that are no flags: {names}. {_hint(unknown[0], actions)}")
    flags: list[str] = []
    for name, value in values.items():
        if value is None or value == []:
            continue
        several = actions[name].nargs == "+"
        if isinstance(value, list) and not several:
            raise ValueError(f"{name} is {quote(value)} in {file}; it must be one value.")
        try:
            if several:
                words = [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            else:
                words = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
            " ".join(words).encode()  # JSON and YAML can name half of a character
        except (TypeError, ValueError, RecursionError) as error:  # a date in a mapping, a number of 5,000 digits
            raise ValueError(f"{name} is {quote(value)} in {file}; it must be a value of its flag.") from error
        flags += words
    return flags
