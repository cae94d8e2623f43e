"""Label embeddings against the formulas written with loops, what they do with unknown and absent labels, and seeds."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from hf_balancemix.models import label_graph_embeddings
from hf_balancemix.models.label_graph import THRESHOLD, embedding_loss, label_graph

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def some_labels(rows: int = 60, classes: int = 6, seed: int = 0) -> torch.Tensor:
    """0, 1 and -1; the last class has no positive label, the one before it none at all that is known."""
    draws = torch.rand(rows, classes, generator=torch.Generator().manual_seed(seed))
    labels = (draws < 0.4).to(torch.int8)
    labels[draws > 0.85] = -1
    labels[:, -1] = labels[:, -1].clamp(max=0)
    labels[:, -2] = -1
    return labels


def graph_by_loops(labels: torch.Tensor) -> torch.Tensor:
    rows, k = labels.tolist(), labels.shape[1]

    def conditional(i: int, j: int) -> float:
        known = [row for row in rows if row[j] == 1 and row[i] != -1]
        return sum(row[i] == 1 for row in known) / len(known) if known else 0.0

    return torch.tensor(
        [[1.0 if i == j else (conditional(i, j) + conditional(j, i)) / 2 for j in range(k)] for i in range(k)],
        dtype=torch.float64,
    )


def loss_by_loops(embeddings: torch.Tensor, graph: torch.Tensor) -> float:
    total = 0.0
    for i, a in enumerate(embeddings.tolist()):
        for j, b in enumerate(embeddings.tolist()):
            inner = sum(x * y for x, y in zip(a, b, strict=True))
            cosine = inner / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
            if not (float(graph[i, j]) < THRESHOLD and cosine < THRESHOLD):
                total += (cosine - float(graph[i, j])) ** 2
    return total


@pytest.mark.parametrize("rows_at_a_time", [7, 65_536])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_the_graph_follows_its_formula_whatever_is_counted_at_a_time(rows_at_a_time, dtype, monkeypatch):
    monkeypatch.setattr("hf_balancemix.models.label_graph._ROWS", rows_at_a_time)
    labels = some_labels()
    torch.testing.assert_close(label_graph(labels.to(dtype)), graph_by_loops(labels), **EXACT)


def test_a_graph_by_hand():
    # Two instances of a with b, one of a alone; in the fourth instance b is there and a is unknown.
    labels = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [-1, 1, 0]])
    expected = torch.tensor([[1, (2 / 2 + 2 / 3) / 2, 0], [(2 / 2 + 2 / 3) / 2, 1, 0], [0, 0, 1]]).double()
    torch.testing.assert_close(label_graph(labels), expected, rtol=0, atol=1e-7)
    assert torch.equal(label_graph(labels[:0]), torch.eye(3).double())


def test_the_loss_follows_its_formula():
    generator = torch.Generator().manual_seed(1)
    graph = label_graph(some_labels())
    for scale in (1.0, 30.0):
        embeddings = scale * torch.randn(6, 4, generator=generator, dtype=torch.float64)
        assert embedding_loss(embeddings, graph).item() == pytest.approx(loss_by_loops(embeddings, graph), rel=1e-12)
    apart = torch.eye(3, dtype=torch.float64) - 0.3  # negative cosines
    assert embedding_loss(apart, torch.eye(3).double()).item() == pytest.approx(0, abs=1e-12)


def test_cosines_of_the_embeddings_are_the_graph():
    # A graph that vectors can have: two classes that are always together, one often with them, two apart.
    labels = torch.zeros(100, 5)
    labels[:50, :2] = 1
    labels[25:75, 2] = 1
    labels[75:90, 3] = 1
    graph = label_graph(labels)
    assert graph[0, 2] == 0.5
    embeddings = label_graph_embeddings(labels, dim=32)
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    joined = graph >= THRESHOLD
    assert (cosines - graph)[joined].abs().max() < 0.01
    assert cosines[~joined].max() < THRESHOLD + 0.01  # how far below is open


@pytest.mark.parametrize(
    "labels",
    [some_labels(), torch.zeros(10, 4), torch.full((10, 4), -1), torch.ones(9, 1), torch.zeros(0, 3)],
    ids=["some", "negative", "unknown", "K = 1", "N = 0"],
)
def test_every_class_has_an_embedding(labels):
    embeddings = label_graph_embeddings(labels, dim=8)
    assert (embeddings.shape, embeddings.dtype) == ((labels.shape[1], 8), torch.float32)
    assert torch.isfinite(embeddings).all()
    assert (embeddings.norm(dim=1) > 1e-3).all()


def test_unknown_labels_do_not_count():
    labels = some_labels()
    padded = torch.cat([labels, torch.full((30, 6), -1, dtype=torch.int8)])
    assert torch.equal(label_graph_embeddings(padded, 8), label_graph_embeddings(labels, 8))
    other = labels.clone()
    other[other == -1] = 0
    assert not torch.equal(label_graph(other), label_graph(labels))


def test_embeddings_are_a_function_of_labels_size_and_seed_alone():
    labels = some_labels()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = label_graph_embeddings(labels, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    with torch.no_grad():
        assert torch.equal(label_graph_embeddings(labels.double(), 8, seed=1), first)
    assert not torch.equal(label_graph_embeddings(labels, 8, seed=2), first)
    code = (
        "import sys, torch; sys.path.insert(0, 'tests/models'); from test_label_graph import *; "
        "torch.set_num_threads(1); print(label_graph_embeddings(some_labels(), 8, seed=1).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch.tensor(eval(done.stdout)).allclose(first, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "dim", "message"),
    [
        (torch.zeros(3), 8, r"labels has the shape \(3,\); it must be \(N, K\)"),
        (torch.zeros(3, 0), 8, r"labels has the shape \(3, 0\)"),
        (torch.tensor([[0.0, 0.5]]), 8, "labels holds 0.5; it must hold 0, 1 and -1"),
        (torch.tensor([[0.0, float("nan")]]), 8, "labels holds nan"),
        (torch.zeros(3, 2), 0, "dim is 0; it must be 1 or more"),
    ],
)
def test_what_are_no_labels_is_refused(labels, dim, message):
    with pytest.raises(ValueError, match=message):
        label_graph_embeddings(labels, dim)
