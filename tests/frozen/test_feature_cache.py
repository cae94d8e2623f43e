"""Features of a frozen backbone on disk: what is in the cache, when it is made anew, and what a run draws from it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, arguments, flat, make_dataset, tiny_resnet, tiny_vit

from hf_balancemix import BalanceMixTrainer, Mislabel
from hf_balancemix.data import PlainInstances, ViewMaker
from hf_balancemix.frozen.cache import ROW_COLUMN, CachedViews, cache_features
from hf_balancemix.frozen.head import FeatureClassifier, FeatureClassifierConfig, backbone_digest, pooled_features
from hf_balancemix.methods import METHODS, trainer_for
from hf_balancemix.trainer import checkpoints

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


class Backbone:
    """Three means and a product, and how often it was asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        means = images.mean((2, 3))
        return torch.cat([means, means.prod(1, keepdim=True)], 1)


def cache(
    folder: Path, train, val, backbone=None, *, digest: str = "one", seed=0, num_views=3, size=16, **of_views
):  # fmt: skip
    backbone = backbone or Backbone()
    views = ViewMaker(size, seed, **of_views)
    return cache_features(folder, backbone, digest, train, val, views, MEAN, STD, num_views=num_views, batch_size=10)


def head(size: int, seed: int = 0) -> FeatureClassifier:
    torch.manual_seed(seed)
    return FeatureClassifier(FeatureClassifierConfig(feature_size=size, hidden_size=8, num_labels=len(NAMES)))


@pytest.fixture
def parts(tmp_path):
    return make_dataset(tmp_path / "t", 13), make_dataset(tmp_path / "v", 7, seed=1)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_a_row_is_the_backbones_output_for_that_view(tmp_path, parts, make):
    model = make().train()
    if make is tiny_resnet:  # running statistics that are not those of the start
        model(torch.randn(8, 3, 16, 16))
    features, train, val = cache(tmp_path / "c", *parts, pooled_features(model), digest=backbone_digest(model))
    views = ViewMaker(16, 0)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def expected(view: torch.Tensor) -> torch.Tensor:
        image = ((view.double() / 255 - mean) / std).float()[None]
        with torch.no_grad():
            if make is tiny_resnet:
                return model.resnet(image).pooler_output.flatten()
            return model.vit(image).last_hidden_state[0, 0]

    assert not model.training
    assert features.shape[0] == 13 * 4 + 7
    for part, number in ((train, 3), (val, 0)):
        for i, row in enumerate(part[ROW_COLUMN]):
            path = part[i]["image"].filename
            for j, view in enumerate([views.plain(path), *views.augmented(path, "cached", i, num_views=number)]):
                torch.testing.assert_close(features[row + j], expected(view), rtol=1e-6, atol=1e-6)
    rows = [row + j for row in train[ROW_COLUMN] for j in range(4)] + list(val[ROW_COLUMN])
    assert rows == list(range(len(features)))
    assert len(features.unique(dim=0)) > 50  # the views differ


def test_rows_go_with_their_instances(tmp_path, parts):
    features, train, _ = cache(tmp_path, *parts)
    views = CachedViews(features, 3, seed=0, image_size=16)
    plain = {row["image_id"]: PlainInstances(train, views)[i]["pixel_values"] for i, row in enumerate(train)}
    noise = Mislabel(rate=0.4, seed=0).fit(train)
    moved = train.shuffle(seed=3).select(range(2, 9)).map(noise, batched=True, features=noise.features)
    batch = PlainInstances(moved, views).__getitems__(range(len(moved)))
    for image_id, row in zip(moved["image_id"], batch, strict=True):
        assert torch.equal(row["pixel_values"], plain[image_id])
    with pytest.raises(ValueError, match="its features are not cached"):
        PlainInstances(parts[0], views)


