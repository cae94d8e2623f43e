"""Two ranks do what one process does with twice the batch."""

from __future__ import annotations

import pytest
import torch
from test_resume import final, run

FLAGS = ("--arch", "vit", "--dropout", "0", "--instances", "32", "--epochs", "2", "--clip", "0")


@pytest.mark.dist
def test_two_ranks_equal_one_process_with_twice_the_batch(tmp_path):
    run(tmp_path / "one", *FLAGS, "--batch", "8")
    run(tmp_path / "two", *FLAGS, "--batch", "4", ranks=2)
    one, ranks = final(tmp_path / "one"), [final(tmp_path / "two", rank) for rank in (0, 1)]
    assert one["world"] == 1
    assert ranks[0]["world"] == 2
    # The worker itself asserts that the method's whole state is bit-identical on both ranks.
    assert torch.equal(ranks[0]["state"]["weights"], ranks[1]["state"]["weights"])
    assert one["state"]["weights"].std() > 0

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
    assert not all(step["reliability"].eq(0).all() for step in one["trace"] if "index" in step)

    assert torch.allclose(one["parameters"], ranks[0]["parameters"], atol=1e-5, rtol=0)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
