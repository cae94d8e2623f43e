"""The audit of a run: what its rows say, when it is there, and that it is written, whole."""

from __future__ import annotations

import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import NAMES, arguments, label_dataset, make_dataset, remember_all, tiny_vit

from hf_balancemix import BalanceMixTrainer, LabelAudit, MultiLabelTrainer, audit_labels
from hf_balancemix.audit.exchange import from_cleanlab
from hf_balancemix.audit.label_audit import make_audit
from hf_balancemix.core import (
    LossHistogram,
    LossMixtures,
    NoiseRates,
    SuspiciousLabels,
    balance_mix,
    wrong_probability,
)
from hf_balancemix.data import given_labels


@pytest.fixture
def trainer(dataset, tmp_path):
    return BalanceMixTrainer(model=tiny_vit(), args=arguments(tmp_path / "run"), train_dataset=dataset)


@pytest.fixture
def suspect(trainer, monkeypatch):
    """A function that makes the findings of a trained run known ones: `(instance, class, score)` each."""

    def replace(*entries):
        state = trainer.balance_mix
        instance, label_class, score = torch.tensor(entries, dtype=torch.float64).T
        at = instance.long(), label_class.long()
        # Where half of the labels are wrong, a score is the probability of the other value.
        rates = torch.full((len(NAMES),), 0.5), torch.tensor(0.5)
        monkeypatch.setattr(balance_mix, "transition_rates", lambda labels, found: rates)
        q = torch.where(torch.from_numpy(state.labels.toarray())[at] == 1, 1 - score, score)
        p_clean = state.clean_probability(torch.arange(state.labels.shape[0]))[at].half()
        state._remember(*at, p_clean, q.half(), q.float())

    return replace


def test_rows_say_which_label_and_how_probably_it_is_wrong(trainer, suspect, dataset):
    trainer.train()
    labels = given_labels(dataset)
    suspect([3, 1, 0.2], [5, 0, 0.9], [5, 1, 0.5], [0, 1, 0.5])
    rows = trainer.label_audit()
    assert isinstance(rows, datasets.Dataset)
    assert rows["image_id"][:] == [105, 100, 105, 103]
    assert rows["class"][:] == [NAMES[0], NAMES[1], NAMES[1], NAMES[1]]
    assert rows["rank"][:] == [1, 1, 2, 3]
    assert rows["score"][:] == pytest.approx([0.9, 0.5, 0.5, 0.2], abs=1e-3)
    for row, instance in zip(rows, (5, 0, 5, 3), strict=True):
        k = NAMES.index(row["class"])
        assert row["image"].endswith(f"{instance:03}.png")
        assert row["given"] == labels[instance, k] == 1 - row["suggested"]
        assert row["kind"] == ("wrong positive" if row["given"] else "missing label")
        index = torch.tensor([instance])
        assert row["prediction"] == trainer.balance_mix.scan_probability(index)[0, k]
        assert row["p_clean"] == trainer.balance_mix.clean_probability(index)[0, k]
        assert row["epochs_distrusted"] == (row["p_clean"] <= 0.5)  # one of two epochs is warm-up


def test_predictions_are_those_of_the_final_weights_and_make_half_of_the_score(trainer, monkeypatch):
    rates = torch.full((len(NAMES),), 0.5), torch.tensor(0.5)
    monkeypatch.setattr(balance_mix, "transition_rates", lambda labels, found: rates)
    state, judge = trainer.balance_mix, trainer.balance_mix.judge

    def judge_one(*args, **options):
        judge(*args, **options)
        judged = torch.full(state.labels.shape, -1.0)
        judged[7, 2] = 0.8
        remember_all(state, torch.ones(state.labels.shape), judged.flatten())

    state.judge = judge_one
    trainer.train()
    image = trainer.views.plain(trainer.views.images(trainer.train_dataset)[[7]]["image"][0])[None]
    trainer.model.eval()
    with torch.no_grad():
        f = trainer.model(pixel_values=trainer._normalise(image)).logits.sigmoid()[0, 2].item()
    row = trainer.label_audit()[0]
    assert row["prediction"] == pytest.approx(f, abs=1e-3)
    odds = (4 * f / (1 - f)) ** 0.5
    assert row["score"] == pytest.approx(1 / (1 + odds) if row["given"] else odds / (1 + odds), abs=1e-3)


