"""NAR: which labels are kept, left out and flipped, and the trainer that learns from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import arguments, make_dataset, tiny_vit

from hf_balancemix.data import given_labels
from hf_balancemix.methods import ELRSettings, NARSettings, NARTrainer, elr_loss, handled_labels, trainer_for

SETTINGS = NARSettings(
    flip_negative=0.9, drop_negative=0.6, flip_positive=0.1, drop_positive=0.3, min_share=0.0
)  # fmt: skip


def test_the_rule_by_hand():
    p = torch.tensor([[0.95, 0.9, 0.7, 0.6, 0.3, 0.2, 0.1, 0.05]]).T
    negative = handled_labels(torch.zeros(8, 1, dtype=torch.int8), p, SETTINGS)
    assert negative.T.tolist() == [[1, -1, -1, 0, 0, 0, 0, 0]]
    positive = handled_labels(torch.ones(8, 1, dtype=torch.int8), p, SETTINGS)
    assert positive.T.tolist() == [[1, 1, 1, 1, 1, -1, -1, 0]]
    assert negative.dtype == torch.int8


def slow_rule(y, p, s):
    out = y.copy()
    for k in range(y.shape[1]):
        known = [v for v in y[:, k] if v >= 0]
        counts = bool(known) and sum(v == 1 for v in known) / len(known) > s.min_share
        for i in range(len(y)):
            if y[i, k] == 0 and p[i, k] > s.flip_negative:
                out[i, k] = 1
            elif y[i, k] == 0 and p[i, k] > s.drop_negative:
                out[i, k] = -1
            elif y[i, k] == 1 and counts and p[i, k] < s.flip_positive:
                out[i, k] = 0
            elif y[i, k] == 1 and counts and p[i, k] < s.drop_positive:
                out[i, k] = -1
    return out


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_the_rule_is_the_slow_one(share):
    rng = np.random.default_rng(0)
    s = NARSettings(flip_negative=0.8, drop_negative=0.5, flip_positive=0.25, drop_positive=0.5, min_share=share)
    y = (rng.random((200, 6)) < np.linspace(0.1, 0.9, 6)).astype(np.int8)
    y[rng.random(y.shape) < 0.2] = -1
    p = rng.random(y.shape)
    p[::17] = math.nan
    handled = handled_labels(torch.tensor(y), torch.tensor(p), s).numpy()
    expected = slow_rule(y, p, s)
    assert np.array_equal(handled, expected)
    assert (handled[y == -1] == -1).all()
    assert np.array_equal(handled[::17], y[::17])  # nothing is decided by what is not finite
    changed = handled != y
    assert changed[y == 0].any()
    assert changed[y == 1].any() == (share < 1)


def test_the_given_labels_are_not_changed():
    given = torch.tensor([[0], [1]], dtype=torch.int8)
    before = given.clone()
    assert not torch.equal(handled_labels(given, torch.tensor([[1.0], [0.0]]), SETTINGS), before)
    assert torch.equal(given, before)


def test_by_default_positives_are_never_flipped_and_those_of_rare_classes_are_kept():
    labels = torch.zeros(10, 2, dtype=torch.int8)
    labels[:2, 0] = labels[:3, 1] = 1  # 20 and 30 per cent
    handled = handled_labels(labels, torch.zeros(10, 2))
    assert handled[:2, 0].tolist() == [1, 1]
    assert handled[:3, 1].tolist() == [-1, -1, -1]


def test_bad_settings_are_refused(dataset, tmp_path):
    for own, message in (
        ({"drop_negative": 1.5}, r"drop_negative is 1.5; it must be in \[0, 1\]."),
        ({"beta": -0.1}, r"beta is -0.1; it must be in \[0, 1\]."),
        ({"flip_negative": 0.5}, "flip_negative is 0.5 and drop_negative 0.54; the first must not be the smaller one"),
        ({"flip_positive": 0.3}, "flip_positive is 0.3 and drop_positive 0.2; the first must not be the larger one"),
        ({"threshold": 0.5}, "threshold is not an argument of nar"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for("nar", arguments(tmp_path), own, model=tiny_vit(), train_dataset=dataset)
    with pytest.raises(TypeError, match="settings is an ELRSettings; it must be NARSettings"):
        NARTrainer(settings=ELRSettings(), args=arguments(tmp_path), model=tiny_vit(), train_dataset=dataset)
    with pytest.raises(ValueError, match=r"labels, probabilities are \(2, 3\), \(3, 2\)"):
        handled_labels(torch.zeros(2, 3), torch.zeros(3, 2))


# ---- the trainer ----

OWN = {"drop_negative": 0.3, "flip_negative": 0.4, "drop_positive": 0.35, "flip_positive": 0.25, "min_share": 0.1}


def run(folder, data, own=OWN, method="nar", **changes):
    args = arguments(folder, **{"num_train_epochs": 4} | changes)
    return trainer_for(method, args, own, model=tiny_vit(), train_dataset=data, eval_dataset=data)


def test_labels_are_handled_after_the_warm_up_by_the_models_own_predictions(tmp_path):
    # At learning rate 0 all predictions are the same; thresholds lie within them, and next to none of them.
    data = make_dataset(tmp_path / "images", 24)
    p = torch.tensor(run(tmp_path / "out", data).predict(data).predictions).sigmoid()
    low, middle, high = (p.flatten().sort().values[[i, i + 1]].mean().item() for i in (30, 60, 90))
    own = {"drop_negative": middle, "flip_negative": high, "drop_positive": middle, "flip_positive": low}
    for warmup in (1, 3):
        trainer = run(tmp_path / "out", data, own | {"min_share": 0}, label_warmup_epochs=warmup, learning_rate=0.0)
        trainer.train()
        given = given_labels(data)
        assert torch.equal(trainer.labels, handled_labels(given, p, trainer.settings))
        logged = [line for line in trainer.state.log_history if "nar_left_out" in line]
        assert [line["epoch"] for line in logged] == [*range(warmup, 4)]
        assert logged[-1]["nar_left_out"] == pytest.approx((trainer.labels < 0).double().mean().item())
        assert logged[-1]["nar_made_positive"] == pytest.approx((trainer.labels > given).double().mean().item())
        made_negative = (trainer.labels == 0) & (given == 1)
        assert logged[-1]["nar_made_negative"] == pytest.approx(made_negative.double().mean().item())
        assert all(0 < value < 0.5 for name, value in logged[-1].items() if name.startswith("nar_"))


def test_in_the_warm_up_it_is_elr(dataset, tmp_path):
    ends = []
    for method, own in (("elr", {}), ("nar", OWN)):
        trainer = run(tmp_path, dataset, own, method, label_warmup_epochs=3)
        losses = []
        loss = trainer._loss
        trainer._loss = lambda *given, loss=loss, losses=losses: losses.append(loss(*given)) or losses[-1]
        trainer.train()
        ends.append(torch.stack(losses))
    assert torch.equal(ends[0][:18], ends[1][:18])
    assert not torch.equal(ends[0][18:], ends[1][18:])


def test_a_step_mixes_the_handled_labels_of_both_instances(dataset, tmp_path):
    trainer = run(tmp_path, dataset, per_device_train_batch_size=12)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    generator = torch.Generator().manual_seed(0)
    trainer.labels = torch.randint(-1, 2, (24, 5), generator=generator, dtype=torch.int8)
    trainer.targets = 0.99 * torch.rand(24, 5, generator=generator)
    lam = batch["lam"][:, None]

    def mixed(table):
        return lam * table[batch["index"]] + (1 - lam) * table[batch["minority_index"]]

    unknown = (trainer.labels[batch["index"]] < 0) | (trainer.labels[batch["minority_index"]] < 0)
    assert 0.3 < unknown.double().mean() < 0.8  # a third each: five ninths
    images = lam[..., None, None] * batch["pixel_values"] + (1 - lam[..., None, None]) * batch["minority_pixel_values"]
    logits = trainer.model(pixel_values=images).logits
    expected = elr_loss(logits, mixed(trainer.labels.float()).masked_fill(unknown, -1), mixed(trainer.targets))
    assert torch.allclose(trainer.compute_loss(trainer.model, batch), expected, atol=1e-6)


def test_flips_are_always_from_the_given_labels(dataset, tmp_path):
    trainer = run(tmp_path, dataset)
    high, low = torch.full((24, 5), 0.99), torch.full((24, 5), 0.31)
    trainer._learn(high, 1)
    assert (trainer.labels == 1).all()
    trainer._learn(low, 2)
    expected = torch.full((24, 5), -1, dtype=torch.int8)  # negatives over 0.3, positives under 0.35
    assert torch.equal(trainer.labels, expected)
