"""Two ranks do what one process does with twice the batch."""

from __future__ import annotations

import io

import pandas as pd
import pytest
import torch
from accelerate.utils import compare_versions
from safetensors.torch import load_file
from test_resume import assert_same_end, final, kill_and_resume, run

FLAGS = ("--arch", "vit", "--dropout", "0", "--instances", "32", "--epochs", "2", "--clip", "0")


@pytest.mark.dist
@pytest.mark.parametrize(("judge", "predictions"), [("network", "views"), ("network", "scan"), ("cross_fit", "scan")])
def test_two_ranks_equal_one_process_with_twice_the_batch(tmp_path, judge, predictions):
    flags = (*FLAGS, "--predictions", predictions, "--judge", judge)
    run(tmp_path / "one", *flags, "--batch", "8")
    run(tmp_path / "two", *flags, "--batch", "4", ranks=2)
    one, ranks = final(tmp_path / "one"), [final(tmp_path / "two", rank) for rank in (0, 1)]
    assert one["world"] == 1
    assert ranks[0]["world"] == 2
    # The worker itself asserts that the method's whole state is bit-identical on both ranks.
    assert torch.equal(ranks[0]["state"]["weights"], ranks[1]["state"]["weights"])
    assert one["state"]["weights"].std() > 0
    if judge == "network":
        limits = [run["state"]["missing_loss_threshold"] for run in (one, *ranks)]
        assert torch.equal(limits[1], limits[2])
        assert torch.allclose(limits[0], limits[1], rtol=1 / 64)  # the width of a bin
        assert (limits[0] > 0).all()
    else:
        for name in ("noise_rates.wrong", "noise_rates.missing", "entries.label_class", "entries.p_clean"):
            assert torch.equal(one["state"][name], ranks[0]["state"][name]), name

    assert len(one["trace"]) == len(ranks[0]["trace"]) == len(ranks[1]["trace"])
    managed = 0
    for alone, first, second in zip(one["trace"], ranks[0]["trace"], ranks[1]["trace"], strict=True):
        if "index" in alone:  # a refined batch, random or minority: the same instances and decisions
            managed += 1
            for name in ("index", "reliability", "labels"):
                assert torch.equal(alone[name], torch.cat([first[name], second[name]])), name
        else:  # a step: the same mixed labels, hence the same lambda
            assert torch.equal(alone["targets"], torch.cat([first["targets"], second["targets"]]))
            mean = (first["loss"] + second["loss"]) / 2
            assert torch.allclose(alone["loss"], mean, atol=1e-5)
    assert managed == 2 * 4  # both batches of each of the four steps after the warm-up
    if judge == "network":  # features of a network from scratch judge nothing; see tests/core/test_judge.py
        assert not all(step["reliability"].eq(0).all() for step in one["trace"] if "index" in step)

    assert torch.allclose(one["parameters"], ranks[0]["parameters"], atol=1e-5, rtol=0)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert ranks[0]["audit"] == ranks[1]["audit"]
    found = [pd.read_csv(io.StringIO(run["audit"])).sort_values(["image_id", "class"]) for run in (one, ranks[0])]
    pd.testing.assert_frame_equal(
        *(f.drop(columns=["rank", "Unnamed: 0"]).reset_index(drop=True) for f in found), atol=2e-3
    )
    assert judge == "cross_fit" or len(found[0])


@pytest.mark.dist
@pytest.mark.skipif(
    compare_versions("accelerate", "<", "1.15") or compare_versions("torch", "<", "2.14"), reason="refused"
)
def test_fsdp_equals_one_process_and_resumes_bit_equal(tmp_path):
    # Of 31 instances the first rank scans 16, in four batches, and the second 15, in three.
    flags = ("--arch", "vit", "--dropout", "0", "--instances", "31", "--epochs", "2", "--drop_last")
    run(tmp_path / "one", *flags, "--batch", "8")
    run(tmp_path / "fsdp", *flags, "--batch", "4", "--fsdp", ranks=2)
    one, ranks = final(tmp_path / "one"), [final(tmp_path / "fsdp", rank) for rank in (0, 1)]
    assert len(one["trace"]) == len(ranks[0]["trace"]) == 3 + 3 * 3
    for alone, first, second in zip(one["trace"], *(end["trace"] for end in ranks), strict=True):
        for name in alone.keys() - {"loss"}:
            assert torch.equal(alone[name], torch.cat([first[name], second[name]])), name
    assert torch.allclose(one["parameters"], ranks[0]["parameters"], atol=1e-5, rtol=0)
    stored = [load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("one", "fsdp")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.allclose(value, stored[1][key], atol=1e-5, rtol=0) for key, value in stored[0].items())
    figures = [[line["eval_mAP"] for line in end["log"] if "eval_mAP" in line] for end in (one, ranks[0])]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)

    resumed = kill_and_resume(tmp_path / "killed", "step:5", *flags, "--batch", "4", "--fsdp", ranks=2)
    assert_same_end(ranks[0], resumed)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_equals_one_process_and_resumes_bit_equal(tmp_path, stage):
    pytest.importorskip("deepspeed", reason="no dependency; it builds on a CPU")
    flags = ("--arch", "vit", "--dropout", "0", "--instances", "31", "--epochs", "2", "--drop_last", "--clip", "1")
    flags += ("--judge", "network", "--predictions", "scan")
    run(tmp_path / "one", *flags, "--batch", "8")
    run(tmp_path / "zero", *flags, "--batch", "4", "--zero", stage, ranks=2)
    kill_and_resume(tmp_path / "killed", "step:5", *flags, "--batch", "4", "--zero", stage, ranks=2)
    names = ("one", "zero", "killed")
    one, zero, killed = (load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in names)
    assert one.keys() == zero.keys() == killed.keys()
    assert all(torch.allclose(value, zero[name], atol=1e-5, rtol=0) for name, value in one.items())
    assert all(torch.equal(value, killed[name]) for name, value in zero.items())
    traces = [final(tmp_path / "one")["trace"], *(final(tmp_path / "zero", rank)["trace"] for rank in (0, 1))]
    for alone, first, second in zip(*traces, strict=True):
        for name in alone.keys() - {"loss"}:
            assert torch.equal(alone[name], torch.cat([first[name], second[name]])), name


@pytest.mark.dist
def test_two_ranks_have_the_average_of_one_process(tmp_path):
    flags = (*FLAGS, "--ema", "0.8", "--save_steps", "3")
    run(tmp_path / "one", *flags, "--batch", "8")
    run(tmp_path / "two", *flags, "--batch", "4", ranks=2)
    one, ranks = final(tmp_path / "one"), [final(tmp_path / "two", rank) for rank in (0, 1)]
    # After training the model has the average, on every rank.
    assert torch.allclose(one["parameters"], ranks[0]["parameters"], atol=1e-5, rtol=0)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    for step in (3, 6):
        files = {}
        for name in ("model", "ema"):
            folders = (tmp_path / ranks / f"checkpoint-{step}" for ranks in ("one", "two"))
            files[name], two = (load_file(folder / f"{name}.safetensors") for folder in folders)
            assert files[name].keys() == two.keys()
            assert all(torch.allclose(value, two[key], atol=1e-5, rtol=0) for key, value in files[name].items())
        apart = (files["model"]["classifier.weight"] - files["ema"]["classifier.weight"]).abs().max()
        assert apart > 1e-3
    figures = [[line["eval_mAP"] for line in end["log"] if "eval_mAP" in line] for end in (one, *ranks)]
    assert len(figures[0]) == 2
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    assert figures[0] == pytest.approx(figures[2], abs=1e-6)
