"""Debiased CKA against other people's code and a sum over quadruples; what it must and must not see."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from expunge.audit.similarity import (
    cka_without_each,
    debiased_cka,
    jackknife,
    procrustes_distance,
    procrustes_without_each,
    released_cka,
)
from expunge.core import Refused


def arrays(seed: int, n: int, d: int, e: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of n examples with `share` of four common directions, and other means."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 4))
    x = share * common @ rng.normal(size=(4, d)) + rng.normal(size=(n, d)) + 1.5
    y = share * common @ rng.normal(size=(4, e)) + rng.normal(size=(n, e)) - 0.5
    return x, y


# Run on these arrays: feature_space_linear_cka(x, y, debiased) and cka(gram_linear(x), gram_linear(y), debiased) of
# google-research/representation_similarity (Kornblith et al.), which agree to 1e-15, and the HSIC of torch-cka 0.21 in
# float64, which agrees to 1e-14. Debiased, then biased.
THEIRS = {
    (0, 60, 10, 14, 1.0): (0.7733858671302658, 0.7856713644709667),
    (1, 20, 50, 33, 0.3): (0.36872203664661296, 0.7346229754132716),
    (2, 40, 8, 90, 0.7): (0.6423290240318892, 0.692820836856006),
    (3, 30, 64, 64, 0.0): (-0.03380233083494937, 0.6768554575466479),
}


@pytest.mark.parametrize("settings", list(THEIRS))
def test_agrees_with_the_authors_code(settings: tuple[int, int, int, int, float]) -> None:
    x, y = arrays(*settings)
    debiased, biased = THEIRS[settings]
    assert debiased_cka(x, y) == pytest.approx(debiased, abs=1e-12)
    assert released_cka(x, y) == pytest.approx(biased, abs=1e-12)


def hsic_by_quadruples(x: np.ndarray, y: np.ndarray) -> float:
    """The mean over all ordered quadruples of different examples of K_ij (L_ij + L_kl - 2 L_ik)."""
    gram, also = x @ x.T, y @ y.T
    terms = [
        gram[i, j] * (also[i, j] + also[k, m] - 2 * also[i, k])
        for i, j, k, m in itertools.permutations(range(len(x)), 4)
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize(("d", "e"), [(3, 5), (12, 20)])
def test_is_the_mean_over_quadruples(d: int, e: int) -> None:
    x, y = arrays(4, 9, d, e, 0.8)
    wanted = hsic_by_quadruples(x, y) / np.sqrt(hsic_by_quadruples(x, x) * hsic_by_quadruples(y, y))
    assert debiased_cka(x, y) == pytest.approx(wanted, rel=1e-10)


def test_feature_space_and_gram_space_agree() -> None:
    """Columns of zeros change nothing but the way it is computed."""
    x, y = arrays(5, 40, 30, 20, 0.5)
    wide = np.concatenate([x, np.zeros((40, 30))], axis=1)
    np.testing.assert_allclose(cka_without_each(wide, y), cka_without_each(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [6, 70])
def test_without_each_is_without_each(d: int) -> None:
    x, y = arrays(6, 30, d, 9, 0.6)
    kept = [np.arange(30) != i for i in range(30)]
    wanted = [debiased_cka(x, y), *(debiased_cka(x[some], y[some]) for some in kept)]
    np.testing.assert_allclose(cka_without_each(x, y), wanted, rtol=0, atol=1e-11)


def test_invariant_to_rotation_scale_and_shift_only() -> None:
    x, y = arrays(7, 50, 12, 12, 0.7)
    turn = np.linalg.qr(np.random.default_rng(8).normal(size=(12, 12)))[0]
    moved = 3.7 * y @ turn + 100.0
    for measure, same in ((debiased_cka, 1.0), (released_cka, 1.0), (procrustes_distance, 0.0)):
        assert measure(x, x) == pytest.approx(same, abs=1e-9)
        assert measure(x, -2 * x @ turn + 5) == pytest.approx(same, abs=1e-9)
        assert measure(x, moved) == pytest.approx(measure(x, y), abs=1e-9)
        assert measure(x, y) == pytest.approx(measure(y, x), abs=1e-12)
        assert abs(measure(x, y * np.arange(1, 13)) - measure(x, y)) > 1e-3


def test_independent_features_with_few_examples() -> None:
    """The debiased form is 0 on average; the released one is far above it, and tends to 1 with the features."""
    pairs = [arrays(seed, 64, 256, 256, 0.0) for seed in range(40)]
    debiased = [debiased_cka(x, y) for x, y in pairs]
    released = [released_cka(x, y) for x, y in pairs]
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / np.sqrt(len(pairs))
    assert np.std(debiased) < 0.05
    assert min(released) > 0.7


def test_released_form_depends_on_order_and_batch() -> None:
    """Batches in class order see no difference between classes, which is all that these two share."""
    rng = np.random.default_rng(9)
    means = np.repeat(np.eye(8), 64, axis=0) * 20
    x, y = means + rng.normal(size=(512, 8)), means + rng.normal(size=(512, 8))
    mixed = rng.permutation(512)
    assert released_cka(x[mixed], y[mixed], 64) > 0.95
    assert released_cka(x, y, 64) < 0.3
    assert debiased_cka(x[mixed], y[mixed]) == pytest.approx(debiased_cka(x, y), abs=1e-10)


def test_procrustes_is_the_best_rotation() -> None:
    """Against the rotation itself, from the singular vectors."""
    x, y = arrays(10, 40, 6, 6, 0.8)
    a, b = ((part - part.mean(0)) / np.linalg.norm(part - part.mean(0)) for part in (x, y))
    left, _, right = np.linalg.svd(b.T @ a)
    assert procrustes_distance(x, y) == pytest.approx(np.square(a - b @ (left @ right)).sum(), rel=1e-10)
    other = np.linalg.qr(np.random.default_rng(11).normal(size=(6, 6)))[0]
    assert np.square(a - b @ other).sum() > procrustes_distance(x, y)


def weighted_distance(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """The Procrustes distance of examples that count `weight` times each."""
    a, b = (np.sqrt(weight)[:, None] * (part - np.average(part, axis=0, weights=weight)) for part in (x, y))
    return 2 - 2 * np.linalg.norm(a.T @ b, "nuc") / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize("d", [6, 40])
def test_procrustes_without_each_is_the_first_order(d: int) -> None:
    """Against finite differences in the weight of each example; and near to leaving it out, where it is one of many."""
    x, y = arrays(16, 30, d, 9, 0.8)
    found = procrustes_without_each(x, y)
    assert found[0] == procrustes_distance(x, y)
    for i in range(30):
        more, less = (weighted_distance(x, y, np.where(np.arange(30) == i, 1 + step, 1.0)) for step in (1e-5, -1e-5))
        assert found[1 + i] == pytest.approx(found[0] - (more - less) / 2e-5, abs=1e-7)
    x, y = arrays(16, 400, 6, 9, 0.8)
    exact = [procrustes_distance(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(400)]
    assert np.std(procrustes_without_each(x, y)[1:]) == pytest.approx(np.std(exact), rel=0.03)


def test_jackknife_interval_covers() -> None:
    """The truth is known: x = z A, y = z B + noise, so CKA = |cov(x, y)|^2 / (|cov(x)| |cov(y)|)."""
    rng = np.random.default_rng(12)
    a, b = rng.normal(size=(5, 8)), rng.normal(size=(5, 8))
    cov = (a.T @ b, a.T @ a, b.T @ b + np.eye(8))
    truth = np.square(cov[0]).sum() / (np.linalg.norm(cov[1]) * np.linalg.norm(cov[2]))
    hits, values = 0, []
    for _ in range(300):
        z = rng.normal(size=(100, 5))
        value, low, high = jackknife(cka_without_each(z @ a, z @ b + rng.normal(size=(100, 8))))
        hits += low <= truth <= high
        values.append(value)
    assert abs(np.mean(values) - truth) < 0.01
    assert 0.91 <= hits / 300 <= 0.985  # 95 % less or more three standard errors of 300 trials


def test_repeated_examples_would_bias_a_bootstrap() -> None:
    """Why the interval is no bootstrap: resampling with repetition brings independent features above 0."""
    x, y = arrays(13, 64, 200, 200, 0.0)
    rows = np.random.default_rng(14).integers(0, 64, 64)
    assert debiased_cka(x[rows], y[rows]) > 0.2 > abs(debiased_cka(x, y))


def test_features_that_do_not_vary_share_nothing() -> None:
    x, y = arrays(15, 30, 6, 6, 0.5)
    flat = np.full((30, 6), 1e3)
    assert debiased_cka(flat, y) == debiased_cka(flat, flat) == released_cka(x, flat) == 0.0
    assert procrustes_distance(flat, y) == 2.0


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (np.ones((9, 2)), np.ones((8, 2)), "same n"),
        (np.ones((3, 2)), np.ones((3, 2)), "at least 4"),
        (np.ones(9), np.ones(9), "expected"),
        (np.full((9, 2), np.nan), np.ones((9, 2)), "finite"),
    ],
)
def test_bad_features_are_refused(x: np.ndarray, y: np.ndarray, said: str) -> None:
    with pytest.raises(Refused, match=said):
        debiased_cka(x, y)
