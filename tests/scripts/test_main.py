"""The command `balancemix`, as a user meets it: from a wheel, in a folder of their own."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import NAMES, load_example, make_dataset
from packaging.version import Version

from hf_balancemix.scripts import audit, train
from hf_balancemix.scripts import main as command
from hf_balancemix.scripts.arguments import parse_script
from hf_balancemix.scripts.parser import parse_arguments
from hf_balancemix.scripts.predict import PredictArguments

REPOSITORY = Path(__file__).parents[2]
FORMAT_OF = {"run_coco": "coco", "run_voc": "voc", "run_deepfashion": "deepfashion", "run_multilabel": "any"}


def start(*argv: str, cwd: Path, path: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """`balancemix ARGV`, of the package in the folder `path`, in a process of its own."""
    code = "from hf_balancemix.scripts.main import main; main()"
    env = os.environ | {"PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False
    )


# ---- the command itself ----


def test_help_is_short_and_imports_nothing_heavy(tmp_path):
    done = start("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) < 30
    assert all(name in done.stdout for name in ("train", "predict", "--version"))
    assert start(cwd=tmp_path).stdout == done.stdout
    code = "import sys; sys.argv[1:] = ['--help']; from hf_balancemix.scripts.main import main; main(); "
    code += "print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_command_that_is_not_known_ends_with_one_line(monkeypatch, capsys):
    for word, hint in (("trian", "Did you mean train?"), ("--seed", "See balancemix --help.")):
        monkeypatch.setattr(sys, "argv", ["balancemix", word])
        with pytest.raises(SystemExit) as stop:
            command.main()
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: command is {word!r}; it must be train, audit or predict. {hint}\n"


def test_a_commands_help_is_its_scripts(monkeypatch, capsys):
    for argv, first in ((["train", "--help"], train.__doc__), (["predict", "-h"], "Class probabilities for a folder")):
        monkeypatch.setattr(sys, "argv", ["balancemix", *argv])
        with pytest.raises(SystemExit) as stop:
            command.main()
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: balancemix {argv[0]} ")
        assert first.strip() in out


def test_flags_of_the_launcher_are_told_from_the_scripts():
    launcher = launch_command_parser()
    split = command.split_flags(
        ["--num_processes", "2", "--seed", "2", "--config_file=c.yaml", "--config", "r.yaml", "--multi_gpu", "--bf16",
         "--num-machines", "1", "--method", "bce", "mixup", "--debug", "underflow_overflow"], launcher,
    )  # fmt: skip
    assert split == (
        ["--num_processes", "2", "--config_file=c.yaml", "--multi_gpu", "--num-machines", "1"],
        ["--seed", "2", "--config", "r.yaml", "--bf16", "--method", "bce", "mixup", "--debug", "underflow_overflow"],
    )


@pytest.mark.parametrize("argv", ["", "--data_dir x", "--data_format voc --data_dir x", "--train_dir x"])
def test_no_flag_of_a_script_goes_to_the_launcher(argv, capsys):
    with pytest.raises(SystemExit):
        train.main([*argv.split(), "--help-all"])
    flags = re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(flags) > 150
    for_launcher, for_script = command.split_flags(flags, launch_command_parser())
    assert for_launcher == []
    assert for_script == flags


# ---- from a wheel ----


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that a wheel of this package was installed into."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # building leaves files behind
    shutil.copytree(REPOSITORY / "hf_balancemix", source / "hf_balancemix")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    has_backend = importlib.util.find_spec("setuptools") and Version(version("setuptools")) >= Version("77")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for argv in (
        ["wheel", "--no-deps", *(["--no-build-isolation"] if has_backend else []), "-w", folder, source],
        ["install", "--no-deps", "--no-index", "--find-links", folder, "--target", folder / "site", "hf_balancemix"],
    ):
        done = subprocess.run([*pip, *map(str, argv)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "site"


def test_train_and_predict_work_from_a_wheel_in_another_folder(installed, tmp_path):
    photos = tmp_path / "photos"
    dataset = make_dataset(photos, 30)
    with open(tmp_path / "labels.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file_name", "tags"])
        for file, labels in zip(sorted(photos.iterdir()), dataset["labels"], strict=True):
            rows.writerow([file.name, ";".join(NAMES[k] for k in labels)])
    (tmp_path / "run.yaml").write_text("num_train_epochs: 2\nlabel_warmup_epochs: 1\nglobal_batch_size: 8\n")
    done = start(
        "train", "--num_processes", "1", "--train_dir", "photos", "--train_csv", "labels.csv", "--label_column",
        "tags", "--separator", ";", "--held_out", "0.3", "--model_name_or_path", "test_resnet", "--from_scratch",
        "--use_cpu", "--image_size", "32", "--method", "bce", "balancemix", "--config", "run.yaml",
        cwd=tmp_path, path=installed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| balancemix |" in done.stdout
    model = tmp_path / "outputs" / "multilabel" / "balancemix"
    assert json.loads((model / "config.json").read_text())["label_names"] == sorted(NAMES)
    assert [p.name for p in sorted(model.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-6"]
    hint = next(line for line in done.stdout.splitlines() if "balancemix predict" in line)
    argv = shlex.split(hint)[1:]
    argv[argv.index("FOLDER")] = "photos"
    done = start(*argv, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "30 images written to scores.csv" in done.stdout
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 31
    script = (installed / "bin" / "balancemix").read_text()
    assert "from hf_balancemix.scripts.main import main" in script


def test_bad_input_ends_the_launched_script_with_one_line_and_status_2(tmp_path):
    done = start("train", "--data_dir", "nowhere", "--use_cpu", "--noise_rat", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :].strip()
    assert error == "error: not understood on the command line: --noise_rat 1. Did you mean --noise_rate?"


# ---- what is written down ----


def commands_in(text: str) -> Iterator[list[str]]:
    """The commands in code blocks and between back-ticks; lines that end in a backslash go on."""
    text = text.replace("\\\n", " ")
    line = r"(?:^ *|`)((?:accelerate launch|torchrun|balancemix|python) [^`\n]+)"
    for found in re.findall(line, text, re.MULTILINE):
        yield shlex.split(found, comments=True)


README = (REPOSITORY / "README.md").read_text()
SITE = [page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").rglob("*.md"))]
SITE = [block for page in SITE for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
SCRIPTS = [load_example(name).__doc__ for name in (*FORMAT_OF, "predict")] + [train.__doc__, command.HELP]


@pytest.mark.parametrize("text", [README, "\n".join(SITE), "\n".join(SCRIPTS)], ids=["readme", "site", "scripts"])
def test_every_command_that_is_written_down_is_understood(text):
    seen = set()
    for words in commands_in(text.replace(" --ddp_backend gloo", "")):  # which would wait for another rank
        script = next((Path(word).stem for word in words if word.startswith("examples/run_")), None)
        if script is not None:
            argv = words[words.index(f"examples/{script}.py") + 1 :]
            parse_script(FORMAT_OF[script], ["--use_cpu", *argv], "")
        elif words[1] == "train":
            argv = command.split_flags(words[2:], launch_command_parser())[1]
            parse_script(None, ["--use_cpu", *argv], "")
        elif words[1] == "audit":
            audit.parse(words[2:])
        elif "predict" in words[1] and words[2:]:
            parse_arguments((PredictArguments,), words[2:])
        else:
            benchmark = (REPOSITORY / words[1]).is_file() or (words[1] == "-m" and words[2].startswith("benchmarks."))
            assert words[1] in ("COMMAND", "--version", "predict") or benchmark, words
        seen.add(script or words[1])
    assert {"train", "predict"} <= seen


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_the_command_passes_signals_on_to_the_process_that_trains(name):
    child = f"import signal, time; signal.signal(signal.SIG{name}, lambda *_: exit(143)); print('up', flush=True)\n"
    child += "for _ in range(300): time.sleep(0.1)"
    parent = "import subprocess, sys; from hf_balancemix.scripts.main import pass_signals_on; pass_signals_on()\n"
    parent += f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    paths = os.pathsep.join([str(REPOSITORY), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.wait(30) == 143
