"""What holds of anything that may come: each property is tried on a few drawn examples, in the slow suite on 1,000.

The few are the same in every run; the 1,000 are new ones, and one that fails is printed.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

from hf_balancemix.core import (
    BalanceMix,
    BalanceMixSettings,
    LossHistogram,
    LossMixtures,
    NoiseRates,
    PairSampler,
    Reliability,
    class_confidences,
    estimate_noise_rates,
    instance_scores,
    label_losses,
    mix_images,
    mix_labels,
    mixing_coefficient,
    refine_labels,
    sampling_weights,
    systematic_resample,
    wrong_probability,
)
from hf_balancemix.core.sampling import confidence_sums
from hf_balancemix.data import (
    Mislabel,
    NoiseMap,
    RandomFlip,
    SinglePositive,
    from_csv,
    given_labels,
    iterative_split,
    load_coco,
    load_noise_map,
    multi_hot,
)
from hf_balancemix.files import one_line, quote
from hf_balancemix.metrics import RunningFigures, class_groups, mean_average_precision, precision_recall_f1

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
NAME = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)


def holds(strategies, few=25):
    """Decorate a function of drawn arguments: a test with a few examples, and a slow one with 1,000."""

    def decorate(check):
        @pytest.mark.parametrize("examples", [few, pytest.param(1000, marks=pytest.mark.slow)])
        def test(examples, tmp_path_factory):
            def folder():
                return tmp_path_factory.mktemp("drawn")

            needs_folder = "folder" in check.__code__.co_varnames[: check.__code__.co_argcount]
            fixed = {"folder": st.builds(folder)} if needs_folder else {}
            run = given(**strategies, **fixed)(check)
            settings(max_examples=examples, derandomize=examples == few, database=None, **COMMON)(run)()

        test.__name__ = check.__name__
        test.__doc__ = check.__doc__
        return test

    return decorate


def floats(low, high, width=32):
    return st.floats(low, high, width=width, allow_subnormal=False)


@st.composite
def tables(draw, low=-30.0, high=30.0, unknown=False, rows=(1, 40), classes=(1, 5)):
    """Logits `(N, K)` float32 and labels `(N, K)` int64."""
    shape = draw(st.tuples(st.integers(*rows), st.integers(*classes)))
    logits = draw(npst.arrays(np.float32, shape, elements=floats(low, high)))
    labels = draw(npst.arrays(np.int64, shape, elements=st.integers(-1 if unknown else 0, 1)))
    return torch.from_numpy(logits), torch.from_numpy(labels)


TABLES, UNKNOWN = tables(), tables(unknown=True)


# ---- mixtures and histograms ----


@holds({"table": TABLES, "cut": st.integers(0, 40), "seed": st.integers(0, 9)})
def test_a_histogram_does_not_depend_on_order_and_batches(table, cut, seed):
    logits, labels = table
    losses, order = (
        label_losses(logits, labels),
        torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)),
    )
    whole, parts = LossHistogram(labels.shape[1]), LossHistogram(labels.shape[1])
    whole.update(losses, labels)
    for part in (order[:cut], order[cut:]):
        parts.update(losses[part], labels[part])
    assert torch.equal(whole.cells, parts.cells)
    assert whole.num_values.sum() == labels.numel()


@holds({"table": TABLES, "count": st.integers(0, 50)})
def test_so_many_of_the_largest_losses_lie_above_their_threshold(table, count):
    logits, labels = table
    losses, k = label_losses(logits, labels), labels.shape[1]
    histogram = LossHistogram(k)
    histogram.update(losses, labels)
    threshold = histogram.threshold_of_largest(0, torch.full((k,), count))
    of_negative = losses.double().clamp(max=16 * (1 - 2**-24)).masked_fill(labels == 1, -1)
    found = (of_negative >= threshold).sum(0)
    assert (found >= torch.minimum((labels == 0).sum(0), torch.tensor(count))).all()
    one_bin_up = threshold * (1 + 2**-5) + 2**-18
    assert ((of_negative >= one_bin_up).sum(0) <= count).all()


@holds({"table": tables(rows=(8, 40))})
def test_mixtures_are_mixtures_and_p_g_is_a_falling_probability(table):
    logits, labels = table
    losses, k = label_losses(logits, labels), labels.shape[1]
    mixtures = LossMixtures.fit(losses, labels, "dividemix")
    assert torch.isfinite(mixtures.means).all()
    assert (mixtures.variances > 0).all()
    torch.testing.assert_close(mixtures.weights.sum(-1).double(), torch.ones(2, k).double(), rtol=0, atol=1e-5)
    grid = torch.linspace(0, 16, 50)[:, None].expand(50, k)
    for value in (0, 1):
        p = mixtures.clean_probability(grid, torch.full((50, k), value))
        assert ((p >= 0) & (p <= 1)).all()
        assert (p.diff(dim=0) <= 1e-6).all()


# ---- confidences and samplers ----


@holds({"table": UNKNOWN, "cut": st.integers(0, 40)})
def test_confidences_are_means_that_add_up_over_batches(table, cut):
    logits, labels = table
    p = logits.double().sigmoid()
    parts = [confidence_sums(p[some], labels[some]) for some in (slice(cut), slice(cut, None))]
    assert all(torch.equal(a + b, c) for a, b, c in zip(*parts, confidence_sums(p, labels), strict=True))
    for found, value in zip(class_confidences(p, labels), (1, 0), strict=True):
        for k in range(labels.shape[1]):
            own = p[labels[:, k] == value, k]
            expected = (own if value else 1 - own).mean().item() if len(own) else 1.0
            assert found[k].item() == pytest.approx(expected, abs=1e-9)


@holds({"table": UNKNOWN, "score": st.sampled_from(["paper", "positive", "uniform"]), "seed": st.integers(0, 9)})
def test_scores_belong_to_instances_and_weights_are_inverse_to_them(table, score, seed):
    logits, labels = table
    positive, negative = class_confidences(logits.double().sigmoid(), labels)
    scores = instance_scores(labels, positive, negative, score)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(instance_scores(labels[order], positive, negative, score), scores[order])
    weights = sampling_weights(scores)
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weights * scores, (weights * scores)[:1].expand(len(scores)))


WEIGHTS = npst.arrays(np.float64, st.integers(1, 60), elements=floats(0, 1, 64))
NOISES = st.sampled_from([Mislabel, RandomFlip, SinglePositive])


@holds({"weights": WEIGHTS, "draws": st.integers(1, 200), "seed": st.integers(0, 99)})
def test_an_instance_is_drawn_as_often_as_its_weight_says(weights, draws, seed):
    assume(weights.sum() > 1e-6)
    w = torch.from_numpy(weights / weights.sum())
    counts = torch.bincount(systematic_resample(w, draws, torch.Generator().manual_seed(seed)), minlength=len(w))
    assert counts.sum() == draws
    assert ((counts - draws * w).abs() < 1 + 1e-5).all()


@holds({"n": st.integers(1, 80), "seed": st.integers(-(2**63), 2**63 - 1), "epoch": st.integers(0, 1000)})
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(n, seed, epoch):
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    keys = []
    for _ in range(2):
        sampler = PairSampler(n, seed, lambda: uniform)
        sampler.set_epoch(epoch)
        keys.append(list(sampler))
    assert keys[0] == keys[1]
    assert sorted(key.random for key in keys[0]) == sorted(key.minority for key in keys[0]) == list(range(n))


# ---- label management and mixing ----


@holds({"table": UNKNOWN, "seed": st.integers(0, 99), "eps": floats(0.5, 1, 64), "trust": st.booleans()})
def test_refined_labels_follow_equation_9_label_by_label(table, seed, eps, trust):
    logits, labels = table
    p_clean = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    refined = refine_labels(labels, p_clean, logits.sigmoid(), eps, trust_positives=trust)
    for t, p, q, new, code, weight in zip(
        *(x.flatten().tolist() for x in (labels, p_clean, logits.sigmoid(), *refined)), strict=True
    ):
        if t >= 0 and (p > 0.5 or (trust and t == 1)):
            expected = (t, Reliability.CLEAN, 1)
        elif q > np.float32(eps) or q < np.float32(1 - eps):
            expected = (float(q > np.float32(eps)), Reliability.RELABELED, 1)
        else:
            expected = (t, Reliability.AMBIGUOUS, p if t >= 0 else 0)
        if abs(q - eps) > 1e-6 and abs(q - (1 - eps)) > 1e-6:  # float32 of either
            assert (new, code) == expected[:2]
            assert weight == pytest.approx(expected[2])


@holds({"alpha": floats(0, 1e9, 64), "key": st.lists(st.integers(-(2**40), 2**40) | NAME, min_size=1, max_size=3)})
def test_lambda_is_a_function_of_its_key_in_its_range(alpha, key):
    lam = mixing_coefficient(alpha, *key)
    assert 0.5 <= lam <= 1
    assert mixing_coefficient(alpha, *key) == lam


@holds({"table": UNKNOWN, "seed": st.integers(0, 99)})
def test_a_mix_lies_between_its_parts_and_is_the_first_at_lambda_1(table, seed):
    _, labels = table
    generator = torch.Generator().manual_seed(seed)
    other = labels[torch.randperm(len(labels), generator=generator)].float()
    labels, lam = labels.float(), 0.5 + 0.5 * torch.rand(len(labels), generator=generator)
    mixed, known = mix_labels(labels, other, lam), (labels >= 0) & ((other >= 0) | (lam[:, None] == 1))
    assert torch.equal(mixed >= 0, known)
    low, high = torch.minimum(labels, other), torch.maximum(labels, other)
    assert ((mixed >= low - 1e-6) & (mixed <= high + 1e-6))[known].all()
    images = torch.rand(len(labels), 3, 2, 2, generator=generator)
    assert torch.equal(mix_images(images, images.flip(0), torch.ones(len(labels))), images)


# ---- how much is wrong ----


@holds({"table": UNKNOWN})
def test_noise_rates_lie_in_their_intervals_and_scores_are_probabilities(table):
    logits, labels = table
    rates = estimate_noise_rates(logits, labels)
    for estimate, low, high in rates:
        assert ((low >= 0) & (low <= estimate + 1e-9) & (estimate <= high + 1e-9) & (high <= 1)).all()
    score = wrong_probability(labels, logits.sigmoid(), rates)
    assert ((score >= 0) & (score <= 1)).all()
    assert (score[labels < 0] == 0).all()


@holds({"wrong": floats(0.01, 0.6, 64), "missing": floats(0.001, 0.1, 64), "k": st.integers(1, 4)})
def test_a_label_is_the_more_probably_wrong_the_more_the_prediction_is_against_it(wrong, missing, k):
    rates = NoiseRates(torch.full((3, k), wrong).double(), torch.full((3, k), missing).double())
    q = torch.linspace(0.001, 0.999, 30)[:, None].expand(30, k)
    labels = (torch.arange(30)[:, None] % 2).expand(30, k)
    for value, sign in ((1, -1), (0, 1)):
        score = wrong_probability(labels, q, rates)[labels[:, 0] == value]
        assert (sign * score.diff(dim=0) >= -1e-6).all()


@holds({"table": tables(rows=(5, 25), low=-12, high=12), "seed": st.integers(0, 9),
        "judge": st.sampled_from([None, 0.5, 2.0])}, few=10)  # fmt: skip
def test_the_state_of_a_run_is_the_same_from_any_order_of_batches_and_after_loading(table, seed, judge):
    logits, labels = table
    states = []
    for order in (
        torch.arange(len(labels)),
        torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)),
    ):
        state = BalanceMix(labels, BalanceMixSettings(judge="network", max_missing=judge))
        for part in order.split(7):
            state.observe(part, logits[part])
        state.end_epoch(1)
        states.append(state)
    loaded = BalanceMix(labels, states[0].settings)
    loaded.load_state_dict(states[0].state_dict())
    first = states[0].state_dict()
    for other in (states[1], loaded):
        assert first.keys() == other.state_dict().keys()
        assert all(torch.equal(first[name], value) for name, value in other.state_dict().items())


# ---- metrics ----


@holds({"table": UNKNOWN})
def test_mean_average_precision_is_that_of_scikit_learn_in_any_monotone_scale(table):
    logits, labels = table
    found = mean_average_precision(logits, labels)["per_class_ap"]
    again = mean_average_precision(logits.double() * 2, labels)["per_class_ap"]
    np.testing.assert_allclose(found, again, atol=1e-12)
    for k in range(labels.shape[1]):
        known = labels[:, k] >= 0
        if (labels[:, k] == 1).any():
            assert found[k] == pytest.approx(average_precision_score(labels[known, k], logits[known, k]), abs=1e-9)
        else:
            assert math.isnan(found[k])


@holds({"table": UNKNOWN, "cut": st.integers(0, 40)})
def test_running_figures_do_not_depend_on_the_batches(table, cut):
    logits, labels = table
    whole, parts = RunningFigures(labels.shape[1]), RunningFigures(labels.shape[1])
    whole.update(logits, labels)
    for some in (slice(cut), slice(cut, None)):
        if len(labels[some]):
            parts.update(logits[some], labels[some])
    (means, ap), (others, other_ap) = whole.compute(), parts.compute()
    assert means == others
    np.testing.assert_array_equal(ap, other_ap)


@holds({"table": TABLES})
def test_overall_f1_is_scikit_learns_micro_average(table):
    logits, labels = table
    found = precision_recall_f1(logits.sigmoid(), labels)
    predicted = (logits.sigmoid() > 0.5).int()
    assert found["OF1"] == pytest.approx(f1_score(labels.flatten(), predicted.flatten(), zero_division=0))
    assert all(0 <= value <= 1 for value in found.values())


@holds(
    {
        "counts": st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
        "bounds": st.tuples(*[st.integers(0, 10**6)] * 2),
    }
)
def test_every_class_is_in_one_group(counts, bounds):
    few, many = sorted(bounds)
    groups = class_groups(counts, many, few)
    assert (sum(mask.astype(int) for mask in groups.values()) == 1).all()


# ---- data ----


@st.composite
def label_lists(draw, rows=(1, 15), unique_ids=True):
    names = draw(st.lists(NAME, min_size=2, max_size=4, unique=True))
    n = draw(st.integers(*rows))
    labels = draw(st.lists(st.sets(st.integers(0, len(names) - 1)), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(0, 10**9), min_size=n, max_size=n, unique=True))
    return names, [sorted(some) for some in labels], ids


def dataset_of(names, labels, ids):
    classes = datasets.List(datasets.ClassLabel(names=names))
    features = datasets.Features({"labels": classes, "image_id": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"labels": labels, "image_id": ids}, features=features)


@holds({"drawn": label_lists()}, few=10)
def test_labels_come_back_from_any_form(drawn):
    names, labels, ids = drawn
    dense = multi_hot(labels, len(names))
    assert [row.nonzero().flatten().tolist() for row in dense] == labels
    assert torch.equal(given_labels(dataset_of(names, labels, ids)), dense.to(torch.int8))


@holds({"drawn": label_lists(), "seed": st.integers(0, 2**31), "rate": floats(0, 0.99, 64),
        "kind": NOISES, "cut": st.integers(1, 15)}, few=10)  # fmt: skip
def test_noise_is_a_function_of_seed_and_image_id(drawn, seed, rate, kind, cut):
    names, labels, ids = drawn
    noise = (kind(seed=seed) if kind is SinglePositive else kind(rate=rate, seed=seed)).fit(
        dataset_of(names, labels, ids)
    )
    whole = noise({"labels": labels, "image_id": ids})["labels"]
    part = noise({"labels": labels[::-1][:cut], "image_id": ids[::-1][:cut]})["labels"]
    assert part == whole[::-1][:cut]


@holds({"drawn": label_lists(), "seed": st.integers(0, 2**31), "rate": floats(0, 0.99, 64)}, few=8)
def test_a_noise_map_gives_the_noisy_labels_and_takes_them_away(folder, drawn, seed, rate):
    clean = dataset_of(*drawn)
    noisy = RandomFlip(rate=rate, seed=seed).add_to(clean)
    NoiseMap.from_datasets(clean, noisy).save(folder / "map.parquet")
    loaded = load_noise_map(folder / "map.parquet")
    assert torch.equal(given_labels(loaded.apply(clean)), given_labels(noisy))
    assert torch.equal(given_labels(loaded.correct(noisy.remove_columns("clean_labels"))), given_labels(clean))


@holds({"drawn": label_lists(rows=(4, 15)), "seed": st.integers(0, 99), "share": floats(0.3, 0.7, 64)}, few=8)
def test_a_split_is_a_partition(drawn, seed, share):
    dataset = dataset_of(*drawn)
    parts = iterative_split(dataset, [share, 1 - share], seed=seed)
    assert Counter(i for part in parts for i in part["image_id"]) == Counter(dataset["image_id"])


def written_images(folder, names):
    for name in names:
        Image.new("RGB", (2, 2)).save(folder / name)


@holds({"drawn": label_lists()}, few=8)
def test_a_csv_file_is_read_as_it_was_written(folder, drawn):
    names, labels, ids = drawn
    assume("file_name" not in names)
    files = [f"{i}.png" for i in ids]
    written_images(folder, files)
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[name, *(int(k in some) for k in range(len(names)))] for name, some in zip(files, labels, strict=True)]
        csv.writer(file).writerows([["file_name", *names], *rows])
    assert torch.equal(given_labels(from_csv(folder / "labels.csv")), multi_hot(labels, len(names)).to(torch.int8))


@holds({"drawn": label_lists(), "seed": st.integers(0, 9)}, few=8)
def test_coco_annotations_are_read_as_they_were_written_in_any_order(folder, drawn, seed):
    names, labels, ids = drawn
    assume(all(names) and any(labels))
    (folder / "train2017").mkdir()
    (folder / "annotations").mkdir()
    files = [f"{i}.png" for i in ids]
    written_images(folder / "train2017", files)
    annotations = [
        {"image_id": i, "category_id": 7 * k + 1} for i, some in zip(ids, labels, strict=True) for k in some
    ]
    np.random.default_rng(seed).shuffle(annotations)
    content = {
        "images": [{"id": i, "file_name": name} for i, name in zip(ids, files, strict=True)],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": 7 * k + 1, "name": name} for k, name in enumerate(names)],
    }
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    found = load_coco(folder, split="train", year=2017)
    by_id = dict(zip(found["image_id"], found["labels"], strict=True))
    annotated = {i: some for i, some in zip(ids, labels, strict=True) if some}  # the others are left out
    assert {i: sorted(some) for i, some in by_id.items()} == annotated


# ---- messages ----


@holds(
    {
        "value": st.recursive(
            st.none() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=50,
        )
    }
)
def test_any_value_is_quoted_in_one_short_line(value):
    for shown in (quote(value), one_line(value, 80)):
        assert len(shown) <= 80
        assert shown.isprintable()
