"""How alike two sets of features of the same examples are: debiased linear CKA and the Procrustes distance.

Pure functions on numpy arrays, in float64. What they are read beside, and on which layers, ``representation`` says.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from expunge.core import Refused

RELEASED_BATCH = 512


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA with unbiased HSIC: 1 for features that are equal up to rotation and scale, 0 on average for independent.

    CKA = H(x, y) / sqrt(H(x, x) H(y, y)) with, for K = x x' and L = y y' without their diagonals, n examples,
    H = (tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n (n-3)). In O(n d^2) where n is the larger, through
    the Gram matrices in O(n^2 d) where d is; equal to rounding. Features that do not vary share nothing: 0. It may
    fall below 0, and is not exactly unbiased, being a ratio.

    Args:
        x: [n, d], n >= 4. y: [n, e], the same examples in the same order.

    Raises:
        Refused: for arrays of different examples, fewer than 4 of them, or numbers that are not finite.

    Paper: Song et al. 2012 (HSIC), Kornblith et al. 2019 (CKA), Nguyen et al. 2021 (debiased).
    """
    return float(_cka(*_pair(x, y, 4))[0])


def cka_without_each(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[1 + n] the debiased CKA, and the same without each example in turn, in the time of one (n >= 5)."""
    return _cka(*_pair(x, y, 5), without=True)


def released_cka(x: np.ndarray, y: np.ndarray, batch: int = RELEASED_BATCH) -> float:
    """Linear CKA as the benchmark released it: biased, per batch in the given order, averaged over batches.

    For comparison only. Where a batch has fewer examples than features, independent features score far above 0; it
    depends on the order of the examples. A last batch of fewer than two examples is left out.

    Paper: arXiv:2503.06991, released code.
    """
    x, y = _pair(x, y, 2)
    found = []
    for start in range(0, len(x), batch):
        a, b = (centred(part[start : start + batch]) for part in (x, y))
        if len(a) > 1:
            size = np.linalg.norm(a @ a.T) * np.linalg.norm(b @ b.T)
            found.append(float(np.sum((a @ a.T) * (b @ b.T)) / size) if size > 0 else 0.0)
    return float(np.mean(found))


def procrustes_distance(x: np.ndarray, y: np.ndarray) -> float:
    """min over orthogonal Q of ||x - y Q||^2 for centred features of norm 1: 2 - 2 ||x'y||_*, in 0 to 2.

    Args:
        x: [n, d], n >= 2. y: [n, e]: the narrower is padded with zeros. Features that do not vary are 2 away.

    Paper: Ding et al. 2021.
    """
    return float(_procrustes(*_pair(x, y, 2))[0])


def procrustes_without_each(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[1 + n] the Procrustes distance, and to first order the same without each example, in the time of one.

    From the derivative of the nuclear norm by the weight of an example, x_i' U V' y_i: a decomposition per example
    would cost n of them.
    """
    return _procrustes(*_pair(x, y, 3))


def _procrustes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = narrow(x), narrow(y)
    sizes = np.array([np.square(part).sum() for part in (x, y)])
    if not sizes.all():
        return np.full(1 + len(x), 2.0)
    left, values, right = np.linalg.svd(x.T @ y, full_matrices=False)
    scale = np.sqrt(sizes.prod())
    likeness = min(1.0, values.sum() / scale)
    shares = (np.square(part).sum(1) / size for part, size in zip((x, y), sizes, strict=True))
    each = ((x @ left) * (y @ right.T)).sum(1) / scale - likeness / 2 * sum(shares)
    return 2 - 2 * np.concatenate([[likeness], likeness - each])


def jackknife(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(value, low, high) from a statistic of all and of all but each of g groups of equal size, [1 + g].

    Standard error sqrt((g - 1) / g sum (v_i - mean v)^2), Student's with g - 1 degrees of freedom.
    """
    groups = len(values) - 1
    error = math.sqrt((groups - 1) / groups * float(np.square(values[1:] - values[1:].mean()).sum()))
    half = float(stats.t.ppf(0.5 + level / 2, groups - 1)) * error
    return float(values[0]), float(values[0]) - half, float(values[0]) + half


def _pair(x: np.ndarray, y: np.ndarray, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(part, np.float64) for part in (x, y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < fewest:
        raise Refused(
            f"features of shapes {x.shape} and {y.shape} cannot be compared: expected [n, d] and [n, e] of the same n "
            f"examples, at least {fewest}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise Refused("features that are not finite cannot be compared: was the model's run stopped by a guard?")
    return centred(x), centred(y)


def centred(x: np.ndarray) -> np.ndarray:
    """Features [n, d] less their means over the examples."""
    return x - x.mean(0)


def narrow(x: np.ndarray) -> np.ndarray:
    """The same features rotated into no more dimensions than examples: nothing here sees a rotation."""
    return x if x.shape[1] <= len(x) else np.asarray(np.linalg.qr(x.T, mode="r")).T


def _cka(x: np.ndarray, y: np.ndarray, without: bool = False) -> np.ndarray:
    """[1] or [1 + n] of centred features."""
    cross, own, other = (_hsic(a, b, without) for a, b in ((x, y), (x, x), (y, y)))
    tiny = np.finfo(np.float64).eps * np.array([np.square(part).sum() ** 2 for part in (x, y)]) / len(x)
    good = (own > tiny[0]) & (other > tiny[1])
    return np.divide(cross, np.sqrt(np.where(good, own * other, 1.0)), out=np.zeros_like(cross), where=good)


def _hsic(x: np.ndarray, y: np.ndarray, without: bool) -> np.ndarray:
    """[1] or [1 + n]: n (n - 3) times the unbiased HSIC, of all examples and of all but each.

    From row sums: k = K1, l = L1 and q_i = sum_j K_ij L_ij, from which dropping an example is a subtraction.
    """
    n, one = len(x), np.ones(len(x))
    if n < max(x.shape[1], y.shape[1]):
        gram, also = (_hollow(part) for part in (x, y))
        k, ell, q = gram.sum(1), also.sum(1), (gram * also).sum(1)
        across = gram @ ell + also @ k if without else one
    else:
        a, b = np.square(x).sum(1), np.square(y).sum(1)
        k, ell = x @ (x.T @ one) - a, y @ (y.T @ one) - b
        q = ((x @ (x.T @ y)) * y).sum(1) - a * b
        across = x @ (x.T @ ell) - a * ell + y @ (y.T @ k) - b * k if without else one
    total = _combined(q.sum(), k.sum(), ell.sum(), k @ ell, n)
    if not without:
        return np.array([total])
    rest = _combined(q.sum() - 2 * q, k.sum() - 2 * k, ell.sum() - 2 * ell, k @ ell - k * ell - across + q, n - 1)
    return np.concatenate([[total], rest * (n * (n - 3)) / ((n - 1) * (n - 4))])


def _combined(trace: np.ndarray, k: np.ndarray, ell: np.ndarray, both: np.ndarray, n: int) -> np.ndarray:
    return trace + k * ell / ((n - 1) * (n - 2)) - 2 / (n - 2) * both


def _hollow(x: np.ndarray) -> np.ndarray:
    gram = x @ x.T
    np.fill_diagonal(gram, 0.0)
    return gram