def test_picks_are_a_pure_function_of_the_key_and_never_twice_the_same():
    features = torch.arange(50.0).view(50, 1)
    keys = list(itertools.product(range(20), range(30), ["random", "minority"]))
    views = CachedViews(features, 6, seed=1, image_size=16)
    picked = {key: views.pick(*key, num_views=2) for key in keys}
    again = CachedViews(features, 6, seed=1, image_size=16)
    torch.rand(7)
    assert {key: again.pick(*key, num_views=2) for key in reversed(keys)} == picked
    assert all(again.pick(*key, num_views=1) == pair[:1] for key, pair in picked.items())
    other = CachedViews(features, 6, seed=2, image_size=16)
    assert sum(other.pick(*key, num_views=2) == pair for key, pair in picked.items()) < 100  # 1/30 of 1,200 by chance
    counts = Counter(map(tuple, picked.values()))
    assert len(counts) == 30  # every ordered pair of different views
    assert all(a != b for a, b in counts)
    assert max(counts.values()) < 75  # 40 each on average
    assert sorted(views.pick(0, num_views=6)) == list(range(6))
    assert CachedViews(features, 1, 0, 16).pick(3, num_views=2) == [0, 0]
    key = keys[17]
    assert [x.item() for x in views.augmented(7, *key, num_views=2)] == [8.0 + v for v in picked[key]]
    assert views.plain(7).item() == 7


def test_the_cache_is_made_once_and_anew_when_anything_changes(tmp_path, parts):
    train, val = parts
    first = Backbone()
    features, *_ = cache(tmp_path, train, val, first)
    assert first.calls > 0
    second = Backbone()
    again, marked, _ = cache(tmp_path, train, val, second)
    assert second.calls == 0
    assert torch.equal(again, features)
    cache(tmp_path, marked, val, second)  # a data set that has the column already
    assert second.calls == 0
    cache(tmp_path, train, val, second, cutout=0.0)
    assert second.calls == 0
    for change in ({"digest": "two"}, {"seed": 1}, {"num_views": 2}, {"size": 20}, {"cutout": 0.5}, {"cutout": 0.25}):
        other = Backbone()
        cache(tmp_path, train, val, other, **change)
        assert other.calls > 0, change
    other = Backbone()
    cache(tmp_path, train.select(range(12)), val, other)
    assert other.calls > 0
    file = train[0]["image"].filename
    os.utime(file, (1, 1))
    other = Backbone()
    cache(tmp_path, train, val, other)
    assert other.calls > 0


def test_the_digest_is_that_of_the_weights_below_the_head():
    model = tiny_resnet()
    before = backbone_digest(model)
    with torch.no_grad():
        model.classifier[-1].weight.add_(1)
    assert backbone_digest(model) == before
    with torch.no_grad():
        next(model.resnet.parameters()).view(-1)[0].add_(1e-6)
    changed = backbone_digest(model)
    assert changed != before
    next(b for name, b in model.named_buffers() if name.endswith("running_var"))[0] += 1e-3
    assert backbone_digest(model) not in (before, changed)


def test_what_was_cut_off_is_not_used(tmp_path, parts, caplog):
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, *parts, Backbone(fail_at=3))
    assert not [path for path in tmp_path.glob("features-*") if path.is_dir() and path.suffix != ".partial"]
    whole, *_ = cache(tmp_path, *parts)
    (folder,) = (path for path in tmp_path.glob("features-*") if path.is_dir())
    whole = whole.clone()
    for damage in (
        lambda: os.truncate(folder / "features.npy", 200),
        lambda: (folder / "cache.json").write_text("{"),
        lambda: (folder / "cache.json").unlink(),
    ):
        damage()
        backbone = Backbone()
        caplog.clear()
        features, *_ = cache(tmp_path, *parts, backbone)
        assert backbone.calls > 0
        assert "damaged" in caplog.text
        assert torch.equal(features, whole)


def test_maps_in_half_precision_are_kept_as_they_are_and_read_as_float32(tmp_path, parts, caplog):
    def backbone(images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::4, ::8].half()

    with caplog.at_level("INFO"):
        features, train, _ = cache(tmp_path, *parts, backbone)
    assert (features.dtype, features.shape) == (torch.float16, (13 * 4 + 7, 3, 4, 2))
    assert f"59 views of 48 bytes are 0.0 MB in {tmp_path}." in caplog.text
    views, maker = CachedViews(features, 3, seed=0, image_size=16), ViewMaker(16, 0)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for i, row in enumerate(train[ROW_COLUMN]):
        path = train[i]["image"].filename
        expected = [maker.plain(path), *maker.augmented(path, "cached", i, num_views=3)]
        expected = [((view / 255 - mean) / std)[:, ::4, ::8] for view in expected]
        picked = views.pick("key", i, num_views=2)
        drawn = views.augmented(row, "key", i, num_views=2)
        assert all(view.dtype == torch.float32 for view in drawn)
        wanted_views = [expected[0], *(expected[1 + p] for p in picked)]
        for view, wanted in zip([views.plain(row), *drawn], wanted_views, strict=True):
            torch.testing.assert_close(view, wanted, rtol=1e-3, atol=1e-3)


