"""Command lines: flag > config file > preset > default, and one clear sentence for everything else."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from conftest import load_example, make_dataset
from torch.utils.data import DataLoader

from hf_balancemix import BalanceMixTrainingArguments
from hf_balancemix.data.training_data import PlainInstances, collate
from hf_balancemix.data.views import ViewMaker
from hf_balancemix.scripts.arguments import SampleArguments, parse_script
from hf_balancemix.scripts.parser import parse_arguments, run

run_coco = load_example("run_coco")


def arguments(*argv: str, config: Path | None = None) -> BalanceMixTrainingArguments:
    flags = [*argv, "--output_dir", "out", "--use_cpu"]
    if config is not None:
        flags += ["--config", str(config)]
    (parsed,) = parse_arguments((BalanceMixTrainingArguments,), flags)
    return parsed


def written(tmp_path: Path, values: dict | str, kind: str = "yaml") -> Path:
    file = tmp_path / f"config.{kind}"
    if not isinstance(values, str):
        values = json.dumps(values, indent="\t") if kind == "json" else yaml.safe_dump(values)
    file.write_text(values)
    return file


# ---- precedence ----


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_flag_over_file_over_preset_over_default(tmp_path, kind):
    paper = BalanceMixTrainingArguments.PRESETS["paper"]
    assert paper["learning_rate"] not in (0.3, 0.2)
    file = written(tmp_path, {"preset": "paper", "learning_rate": 0.2, "weight_decay": 1e-5, "seed": 5}, kind)
    assert arguments().monotone is True
    assert arguments().seed == 42
    assert arguments(config=file).monotone is False  # the preset that the file names
    assert arguments(config=file).max_grad_norm == paper["max_grad_norm"]
    assert arguments(config=file).learning_rate == 0.2
    assert arguments(config=file).weight_decay == 1e-5
    assert arguments(config=file).seed == 5
    assert arguments("--learning_rate", "0.3", config=file).learning_rate == 0.3
    assert arguments("--learning_rate", "0.3", config=file).weight_decay == 1e-5
    assert arguments("--preset", "default", config=file).monotone is True
    assert arguments("--preset", "paper").monotone is False
    assert arguments("--preset", "paper", "--monotone", "true").monotone is True


def test_zero_and_false_are_values_and_not_absent(tmp_path):
    file = written(tmp_path, {"weight_decay": 0, "label_warmup_epochs": 0, "mixup_alpha": 0.0, "monotone": False})
    args = arguments(config=file)
    assert (args.weight_decay, args.label_warmup_epochs, args.mixup_alpha, args.monotone) == (0, 0, 0, False)
    assert arguments("--num_train_epochs", "0.5").num_train_epochs == 0.5


def test_booleans_on_and_off_by_flag_and_by_file(tmp_path):
    assert arguments().select_clean is True
    assert arguments("--no_select_clean").select_clean is False
    assert arguments("--select_clean", "false").select_clean is False
    assert arguments("--no-select-clean").select_clean is False
    assert arguments().trust_positives is False
    assert arguments("--trust_positives").trust_positives is True
    for word, value in (("true", True), ("false", False), ("no", False), ("yes", True), ("True", True)):
        file = written(tmp_path, f"select_clean: {word}\ntrust_positives: {word}\nmonotone: {word}\n")
        args = arguments(config=file)
        assert (args.select_clean, args.trust_positives, args.monotone) == (value, value, value)
    file = written(tmp_path, {"select_clean": False, "trust_positives": True}, "json")
    assert arguments(config=file).select_clean is False
    assert arguments("--select_clean", "--trust_positives", "no", config=file).select_clean is True
    assert arguments("--select_clean", "--trust_positives", "no", config=file).trust_positives is False


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(tmp_path):
    file = written(tmp_path, "save_strategy: no\neval_strategy: no\n")
    assert arguments(config=file).save_strategy == "no"


def test_lists_dicts_and_odd_strings(tmp_path):
    file = written(
        tmp_path,
        {
            "label_names": ["labels", "more"], "lr_scheduler_kwargs": {"num_cycles": 0.25, "on": True},
            "run_name": "-starts with a dash", "lr_scheduler_type": "cosine",
        },
    )  # fmt: skip
    args = arguments(config=file)
    assert args.label_names == ["labels", "more"]
    assert args.lr_scheduler_kwargs == {"num_cycles": 0.25, "on": True}
    assert args.run_name == "-starts with a dash"
    assert arguments("--label_names", "labels", config=file).label_names == ["labels"]
    assert arguments(config=written(tmp_path, "label_names: labels\n")).label_names == ["labels"]
    # null and an empty list leave the default
    args = arguments(config=written(tmp_path, {"label_names": [], "learning_rate": None, "seed": None}))
    assert args.label_names is None
    assert args.learning_rate == BalanceMixTrainingArguments.PRESETS["default"]["learning_rate"]


def test_the_examples_arguments_follow_the_same_order(tmp_path):
    def parse(*argv: str, **values):
        file = written(tmp_path, values)
        return parse_script("coco", [*argv, "--use_cpu", "--config", str(file)], "")

    data, noise, model, args = parse()
    assert data.data_dir is None
    assert noise.noise == "mislabel"
    assert model.method == ["bce", "mixup", "balancemix"]
    assert model.from_scratch
    assert args.num_train_epochs == SampleArguments.PRESETS["default"]["num_train_epochs"] != 50
    assert (args.output_dir, args.many_shot, args.image_size) == ("outputs/sample", 300, 48)

    data, noise, model, args = parse("--data_dir", "coco")
    assert (args.num_train_epochs, args.label_warmup_epochs, args.global_batch_size) == (50, 10, 64)
    assert (args.output_dir, args.many_shot, args.few_shot) == ("outputs/coco", None, None)
    assert noise.noise is None
    assert model.method is None
    assert not model.from_scratch

    file = {
        "data_dir": "coco", "method": ["bce", "mixup"], "num_train_epochs": 7, "noise": "flip", "year": 2014,
        "model_kwargs": {"drop_rate": 0.1},
    }  # fmt: skip
    data, noise, model, args = parse("--noise", "mislabel", "--preset", "paper", **file)
    assert (data.data_dir, noise.noise, data.year) == ("coco", "mislabel", 2014)
    assert model.method == ["bce", "mixup"]
    assert model.model_kwargs == {"drop_rate": 0.1}
    assert (args.num_train_epochs, args.label_warmup_epochs, args.monotone) == (7, 1, False)
    assert parse("--method", "bce", **file)[2].method == ["bce"]
    with pytest.raises(ValueError, match="method is 'nothing'; it must be one of bce"):
        parse("--method", "nothing")


# ---- batch sizes and optimiser ----


def test_the_global_batch_is_shared_among_accumulation_steps_and_ranks(monkeypatch):
    assert arguments().per_device_train_batch_size == arguments().global_batch_size == 64
    args = arguments("--gradient_accumulation_steps", "4", "--global_batch_size", "32")
    assert (args.per_device_train_batch_size, args.global_batch_size) == (8, 32)
    args = arguments("--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "3")
    assert (args.per_device_train_batch_size, args.global_batch_size) == (3, 12)
    monkeypatch.setattr(BalanceMixTrainingArguments, "world_size", 2)
    args = arguments("--gradient_accumulation_steps", "4", "--global_batch_size", "32")
    assert (args.per_device_train_batch_size, args.global_batch_size) == (4, 32)
    with pytest.raises(ValueError, match="global_batch_size is 36; it must be a multiple of 2 ranks x 4 accumulation"):
        arguments("--gradient_accumulation_steps", "4", "--global_batch_size", "36")
    with pytest.raises(ValueError, match="global_batch_size is 64; it must be per_device_train_batch_size 8 x 2"):
        arguments("--global_batch_size", "64", "--per_device_train_batch_size", "8")
    with pytest.raises(ValueError, match="global_batch_size is 4; it must be a multiple of 2 ranks x 8"):
        arguments("--gradient_accumulation_steps", "8", "--global_batch_size", "4")


def test_another_optimiser_does_not_inherit_sgds_momentum(tmp_path):
    args = arguments()
    assert (args.optim, args.optim_args) == ("sgd", "momentum=0.9")
    args = arguments("--optim", "adamw_torch")
    assert (args.optim, args.optim_args) == ("adamw_torch", None)
    assert arguments(config=written(tmp_path, {"optim": "adamw_torch"})).optim_args is None
    assert arguments("--optim", "adamw_torch", "--optim_args", "eps=1e-6").optim_args == "eps=1e-6"
    assert arguments("--optim", "sgd").optim_args == "momentum=0.9"
    assert arguments("--optim_args", "momentum=0.5").optim_args == "momentum=0.5"


# ---- bad input ----


@pytest.mark.parametrize(
    ("content", "kind", "match"),
    [
        ("learning_rat: 0.1", "yaml", r"keys that are no flags: learning_rat\. Did you mean learning_rate\?"),
        ("b: 1\nseed: 2\na: 1", "yaml", r"keys that are no flags: a, b\. See --help"),
        ("1: 2", "yaml", r"keys that are no flags: 1\."),
        ("no_select_clean: true", "yaml", "no_select_clean"),
        ("config: other.yaml", "yaml", "no flags: config"),
        ("help: true", "yaml", "no flags: help"),
        ("seed: [1, 2]", "yaml", r"seed is \[1, 2\] in .*; it must be one value"),
        ("a: [1,", "yaml", r"it must be readable as YAML or JSON"),
        ('{"seed": 1', "json", r"it must be readable as YAML or JSON: .*line 1"),
        ("- seed\n- 1", "yaml", "a list; it must map"),
        ("", "yaml", "a NoneType; it must map"),
        ("learning_rate: -1", "yaml", "-1|learning_rate"),
    ],
)
def test_a_config_file_that_is_wrong(tmp_path, content, kind, match):
    file = written(tmp_path, content, kind)
    if "learning_rate: -1" in content:  # a negative number is a value, not a flag
        assert arguments(config=file).learning_rate == -1
        return
    with pytest.raises(ValueError, match=match) as error:
        arguments(config=file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def bomb() -> str:
    """Ten to the ninth words, of ten lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "kind", "match"),
    [
        (bomb(), "yaml", r"the alias \*a0 stands there; there must be none; write out its value"),
        ("a: &a [*a]", "yaml", r"the alias \*a stands there"),
        ("seed: &s 1\nmax_steps: *s", "yaml", r"the alias \*s stands there"),
        ("seed: 1\nseed: 2", "yaml", r"the key 'seed' stands there twice.*line 2"),
        ('{"seed": 1, "seed": 2}', "json", r"an object has the key 'seed' twice"),
        ("[" * 10**5, "yaml", "nested too deeply"),
        ("[" * 10**5, "json", "nested too deeply"),
        ("- " * 10**4, "yaml", "nested too deeply|no flags|it must map"),
        (
            '{"lr_scheduler_kwargs": ' + '{"a": ' * 2000 + "1" + "}" * 2001,
            "json",
            "nested too deeply|value of its flag",
        ),
        (f"seed: {'7' * 5000}", "yaml", "readable as YAML or JSON: .*4300"),
        ('label_names: ["a", "\\ud800"]', "yaml", "label_names is .* it must be a value of its flag"),
        ('{"run_name": "\\ud800"}', "json", "run_name is .* it must be a value of its flag"),
        (f"seed: 0x{'f' * 5000}", "yaml", "seed is .* it must be a value of its flag"),
        ("seed: fast", "yaml", r"is none of its flag's: argument --seed: invalid int value: 'fast'"),
        (f"seed: {'x' * 9999}", "yaml", r"is none of its flag's: argument --seed: invalid int value: 'xxx"),
        ("learning_rate: .nan", "yaml", "--learning_rate: invalid number value"),
        ('{"learning_rate": -Infinity}', "json", "--learning_rate: invalid number value"),
        ("seed: !!bool x", "yaml", "readable as YAML or JSON"),
        ("seed: !!timestamp x", "yaml", "readable as YAML or JSON"),
        ("seed: !!int ''", "yaml", "readable as YAML or JSON"),
        ("seed: !!python/object/apply:os.getcwd []", "yaml", "readable as YAML or JSON"),
        ("lr_scheduler_kwargs: {a: 2020-01-01}", "yaml", "lr_scheduler_kwargs is .* it must be a value of its flag"),
        ("\0", "yaml", "readable as YAML or JSON"),
        ("\n".join(f"unknown_{i}: 1" for i in range(3000)), "yaml", "keys that are no flags: unknown_0, "),
        ("x" * 10**5 + ": 1", "yaml", "readable as YAML or JSON"),
        ("#" * 2**21, "yaml", "of 2,097,152 bytes; it must have 262,144 at most as YAML; write it as JSON"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_hostile_config_file_is_one_short_sentence_soon(tmp_path, content, kind, match):
    file, start = written(tmp_path, content, kind), time.monotonic()
    with pytest.raises(ValueError, match=match) as error:
        arguments(config=file)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 20


def test_thousands_of_unknown_flags_are_a_short_sentence():
    with pytest.raises(ValueError, match=r"not understood on the command line: --unknown_0 --unknown_1") as error:
        arguments(*(f"--unknown_{i}" for i in range(3000)))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        (lambda folder: (folder / "absent" / "x.csv").touch(), "x.csv: No such file or directory; it must"),
        (lambda folder: (folder / "file" / "x.csv").read_text(), "file/x.csv: Not a directory; it must"),
        (lambda folder: folder.read_bytes(), ": Is a directory; it must"),
        (lambda folder: (folder / ("x" * 5000)).read_text(), "xx…: File name too long; it must"),
        (lambda folder: os.scandir(folder / "absent"), "absent: No such file or directory; it must"),
        (lambda folder: shutil.copy(folder / "file", "/proc/none"), "/proc/none: "),
        (lambda folder: _raise(OSError(28, "No space left on device")), "No space left on device"),
        (lambda folder: _raise(ConnectionError("x" * 9999)), "xxx"),
    ],
)
def test_run_says_in_a_sentence_what_the_system_refuses(tmp_path, capsys, fail, expected):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        run(lambda: fail(tmp_path))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert len(lines[0]) < 400


