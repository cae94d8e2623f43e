"""Which classes occur together in the training labels, as vectors: the label embeddings of the head MS-CMA.

ASGE, adjacency-based similarity graph embedding (You et al., Cross-Modality Attention with Semantic Graph Embedding
for Multi-Label Classification, AAAI 2020), from its description; docs/choices.md says what that leaves open.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THRESHOLD = 0.1  # pairs of classes below it, in the graph and in the embeddings, are as good as apart
_STEPS, _LEARNING_RATE, _WIDTH = 500, 3e-3, 256
_ROWS = 65_536  # counted at a time, so that millions of labels need no copy in floating point


def label_graph(labels: Tensor) -> Tensor:
    """A_ij = (P(i | j) + P(j | i)) / 2 of the labels; A_ii = 1.

    P(i | j) is the share of positive labels of i among the instances that are positive for j and known for i, and 0
    where there is none: a class without positive labels is a neighbour of none.

    Args:
        labels: `(N, K)` of 0, 1 and -1 (unknown), of any dtype.

    Returns:
        `(K, K)` float64 in [0, 1], symmetric.

    Raises:
        ValueError: `labels` is no matrix, has no class or other values.
    """
    if labels.ndim != 2 or labels.shape[1] == 0:
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)}; it must be (N, K), a row an instance and a column a class; "
            "pass hf_balancemix.data.given_labels(dataset)."
        )
    known_values = (labels == 0) | (labels == 1) | (labels == -1)
    if not known_values.all():
        raise ValueError(
            f"labels holds {labels[~known_values][0].item()}; it must hold 0, 1 and -1 (unknown); pass "
            "hf_balancemix.data.given_labels(dataset)."
        )
    both = known = torch.zeros(labels.shape[1], labels.shape[1], dtype=torch.float64, device=labels.device)
    for rows in labels.split(_ROWS):
        positive = (rows == 1).double()
        both = both + positive.T @ positive
        known = known + (rows >= 0).double().T @ positive  # [i, j]: positive for j, known for i
    conditional = both / known.clamp(min=1)
    return ((conditional + conditional.T) / 2).fill_diagonal_(1)


def embedding_loss(embeddings: Tensor, graph: Tensor) -> Tensor:
    """Sum over all (i, j) of (cos(e_i, e_j) - A_ij)^2, without the pairs of which both are below `THRESHOLD`.

    Args:
        embeddings: `(K, D)`, any real numbers.
        graph: `(K, K)` A, as of :func:`label_graph`.

    Returns:
        A scalar.
    """
    directions = F.normalize(embeddings, dim=1)
    cosines = directions @ directions.T
    counts = (graph >= THRESHOLD) | (cosines >= THRESHOLD)
    return ((cosines - graph).square() * counts).sum()


def label_graph_embeddings(labels: Tensor, dim: int = 256, seed: int = 0) -> Tensor:
    """Embeddings of the classes whose cosines are the entries of their :func:`label_graph`, as far as these can be.

    They are what an MLP of three layers with 256 hidden units, drawn with `seed`, makes of one-hot classes after 500
    steps of Adam on `embedding_loss`: a pure function of its arguments, of which torch's generators see nothing.
    A class without positive labels has one, too: away from all others.

    Args:
        labels: `(N, K)` of 0, 1 and -1 (unknown): the training set's.
        dim: D, 1 or more.
        seed: Of the MLP.

    Returns:
        `(K, D)` float32 on the CPU.

    Raises:
        ValueError: `dim` is less than 1, or as :func:`label_graph`.
    """
    if dim < 1:
        raise ValueError(f"dim is {dim}; it must be 1 or more; leave it out for 256.")
    graph = label_graph(labels).float().cpu()
    classes = torch.eye(len(graph))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        mlp = nn.Sequential(
            nn.Linear(len(graph), _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, dim)
        )
        optimiser = torch.optim.Adam(mlp.parameters(), _LEARNING_RATE)
        for step in range(_STEPS):
            for group in optimiser.param_groups:  # down to 0, as it oscillates otherwise
                group["lr"] = _LEARNING_RATE * (1 - step / _STEPS)
            optimiser.zero_grad()
            embedding_loss(mlp(classes), graph).backward()
            optimiser.step()
        return mlp(classes).detach()
