"""The command `balancemix`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hf_balancemix
from hf_balancemix.files import quote

HELP = """usage: balancemix COMMAND [--FLAG VALUE ...]

Train the right multi-label image model from unbalanced, wrong or missing labels.

    train     train, evaluate and save a model, with BalanceMix or the methods it is compared with
    audit     which labels are probably wrong, as a table, a CSV, or pages to look at them and to decide
    predict   class probabilities of a folder of images, as CSV

    balancemix train
    balancemix train --train_dir photos --train_csv labels.csv --label_column tags --separator ","
    balancemix train --num_processes 4 --data_dir coco --image_size 448 --preset paper --bf16
    balancemix audit --model outputs/multilabel/balancemix --html report
    balancemix predict --model outputs/multilabel/balancemix --images FOLDER --output scores.csv

Without data, train compares three methods on a built-in sample. Flags of `accelerate launch` start several processes.
balancemix COMMAND --help lists the flags of a command; balancemix --version says which version this is."""

# What both the launcher and the training arguments have; it goes to the training.
SHARED_FLAGS = {"--debug", "--gradient_accumulation_steps", "--gradient-accumulation-steps", "--help"}


def main() -> None:
    """Run the command that `sys.argv` names."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(HELP)
    elif command == "--version":
        print(hf_balancemix.__version__)
    elif command == "train":
        train(argv)
    elif command in ("audit", "predict"):
        from hf_balancemix.scripts import parser

        parser.run(lambda: importlib.import_module(f"hf_balancemix.scripts.{command}").main(argv))
    else:
        near = difflib.get_close_matches(command, ["train", "audit", "predict"], n=1)
        hint = f"Did you mean {near[0]}?" if near else "See balancemix --help."
        print(f"error: command is {quote(command)}; it must be train, audit or predict. {hint}", file=sys.stderr)
        sys.exit(2)


def train(argv: Sequence[str]) -> None:
    """Start `hf_balancemix/scripts/train.py` as `accelerate launch` does, in one process or several."""
    if {"-h", "--help", "--help-all"} & set(argv):
        from hf_balancemix.scripts import parser
        from hf_balancemix.scripts import train as script

        parser.run(lambda: script.main(argv))
        return
    from accelerate.commands.launch import launch_command, launch_command_parser

    pass_signals_on()
    launcher = launch_command_parser()
    for_launcher, for_script = split_flags(argv, launcher)
    script_file = Path(__file__).with_name("train.py")
    try:
        launch_command(launcher.parse_args([*for_launcher, str(script_file), *for_script]))
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)


def pass_signals_on() -> None:
    """What ends a run, or has it saved, reaches the processes that train; accelerate's launcher ends without a word.

    Where it starts several processes, torchrun, which it then is, replaces this for SIGTERM by its own.
    """

    def pass_on(number: int, frame: object) -> None:
        import psutil  # accelerate needs it

        for child in psutil.Process().children():
            child.send_signal(number)

    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), pass_on)


def split_flags(argv: Sequence[str], launcher: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """A command line's flags of the launcher, with their values, and all others; each in the order given."""
    actions = {flag: action for action in launcher._actions for flag in action.option_strings if flag.startswith("--")}
    for_launcher: list[str] = []
    for_script: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, _ = word.partition("=")
        if flag in actions and flag not in SHARED_FLAGS:
            for_launcher.append(word)
            if not equals and actions[flag].nargs is None and rest:
                for_launcher.append(rest.pop(0))
        else:
            for_script.append(word)
    return for_launcher, for_script