def _raise(error: Exception) -> None:
    raise error


def test_a_config_file_that_is_absent_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config is .*gone\.yaml; it must be a YAML or JSON file"):
        arguments(config=tmp_path / "gone.yaml")
    with pytest.raises(FileNotFoundError, match="it must be a YAML or JSON file"):
        arguments(config=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"binary\.yaml; it must be readable"):
        arguments(config=tmp_path / "binary.yaml")


def test_flags_that_are_not_known_or_have_wrong_values(capsys):
    with pytest.raises(ValueError, match=r"command line: --learning_rat 0\.1\. Did you mean --learning_rate"):
        arguments("--learning_rat", "0.1")
    with pytest.raises(ValueError, match=r"not understood .*: --learn=0\.1"):  # no abbreviations
        arguments("--learn=0.1")
    with pytest.raises(ValueError, match="save and eval strategy to match"):  # what TrainingArguments says
        arguments("--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "steps")
    with pytest.raises(ValueError, match="preset is 'papers'; it must be one of default, paper"):
        arguments("--preset", "papers")
    with pytest.raises(ValueError, match=r"relabel_threshold.*0\.3"):
        arguments("--relabel_threshold", "0.3")
    for flags in (["--learning_rate", "fast"], ["--eval_strategy", "foo"], ["--minority_score", "odd"], ["--seed"]):
        with pytest.raises(SystemExit) as stop:
            arguments(*flags)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        run_coco.main(["--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    for flag in (
        "--data_dir",
        "--noise_rate",
        "--relabel_threshold",
        "--no_select_clean",
        "--config",
        "--learning_rate",
    ):
        assert flag in out
    assert "Traceback" not in out + err


def help_of(*argv: str, capsys) -> str:
    with pytest.raises(SystemExit):
        run_coco.main([*argv])
    return capsys.readouterr().out


def test_help_is_grouped_and_leaves_what_is_inherited_to_help_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = help_of("--help", capsys=capsys)
    titles = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options", "data", "noise", "model", "method", "BalanceMix", "training", "output"]
    parts = dict(zip(titles, re.split(r"\n[A-Za-z]+:\n", out)[1:], strict=True))
    for title, flags in {
        "data": ["data_dir", "year", "max_eval_samples"],
        "noise": ["noise_rate", "noise_map"],
        "model": ["head", "frozen_backbone"],
        "method": ["method", "method_args"],
        "BalanceMix": ["relabel_threshold", "label_warmup_epochs"],
        "training": ["preset", "learning_rate", "seed", "bf16", "image_size"],
        "output": ["output_dir", "save_total_limit", "push_to_hub", "resume_from_checkpoint"],
    }.items():
        assert all(f"\n  --{flag} " in "\n" + parts[title] for flag in flags), title
    assert "--adam_beta1" not in out
    everything = help_of("--help-all", capsys=capsys)
    assert "--adam_beta1 NUMBER" in everything
    assert everything.startswith(out.rstrip())
    assert len(out.splitlines()) < 360  # were 724


def test_help_shows_the_examples_as_they_are_and_defaults_as_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = help_of("--help", capsys=capsys)
    assert run_coco.__doc__.rstrip() in out
    assert not re.search(r"[dD]efault: [^)]*\bNone\b", out)

    def text(flag: str, out: str) -> str:
        return " ".join(out.split(f"\n  --{flag} ")[1].split("\n  --")[0].split())

    assert text("learning_rate", out).endswith("(default: 0.004; paper: 0.01; ml-decoder: 0.0001)")
    assert text("select_clean", out).endswith("(default: true; --no_select_clean: false)")
    assert text("optim_args", out).endswith("(default: none; paper: momentum=0.9)")
    assert text("seed", out).endswith("(default: 42)")
    coco = help_of("--data_dir", "coco", "--help", capsys=capsys)
    assert text("learning_rate", coco).endswith("(default: 0.01; ml-decoder: 0.0001)")
    assert text("num_train_epochs", coco).endswith("(default: 50; ml-decoder: 40)")


def test_a_flag_that_is_not_known_is_said_before_what_is_missing():
    with pytest.raises(ValueError, match=r"not understood .*--data_dri voc\. Did you mean --data_dir\?"):
        parse_script("voc", ["--use_cpu", "--data_dri", "voc"], "")
    with pytest.raises(ValueError, match="data_dir is None; it must be the folder that holds VOCdevkit/"):
        parse_script("voc", ["--use_cpu"], "")


def test_the_kind_of_data_is_what_a_flag_or_the_config_file_says(tmp_path):
    def kinds(*argv: str, **values) -> list[str]:
        file = written(tmp_path, values)
        data, _, _, args = parse_script(None, [*argv, "--use_cpu", "--config", str(file)], "")
        return [type(data).__name__, type(args).__name__]

    assert kinds() == ["CocoData", "SampleArguments"]
    assert kinds(data_dir="coco") == kinds("--data-dir=coco") == ["CocoData", "CocoArguments"]
    assert kinds("--data_dir", "x", data_format="voc") == ["VocData", "VocArguments"]
    assert kinds("--data_format", "deepfashion", data_format="voc", data_dir="x")[0] == "DeepFashionData"
    assert kinds("--train_dir", "x") == kinds(dataset_name="user/set") == ["AnyData", "MultiLabelArguments"]
    with pytest.raises(ValueError, match="data_format is 'folder'; it must be one of coco, voc, deepfashion, any"):
        kinds(data_format="folder")
    with pytest.raises(ValueError, match="not understood on the command line: --year 2014"):
        kinds("--data_format", "voc", "--data_dir", "x", "--year", "2014")
    with pytest.raises(ValueError, match="pass either --dataset_name"):
        kinds("--data_format", "any")


def test_run_shows_our_messages_and_keeps_other_tracebacks(capsys):
    def bad_input():
        arguments("--preset", "papers")

    with pytest.raises(SystemExit) as stop:
        run(bad_input)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("\nerror: preset is 'papers'; it must be one of default, paper")

    def bug():
        int("x" * 3)
        json.loads("{")

    with pytest.raises(ValueError, match="invalid literal"):
        run(bug)
    run(lambda: None)


def test_run_shows_the_message_of_a_data_loaders_worker(tmp_path, capsys):
    data = make_dataset(tmp_path / "images", 4)
    (tmp_path / "images" / "002.png").write_bytes(b"cut")
    instances = PlainInstances(data, ViewMaker(16, seed=0))
    with pytest.raises(SystemExit):
        run(lambda: list(DataLoader(instances, 2, num_workers=1, collate_fn=collate)))
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"error: cannot decode image {tmp_path / 'images' / '002.png'} (")
    assert "Traceback" not in err

    def foreign(rows):
        raise ValueError("not ours")

    with pytest.raises(ValueError, match="Traceback"):
        run(lambda: list(DataLoader(instances, 2, num_workers=1, collate_fn=foreign)))


def test_a_script_that_ends_well_leaves_its_process_group_and_one_that_fails_does_not_wait(tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(fail)
        assert dist.is_initialized()
        run(lambda: None)
        assert not dist.is_initialized()
        run(lambda: None)  # a script of one process
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
