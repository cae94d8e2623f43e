"""Mixtures of losses against scikit-learn, against hand-computed numbers, and under everything that can go wrong."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exact_em import exact_em
from safetensors.torch import load_file, save_file
from sklearn.mixture import GaussianMixture
from torch import Tensor

from hf_balancemix.core.loss_histogram import LossHistogram, bin_edges, label_losses
from hf_balancemix.core.loss_mixture import (
    MIXTURE_PRESETS,
    LossMixtures,
    MixtureSettings,
    _centered_bins,
    _e_step,
    _moments,
)

TEN = MixtureSettings(max_iter=10, tol=0.0, reg_covar=5e-4)
FORTY = MixtureSettings(max_iter=40, tol=0.0, reg_covar=1e-6)
NOISES = ["clean", "mislabel", "flip"]


def simulate(
    noise: str, num_instances: int = 4000, num_classes: int = 6, model_noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Losses of a model that is nearly calibrated on noisy labels (rate 0.4), long-tailed classes; and the labels."""
    rng = np.random.default_rng(0)
    prior = np.geomspace(0.4, 0.01, num_classes)
    clean = rng.random((num_instances, num_classes)) < prior
    separation = rng.uniform(2, 4, num_classes)
    evidence = rng.standard_normal(clean.shape) + separation * clean
    p = 1 / (1 + np.exp(-(np.log(prior / (1 - prior)) + separation * evidence - separation**2 / 2)))
    if noise == "clean":
        given = clean
    elif noise == "flip":
        given = clean ^ (rng.random(clean.shape) < 0.4)
        p = 0.6 * p + 0.4 * (1 - p)
    else:  # a positive label is lost with probability 0.4, and an absent class takes over as many as it has
        added = 0.4 * clean.sum(0) / (num_instances - clean.sum(0))
        given = np.where(clean, rng.random(clean.shape) >= 0.4, rng.random(clean.shape) < added)
        p = 0.6 * p + added * (1 - p)
    logits = np.log(p / (1 - p)) + model_noise * rng.standard_normal(p.shape)
    losses = np.logaddexp(0, np.where(given, -logits, logits))
    return torch.tensor(losses, dtype=torch.float32), torch.tensor(given)


def each_set(losses: Tensor, labels: Tensor):
    for polarity in (0, 1):
        for k in range(losses.shape[1]):
            yield polarity, k, losses[labels[:, k] == bool(polarity), k]


# The edges of the bins: 64 in every power of two of (loss + 2^-14).
EDGES = np.concatenate([*(2.0**e * (1 + np.arange(64) / 64) for e in range(-14, 4)), [16.0]]) - 2.0**-14


def sklearn_mixture(values: Tensor, settings: MixtureSettings) -> GaussianMixture:
    """scikit-learn's EM, started by the M step after the best split in two at a bin's edge (exact 2-means)."""
    x = np.sort(values.double().numpy())
    cuts = np.unique(np.searchsorted(x, EDGES[:-1]))  # larger losses than the last edge are in the last bin
    parts = [(x[:cut], x[cut:]) for cut in cuts if 0 < cut < len(x)]
    parts = min(parts, key=lambda pair: sum(len(part) * part.var() for part in pair))
    mixture = GaussianMixture(
        2,
        tol=settings.tol,
        reg_covar=settings.reg_covar,
        max_iter=settings.max_iter,
        weights_init=[len(part) / len(x) for part in parts],
        means_init=[[part.mean()] for part in parts],
        precisions_init=[[[1 / (part.var() + settings.reg_covar)]] for part in parts],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: a fixed number of iterations is asked for
        return mixture.fit(x[:, None])


def sklearn_posterior(values: Tensor, settings: MixtureSettings) -> np.ndarray:
    mixture = sklearn_mixture(values, settings)
    return mixture.predict_proba(values.double().numpy()[:, None])[:, mixture.means_[:, 0].argmin()]


def assert_same(one: LossMixtures, other: LossMixtures) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def fit_set(values: list[float] | Tensor, settings="sklearn") -> tuple[LossMixtures, Tensor]:
    """The mixture of one set, and the clean probability of each value, as printed and corrected, `(2, n)`."""
    losses = torch.as_tensor(values, dtype=torch.float32)[:, None]
    labels = torch.ones_like(losses)
    mixtures = LossMixtures.fit(losses, labels, settings)
    both = [mixtures.clean_probability(losses, labels, monotone=monotone)[:, 0] for monotone in (False, True)]
    return mixtures, torch.stack(both)


# ---------------------------------------------------------------------------------------------------- label_losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_label_losses_equal_the_cross_entropy_of_the_probability(dtype):
    logits = torch.linspace(-12, 12, 101).to(dtype)[:, None].expand(-1, 2)
    labels = torch.tensor([0, 1]).expand(101, 2)
    p = torch.sigmoid(logits.double())
    want = -torch.log(torch.where(labels == 1, p, 1 - p))
    got = label_losses(logits, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)


def test_label_losses_stay_finite_where_the_probability_rounds_to_0_or_1():
    got = label_losses(torch.tensor([[1e4, -1e4, 200.0, -200.0]] * 2), torch.tensor([[0.0] * 4, [1.0] * 4]))
    assert got.tolist() == [[1e4, 0, 200, 0], [0, 1e4, 0, 200]]


def test_label_losses_take_any_leading_shape():
    assert label_losses(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)).shape == (2, 3, 4)