def test_a_disk_without_room_is_told_before_the_cache_is_written(tmp_path, parts, monkeypatch):
    size = (13 * 4 + 7) * 4 * 4  # bytes of the rows
    for free in (size - 1, size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        if free < size:
            backbone = Backbone()
            with pytest.raises(ValueError, match=r"59 views of 16 bytes are .* MB left; it must have room"):
                cache(tmp_path, *parts, backbone)
            assert backbone.calls == 1
            assert not [path for path in tmp_path.iterdir() if path.is_dir() and "features-" in path.name]
        else:
            cache(tmp_path, *parts)


def test_a_folder_that_cannot_be_written_is_told_before_any_image_is_seen(tmp_path, parts):
    (tmp_path / "file").write_text("")
    backbone = Backbone()
    with pytest.raises(ValueError, match=r"cached features \(--cache_dir\) is .*, where nothing can be written"):
        cache(tmp_path / "file" / "features", *parts, backbone)
    assert backbone.calls == 0


def test_no_views_are_refused(tmp_path, parts):
    with pytest.raises(ValueError, match="num_views is 0"):
        cache(tmp_path, *parts, num_views=0)


def test_a_model_without_a_linear_classifier_is_refused():
    model = tiny_resnet()
    model.classifier[-1] = torch.nn.LazyLinear(7)
    with pytest.raises(ValueError, match="no linear layer with 5 outputs"):
        pooled_features(model)


def test_the_head_saves_and_loads_as_any_model(tmp_path):
    from transformers import AutoModelForImageClassification

    model = head(6).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(3, 6)
    first, last = (layer for layer in model.head if isinstance(layer, torch.nn.Linear))
    expected = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(loaded(pixel_values=x).logits, expected)
    assert [p.shape for p in head(6, seed=1).parameters()] == [(8, 6), (8,), (5, 8), (5,)]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    train, val = make_dataset(folder / "t", 26), make_dataset(folder / "v", 9, seed=1)
    noise = Mislabel(rate=0.4, seed=0).fit(train)
    train = train.map(noise, batched=True, features=noise.features)
    return cache(folder, train, val)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_cached_features(tmp_path, cached, method):
    features, train, val = cached
    views = CachedViews(features, 3, seed=3, image_size=16)
    given = {"train_dataset": train, "eval_dataset": val, "views": views}
    trainer = trainer_for(method, arguments(tmp_path), model=head(4), **given)
    before = flat(trainer.model)
    trainer.train()
    assert (flat(trainer.model) - before).abs().max() > 1e-4
    scores = trainer.predict(val).predictions
    assert scores.shape == (9, len(NAMES))
    if method != "co-teaching":  # which wraps two heads
        with torch.no_grad():
            expected = trainer.model.eval()(pixel_values=features[val[ROW_COLUMN]]).logits
        np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_on_cached_features_ends_the_same(tmp_path, cached):
    features, train, val = cached

    def trainer(folder: Path) -> BalanceMixTrainer:
        args = arguments(folder, num_train_epochs=3, save_strategy="steps", save_steps=4)
        views = CachedViews(features, 3, seed=3, image_size=16)
        return BalanceMixTrainer(model=head(4), args=args, train_dataset=train, eval_dataset=val, views=views)

    whole = trainer(tmp_path)
    whole.train()
    assert whole.state.global_step == 21
    resumed = trainer(tmp_path)
    assert checkpoints.check(tmp_path / "checkpoint-12") is None
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-12")  # in the middle of the second epoch
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert torch.equal(resumed.balance_mix.weights, whole.balance_mix.weights)
