"""ROC curves and what an attack finds while it accuses almost nobody wrongly: the true positive rate at a low rate.

Functions of scores that are larger for members. An average over all examples (an area, an accuracy) hides an attack that
is sure of a few of them: the true positive rate at a false positive rate of 1 % or 0.1 % shows it. It needs many
non-members, and these functions refuse it where there are too few.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from expunge.audit import intervals
from expunge.audit.subject import Reading
from expunge.core import Refused

RATES = (0.01, 0.001)
POINTS = 200
AXES = ("false positive rate", "true positive rate")


def scores_of(values: ArrayLike, name: str) -> np.ndarray:
    """[n] float64, refused where it is empty, not one number per example, or has NaN."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise Refused(f"{name} scores: expected one number per example, found shape {found.shape}")
    if np.isnan(found).any():
        raise Refused(f"{name} scores: expected numbers, found {int(np.isnan(found).sum())} NaN; drop those examples")
    return found


def roc(positive: ArrayLike, negative: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1); equal scores are called together.

    Args:
        positive, negative: [p], [q] scores of members and of non-members, larger for members; infinite ones are fine.
    """
    first, second = np.sort(scores_of(positive, "positive")), np.sort(scores_of(negative, "negative"))
    thresholds = np.unique(np.concatenate([first, second]))[::-1]
    rates = [1 - np.searchsorted(group, thresholds, "left") / len(group) for group in (second, first)]
    return np.concatenate([[0.0], rates[0]]), np.concatenate([[0.0], rates[1]])


def curve(positive: ArrayLike, negative: ArrayLike, points: int = POINTS) -> tuple[tuple[float, ...], ...]:
    """A ROC for ``Reading.curves``: its corners, or at most `points` of them, dense near 0 for a log-log plot.

    Args:
        positive, negative: as ``roc``. points: >= 10.
    """
    fpr, tpr = roc(positive, negative)
    inner = ((fpr[1:-1] == fpr[:-2]) & (fpr[1:-1] == fpr[2:])) | ((tpr[1:-1] == tpr[:-2]) & (tpr[1:-1] == tpr[2:]))
    corner = np.concatenate([[True], ~inner, [True]])
    fpr, tpr = fpr[corner], tpr[corner]
    if len(fpr) > points:
        half = points // 2 - 1
        wanted = np.concatenate([np.geomspace(fpr[fpr > 0][0], 1, half), np.linspace(0, 1, half)])
        kept = np.unique(np.concatenate([[0, len(fpr) - 1], np.searchsorted(fpr, wanted, "right") - 1]))
        fpr, tpr = fpr[kept], tpr[kept]
    return tuple(fpr.tolist()), tuple(tpr.tolist())


def balanced_accuracy(positive: ArrayLike, negative: ArrayLike) -> float:
    """max over thresholds of (TPR + 1 - FPR) / 2: at least 0.5, and above it by chance, as the best one is taken."""
    fpr, tpr = roc(positive, negative)
    return float((tpr + 1 - fpr).max() / 2)


def too_few(negatives: int, fpr: float) -> str:
    """Why a rate cannot be asked of so few non-members; "" where it can."""
    _in_range(fpr)
    wanted = math.ceil(1 / fpr - 1e-9)
    if negatives >= wanted:
        return ""
    return (
        f"too few examples for an attack at a false positive rate of {fpr:g}: expected at least {wanted} non-members, "
        f"found {negatives}; give more test data or ask for a higher rate"
    )


def tpr_value(positive: ArrayLike, negative: ArrayLike, fpr: float) -> float:
    """True positive rate at the lowest threshold that calls no more than a share `fpr` of the negatives members.

    Raises:
        Refused: where 1 / fpr is more than there are negatives.
    """
    first, second = scores_of(positive, "positive"), scores_of(negative, "negative")
    allowed = _allowed(len(second), fpr)
    return float((first > np.sort(second)[::-1][allowed]).mean())


def tpr_at(positive: ArrayLike, negative: ArrayLike, fpr: float, *, level: float = 0.95) -> tuple[float, float, float]:
    """The same with its interval, which covers at least as often as it says, whatever the scores are like.

    The threshold is known from the negatives only up to their number. Its own exact interval comes from their order:
    the count of negatives above the true threshold is binomial (q, fpr). The low end is Clopper and Pearson's low end
    for the positives above the highest plausible threshold, the high end theirs above the lowest one; threshold and
    positives get half of the error each. Near q = 1 / fpr the low end is therefore 0, as it should be.

    Examples are taken as independent. The interval does not hold what else varies: the seed of the attacked model, and
    the reference models that the scores come from.

    Args:
        positive, negative: [p], [q] scores, larger for members. fpr: in (0, 1), at least 1 / q. level: in (0, 1).

    Returns:
        (value, low, high), shares in [0, 1].

    Raises:
        Refused: too few negatives, a rate out of range, NaN.
    """
    value = tpr_value(positive, negative, fpr)
    first, ordered = np.asarray(positive, np.float64), np.sort(np.asarray(negative, np.float64))[::-1]
    size, tail = len(ordered), (1 - level) / 4
    above = int(stats.binom.ppf(tail, size, fpr))  # P(count < above) <= tail: so many negatives are beyond, at least
    below = int(stats.binom.ppf(1 - tail, size, fpr))
    highest = ordered[above - 1] if above > 0 else np.inf
    lowest = ordered[below] if below < size else -np.inf
    counts = [int((first > highest).sum()), int((first > lowest).sum())]
    low, _ = intervals.clopper_pearson(counts[0], len(first), 1 - 2 * tail)
    _, high = intervals.clopper_pearson(counts[1], len(first), 1 - 2 * tail)
    return value, float(low), float(high)


def low_rates(positive: ArrayLike, negative: ArrayLike, *, independent: bool = True) -> dict[str, float]:
    """Numbers for ``Reading.detail``: balanced accuracy, and TPR at 1 % and 0.1 % FPR with their ends.

    A rate with too few negatives is left out (``too_few`` says why), and so are the ends where the scores are not
    `independent` (several per example).
    """
    found = {"balanced_accuracy": balanced_accuracy(positive, negative)}
    for rate in RATES:
        if too_few(np.size(negative), rate):
            continue
        name = f"tpr_at_fpr_{rate:g}"
        if independent:
            found[name], found[f"{name}_low"], found[f"{name}_high"] = tpr_at(positive, negative, rate)
        else:
            found[name] = tpr_value(positive, negative, rate)
    return found


def separation(name: str, positive: np.ndarray, negative: np.ndarray, **detail: float) -> Reading:
    """A Reading of how well scores tell two groups of examples: area with DeLong's interval, ROC, low rates."""
    low, high = intervals.auc_interval(positive, negative)
    return Reading(
        name,
        intervals.auc(positive, negative),
        low,
        high,
        len(positive) + len(negative),
        detail={**low_rates(positive, negative), **detail},
        curves={"roc": curve(positive, negative)},
        axes=AXES,
    )


def matched(name: str, positive: np.ndarray, negative: np.ndarray, **detail: float) -> Reading:
    """The same where `negative` [k, n] are scores of other models on the same examples (NaN: none)."""
    low, high = intervals.matched_auc_interval(positive, negative)
    flat = negative[~np.isnan(negative)]
    return Reading(
        name,
        intervals.auc(positive, flat),
        low,
        high,
        len(positive),
        detail={**low_rates(positive, flat, independent=False), **detail},
        curves={"roc": curve(positive, flat)},
        axes=AXES,
    )


def _allowed(negatives: int, fpr: float) -> int:
    """How many negatives may lie above the threshold."""
    reason = too_few(negatives, fpr)
    if reason:
        raise Refused(reason)
    return math.floor(fpr * negatives + 1e-9)


def _in_range(fpr: float) -> None:
    if not 0 < fpr < 1:
        raise Refused(f"a false positive rate must lie in (0, 1), found {fpr!r}")
