"""Intervals against independent implementations, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from expunge.audit import intervals
from expunge.core import Key, Refused


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 40), (40, 40), (3, 10), (517, 1000)])
def test_proportions_agree_with_scipy(k: int, n: int) -> None:
    for ours, method in ((intervals.wilson, "wilson"), (intervals.clopper_pearson, "exact")):
        for level in (0.9, 0.95):
            theirs = stats.binomtest(k, n).proportion_ci(level, method=method)
            assert np.allclose(ours(k, n, level), (theirs.low, theirs.high), atol=1e-12)


def test_proportions_are_vectorised_and_refuse_nonsense() -> None:
    low, high = intervals.wilson([0, 5, 10], 10)
    assert low.shape == high.shape == (3,)
    assert low[1] == intervals.wilson(5, 10)[0]
    for k, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(Refused, match="successes"):
            intervals.wilson(k, n)
    with pytest.raises(Refused, match="level"):
        intervals.clopper_pearson(1, 2, 1.0)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.95])
def test_proportions_cover(p: float) -> None:
    """Exact coverage: the binomial probability of the counts whose interval holds p."""
    n = 60
    counts = np.arange(n + 1)
    for method, least in ((intervals.wilson, 0.90), (intervals.clopper_pearson, 0.95)):
        low, high = method(counts, n)
        assert stats.binom.pmf(counts[(low <= p) & (p <= high)], n, p).sum() >= least


def test_auc_counts_pairs_and_ties() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 6, 37), rng.integers(1, 7, 23)
    pairs = [(a > b) + 0.5 * (a == b) for a in ours for b in theirs]
    assert intervals.auc(ours, theirs) == pytest.approx(np.mean(pairs), abs=1e-12)
    labels = np.r_[np.ones(37), np.zeros(23)]
    assert intervals.auc(ours, theirs) == pytest.approx(roc_auc_score(labels, np.r_[ours, theirs]), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_auc_interval_covers(shift: float) -> None:
    rng, truth, hits = np.random.default_rng(1), stats.norm.cdf(shift / math.sqrt(2)), 0
    for _ in range(400):
        low, high = intervals.auc_interval(rng.normal(shift, 1, 40), rng.normal(0, 1, 60))
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.985  # 95 % within three standard errors


def test_auc_interval_of_perfect_separation_is_not_a_point() -> None:
    low, high = intervals.auc_interval(np.arange(10, 20), np.arange(10))
    assert high == 1.0
    assert low == pytest.approx(0.025 ** (1 / 10))
    assert intervals.auc_interval([1.0], [0.0]) == (0.0, 1.0)


def test_intervals_over_seeds() -> None:
    sample = [1.0, 2.0, 4.0, 7.0]
    expected = stats.t.interval(0.95, 3, np.mean(sample), stats.sem(sample))
    assert intervals.t_interval(sample) == pytest.approx(expected)
    assert intervals.t_interval([3.0]) == (-math.inf, math.inf)
    low, high = intervals.next_interval([2.0, 2.0, 2.0], prior=1.5)  # pooled variance (2 * 0 + 1.5) / 3
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(0.5 * 4 / 3))


def test_the_next_value_is_covered() -> None:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(2000):
        *known, new = rng.normal(5, 2, 5)
        low, high = intervals.next_interval(known)
        hits += low <= new <= high
    assert 0.935 <= hits / 2000 <= 0.965


def test_choices_do_not_depend_on_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(intervals.choices(7, 50, Key(3))))
    monkeypatch.setattr(intervals, "_CELLS", 40)
    assert np.array_equal(np.concatenate(list(intervals.choices(7, 50, Key(3)))), whole)
    assert np.array_equal(np.concatenate(list(intervals.choices(7, 50, Key(3), largest=1000))), whole)
    assert not np.array_equal(np.concatenate(list(intervals.choices(7, 50, Key(4)))), whole)


def test_resampled_statistics_equal_brute_force() -> None:
    rng = np.random.default_rng(5)
    ours, theirs, keys = rng.integers(0, 9, 31).astype(float), rng.integers(1, 9, 17).astype(float), (Key(1), Key(2))
    first = np.concatenate(list(intervals.choices(31, 20, keys[0])))
    second = np.concatenate(list(intervals.choices(17, 20, keys[1])))
    wanted = [intervals.auc(ours[a], theirs[b]) for a, b in zip(first, second, strict=True)]
    assert np.allclose(intervals.resampled_auc(ours, theirs, 20, keys), wanted, atol=1e-12)
    assert np.allclose(intervals.resampled_mean(ours, 20, keys[0]), ours[first].mean(1))
    weights = rng.random(31)
    assert np.allclose(
        intervals.resampled_ratio(ours, weights, 20, keys[0]), [ours[a].sum() / weights[a].sum() for a in first]
    )


@pytest.mark.parametrize("truth", [0.0, 0.1, 0.4])
def test_distance_interval_covers_also_zero(truth: float) -> None:
    """The mean of three |differences|, each the mean of 50 noisy examples: a percentile interval misses 0 always."""
    rng, hits, plain = np.random.default_rng(7), 0, 0
    for number in range(200):
        samples = rng.normal(truth, 1, (3, 50))
        seen = samples.mean(1)
        drawn = np.stack([intervals.resampled_mean(row, 200, Key(number).at(i)) for i, row in enumerate(samples)])
        low, high = intervals.distance_interval(float(np.abs(seen).mean()), np.abs(drawn - seen[:, None]).mean(0))
        hits += low <= truth <= high
        plain += intervals.percentile(np.abs(drawn).mean(0))[0] <= truth
    assert hits / 200 >= 0.93
    if truth == 0:
        assert plain == 0
