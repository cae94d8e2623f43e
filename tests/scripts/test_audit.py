"""`balancemix audit` at the command line; what it is for, tests/docs/test_tutorials.py runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import arguments, make_dataset, tiny_vit

from hf_balancemix import BalanceMixTrainer
from hf_balancemix.scripts import audit as script


@pytest.fixture
def model(tmp_path):
    """The folder of a short run."""
    trainer = BalanceMixTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "run", judge="network"), train_dataset=make_dataset(tmp_path / "i")
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


def test_nothing_is_overwritten_and_nothing_is_ignored(model, tmp_path):
    (tmp_path / "report").mkdir()
    with pytest.raises(FileExistsError, match=r"report exists; it must not"):
        script.main(["--model", str(model), "--html", str(tmp_path / "report")])
    for flag, value in (("folds", 5), ("batch_size", 8), ("device", "cpu"), ("seed", 0)):
        with pytest.raises(ValueError, match=f"{flag} is {value!r}; it must come with data"):
            script.main(["--model", str(model), f"--{flag}", str(value)])
    with pytest.raises(ValueError, match="html is None; there must be pages"):
        script.main(["--model", str(model), "--push_to_hub", "user/x"])
    with pytest.raises(ValueError, match="max_eval_samples is 5; an audit is of the training data"):
        script.main(["--model", str(model), "--train_dir", str(tmp_path), "--max_eval_samples", "5"])
    with pytest.raises(FileNotFoundError, match="as a run of BalanceMix leaves it beside its model"):
        script.main(["--model", str(tmp_path)])


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    code = "from hf_balancemix.scripts.main import main; main()"
    for flags, message in (
        ([], "label_audit.parquet is absent"),
        (["--html", str(tmp_path)], f"{tmp_path} exists; it must not"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "audit", "--model", str(tmp_path), *flags],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.strip().startswith("error: ")
        assert message in done.stderr
        assert done.stderr.strip().count("\n") == 0