# ------------------------------------------------------------------------------------------------------- the bins


def test_bins_lie_where_their_edges_say():
    edges = bin_edges().numpy()
    assert edges.tolist() == EDGES.tolist()
    assert edges[[0, -1]].tolist() == [0, 16 - 2**-14]
    for loss in (0.0, 1e-7, 1e-5, 0.01, 0.3, 0.6931, 1.0, 2.5, 9.0, 15.9):
        for polarity in (0, 1):
            histogram = LossHistogram(1)
            histogram.update(torch.tensor([[loss]]), torch.tensor([[polarity]]))
            assert histogram.counts.shape == (2, 1, len(edges) - 1)
            assert histogram.counts.sum() == histogram.counts[polarity].sum() == 1
            k = int(histogram.counts[polarity, 0].argmax())
            assert edges[k] <= loss < edges[k + 1]


# --------------------------------------------------------------------------------------- against references: EM


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", [TEN, FORTY])
def test_raw_posteriors_equal_scikit_learns_at_a_fixed_number_of_iterations(noise, settings):
    losses, labels = simulate(noise)
    mixtures = LossMixtures.fit(losses, labels, settings)
    assert mixtures.separated.all()
    assert (mixtures.num_iter == settings.max_iter).all()
    got = mixtures.clean_probability(losses, labels, monotone=False).numpy()
    for polarity, k, values in each_set(losses, labels):
        difference = np.abs(got[labels[:, k] == bool(polarity), k] - sklearn_posterior(values, settings))
        assert difference.max() < 1e-3, (polarity, k, difference.max())


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("preset", MIXTURE_PRESETS)
def test_the_clean_set_equals_scikit_learns_under_a_tolerance(noise, preset):
    losses, labels = simulate(noise)
    got = LossMixtures.fit(losses, labels, preset).clean_probability(losses, labels, monotone=False).numpy()
    same = 0
    for polarity, k, values in each_set(losses, labels):
        want = sklearn_posterior(values, MIXTURE_PRESETS[preset]) > 0.5
        same += ((got[labels[:, k] == bool(polarity), k] > 0.5) == want).sum()
    assert same >= 0.999 * losses.numel()


@pytest.mark.parametrize("settings", [TEN, FORTY, *MIXTURE_PRESETS.values()])
def test_exact_em_equals_scikit_learn(settings):
    for noise in NOISES:
        for _, _, values in each_set(*simulate(noise, num_instances=1500, num_classes=2)):
            want, got = sklearn_mixture(values, settings), exact_em(values, settings)
            order = want.means_[:, 0].argsort()
            assert got.num_iter == want.n_iter_
            np.testing.assert_allclose(got.means, want.means_[order, 0], rtol=1e-8)
            np.testing.assert_allclose(got.variances, want.covariances_[order, 0, 0], rtol=1e-8)
            np.testing.assert_allclose(got.weights, want.weights_[order], rtol=1e-8)


