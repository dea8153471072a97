"""The forgetting score of the NeurIPS 2023 unlearning challenge, and a bound on epsilon that can be defended.

Per forget example, the margins under unlearned and under retrained models are two samples. An attacker guesses from one
margin which of the two it came from; how well the best rule does says how large epsilon is in (epsilon, delta)-unlearning.
The released epsilon is the best of thousands of rules on the same models that it is tried on, so it is too large: equal
populations score about 0.19, not 1. The bound chooses its rule on half of the models and tries it on the rest.

Source: google-deepmind/unlearning_evaluation. Its rates are float32 and so are its single thresholds; these are float64.
"""

from __future__ import annotations

import math

import numpy as np

from expunge.audit import populations
from expunge.audit.epsilon import DELTA, epsilon_bound, pooled
from expunge.audit.subject import Reading, Subject
from expunge.audit.tug_of_war import share_right
from expunge.core import Refused
from expunge.registry import measure

CAP, BUCKET = 50.0, 0.5
PER_UNIT, BUFFER, PEAKED = 100, 2.0, 0.01
LEAST = 16  # models a side
_LEFT = math.ceil(2 * BUFFER * PER_UNIT)
_CELLS = 1 << 21


@measure
def forgetting_score(subject: Subject) -> Reading | None:
    """F, the forgetting quality of the NeurIPS 2023 challenge, beside what retrained models score against each other.

    None without ``unlearned``, or with fewer than 16 of them or of the retrained. F is the mean over forget examples of
    2^-floor(2 epsilon). The number is at h models a side, at most half of the retrained, averaged over random halves;
    the reference is F between two halves of the retrained at the same h, never 1: a perfect method stands near 0.19.
    In the detail: F with as many models as there are (``all_models``, which the challenge prints and which has no floor
    here), ``final`` with the challenge's utility factors, and the bound on epsilon with its own floor. F says how alike
    the populations are on average; one example of which everything is known is lost in it.
    """
    count = min(len(subject.unlearned), len(subject.retrained))
    if count < LEAST:
        return None
    ours, theirs = subject.margins("forget", subject.unlearned), subject.margins("forget")
    key = subject.key.at("populations")
    splits = populations.halves(len(ours), len(theirs), 0, key, populations.SPLITS // 2)
    size = len(splits[0].retrained)
    each = np.stack([scores(epsilons(ours[s.unlearned], theirs[s.retrained]), size) for s in splits])
    floors = [float(scores(epsilons(theirs[s.others], theirs[s.retrained]), size).mean()) for s in splits]
    low, high = populations.interval(each.mean(1).tolist(), each.mean(0))
    value, band = float(each.mean()), populations.band(floors)
    everything = epsilons(ours[:count], theirs[:count])
    detail = {
        "models": float(size),
        "floor": float(np.mean(floors)),
        "all_models": float(scores(everything, count).mean()),
        "all_models_epsilon": float(everything.mean()),
        **_bounds(ours, theirs, splits),
    }
    factor = _utility(subject)
    if factor is not None:
        detail |= {"final": value * factor, "utility": factor}
    verdict = "outside" if value < band[0] else "within"
    reference = (max(0.0, band[0]), min(1.0, band[1]))
    ends = max(0.0, low), min(1.0, high)
    return Reading("forgetting_score", value, *ends, each.shape[1], "", "higher", reference, verdict, detail)


def _bounds(ours: np.ndarray, theirs: np.ndarray, splits: list[populations.Half]) -> dict[str, float]:
    """The bound on epsilon, averaged over examples, on the first halves; and between retrained models."""
    found = {}
    first, half = splits[0], len(splits[0].retrained) // 2
    reference = theirs[first.retrained]
    for name, group in (("epsilon_bound", ours[first.unlearned]), ("epsilon_bound_floor", theirs[first.others])):
        bound = epsilon_bound(group[:half], reference[:half], group[half:], reference[half:])
        found[name], found[f"{name}_largest"] = float(bound.mean()), float(bound.max())
    n, m = len(ours) // 2, len(theirs) // 2
    found["all_models_epsilon_bound"] = float(epsilon_bound(ours[:n], theirs[:m], ours[n:], theirs[m:]).mean())
    return found


def _utility(subject: Subject) -> float | None:
    """Retain and test accuracy of the unlearned models over the retrained ones', multiplied; not clipped."""
    factor = 1.0
    for data in ("retain", "test"):
        if not subject.has(data) or subject.outputs(data).correct is None:
            return None
        means = [
            float(np.mean([share_right(subject.outputs(data, model)) for model in models]))
            for models in (subject.unlearned, subject.retrained)
        ]
        if means[1] == 0.0:
            return None
        factor *= means[0] / means[1]
    return factor


def scores(epsilon: np.ndarray, models: int) -> np.ndarray:
    """[n] H = 2^-floor(epsilon / 0.5) below ceil(log(models - 1)), else 0. The mean over examples is F.

    Args:
        epsilon: [n], >= 0. models: a side, >= 2.
    """
    if models < 2:
        raise Refused(f"the forgetting score needs 2 models a side or more, found {models}")
    values = np.asarray(epsilon, np.float64)
    return np.where(values < math.ceil(math.log(models - 1)), 2.0 ** -np.floor(values / BUCKET), 0.0)


def epsilons(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """[n] the challenge's epsilon of each example, in 0 .. 50, by its rules.

    The sample with the larger median is the positive one (the unlearned where they are equal). Rules: "at or above t is
    positive" with t on a grid of 100 per unit over both samples; "inside [a, b] is the more peaked sample", with b on
    such a grid within 2 of the largest value of that sample and a within 2 of b less its range. For false positive and
    negative rates a, b over models epsilon = max(log(1 - 1e-5 - a) - log b, log(1 - 1e-5 - b) - log a, 0); infinite
    where both are 0; a rule with one of them 0 is left out. The largest one counts, up to 50; 50 too where the ranges
    of the samples differ by more than a factor of 100.

    A rule's rates depend only on how many values lie below its thresholds. So per grid it is found which gaps between
    the 2N sorted values have a threshold in them, and epsilon is looked up by counts: no rule is tried on any model.

    Where the released code stops (no rule is left), this is 0 for equal samples and 50 otherwise.

    Args:
        unlearned, retrained: [N, n] margins, as many models of each.
    """
    ours, theirs = populations.checked(unlearned, retrained, least=2)
    if len(ours) != len(theirs):
        raise Refused(
            f"the forgetting score compares as many unlearned as retrained models, found {len(ours)} and "
            f"{len(theirs)}: leave some out"
        )
    table = _epsilon_table(len(ours))
    size = max(1, _CELLS // (2 * len(ours) * min(_LEFT, 2 * len(ours))))
    starts = range(0, ours.shape[1], size)
    return np.concatenate([_largest(ours[:, i : i + size].T, theirs[:, i : i + size].T, table) for i in starts])


def _epsilon_table(count: int) -> np.ndarray:
    """[count + 1, count + 1] epsilon by false negatives and false positives; -1 for a rule that is left out."""
    rates = np.arange(count + 1) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.log(1 - DELTA - rates)[None, :] - np.log(rates)[:, None]
        two = np.log(1 - DELTA - rates)[:, None] - np.log(rates)[None, :]
        table = np.fmax(np.fmax(one, two), 0.0)
    table[-1, -1] = -1.0
    table[0], table[:, 0] = -1.0, -1.0
    table[0, 0] = np.inf
    return table


def _largest(ours: np.ndarray, theirs: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[m] for [m, N] margins of both."""
    swap = (np.median(theirs, 1) > np.median(ours, 1))[:, None]
    positive, negative = np.where(swap, theirs, ours), np.where(swap, ours, theirs)
    spans = np.ptp(positive, 1), np.ptp(negative, 1)
    peaked = (spans[0] >= spans[1])[:, None]
    inner, outer = np.where(peaked, negative, positive), np.where(peaked, positive, negative)
    found = np.maximum(_double(inner, outer, table), _single(positive, negative, table))
    equal = (np.sort(ours, 1) == np.sort(theirs, 1)).all(1)
    found = np.where(found < 0, np.where(equal, 0.0, CAP), found)
    widest = np.maximum(*spans)
    flat = (widest > 0) & (np.minimum(*spans) < PEAKED * widest)
    return np.minimum(np.where(flat, CAP, found), CAP)


def _grid(start: np.ndarray, end: np.ndarray, points: np.ndarray | int, place: np.ndarray) -> np.ndarray:
    """The thresholds at these places of a grid of `points` evenly spaced from start to end, to the bit of linspace."""
    last = np.maximum(np.asarray(points) - 1, 1)
    return np.where(place == last, end, place * ((end - start) / last) + start)


def _passed(
    values: np.ndarray, start: np.ndarray, end: np.ndarray, points: np.ndarray | int, strictly: bool = False
) -> np.ndarray:
    """How many thresholds of a grid (see ``_grid``) lie at or below each value; `strictly`: below it."""
    last = np.maximum(np.asarray(points) - 1, 1)
    step = (end - start) / last
    exact = (values - start) / np.where(step > 0, step, 1.0)
    place = np.clip(np.floor(exact), -1, last)
    near = np.nonzero(np.abs(exact - np.rint(exact)) < 1e-6)  # here rounding decides: look at the threshold itself
    if len(near[0]):
        low, high, top, seen = (np.broadcast_to(part, place.shape)[near] for part in (start, end, last, values))
        guess = np.clip(np.rint(exact[near]), 0, top)
        threshold = np.where(guess == top, high, guess * ((high - low) / top) + low)
        place[near] = guess - np.where(threshold < seen if strictly else threshold <= seen, 0, 1)
    return (place + 1).astype(np.int64)


def _single(positive: np.ndarray, negative: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[m] the best rule "at or above t is positive"; -1 where there is none."""
    values, below_positive, below_negative = pooled(positive, negative)
    start, end = values[:, :1], values[:, -1:]
    points = np.ceil((end - start) * PER_UNIT)
    counts = np.concatenate([np.zeros((len(values), 1), np.int64), _passed(values, start, end, points)], 1)
    reached = (np.diff(counts, axis=1) > 0) & (points > 0)  # a threshold in the gap that ends at each value
    found = table[below_positive[:, :-1], negative.shape[1] - below_negative[:, :-1]]
    return np.where(reached, found, -1.0).max(1)


def _double(inner: np.ndarray, outer: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[m] the best rule "inside [a, b] is the more peaked sample"; -1 where there is none."""
    width = np.ptp(inner, 1)
    start, end = inner.min(1) + width - BUFFER, inner.max(1) + BUFFER
    points = np.ceil((end - start) * PER_UNIT).astype(np.int64)  # 400, and 401 where rounding lifts it
    found = np.empty(len(inner))
    for number in np.unique(points):
        some = np.flatnonzero(points == number)
        ends = start[some, None], end[some, None], width[some, None]
        found[some] = _intervals(inner[some], outer[some], *ends, int(number), table)
    return found


def _intervals(
    inner: np.ndarray,
    outer: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    width: np.ndarray,
    points: int,
    table: np.ndarray,
) -> np.ndarray:
    """[m] the best interval; right ends are `points` from start to end [m, 1].

    Right ends with the same values below them are one class (rank). Its left ends reach every gap between values that
    is longer than their step and within their range; the shorter gaps are looked at one by one.
    """
    values, first, rest = pooled(inner, outer)
    row = np.arange(len(values))[:, None]
    below = _passed(values, start, end, points, strictly=True)  # right ends below each value
    edge = np.zeros((len(values), 1), np.int64)
    one, after = np.concatenate([edge, below], 1), np.concatenate([below, edge + points], 1)
    present = after > one
    rank = np.argsort(~present, 1, kind="stable")[:, : int(present.sum(1).max())]
    lowest = _grid(start, end, points, one[row, rank]) - width - BUFFER
    highest = _grid(start, end, points, after[row, rank] - 1) - width + BUFFER
    gaps = np.concatenate([np.full((len(values), 1), np.inf), np.diff(values, axis=1)], 1)
    long = gaps > 2 * BUFFER / (_LEFT - 1) * 1.001
    previous = np.concatenate([np.full((len(values), 1), -np.inf), values[:, :-1]], 1)
    reached = (lowest[:, :, None] <= values[:, None]) & (highest[:, :, None] > previous[:, None]) & long[:, None]
    _add_short(reached, np.nonzero(~long & (gaps > 0)), values, below, present, (start, end, width), points)
    reached &= present[row, rank][:, :, None] & (np.arange(values.shape[1]) < rank[:, :, None])
    missed = inner.shape[1] - first[row, rank][:, :, None] + first[:, None, :-1]
    caught = rest[row, rank][:, :, None] - rest[:, None, :-1]
    found = table.ravel().take(missed * table.shape[1] + caught, mode="clip")
    return np.where(reached, found, -1.0).max((1, 2))


def _add_short(
    reached: np.ndarray,
    short: tuple[np.ndarray, ...],
    values: np.ndarray,
    below: np.ndarray,
    present: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray, np.ndarray],
    points: int,
) -> None:
    """Mark in `reached` [m, ranks, gaps] the short gaps in which some left end lies."""
    size, count = len(values), max(1, _CELLS // points)
    flat = np.bincount((np.arange(size)[:, None] * (points + 1) + below).ravel(), minlength=size * (points + 1))
    ranks = flat.reshape(size, points + 1).cumsum(1)[:, :points]  # values at or below each right end
    column = (present.cumsum(1) - 1)[np.arange(size)[:, None], ranks]
    right = _grid(ends[0], ends[1], points, np.arange(points)[None])
    for begin in range(0, len(short[0]), count):
        example, gap = (part[begin : begin + count] for part in short)
        left = right[example] - ends[2][example]
        grid = left - BUFFER, left + BUFFER, _LEFT
        seen, before = (_passed(values[example, gap - back][:, None], *grid) for back in (0, 1))
        found = np.nonzero(seen > before)
        reached[example[found[0]], column[example[found[0]], found[1]], gap[found[0]]] = True