@pytest.mark.parametrize("max_steps", [8, 12])  # 6 an epoch
@pytest.mark.parametrize("judge", ["cross_fit", "network"])
def test_training_that_ends_within_an_epoch_is_scanned_at_its_end(dataset, tmp_path, judge, max_steps):
    args = arguments(tmp_path / "run", judge=judge, max_steps=max_steps)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    state, judge = trainer.balance_mix, trainer.balance_mix.judge

    def judge_and_doubt_all(*args, **options):
        judge(*args, **options)
        remember_all(state, torch.zeros(state.labels.shape), torch.full(state.labels.shape, -1.0).flatten())

    state.judge = judge_and_doubt_all
    trainer.train()
    images = trainer.views.images(trainer.train_dataset)[:]["image"]
    pixels = trainer._normalise(torch.stack([trainer.views.plain(image) for image in images]))
    with torch.no_grad():
        f = trainer.model.eval()(pixel_values=pixels).logits.sigmoid()
    found = trainer.balance_mix.scan_probability(torch.arange(len(dataset)))
    remembered = ~found.isnan()
    assert remembered.any()
    torch.testing.assert_close(found[remembered], f[remembered], atol=1e-3, rtol=0)


def test_an_audit_is_written_beside_the_model_once_it_is_trained_and_read_again(trainer, suspect, tmp_path):
    trainer.save_model(str(tmp_path / "untrained"))
    assert not list((tmp_path / "untrained").glob("label_audit*"))
    trainer.train()
    suspect([3, 1, 0.2], [5, 0, 0.9])
    trainer.save_model()
    audit = LabelAudit.load(tmp_path / "run")
    assert audit.rows.to_dict() == trainer.label_audit().to_dict()
    assert audit.classes == trainer._label_audit().classes
    assert audit.num_estimated == 1
    labels = given_labels(trainer.train_dataset)
    for k, known in enumerate(audit.classes):
        assert known.name == NAMES[k]
        assert (known.positives, known.negatives) == ((labels[:, k] == 1).sum(), (labels[:, k] == 0).sum())
        assert known.wrong is None  # of so few nothing can be said
        edges, counts = known.histogram_positive[:2]
        assert sum(counts) == known.positives
        assert len(edges) == len(counts) + 1


def test_the_audit_of_a_run_before_is_not_left_beside_another_model(trainer, dataset, tmp_path):
    trainer.train()
    trainer.save_model()
    written = (tmp_path / "run/label_audit.parquet").read_bytes()
    args = arguments(tmp_path / "run", select_clean=False)
    for other in (MultiLabelTrainer, BalanceMixTrainer):
        trainer._label_audit().save(tmp_path / "run")
        again = other(model=tiny_vit(), args=args, train_dataset=dataset)
        again.save_model()  # nothing is trained yet, so that the model may be the one that was saved
        assert (tmp_path / "run/label_audit.parquet").read_bytes() == written
        again.train()
        again.save_model()
        assert not list((tmp_path / "run").glob("label_audit*"))


@pytest.mark.parametrize("change", [lambda d: d.shuffle(seed=0), lambda d: d.select(range(5))])
def test_a_training_set_that_was_changed_afterwards_is_refused(trainer, suspect, dataset, change):
    trainer.train()
    suspect([3, 1, 0.2], [5, 0, 0.9])
    rows = trainer.label_audit().to_dict()
    trainer.train_dataset = change(dataset)
    with pytest.raises(ValueError, match="not the labels of the 24 trained on; it must be the trainer's first"):
        trainer.label_audit()
    trainer.train_dataset = dataset
    assert trainer.label_audit().to_dict() == rows


