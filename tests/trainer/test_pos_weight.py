"""The weight of positive labels: torch's own, in every method whose loss is BCE, and refused by the others."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import NAMES, arguments, make_dataset, tiny_vit
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce

from hf_balancemix.core import binary_cross_entropy
from hf_balancemix.methods import METHODS, trainer_for
from hf_balancemix.trainer.pos_weight import positive_weights

WITH = ["bce", "mixup", "balancemix", "+minority", "+clean", "+relabel", "balancemix-without-minority", "co-teaching"]
VALUES = [1.0, 2.5, 0.5, 30.0, 4.0]


def test_the_loss_is_torchs():
    g = torch.Generator().manual_seed(0)
    x, t, w = (torch.rand(6, 5, generator=g) for _ in range(3))
    pos_weight = torch.tensor(VALUES)
    expected = torch_bce(x, t, w, pos_weight=pos_weight, reduction="none")
    assert torch.equal(binary_cross_entropy(x, t, w, "none", pos_weight), expected)
    t[0, 1] = -1
    assert binary_cross_entropy(x, t, w, "none", pos_weight)[0, 1] == 0
    with pytest.raises(ValueError, match=r"pos_weight has the shape \(4,\); it must be \(5,\)"):
        binary_cross_entropy(x, t, pos_weight=pos_weight[:4])


def test_balanced_counts_known_labels_and_is_1_where_a_class_lacks_a_kind():
    labels = torch.tensor([[1, 0, 1, -1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, -1, 0], [-1, 0, 1, -1]])
    assert positive_weights("balanced", labels).tolist() == [3.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "given", [2.5, "2.5", VALUES, json.dumps(VALUES), tuple(VALUES), "[3, 1, 1, 1, 1]", "balanced"]
)
def test_every_way_to_say_it_reaches_the_loss(given, dataset, tmp_path):
    trainer = trainer_for("bce", arguments(tmp_path / "o", pos_weight=given), model=tiny_vit(), train_dataset=dataset)
    labels = torch.tensor([[float(k in row["labels"]) for k in range(len(NAMES))] for row in dataset])
    if given == "balanced":
        expected = [(24 - n) / n for n in labels.sum(0).tolist()]
    else:
        value = json.loads(given) if isinstance(given, str) else given
        expected = [value] * 5 if isinstance(value, float) else list(value)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    own = torch_bce(outputs.logits, batch["labels"], pos_weight=torch.tensor(expected), reduction="none")
    assert loss.item() == pytest.approx(own.sum(1).mean().item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_it_or_refuse_it(method, tmp_path):
    data = make_dataset(tmp_path / "i", 8)
    logs = []
    for given in (None, 5.0):
        args = arguments(
            tmp_path / str(given), pos_weight=given, learning_rate=0.0, eval_strategy="epoch",
            logging_strategy="epoch", per_device_train_batch_size=8,
        )  # fmt: skip
        make = {"model": tiny_vit(), "train_dataset": data, "eval_dataset": data}
        if given is not None and method not in WITH:
            with pytest.raises(ValueError, match=r"pos_weight is 5.0, but .* has a loss of its own"):
                trainer_for(method, args, **make)
            return
        trainer = trainer_for(method, args, **make)
        trainer.train()
        logs.append(trainer.state.log_history)
    losses, evaluations = ([[line[n] for line in log if n in line] for log in logs] for n in ("loss", "eval_loss"))
    assert all(weighted > plain * 1.2 for plain, weighted in zip(*losses, strict=True))
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize(
    "bad", [0, -1.0, math.inf, math.nan, True, "many", "", "[]", "[1, null]", [1.0, 0.0], "[1, NaN]", {"ant": 2}]
)
def test_what_is_no_weight_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=r"pos_weight is .*; it must be 'balanced', or one positive finite number"):
        arguments(tmp_path, pos_weight=bad)


def test_another_number_of_weights_than_classes_is_refused(dataset, tmp_path):
    args = arguments(tmp_path / "o", pos_weight=[1.0, 2.0])
    with pytest.raises(ValueError, match="pos_weight holds 2 numbers; it must hold 5"):
        trainer_for("bce", args, model=tiny_vit(), train_dataset=dataset)
