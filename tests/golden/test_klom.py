"""KLoM against both released estimators, closed forms for normal populations, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import energy_distance

from expunge.audit import klom
from expunge.core import Refused

# RoyRin/data-unlearning-bench eb261f9 (compute_binned_KL_div) and easydub/EasyDUB-code 5de3c4c (binned_kl_divergence),
# run on the arrays of ``fixed()``, example by example.
EASYDUB = [
    4.137059743921757,
    2.4232887582544445,
    2.6692069171700865,
    0.39837982482872103,
    4.656490765475312,
    7.77361852513207,
]
SWAPPED = [
    1.4156753423811788,
    3.048542873386274,
    3.0427951197385035,
    1.8293113080069299,
    4.5733517233024195,
    2.268683541318364,
]
RENORMALISED = [
    4.137129741471873,
    2.4233187578044535,
    2.669256915920128,
    0.3983798248287211,
    4.656560763025427,
    7.773748516682804,
]


def fixed() -> tuple[np.ndarray, np.ndarray]:
    """Unlearned and retrained margins [30, 6]; some columns narrow, one beyond the clip."""
    rng = np.random.default_rng(2024)
    unlearned = rng.normal(1, 2, (30, 6)) * np.array([1, 0.3, 2, 1, 40, 1])
    return unlearned, rng.normal(1.5, 2, (30, 6)) * np.array([1, 0.6, 1, 1, 40, 0.01])


def by_hand(p: np.ndarray, q: np.ndarray) -> float:
    """The published rules for one example, written out."""
    p, q = np.clip(p, -100, 100), np.clip(q, -100, 100)
    start, end = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(start, end if end > start else start + 1, 21)
    counts = [[sum(edges[b] <= v < edges[b + 1] for v in x) for b in range(20)] for x in (p, q)]
    ours, theirs = (np.array(c) / max(sum(c), 1) for c in counts)
    return float(sum(a * math.log(a / max(b, 1e-5)) for a, b in zip(ours, theirs, strict=True) if a > 0))


def test_both_released_estimators_in_both_orders() -> None:
    unlearned, retrained = fixed()
    assert np.allclose(klom.released(unlearned, retrained), EASYDUB, rtol=0, atol=1e-9)
    assert np.allclose(klom.released(retrained, unlearned), SWAPPED, rtol=0, atol=1e-9)
    assert np.allclose(klom.released(unlearned, retrained, renormalise=True), RENORMALISED, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [2, 7, 60])
def test_the_rules_written_out(count: int) -> None:
    """Also with ties on the edges of bins, where a value goes up, and with the largest value dropped."""
    rng = np.random.default_rng(count)
    p, q = rng.normal(size=(count, 40)) * 9, rng.normal(size=(count + 3, 40)) * 9
    p[:, :20], q[:, :20] = p[:, :20].round(), q[:, :20].round()
    assert np.allclose(klom.released(p, q), [by_hand(p[:, i], q[:, i]) for i in range(40)], atol=1e-9)


def test_the_largest_value_is_dropped() -> None:
    p, q = np.array([[0.0], [1.0]]), np.array([[0.0], [0.0]])
    assert klom.released(p, q)[0] == 0.0  # the 1 is gone: with it, this would be near the ceiling
    alone = np.full((3, 1), 5.0)
    assert klom.released(alone, np.zeros((3, 1)))[0] == 0.0
    assert np.isnan(klom.released(alone, np.zeros((3, 1)), renormalise=True)[0])
    assert klom.released(alone, alone)[0] == 0.0
    assert klom.released(np.zeros((3, 1)), alone + np.array([[0], [1e-3], [1e-2]]))[0] == pytest.approx(math.log(1e5))


def test_gaussian_kl_of_known_normals() -> None:
    """20,000 models: N(1, 2^2) from N(0, 1) is log(1/2) + (4 + 1)/2 - 1/2."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(1, 2, (20000, 20)), rng.normal(0, 1, (20000, 20))
    assert klom.gaussian(p, q).mean() == pytest.approx(math.log(0.5) + 2.5 - 0.5, rel=0.01)
    assert klom.gaussian(q, p).mean() == pytest.approx(math.log(2) + 2 / 8 - 0.5, rel=0.01)
    assert np.abs(klom.gaussian(p, p)).max() < 1e-12


@pytest.mark.parametrize("count", [10, 20, 50])
def test_the_gaussian_floor_is_its_closed_form(count: int) -> None:
    rng = np.random.default_rng(count)
    found = klom.gaussian(rng.normal(3, 5, (count, 20000)), rng.normal(3, 5, (count, 20000)))
    assert found.mean() == pytest.approx(((count - 1) / (count - 3) * (1 + 2 / count) - 1) / 2, rel=0.05)


# Simulated apart, before ours was written: mean and P95 over examples of equal normal populations, at 10, 50 and 100 models.
@pytest.mark.parametrize(("count", "mean", "p95"), [(10, 5.57, 8.0), (50, 0.84, 1.7), (100, 0.34, 0.65)])
def test_the_null_table(count: int, mean: float, p95: float) -> None:
    rng = np.random.default_rng(21)
    found = klom.released(rng.normal(size=(count, 3000)), rng.normal(size=(count, 3000)))
    assert found.mean() == pytest.approx(mean, rel=0.05)
    assert np.quantile(found, 0.95) == pytest.approx(p95, rel=0.07)


def test_energy_distance_is_unbiased_and_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.normal(0.5, 2, (6, 30)), rng.normal(0, 1, (9, 30))
    n, m = len(p), len(q)
    inner = [np.abs(x[:, None] - x[None]).mean((0, 1)) for x in (p, q)]  # over all pairs, equal ones too
    biased = klom.energy(p, q) + inner[0] * (n / (n - 1) - 1) + inner[1] * (m / (m - 1) - 1)
    assert np.allclose(biased, [energy_distance(p[:, i], q[:, i]) ** 2 for i in range(30)])
    equal = klom.energy(rng.normal(size=(4, 20000)), rng.normal(size=(4, 20000)))
    assert abs(equal.mean()) < 4 * equal.std() / math.sqrt(20000)


def test_examples_do_not_touch_each_other() -> None:
    p, q = fixed()
    for kind in (klom.released, klom.gaussian, klom.energy):
        assert np.allclose(kind(p, q), [kind(p[:, [i]], q[:, [i]])[0] for i in range(6)])


@pytest.mark.parametrize("kind", [klom.released, klom.gaussian, klom.energy])
def test_bad_input(kind: object) -> None:
    good = np.zeros((4, 3))
    with pytest.raises(Refused, match="unlearned margins have shape"):
        kind(np.zeros(4), good)
    with pytest.raises(Refused, match="of 2 examples and retrained ones of 3"):
        kind(np.zeros((4, 2)), good)
    broken = good.copy()
    broken[1, 1] = math.nan
    with pytest.raises(Refused, match="retrained margins hold NaN"):
        kind(good, broken)
    if kind is not klom.released:
        with pytest.raises(Refused, match="2 models or more"):
            kind(good[:1], good)