@pytest.mark.parametrize(
    ("ids", "problem"),
    [(np.arange(24) / 2, r"image_id is 0\.0; it must be"), (np.arange(24) // 2, "'0' occurs 2 times")],
)
def test_ids_that_tell_no_images_apart_cost_the_audit_and_not_the_model(dataset, tmp_path, caplog, ids, problem):
    data = dataset.remove_columns("image_id").add_column("image_id", ids)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=arguments(tmp_path / "run"), train_dataset=data)
    trainer.train()
    trainer.save_model()
    assert re.search(f"No label audit is written .*{problem}", caplog.text)
    assert (tmp_path / "run/model.safetensors").is_file()
    with pytest.raises(ValueError, match=problem):
        trainer.label_audit()
    with pytest.raises(ValueError, match=problem):
        audit_labels(trainer.model, data, trainer.processing_class)


def test_ids_keep_their_type(dataset, tmp_path):
    ids = pa.array([2**63 + i for i in range(24)], pa.uint64())
    data = dataset.remove_columns("image_id")
    data = data.add_column("image_id", ids, feature=datasets.Value("uint64"))
    args = arguments(tmp_path / "run", judge="network")
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    found = LabelAudit.load(tmp_path / "run").rows["image_id"][:]
    assert found
    assert set(found) <= set(ids.to_pylist())


def test_a_damaged_audit_is_refused_and_an_absent_one_named(trainer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"label_audit\.parquet is absent"):
        LabelAudit.load(tmp_path)
    trainer.train()
    trainer._label_audit().save(tmp_path)
    (tmp_path / "label_audit.json").write_text(json.dumps({"format": 1, "classes": [{"name": "x"}]}))
    with pytest.raises(ValueError, match="holds no audit that can be read"):
        LabelAudit.load(tmp_path)
    trainer._label_audit().save(tmp_path)
    (tmp_path / "label_audit.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="holds no audit that can be read"):
        LabelAudit.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[" * 10**5,
        lambda text: text.replace('"format": 1', f'"format": {"7" * 5000}'),
        lambda text: text.replace('"format": 1', f'"format": {"7" * 4000}'),
        lambda text: text.replace('"format": 1', '"format": 1, "format": 1'),
        lambda text: text.replace(f'"name": "{NAMES[0]}"', '"name": ["x"]'),
        lambda text: re.sub(r'"positives": \d+', '"positives": "many"', text),
        lambda text: re.sub(r'"wrong": [^,]+,', '"wrong": [0.1, 0.2],', text),
        lambda text: re.sub(r'"wrong": [^,]+,', '"wrong": "all",', text),
        lambda text: text.replace('"negatives"', '"' + "x" * 5000 + '"'),
        lambda text: json.dumps({"classes": [json.loads(text)]}),
        lambda text: json.dumps([text] * 5000),
    ],
)
def test_a_hostile_audit_is_one_short_sentence(tmp_path, damage):
    folder = tmp_path / "audit"
    small_audit().save(folder)
    LabelAudit.load(folder)
    text = (folder / "label_audit.json").read_text()
    (folder / "label_audit.json").write_text(damage(text))
    assert (folder / "label_audit.json").read_text() != text
    with pytest.raises(ValueError, match="holds no audit that can be read") as error:
        LabelAudit.load(folder)
    assert len(str(error.value)) < 400


def small_audit() -> LabelAudit:
    labels = np.eye(len(NAMES), dtype=np.uint8)
    return from_cleanlab(label_dataset(labels, NAMES), labels == 1, np.full(labels.shape, 0.25))


def test_an_audit_is_not_read_through_links_out_of_its_folder(tmp_path):
    small_audit().save(tmp_path / "audit")
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "audit").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="leads out of it"):
        LabelAudit.load(tmp_path / "linked")
    assert len(LabelAudit.load(tmp_path / "linked", follow_links=True).classes) == len(NAMES)


