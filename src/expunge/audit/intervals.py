"""Intervals for what an audit reports: proportions, the area under a ROC curve, means over seeds, resampled statistics.

Pure functions on numpy arrays. Every draw comes from a Key, so the same call gives the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from expunge.core import Key, Refused

Interval = tuple[float, float]
_CELLS = 1 << 22  # resampled entries held at once: bounds the memory of a bootstrap, whatever the data


def wilson(successes: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson score interval of a proportion: close to its nominal coverage on average, also for few examples.

    Args:
        successes: count, any shape. n: trials, >= 1, same shape. level: in (0, 1).
    """
    k, n = _counts(successes, n, level)
    z2 = float(special.ndtri(0.5 + level / 2)) ** 2
    share = k / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return np.where(k == 0, 0.0, centre - half), np.where(k == n, 1.0, centre + half)


def clopper_pearson(successes: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Exact binomial interval: covers at least as often as it says, for every proportion (so it is wider)."""
    k, n = _counts(successes, n, level)
    tail = (1 - level) / 2
    low = np.where(k == 0, 0.0, special.betaincinv(np.maximum(k, 1), n - np.maximum(k, 1) + 1, tail))
    below = np.minimum(k, n - 1)
    return low, np.where(k == n, 1.0, special.betaincinv(below + 1, n - below, 1 - tail))


def _counts(successes: ArrayLike, n: ArrayLike, level: float) -> tuple[np.ndarray, np.ndarray]:
    k, total = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if np.any(total < 1) or np.any(k < 0) or np.any(k > total):
        raise Refused(f"expected 0 <= successes <= n with n >= 1, found {successes!r} of {n!r}")
    if not 0 < level < 1:
        raise Refused(f"level must lie in (0, 1), found {level!r}")
    return k, total


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval of the mean over seeds; infinite for a single one, which says nothing of the spread."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.5 + level / 2, len(sample) - 1)) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def next_interval(values: ArrayLike, level: float = 0.95, prior: float | None = None) -> Interval:
    """Where one more value of the same kind is expected: mean -+ t s sqrt(1 + 1/n), for normal values, n >= 2.

    Args:
        values: [n]. level: in (0, 1).
        prior: a variance known from elsewhere, which counts as one more degree of freedom.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return -math.inf, math.inf
    degrees, variance = len(sample) - 1, sample.var(ddof=1)
    if prior is not None:
        degrees, variance = degrees + 1, (degrees * variance + prior) / (degrees + 1)
    half = float(stats.t.ppf(0.5 + level / 2, degrees)) * math.sqrt(variance * (1 + 1 / len(sample)))
    return float(sample.mean() - half), float(sample.mean() + half)


def one_more(means: ArrayLike) -> Interval:
    """Where one more model is expected, from each of K models' mean distance (or similarity) to the K - 1 others.

    The means share their pairs, which makes them alike: where a pair scores m - a_i - a_j, two means differ by
    (a_i - a_j) (K - 2) / (K - 1). Their spread is widened by that, and the 95 % prediction interval taken. For two
    models, whose one pair says nothing of a spread, that pair.
    """
    values = np.asarray(means, np.float64)
    count, centre = len(values), float(values.mean())
    if count < 3:
        return float(values.min()), float(values.max())
    return next_interval(centre + (values - centre) * (count - 1) / (count - 2))


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2, by ranks."""
    return float(_placements(np.asarray(positive, np.float64), np.asarray(negative, np.float64)).mean())


def _placements(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n] share of `others` below each value, ties counted half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def auc_interval(positive: ArrayLike, negative: ArrayLike, level: float = 0.95) -> Interval:
    """DeLong's interval of the area under the ROC curve, on the logit scale, so that it stays inside (0, 1).

    The variance is S10/m + S01/n, the variances of the placement values. At an area of exactly 0 or 1 it is 0 and
    says nothing: there the exact binomial interval of the smaller group is given.

    Paper: DeLong, DeLong and Clarke-Pearson 1988, with the rank form of Sun and Xu 2014; the logit scale is ours.
    """
    first, second = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if len(first) < 2 or len(second) < 2:
        return 0.0, 1.0
    a, b = _placements(first, second), 1 - _placements(second, first)
    area = float(a.mean())
    deviation = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    if area in (0.0, 1.0) or deviation == 0.0:
        smaller = min(len(a), len(b))
        low, high = clopper_pearson(round(area * smaller), smaller, level)
        return float(low), float(high)
    z = float(special.ndtri(0.5 + level / 2))
    half = z * deviation / (area * (1 - area))
    return float(special.expit(special.logit(area) - half)), float(special.expit(special.logit(area) + half))


def matched_auc_interval(positive: ArrayLike, negative: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of the area where positives and negatives are the same examples under different models.

    DeLong's placement values, summed per example before their variance is taken, so that the scores of one example may
    depend on each other; on the logit scale. At an area of exactly 0 or 1, the exact binomial interval over examples.

    Args:
        positive: [n]. negative: [k, n], NaN where there is none; some for at least one example.

    Paper: Obuchowski 1997 (clustered ROC data), with each example a cluster.
    """
    first, second = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    there, n = ~np.isnan(second), len(first)
    placed = np.full(second.shape, np.nan)
    placed[there] = 1 - _placements(second[there], first)
    ours, area = _placements(first, second[there]), float(np.nanmean(placed))
    errors = (ours - area) + np.nansum(placed - area, axis=0) * n / there.sum()
    deviation = math.sqrt(float((errors**2).sum()) / (n * max(1, n - 1)))
    if n < 2:
        return 0.0, 1.0
    if area in (0.0, 1.0) or deviation == 0.0:
        low, high = clopper_pearson(round(area * n), n, level)
        return float(low), float(high)
    half = float(special.ndtri(0.5 + level / 2)) * deviation / (area * (1 - area))
    return float(special.expit(special.logit(area) - half)), float(special.expit(special.logit(area) + half))


def choices(size: int, draws: int, key: Key, largest: int = 0) -> Iterator[np.ndarray]:
    """Positions [k, size] drawn with replacement, `draws` rows in all: the same for every caller with the same key.

    How the rows are grouped does not change them; `largest` is the size of the largest array that goes along.
    """
    rng = np.random.Generator(np.random.PCG64(key.seed))
    rows = max(1, _CELLS // max(1, size, largest))
    for start in range(0, draws, rows):
        yield rng.integers(0, size, (min(rows, draws - start), size), dtype=np.int64)


def resampled_mean(values: ArrayLike, draws: int, key: Key) -> np.ndarray:
    """[draws] bootstrap means. Two calls with one key and one length resample the same examples: they are paired."""
    sample = np.asarray(values, dtype=np.float64)
    return np.concatenate([sample[index].mean(1) for index in choices(len(sample), draws, key)])


def resampled_ratio(above: ArrayLike, below: ArrayLike, draws: int, key: Key) -> np.ndarray:
    """[draws] bootstrap values of sum(above) / sum(below) over examples: a loss per unit. Paired, as above."""
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.concatenate([top[index].sum(1) / bottom[index].sum(1) for index in choices(len(top), draws, key)])


def resampled_auc(positive: ArrayLike, negative: ArrayLike, draws: int, keys: tuple[Key, Key]) -> np.ndarray:
    """[draws] bootstrap areas under the ROC curve, both groups resampled; paired as ``resampled_mean``."""
    first, second = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    order = np.argsort(second, kind="stable")
    left = np.searchsorted(second[order], first, "left")
    right = np.searchsorted(second[order], first, "right")
    rank = np.empty(len(second), dtype=np.int64)
    rank[order] = np.arange(len(second))
    widest, areas = max(len(first), len(second)), []
    for ours, theirs in zip(
        choices(len(first), draws, keys[0], widest), choices(len(second), draws, keys[1], widest), strict=True
    ):
        row = np.arange(len(ours))[:, None]
        counts = np.bincount((rank[theirs] + row * len(second)).ravel(), minlength=theirs.size).reshape(theirs.shape)
        below = np.zeros((len(theirs), len(second) + 1))
        np.cumsum(counts, axis=1, out=below[:, 1:])
        areas.append((below[row, left[ours]] + below[row, right[ours]]).mean(1) / (2 * len(second)))
    return np.concatenate(areas)


def percentile(samples: ArrayLike, level: float = 0.95) -> Interval:
    """The middle `level` of bootstrap values."""
    low, high = np.quantile(np.asarray(samples, np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(samples: ArrayLike, size: int, level: float = 0.95) -> Interval:
    """``percentile`` of bootstrap values of a share; Wilson's where they are all alike, which is no certainty.

    Args:
        samples: [draws] resampled means of values in [0, 1]. size: examples resampled, >= 1. level: in (0, 1).
    """
    low, high = percentile(samples, level)
    if high - low > 1e-12:
        return low, high
    ends = wilson(min(1.0, max(0.0, low)) * size, size, level)
    return float(ends[0]), float(ends[1])


def distance_interval(value: float, noise: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of a mean of absolute differences, which chance makes larger: value -+ a quantile of the noise.

    Resampling adds that bias once more, so that a percentile interval of a true 0 never holds 0. By the triangle
    inequality |mean |d| - mean |truth|| <= mean |d - truth|, so this one covers at least as often as it says.

    Args:
        value: mean of |d|. noise: [draws] mean of |resampled d - d|. level: in (0, 1).
    """
    half = float(np.quantile(np.asarray(noise, np.float64), level))
    return max(0.0, value - half), value + half


def student_errors(values: ArrayLike, draws: int, key: Key) -> np.ndarray:
    """[draws, M] errors of the mean of `values` [K, M] over K models: multivariate Student with K - 1 degrees, K >= 2.

    Resampling a few models gives too small a spread, and no draw beyond the most extreme of them.
    """
    sample = np.asarray(values, np.float64)
    count = len(sample)
    rng = np.random.Generator(np.random.PCG64(key.seed))
    normal = rng.standard_normal((draws, count)) @ (sample - sample.mean(0)) / math.sqrt(count * (count - 1))
    return normal * np.sqrt((count - 1) / rng.chisquare(count - 1, (draws, 1)))


def gap_interval(differences: ArrayLike, errors: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of a mean of absolute values, mean_k |m_k|, from estimates d_k of the m_k and draws of their errors.

    Chance pushes mean |d_k| away from 0, so that quantiles of resampled values do not cover. Here each end is the value
    under which one as far as the one seen has probability (1 - level) / 2, along the path of the truths nearest to d for
    each value: m_k = sign(d_k) max(|d_k| + t s_k^2, 0), with s_k^2 the variance of the errors.

    Args:
        differences: [M]. errors: [draws, M], of d_k about m_k. level: in (0, 1).

    Source: hybrid resampling, Chuang and Lai 2000; the path is the constrained least squares one.
    """
    d, noise = np.asarray(differences, np.float64), np.asarray(errors, np.float64)
    noise = noise - noise.mean(0)
    size, sign, variance = np.abs(d), np.where(d < 0, -1.0, 1.0), noise.var(0)
    seen, tail = float(size.mean()), (1 - level) / 2
    moving = variance > 0
    if not moving.any():
        return seen, seen

    def at(t: float) -> tuple[float, float, float]:
        """The value at t, and how often a draw is at most, at least, as far as what was seen."""
        truth = np.maximum(size + t * variance, 0.0)
        drawn = np.abs(truth + sign * noise).mean(1)
        return float(truth.mean()), float((drawn <= seen).mean()), float((drawn >= seen).mean())

    nearest = float(-(size[moving] / variance[moving]).max())
    still = float(size[~moving].sum()) / len(d)  # what no chance moves, and no truth nearer to 0 changes
    low = still if at(nearest)[2] >= tail else at(_edge(nearest, 0.0, lambda t: at(t)[2] >= tail))[0]
    furthest = 1.0 / float(np.sqrt(variance[moving]).min())
    while at(furthest)[1] >= tail:
        furthest *= 2
    return low, at(_edge(furthest, 0.0, lambda t: at(t)[1] >= tail))[0]


def _edge(outside: float, inside: float, holds: Callable[[float], bool]) -> float:
    """The last point, from `inside` towards `outside`, at which the condition holds, by bisection."""
    for _ in range(40):
        middle = (outside + inside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside
