"""A run that is killed and resumed ends exactly as the same run uninterrupted."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_balancemix.trainer import checkpoints

WORKER = Path(__file__).parent / "training_worker.py"
# 26 instances in batches of 4: 7 steps an epoch for one rank (4 for two), 3 epochs, warm-up of one epoch.
# Scan batches hold 5 instances: 6 a scan for one rank (3 for two).
MOMENTS = ["step:3", "step:9", "scan:2", "scan:8", "save:3", "manifest:4"]


def run(
    folder: Path, *flags: str, ranks: int = 1, fails: bool = False, **options: bool
) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
        start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    done = subprocess.run(
        [*start, str(WORKER), str(folder), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
        **options,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def final(folder: Path, rank: int = 0) -> dict:
    return torch.load(folder / f"final-{rank}.pt", weights_only=True)


def assert_same_end(one: dict, two: dict) -> None:
    assert one["steps"] == two["steps"]
    assert torch.equal(one["parameters"], two["parameters"])
    assert one["audit"] == two["audit"]
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name


def kill_and_resume(folder: Path, moment: str, *flags: str, ranks: int = 1) -> dict:
    run(folder, "--kill", moment, "--kill_rank", str(ranks - 1 if moment[:4] in ("step", "scan") else 0), *flags,
        ranks=ranks, fails=True)  # fmt: skip
    assert not (folder / "final-0.pt").exists()
    run(folder, "--resume", *flags, ranks=ranks)
    return final(folder)


CONFIGURATIONS = list(itertools.product(["resnet", "vit"], [0, 2], [1, 2]))  # architecture, workers, ranks
# For each configuration one moment: in the warm-up, after it, during the scan, in a save, before a manifest, ...
# "step:7" of two ranks goes on from checkpoint-6, inside an epoch with label management: there batch-norm statistics,
# which differ between the ranks, would decide about labels.
ONE_EACH = ["scan:8", "save:3", "manifest:3", "step:7", "step:9", "manifest:2", "save:5", "step:3"]
PAIRWISE = (0, 3, 5, 6)  # of these any two of architecture, workers and ranks come together; the others are slow


@pytest.mark.parametrize(
    ("configuration", "moment"),
    [
        pytest.param(*case, marks=[] if i in PAIRWISE else pytest.mark.slow)
        for i, case in enumerate(zip(CONFIGURATIONS, ONE_EACH, strict=True))
    ],
)
def test_killed_and_resumed_is_bit_equal(tmp_path, configuration, moment):
    arch, workers, ranks = configuration
    flags = ("--arch", arch, "--workers", str(workers), "--clip", "1.0")
    flags += ("--predictions", "views" if (arch == "resnet") == (workers == 0) else "scan")
    flags += ("--judge", "network" if arch == "resnet" else "cross_fit")
    run(tmp_path / "whole", *flags, ranks=ranks)
    whole = final(tmp_path / "whole")
    assert whole["world"] == ranks
    assert_same_end(whole, kill_and_resume(tmp_path / "killed", moment, *flags, ranks=ranks))


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(tmp_path):
    flags = ("--arch", "vit", "--dropout", "0", "--instances", "32", "--epochs", "2", "--judge", "network")
    run(tmp_path / "two", *flags, "--batch", "4", ranks=2)
    whole = [final(tmp_path / "two", rank) for rank in (0, 1)]
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        # In the middle of an epoch in which labels are managed: two of its four steps are left.
        shutil.copytree(tmp_path / "two" / "checkpoint-6", folder / "checkpoint-6")
        done = run(folder, *flags, "--batch", str(8 // ranks), "--resume", ranks=ranks)
        assert f"ranks was 2 at the checkpoint and is {ranks} now" in done.stderr
        ends = [final(folder, rank) for rank in range(ranks)]
        assert ends[0]["world"] == ranks
        assert ends[0]["steps"] == 8
        assert torch.allclose(ends[0]["parameters"], whole[0]["parameters"], atol=1e-5, rtol=0)
        assert {len(end["trace"]) for end in ends} == {2 * 3}
        # Of both batches the same instances in the same order, each once, and the same decisions about their labels.
        for i in range(-6, 0):
            for name in ends[0]["trace"][i].keys() - {"loss"}:
                one, other = (torch.cat([end["trace"][i][name] for end in group]) for group in (whole, ends))
                assert torch.equal(one, other), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("arch", "workers", "ranks"), CONFIGURATIONS)
def test_the_full_matrix(tmp_path, arch, workers, ranks):
    flags = ("--arch", arch, "--workers", str(workers), "--accumulation", "2" if workers == 0 else "1")
    run(tmp_path / "whole", *flags, ranks=ranks)
    whole = final(tmp_path / "whole")
    for moment in MOMENTS:
        if ranks == 2 or workers == 0:  # fewer steps and scan batches a rank
            moment = {"step:9": "step:5", "scan:8": "scan:4", "save:3": "save:2", "manifest:4": "manifest:2"}.get(
                moment, moment
            )
        resumed = kill_and_resume(tmp_path / moment.replace(":", "-"), moment, *flags, ranks=ranks)
        assert_same_end(whole, resumed)


def test_a_half_written_checkpoint_is_passed_over_and_named(tmp_path, caplog):
    run(tmp_path / "run", "--kill", "save:3", fails=True)
    assert checkpoints.check(tmp_path / "run" / "checkpoint-6") is not None
    assert checkpoints.last_whole_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert "checkpoint-6" in caplog.text
