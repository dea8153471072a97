"""The challenge's epsilon and score against its own code, and against its rules tried one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expunge.audit import forgetting_score as challenge
from expunge.audit.epsilon import epsilon_bound
from expunge.core import Refused

# google-deepmind/unlearning_evaluation ffae0ff, metric.py, on the arrays of ``fixed``: its functions on the CPU, with
# assertions off (one asserts the truth of an array). Its rates are float32.
RELEASED = {
    16: (
        *(2.564937114715576, 2.484893321990967, 2.7080395221710205, 2.0794215202331543, 1.7917327880859375),
        *(1.7917327880859375, 1.9458873271942139, 1.7917327880859375, 2.3025691509246826, 2.564937114715576),
        *(2.564937114715576, 2.6390459537506104),
    ),
    64: (
        *(3.9318130016326904, 2.5648999214172363, 1.0985054969787598, 2.708007335662842, 3.526341676712036),
        3.433966636657715,
    ),
}
SCORES = {16: 0.0703125, 64: 0.057291666666666664}


def draw(rng: np.random.Generator, count: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Unlearned and retrained margins [count, examples] that differ in centre and spread."""
    base = rng.normal(2, 2, examples)
    retrained = base + rng.normal(0, 1, (count, examples))
    spread, shift = np.linspace(0.4, 1.6, examples), np.linspace(-1.5, 2.5, examples)
    return base + rng.normal(0, 1, (count, examples)) * spread + shift, retrained


def rules(u: np.ndarray, r: np.ndarray) -> float:
    """Every rule tried on every model, for one example."""
    positive, negative = (r, u) if np.median(r) > np.median(u) else (u, r)
    spans, n = (np.ptp(positive), np.ptp(negative)), len(u)
    if min(spans) / max(spans) < 0.01:
        return 50.0
    low, high = min(u.min(), r.min()), max(u.max(), r.max())
    tried = [
        ((positive < t).sum(), (negative >= t).sum()) for t in np.linspace(low, high, math.ceil((high - low) * 100))
    ]
    inner, outer = (negative, positive) if spans[0] >= spans[1] else (positive, negative)
    width = np.ptp(inner)
    first, last = inner.min() + width - 2.0, inner.max() + 2.0
    for right in np.linspace(first, last, math.ceil((last - first) * 100)):
        left = np.linspace(right - width - 2.0, right - width + 2.0, 400)[:, None]
        caught = [((left <= x) & (x <= right)).sum(1) for x in (inner, outer)]
        tried += list(zip(n - caught[0], caught[1], strict=True))
    best = -1.0
    for missed, wrong in set(tried):
        if missed == wrong == 0:
            return 50.0
        if missed and wrong:
            pairs = [(a / n, b / n) for a, b in ((wrong, missed), (missed, wrong)) if a < n]
            best = max([best, *(max(0.0, math.log(1 - 1e-5 - a) - math.log(b)) for a, b in pairs)])
    return best


def test_the_released_code() -> None:
    rng = np.random.default_rng(20230)
    for count, examples in ((16, 12), (64, 6)):
        unlearned, retrained = draw(rng, count, examples)
        found = challenge.epsilons(unlearned, retrained)
        assert np.allclose(found, RELEASED[count], rtol=0, atol=5e-7)
        assert challenge.scores(found, count).mean() == SCORES[count]


@pytest.mark.parametrize(("count", "decimals"), [(5, 9), (16, 9), (16, 1), (16, 2), (40, 9)])
def test_ranks_equal_every_rule_of_the_grid(count: int, decimals: int) -> None:
    """Exactly, also where values are on thresholds and on each other."""
    unlearned, retrained = (x.round(decimals) for x in draw(np.random.default_rng(count), count, 15))
    wanted = [rules(unlearned[:, i], retrained[:, i]) for i in range(15)]
    assert np.allclose(challenge.epsilons(unlearned, retrained), wanted, rtol=0, atol=1e-12)