def test_there_is_no_audit_without_label_management(trainer, dataset, tmp_path):
    with pytest.raises(ValueError, match="no label was judged"):
        trainer.label_audit()
    other = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "b"), train_dataset=dataset)
    with pytest.raises(ValueError, match=r"'bce'.*BalanceMixTrainer, or .* audit_labels"):
        other.label_audit()
    off = BalanceMixTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "c", select_clean=False), train_dataset=dataset
    )
    off.train()
    off.save_model()
    with pytest.raises(ValueError, match="no label was judged"):
        off.label_audit()
    assert not list((tmp_path / "c").glob("label_audit*"))


def test_where_the_network_judges_its_doubts_are_counted_an_epoch(tmp_path):
    data = make_dataset(tmp_path / "images", 60)
    args = arguments(tmp_path / "o", judge="network", num_train_epochs=4, max_missing=0.0)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=data)
    state, doubts = trainer.balance_mix, []
    end_epoch = state.end_epoch

    def watched(epoch):
        if state.settings.manages_labels(state.epoch):
            doubts.append((state.clean_probability(torch.arange(60)) <= 0.5).int())
        end_epoch(epoch)

    state.end_epoch = watched
    trainer.train()
    found = state.suspicious_labels()
    total = sum(doubts)
    assert len(doubts) == 3
    assert (total > 0).any()
    assert torch.equal(found.epochs, total[found.instance, found.label_class])
    assert all(c.wrong is None for c in trainer._label_audit().classes)


def test_scores_are_the_share_of_wrong_labels_where_noise_is_class_conditional():
    """Labels drawn with known q, T01 and T10: among those of about one score, that share is wrong."""
    rng = np.random.default_rng(0)
    q = rng.beta(0.5, 2, (200_000, 1))
    clean = rng.random(q.shape) < q
    given = np.where(clean, rng.random(q.shape) > 0.3, rng.random(q.shape) < 0.1)
    wrong_of_given, missing_of_rest = (~clean)[given].mean(), clean[~given].mean()
    rates = NoiseRates(*(torch.full((3, 1), float(r), dtype=torch.float64) for r in (wrong_of_given, missing_of_rest)))
    score = wrong_probability(torch.from_numpy(given).int(), torch.from_numpy(q), rates).numpy()
    is_wrong = given != clean
    for low in np.arange(0, 0.9, 0.1):
        here = (score >= low) & (score < low + 0.1)
        assert score[here].mean() == pytest.approx(is_wrong[here].mean(), abs=0.02)
    assert score.sum() == pytest.approx(is_wrong.sum(), rel=0.02)


def test_what_is_not_known_is_not_wrong():
    rates = NoiseRates(*(torch.full((3, 2), 0.3) for _ in range(2)))
    labels, q = torch.tensor([[1, -1], [0, 1], [1, 0]]), torch.tensor([[0.1, 0.9], [0.2, torch.nan], [0.9, 0.9]])
    score = wrong_probability(labels, q, rates)
    assert score[0, 1] == score[1, 1] == 0
    assert score[0, 0] > 0.5 > score[2, 0]
    assert score[2, 1] > score[1, 0]


def test_the_mixture_is_drawn_on_the_scale_of_the_histogram():
    """Of losses that are two Gaussians, each component expects in each bin what was drawn from it."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(6000, generator=generator) * 0.05 + 0.5
    noisy = torch.randn(2000, generator=generator) * 0.2 + 3
    losses = torch.cat([clean, noisy])[:, None]
    histogram = LossHistogram(1)
    histogram.update(losses, torch.ones(8000, 1))
    mixtures = LossMixtures.fit_histogram(histogram, "sklearn")
    data, none = label_dataset(np.ones((8000, 1))), torch.zeros(0)
    found = SuspiciousLabels(none.long(), none.long(), none, none, none, none.int())
    audit = make_audit(data, ["a"], torch.ones(8000, 1), found, None, histogram.coarse_counts, mixtures)
    edges, counts, *expected = audit.classes[0].histogram_positive
    for drawn, curve in zip((clean, noisy), expected, strict=True):
        assert curve == pytest.approx(np.histogram(drawn, edges)[0], abs=60)
        assert sum(curve) == pytest.approx(len(drawn), rel=0.01)
    assert sum(counts) == 8000
    assert audit.classes[0].histogram_negative == []
