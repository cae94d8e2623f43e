"""Two trainings do not share a folder, and what cannot be written is said in one sentence before the first step."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import filelock
import pytest
from conftest import arguments, tiny_vit
from transformers import TrainerCallback

from hf_balancemix import MultiLabelTrainer
from hf_balancemix.trainer import sole_run

HOLDER = """
import sys, time
from pathlib import Path
from hf_balancemix.trainer.sole_run import sole_run
with sole_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def a_trainer(folder, dataset, **changes):
    return MultiLabelTrainer(model=tiny_vit(), args=arguments(folder, **changes), train_dataset=dataset)


def test_a_second_run_says_who_has_the_folder_until_that_one_dies(tmp_path, dataset, monkeypatch):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "o")], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(sole_run, "PATIENCE", 0.2)
        trainer = a_trainer(tmp_path / "o", dataset)
        with pytest.raises(ValueError, match="into which another run is training") as refused:
            trainer.train()
        assert re.search(rf"process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d", str(refused.value))
        assert trainer.state.global_step == 0
        assert trainer.predict(dataset).predictions.shape == (24, 5)  # which writes nothing
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    monkeypatch.setattr(sole_run, "PATIENCE", 6)
    trainer.train()
    assert trainer.state.global_step == 12


def test_a_run_that_ends_or_fails_leaves_the_folder(tmp_path, dataset):
    class Fail(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            assert (tmp_path / "o" / sole_run.HOLDER_FILE).exists()
            raise ZeroDivisionError

    trainer = a_trainer(tmp_path / "o", dataset)
    trainer.add_callback(Fail())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    for _ in range(2):
        assert not (tmp_path / "o" / sole_run.HOLDER_FILE).exists()
        a_trainer(tmp_path / "o", dataset).train()


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")], ids=["flock", "nfs"]
)
def test_without_locks_a_line_says_so_and_the_run_goes_on(tmp_path, dataset, monkeypatch, caplog, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    a_trainer(tmp_path / "o", dataset).train()
    assert f"The file system of {tmp_path / 'o'} has no locks" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(tmp_path, dataset, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir is .*/file, which cannot be made \(File exists\)"):
        a_trainer(tmp_path / "file", dataset)
    with pytest.raises(ValueError, match=r"output_dir is .*/file/o, which cannot be made \(Not a directory\)"):
        a_trainer(tmp_path / "file" / "o", dataset)

    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = a_trainer(tmp_path / "o", dataset)
    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(ValueError, match=r"where nothing can be written \(Read-only file system\)"):
        trainer.train()


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path, dataset, monkeypatch):
    trainer = a_trainer(tmp_path / "o", dataset)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(sole_run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"with 0 MB free; it must have room for a checkpoint, at least 0 MB"):
        trainer.train()