def test_the_extremes() -> None:
    rng = np.random.default_rng(0)
    near = rng.normal(size=(16, 1))
    assert challenge.epsilons(near + 9, near)[0] == 50.0  # apart
    assert challenge.epsilons(near * 1e-4, near)[0] == 50.0  # one of them all alike
    assert challenge.epsilons(near, near)[0] < 0.01
    assert challenge.epsilons(np.ones((4, 1)), np.ones((4, 1)))[0] == 0.0
    assert challenge.epsilons(np.ones((4, 1)), np.zeros((4, 1)))[0] == 50.0


def test_score_buckets() -> None:
    epsilon = np.array([0.0, 0.49, 0.5, 1.0, 6.49, 6.5, 6.99, 7.0, 50.0])
    assert challenge.scores(epsilon, 512).tolist() == [1, 1, 0.5, 0.25, 2**-12, 2**-13, 2**-13, 0, 0]
    assert challenge.scores(np.array([2.9, 3.0]), 16).tolist() == [2**-5, 0]  # ceil(log 15) = 3


@pytest.mark.parametrize(("count", "epsilon", "score"), [(16, 1.5, 0.19), (64, 1.55, 0.18)])
def test_the_null_table(count: int, epsilon: float, score: float) -> None:
    """Section 21, at its deviation of 2: equal populations score about 0.19, not 1. Its cells are of 150 examples.

    Three standard errors of both: 3 sqrt(0.36^2/150 + 0.36^2/800) of epsilon, and 0.10 for 0.36 of F.
    """
    rng = np.random.default_rng(count)
    found = challenge.epsilons(2 * rng.normal(size=(count, 800)), 2 * rng.normal(size=(count, 800)))
    assert found.mean() == pytest.approx(epsilon, abs=0.096)
    assert challenge.scores(found, count).mean() == pytest.approx(score, abs=0.027)


def test_the_bound_of_perfect_separation() -> None:
    """By arithmetic: no error in 512 models a side certifies about 4.9, in 64 about 2.8."""
    for count, wanted in ((512, 4.92), (64, 2.83)):
        apart = np.arange(count, dtype=float)[:, None] / count
        found = epsilon_bound(apart + 5, apart, apart + 5, apart)[0]
        upper = 1 - 0.025 ** (1 / count)
        assert found == pytest.approx(math.log(1 - 1e-5 - upper) - math.log(upper))
        assert found == pytest.approx(wanted, abs=0.02)


def test_the_bound_holds_where_the_truth_is_known() -> None:
    """Equal populations: epsilon is 0, so a bound above 0 is a false one, in at most one example of twenty."""
    rng = np.random.default_rng(4)
    null = epsilon_bound(*(rng.normal(size=(32, 2000)) for _ in range(4)))
    assert (null > 0).mean() <= 0.05
    parts = [rng.laplace(place, 1, (128, 400)) for place in (1.0, 0.0, 1.0, 0.0)]
    shifted = epsilon_bound(*parts)  # Laplace samples 1 apart: epsilon is 1, the ratio of the densities
    assert (shifted > 1).mean() <= 0.05
    assert 0.2 < shifted.mean() < 1
    narrow = epsilon_bound(*(rng.normal(size=(128, 300)) * spread for spread in (0.2, 1, 0.2, 1)))
    assert narrow.mean() > 1  # no single threshold tells these apart: an interval does


def test_bad_input() -> None:
    good = np.zeros((16, 3))
    with pytest.raises(Refused, match="as many unlearned as retrained"):
        challenge.epsilons(good, good[:8])
    with pytest.raises(Refused, match="2 models or more"):
        challenge.epsilons(good[:1], good[:1])
    with pytest.raises(Refused, match="NaN"):
        challenge.epsilons(good + math.inf, good)
    with pytest.raises(Refused, match="2 models a side"):
        challenge.scores(np.zeros(3), 1)
    with pytest.raises(Refused, match="same examples"):
        epsilon_bound(good, good, good[:, :2], good[:, :2])
