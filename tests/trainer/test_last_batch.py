"""A last batch of one instance is refused before the first step where the model cannot be trained on it."""

from __future__ import annotations

import pytest
import torch
from conftest import arguments, flat, make_dataset, tiny_resnet, tiny_vit
from test_resume import final, run
from torch import nn

from hf_balancemix import BalanceMixTrainer, MultiLabelTrainer
from hf_balancemix.trainer.last_batch import has_batch_of_one


class Head(nn.Module):
    """Batch norm of what was pooled."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(inner.in_features), inner

    def forward(self, x):
        return self.inner(self.norm(x))


def normalised_vit():
    model = tiny_vit()
    model.classifier = Head(model.classifier)
    return model


def trainer_of(model, folder, n, cls=MultiLabelTrainer, **changes):
    args = arguments(folder / "o", num_train_epochs=1, **changes)
    return cls(model=model, args=args, train_dataset=make_dataset(folder / "i", n))


@pytest.mark.parametrize(("n", "batch", "accumulation"), [(9, 4, 1), (9, 4, 2), (6, 1, 2)])
def test_a_model_that_cannot_is_refused_before_the_first_step(n, batch, accumulation, tmp_path):
    trainer = trainer_of(
        normalised_vit(), tmp_path, n, BalanceMixTrainer, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, max_steps=5, label_warmup_epochs=1,
    )  # fmt: skip
    before = flat(trainer.model).clone()
    what = "each batch" if batch == 1 else r"the last batch of an epoch \(9 in batches of 4\)"
    fix = "raise the batch size" if batch == 1 else "set dataloader_drop_last=True"
    with pytest.raises(ValueError, match=rf"{what} has one instance, .*Expected more than 1 value.*{fix}"):
        trainer.train()
    assert torch.equal(flat(trainer.model), before)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("n", "changes"), [(8, {}), (9, {"dataloader_drop_last": True}), (9, {"max_steps": 2}), (10, {})]
)
def test_without_such_a_batch_it_trains(n, changes, tmp_path):
    trainer = trainer_of(normalised_vit(), tmp_path, n, **changes)
    trainer.train()
    assert trainer.state.global_step == (3 if n == 10 else 2)


@pytest.mark.parametrize("model", [tiny_resnet, tiny_vit])
def test_a_model_that_can_trains_as_if_nothing_was_tried(model, tmp_path, monkeypatch):
    options = {} if model is tiny_resnet else {"dropout": 0.3}
    ends = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr(MultiLabelTrainer, "_check_last_batch", lambda self: None)
        trainer = trainer_of(model(**options), tmp_path / str(tried), 9)
        trainer.train()
        assert trainer.state.global_step == 3
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)


def test_batches_of_one_as_a_loader_makes_them():
    for n in range(4, 14):
        for batch in (1, 2, 3, 4):
            for drop_last in (True, False):
                loader = torch.utils.data.DataLoader(range(n), batch, drop_last=drop_last)
                for num_batches in (0, 1, 2, len(loader)):
                    rows = list(loader)[: num_batches or None]
                    expected = any(len(row) == 1 for row in rows)
                    assert has_batch_of_one(n, batch, 1, drop_last, num_batches) == expected


@pytest.mark.dist
def test_of_two_ranks_none_has_a_batch_of_one(tmp_path):
    # 17 instances in batches of 4 for each rank: the last ones are filled with the epoch's first.
    run(tmp_path / "o", "--instances", "17", "--epochs", "2", "--norm_head", ranks=2)
    assert final(tmp_path / "o")["steps"] == 6