@pytest.mark.parametrize("preset", MIXTURE_PRESETS)
def test_parameters_equal_exact_em(preset):
    losses, labels = simulate("mislabel")
    mixtures = LossMixtures.fit(losses, labels, preset)
    for polarity, k, values in each_set(losses, labels):
        want = exact_em(values, MIXTURE_PRESETS[preset])
        assert mixtures.num_iter[polarity, k] == want.num_iter
        for name in ("means", "variances", "weights"):
            torch.testing.assert_close(getattr(mixtures, name)[polarity, k], getattr(want, name), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_an_e_step_on_bins_equals_one_on_values(noise):
    losses, labels = simulate(noise, num_classes=2)
    histogram = LossHistogram(2)
    histogram.update(losses, labels)
    for polarity, k, values in each_set(losses, labels):
        bins, center = _centered_bins(histogram.cells[:, k, polarity][:, None])
        means, variances, weights, _ = exact_em(values, MixtureSettings(3, 0.0, 1e-4))
        x, means = values.double() - center, means - center
        joint = weights.log() - 0.5 * (2 * np.pi * variances).log() - (x[:, None] - means) ** 2 / (2 * variances)
        r = joint.softmax(1)[:, 0]
        total = _moments(bins, torch.ones_like(bins.number))
        got, likelihood = _e_step(bins, total, means[None], variances[None], weights[None])
        for power, sum_of_bins in enumerate(got):
            torch.testing.assert_close(sum_of_bins, (r * x**power).sum(0, keepdim=True), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(likelihood, joint.logsumexp(1).mean(0, keepdim=True), rtol=0, atol=1e-6)


def test_a_peak_far_narrower_than_its_bin_does_not_derail_em():
    # Without noise of the model the probabilities end sharply at 0.4 and 0.6, and nearly all losses are at two values.
    # Bins cannot resolve this; the clean set is still mostly that of the values.
    losses, labels = simulate("flip", num_instances=8000, model_noise=0.0)
    settings = MixtureSettings(40, 0.0, 1e-9)
    got = LossMixtures.fit(losses, labels, settings).clean_probability(losses, labels, monotone=False).numpy()
    for polarity, k, values in each_set(losses, labels):
        same = (got[labels[:, k] == bool(polarity), k] > 0.5) == (sklearn_posterior(values, settings) > 0.5)
        assert same.mean() > 0.85, (polarity, k, same.mean())


def test_two_far_groups_give_their_own_means_variances_and_weights():
    mixtures, p = fit_set([1.0, 1.0, 1.5, 1.5, 9.0, 11.0], MixtureSettings(5, 0.0, 1e-6))
    torch.testing.assert_close(mixtures.means[1, 0], torch.tensor([1.25, 10.0], dtype=torch.float64))
    want = torch.tensor([0.0625 + 1e-6, 1.0 + 1e-6], dtype=torch.float64)
    torch.testing.assert_close(mixtures.variances[1, 0], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(mixtures.weights[1, 0], torch.tensor([4 / 6, 2 / 6], dtype=torch.float64))
    assert (p > 0.5).tolist() == [[True] * 4 + [False] * 2] * 2


def test_raw_posterior_is_bayes_rule_on_the_parameters():
    losses, labels = simulate("flip")
    mixtures = LossMixtures.fit(losses, labels, "dividemix")
    got = mixtures.clean_probability(losses, labels, monotone=False)
    for polarity, k, values in each_set(losses, labels):
        mean, variance = mixtures.means[polarity, k], mixtures.variances[polarity, k]
        normal = torch.exp(-((values.double()[:, None] - mean) ** 2) / (2 * variance)) / variance.sqrt()
        joint = mixtures.weights[polarity, k] * normal
        want = (joint[:, 0] / joint.sum(1)).float()
        torch.testing.assert_close(got[labels[:, k] == bool(polarity), k], want, rtol=0, atol=1e-6)


def test_a_set_is_fitted_as_it_would_be_alone():
    losses, labels = simulate("mislabel", num_classes=8)
    together = LossMixtures.fit(losses, labels, "sklearn")
    assert len(together.num_iter.unique()) > 3  # they do stop at different times
    for k in range(8):
        alone = LossMixtures.fit(losses[:, k : k + 1], labels[:, k : k + 1], "sklearn")
        assert torch.equal(alone.num_iter[:, 0], together.num_iter[:, k])
        torch.testing.assert_close(alone.means[:, 0], together.means[:, k], rtol=1e-9, atol=0)


def test_more_sets_than_are_fitted_at_once():
    losses, labels = simulate("mislabel", num_instances=1000, num_classes=100)
    many = LossMixtures.fit(losses, labels, "dividemix")
    few = LossMixtures.fit(losses[:, 90:], labels[:, 90:], "dividemix")
    torch.testing.assert_close(many.means[:, 90:], few.means, rtol=1e-9, atol=0)
    assert torch.equal(many.separated[:, 90:], few.separated)


# ------------------------------------------------------------------------------------------- order, ranks, threads


def test_parameters_are_bit_identical_under_any_order_and_any_batches():
    losses, labels = simulate("mislabel", num_instances=9000)
    want = LossMixtures.fit(losses, labels, "dividemix")
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    for batch in (64, 1000, 3000, 9000):
        histogram = LossHistogram(6)
        for rows in order.split(batch):
            histogram.update(losses[rows], labels[rows])
        assert_same(LossMixtures.fit_histogram(histogram, "dividemix"), want)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_parameters_are_bit_identical_for_any_number_of_parts(ranks):
    losses, labels = simulate("flip", num_instances=5000)
    parts = [LossHistogram(6) for _ in range(ranks)]
    for rank, part in enumerate(parts):
        part.update(losses[rank::ranks], labels[rank::ranks])
    total = LossHistogram(6)
    total.cells = sum(part.cells for part in parts)
    assert_same(LossMixtures.fit_histogram(total, "dividemix"), LossMixtures.fit(losses, labels, "dividemix"))


def test_parameters_are_bit_identical_for_any_number_of_threads():
    losses, labels = simulate("mislabel", num_classes=40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = LossMixtures.fit(losses, labels, "dividemix")
        torch.set_num_threads(2)
        two = LossMixtures.fit(losses, labels, "dividemix")
    finally:
        torch.set_num_threads(before)
    assert_same(one, two)


def _reduce_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    losses, labels = simulate("mislabel", num_instances=3001)
    losses[rank, 0] = float("nan")
    histogram = LossHistogram(6)
    histogram.update(losses[rank::2], labels[rank::2])
    histogram.reduce()
    torch.save(LossMixtures.fit_histogram(histogram, "dividemix").state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_reduce_over_two_processes_equals_one_process(tmp_path):
    mp.spawn(_reduce_on_rank, args=(str(tmp_path),), nprocs=2)
    losses, labels = simulate("mislabel", num_instances=3001)
    losses[:2, 0] = float("nan")
    want = LossMixtures.fit(losses, labels, "dividemix")
    for rank in (0, 1):
        assert_same(LossMixtures.from_state_dict(torch.load(tmp_path / f"{rank}.pt")), want)


@pytest.mark.parametrize("polarity", [0, 1])
def test_the_largest_losses_are_told_apart_to_the_width_of_a_bin(polarity):
    losses = 3 * torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) ** 3
    losses[::50, 1] = float("nan")
    losses[:300, 2], losses[300:310, 2] = 0.0, 100.0  # ties, and values beyond the last bin
    labels = torch.full((500, 4), polarity)
    labels[::3] = 1 - polarity
    histogram = LossHistogram(4)
    histogram.update(losses, labels)
    of_set = [x[torch.isfinite(x)].sort(descending=True).values for x in losses[labels[:, 0] == polarity].t()]
    for counts in ([1, 10, 5, 100], [50, 1, 150, 333]):
        edges = histogram.threshold_of_largest(polarity, torch.tensor(counts)).tolist()
        for values, count, edge in zip(of_set, counts, edges, strict=True):
            largest = min(values[count - 1].item(), 16)
            assert edge <= largest + 1e-6
            assert largest < edge * (1 + 1 / 64) + 2e-6
    most = [len(values) for values in of_set]
    assert histogram.threshold_of_largest(polarity, torch.tensor([0, 0, 0, 0])).tolist() == 4 * [float("inf")]
    assert histogram.threshold_of_largest(polarity, torch.tensor([n + 1 for n in most])).tolist() == 4 * [0.0]


def test_reduce_without_processes_changes_nothing():
    histogram = LossHistogram(2)
    histogram.update(torch.rand(10, 2), torch.zeros(10, 2))
    before = histogram.cells.clone()
    histogram.reduce()
    assert torch.equal(histogram.cells, before)


# ------------------------------------------------------------------------------------------------ degenerate sets

# Found by search: EM on these leaves overlapping components, of which the smaller-mean one wins nowhere.
NOTHING_CLEAN = [
    1.0572, 0.9296, 1.0833, 0.983, 1.0092, 0.8828, 1.0247, 0.9342, 0.9583, 0.9698, 1.0137, 1.1129, 0.9808, 1.0254,
    0.947, 1.0379, 1.018, 1.0579, 0.9767, 1.001, 0.9936, 1.0058, 1.066, 1.0543, 1.0952, 0.9382, 1.0627,
]  # fmt: skip
# ... and on these, a smaller-mean component of weight 7e-6.
NO_WEIGHT = [
    0.9692, 0.9633, 1.0434, 0.9545, 0.9994, 0.9594, 0.9744, 1.026, 0.9952, 0.9721, 1.0297, 1.0051, 1.0292, 0.9693,
    1.0558, 0.9895, 1.0416, 1.015, 1.0051, 0.9644, 0.9962, 0.9076, 1.0049, 1.027, 1.0009, 0.9941, 0.9421, 1.025,
    1.0092, 0.9622, 0.9945, 0.9625, 1.0128, 0.9953, 1.0062, 0.9533, 0.9666,
]  # fmt: skip
# ... and on these, a larger-mean component of weight 2e-6.
NO_WEIGHT_LARGER = [
    1.0033, 0.9932, 0.9921, 0.9767, 1.0208, 0.9937, 1.0042, 1.018, 1.0204, 0.9921, 1.0289, 0.9888, 0.9694, 0.9814,
    0.9983, 0.997, 0.9791, 1.0561, 1.0354, 1.0175, 0.9683, 0.9747,
]  # fmt: skip
UNTIL_CONVERGED = MixtureSettings(max_iter=1000, tol=1e-9, reg_covar=1e-4)


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ([], "sklearn"),
        ([0.7], "sklearn"),
        ([0.1, 0.1, 5.0, 5.0], "sklearn"),
        ([0.7] * 50, "sklearn"),
        ([0.0] * 50, "sklearn"),
        ([100.0] * 50, "sklearn"),
        ([0.700, 0.701] * 50, "sklearn"),  # one bin
        (torch.linspace(1e-5, 2e-5, 500), "dividemix"),  # the floor of the variance hides all differences
        (NOTHING_CLEAN, UNTIL_CONVERGED),
        (NO_WEIGHT, UNTIL_CONVERGED),
        (NO_WEIGHT_LARGER, UNTIL_CONVERGED),
    ],
)
def test_a_set_without_two_components_is_all_clean(values, settings):
    mixtures, p = fit_set(values, settings)
    assert not mixtures.separated[1, 0]
    assert (p == 1).all()
    for tensor in mixtures.state_dict().values():
        assert torch.isfinite(tensor.double()).all()


def test_the_found_sets_are_what_they_are_said_to_be():
    for values, settings in ((NOTHING_CLEAN, UNTIL_CONVERGED), (NO_WEIGHT, UNTIL_CONVERGED)):
        assert (sklearn_posterior(torch.tensor(values), settings) < 0.5).all()
    for values in (NO_WEIGHT, NO_WEIGHT_LARGER):
        assert sklearn_mixture(torch.tensor(values), UNTIL_CONVERGED).weights_.min() < 1e-4


def test_five_values_in_two_groups_are_enough():
    mixtures, p = fit_set([0.1, 0.1, 0.1, 5.0, 5.0])
    assert mixtures.separated[1, 0]
    assert (p > 0.5).tolist() == [[True] * 3 + [False] * 2] * 2


@pytest.mark.parametrize(
    "settings", [*MIXTURE_PRESETS, MixtureSettings(60, 0.0, 1e-12), MixtureSettings(1, 0.0, 1e-6)]
)
def test_no_set_however_odd_gives_nan_or_nothing_clean(settings):
    generator = torch.Generator().manual_seed(0)

    def uniform(rows: int) -> Tensor:
        return torch.rand(rows, generator=generator)

    odd = [
        lambda n: uniform(n) * 1e-6,
        lambda n: (torch.randn(n, generator=generator) * 8).exp(),
        lambda n: uniform(n).round() * 12 + 1e-3 * uniform(n),
        lambda n: (uniform(n) < 0.1) * 40 + 1e-8 * uniform(n),
        lambda n: 0.69 + 1e-3 * uniform(n),
        lambda n: (3 * uniform(n)).floor(),
        lambda n: 15.9 + uniform(n),
        lambda n: uniform(n) * 1e30,
        lambda n: 1 + 0.05 * torch.randn(n, generator=generator),
    ]
    for _ in range(40):
        n = int(torch.randint(0, 60, (1,), generator=generator))
        losses = torch.stack([make(n) for make in odd], 1)
        for value, share in (("nan", 0.02), ("inf", 0.01), ("-inf", 0.01)):
            losses[torch.rand(losses.shape, generator=generator) < share] = float(value)
        labels = torch.rand(losses.shape, generator=generator) < uniform(1)
        finite = torch.isfinite(losses)
        mixtures = LossMixtures.fit(losses, labels, settings)
        for tensor in mixtures.state_dict().values():
            assert torch.isfinite(tensor.double()).all()
        for monotone in (False, True):
            p = mixtures.clean_probability(losses, labels, monotone=monotone)
            assert ((p >= 0) & (p <= 1)).all()
            for label in (False, True):
                in_set = finite & (labels == label)
                assert (((p > 0.5) & in_set).any(0) | ~in_set.any(0)).all()


# -------------------------------------------------------------------------------------------- monotone correction


def random_mixtures(num_classes: int, seed: int) -> LossMixtures:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(2, num_classes, *shape, generator=generator, dtype=torch.float64)

    means = (uniform(2) * 8).sort(-1).values
    weights = uniform(1) * 0.98 + 0.01
    return LossMixtures(
        means=means,
        variances=10 ** (uniform(2) * 6 - 5),
        weights=torch.cat([weights, 1 - weights], -1),
        separated=torch.ones(2, num_classes, dtype=torch.bool),
        num_iter=torch.ones(2, num_classes, dtype=torch.int64),
    )


@pytest.mark.parametrize("seed", range(5))
def test_corrected_probability_never_rises_with_the_loss(seed):
    mixtures = random_mixtures(100, seed)
    losses = torch.linspace(0, 20, 2001)[:, None].expand(-1, 100)
    for label in (0, 1):
        labels = torch.full_like(losses, label)
        raw = mixtures.clean_probability(losses, labels, monotone=False)
        corrected = mixtures.clean_probability(losses, labels)
        assert (raw.diff(dim=0) > 1e-3).any()  # Eq. 8 as printed does rise
        assert (corrected.diff(dim=0) <= 1e-7).all()
        # Between the means both components agree on the direction: nothing to correct.
        mean = mixtures.means[label]
        between = (losses >= mean[:, 0]) & (losses <= mean[:, 1])
        assert torch.equal(corrected[between], raw[between])


def test_correction_where_the_smaller_component_is_the_wider_one():
    # N(1, 1) and N(3, 0.25), equal weights: log-odds = -(x - 1)^2 / 2 + 2 (x - 3)^2 + log(1 / 2), least at x = 11/3.
    mixtures = random_mixtures(1, 0)
    mixtures.means[:] = torch.tensor([1.0, 3.0])
    mixtures.variances[:] = torch.tensor([1.0, 0.25])
    mixtures.weights[:] = 0.5
    losses, labels = torch.tensor([[1.0], [3.0], [11 / 3], [5.0], [9.0]]), torch.ones(5, 1)
    odds = -((losses - 1) ** 2) / 2 + 2 * (losses - 3) ** 2 + np.log(0.5)
    raw = mixtures.clean_probability(losses, labels, monotone=False)
    torch.testing.assert_close(raw, torch.sigmoid(odds))
    assert raw[-1] > 0.999
    corrected = mixtures.clean_probability(losses, labels)
    torch.testing.assert_close(corrected, torch.sigmoid(torch.cat([odds[:3], odds[2:3], odds[2:3]])))


def test_correction_where_the_smaller_component_is_the_narrower_one():
    # N(1, 0.01) and N(2, 4): the log-odds peak at x = (1 * 4 - 2 * 0.01) / 3.99, and fall again towards 0.
    mixtures = random_mixtures(1, 0)
    mixtures.means[:] = torch.tensor([1.0, 2.0])
    mixtures.variances[:] = torch.tensor([0.01, 4.0])
    mixtures.weights[:] = 0.5
    peak = 3.98 / 3.99
    losses, labels = torch.tensor([[0.0], [0.5], [peak], [1.5], [3.0]]), torch.ones(5, 1)
    raw = mixtures.clean_probability(losses, labels, monotone=False)
    corrected = mixtures.clean_probability(losses, labels)
    assert raw[0] < 0.01
    torch.testing.assert_close(corrected, torch.cat([raw[2:3], raw[2:3], raw[2:]]))


# ------------------------------------------------------------------------------------------------- dtypes, values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_equal_float32_of_the_same_values(dtype):
    losses, labels = simulate("mislabel", num_instances=1000)
    losses = losses.to(dtype)
    mixtures = LossMixtures.fit(losses, labels, "dividemix")
    assert_same(mixtures, LossMixtures.fit(losses.float(), labels, "dividemix"))
    got = mixtures.clean_probability(losses, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, mixtures.clean_probability(losses.float(), labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bfloat16])
def test_labels_of_any_dtype(dtype):
    losses, labels = simulate("mislabel", num_instances=500)
    assert_same(LossMixtures.fit(losses, labels.to(dtype), "dividemix"), LossMixtures.fit(losses, labels, "dividemix"))


def test_memory_layout_does_not_matter():
    losses, labels = simulate("mislabel", num_instances=5000)
    want = LossMixtures.fit(losses, labels, "dividemix")
    assert_same(LossMixtures.fit(losses.t().contiguous().t(), labels, "dividemix"), want)
    assert_same(LossMixtures.fit(losses, labels.t().contiguous().t(), "dividemix"), want)
    assert_same(LossMixtures.fit(losses.clone().requires_grad_(), labels, "dividemix"), want)


@pytest.mark.parametrize("num_instances", [300, 5000])
def test_losses_that_are_not_finite_are_left_out_and_never_clean(num_instances):
    losses, labels = simulate("mislabel", num_instances=num_instances)
    histogram = LossHistogram(6)
    histogram.update(losses, labels)
    want = histogram.num_values
    extra = torch.tensor([float("nan"), float("inf"), -float("inf")])[:, None].expand(3, 6)
    more, more_labels = torch.cat([losses, extra]), torch.cat([labels, torch.ones(3, 6, dtype=torch.bool)])
    with_extra = LossHistogram(6)
    with_extra.update(more, more_labels)
    assert torch.equal(with_extra.num_values, want)
    assert want.sum() == losses.numel()
    mixtures = LossMixtures.fit_histogram(with_extra, "dividemix")
    assert_same(mixtures, LossMixtures.fit_histogram(histogram, "dividemix"))
    p = mixtures.clean_probability(more, more_labels)
    assert (p[-3:] == 0).all()
    assert torch.isfinite(p).all()


def test_a_loss_that_is_not_finite_is_not_clean_in_a_degenerate_set_either():
    _, p = fit_set([0.5, 0.5, float("nan"), float("inf")])
    assert p.tolist() == [[1, 1, 0, 0]] * 2


def test_values_beyond_the_histogram_count_as_its_ends():
    outside = [-1e-3, 0.0, 0.0, 1e-30, 16.0, 50.0, 1e30]
    inside = [0.0, 0.0, 0.0, 0.0, 15.999999, 15.999999, 15.999999]
    mixtures, p = fit_set(outside)
    assert_same(mixtures, fit_set(inside)[0])
    assert (p > 0.5).tolist() == [[True] * 4 + [False] * 3] * 2
    torch.testing.assert_close(mixtures.means[1, 0], torch.tensor([0.0, 16.0], dtype=torch.float64), atol=1e-4, rtol=0)


def test_tiny_losses_keep_their_moments():
    values = torch.logspace(-9, -4.5, 1000)
    mixtures, _ = fit_set(torch.cat([values, torch.full((10,), 3.0)]), MixtureSettings(3, 0.0, 1e-12))
    torch.testing.assert_close(mixtures.means[1, 0, 0], values.double().mean(), rtol=1e-5, atol=0)
    want = values.double().var(correction=0) + 1e-12
    torch.testing.assert_close(mixtures.variances[1, 0, 0], want, rtol=1e-5, atol=0)


def test_a_hundred_million_instances_do_not_overflow():
    losses, labels = simulate("mislabel", num_instances=1000, num_classes=3)
    losses[:, 0] = 15.999999  # the largest offset of a bin, in one bin
    histogram = LossHistogram(3)
    histogram.update(losses, labels)
    want = LossMixtures.fit_histogram(histogram, "dividemix")
    histogram.cells *= 100_000
    assert (histogram.cells >= 0).all()
    assert histogram.num_values.sum() == 3e8
    got = LossMixtures.fit_histogram(histogram, "dividemix")
    assert torch.equal(got.num_iter, want.num_iter)
    assert torch.equal(got.separated, want.separated)
    torch.testing.assert_close(got.means, want.means, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.variances, want.variances, rtol=1e-7, atol=0)


def test_no_instance_at_all():
    losses = torch.zeros(0, 3)
    mixtures = LossMixtures.fit(losses, losses, "dividemix")
    assert not mixtures.separated.any()
    assert mixtures.clean_probability(losses, losses).shape == (0, 3)


# ----------------------------------------------------------------------------------------------- state and errors


def test_states_go_through_safetensors_and_back(tmp_path):
    losses, labels = simulate("mislabel", num_instances=500)
    histogram = LossHistogram(6)
    histogram.update(losses, labels)
    mixtures = LossMixtures.fit_histogram(histogram, "dividemix")
    save_file({k: v.contiguous() for k, v in mixtures.state_dict().items()}, tmp_path / "mixtures.safetensors")
    assert_same(LossMixtures.from_state_dict(load_file(tmp_path / "mixtures.safetensors")), mixtures)


def test_states_of_another_shape_are_refused():
    state = LossMixtures.fit_histogram(LossHistogram(3), "dividemix").state_dict()
    with pytest.raises(ValueError, match=r"'separated' .* is \(2, 1\); it must be a tensor of shape \(2, 3\)"):
        LossMixtures.from_state_dict({**state, "separated": torch.ones(2, 1)})
    with pytest.raises(ValueError, match=r"'means' .* is missing"):
        LossMixtures.from_state_dict({name: x for name, x in state.items() if name != "means"})


def test_wrong_shapes_are_refused():
    histogram, mixtures = LossHistogram(3), LossMixtures.fit_histogram(LossHistogram(3), "dividemix")
    for call in (histogram.update, mixtures.clean_probability):
        with pytest.raises(ValueError, match=r"losses have shape \(4, 2\); they must be \(instances, 3\)"):
            call(torch.zeros(4, 2), torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"losses have shape \(3,\)"):
            call(torch.zeros(3), torch.zeros(3))
        with pytest.raises(ValueError, match=r"labels have shape \(5, 3\) and losses \(4, 3\)"):
            call(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"losses have shape \(4,\); they must be \(instances, classes\)"):
        LossMixtures.fit(torch.zeros(4), torch.zeros(4), "dividemix")
    with pytest.raises(ValueError, match="labels have shape"):
        label_losses(torch.zeros(4, 3), torch.zeros(4))


def test_wrong_types_and_values_are_refused():
    whole = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"losses are torch.int64; they must be floating point"):
        LossHistogram(3).update(whole, whole)
    with pytest.raises(TypeError, match=r"logits are torch.int64"):
        label_losses(whole, whole)
    for wrong in (0.5, 2.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"labels hold {wrong:g}; each must be 0 or 1"):
            LossHistogram(3).update(torch.zeros(4, 3), torch.full((4, 3), wrong))
    for wrong in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="num_classes is"):
            LossHistogram(wrong)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"settings is 'fast'; it must be one of \['dividemix', 'sklearn'\]"):
        LossMixtures.fit_histogram(LossHistogram(3), "fast")
    with pytest.raises(ValueError, match="max_iter is 0"):
        MixtureSettings(0, 1e-3, 1e-6)
    with pytest.raises(ValueError, match="tol is -1"):
        MixtureSettings(10, -1, 1e-6)
    with pytest.raises(ValueError, match="reg_covar is 0"):
        MixtureSettings(10, 1e-3, 0)
