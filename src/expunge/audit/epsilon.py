"""A lower bound on epsilon, in (epsilon, delta)-unlearning, that can be defended.

The released forgetting score takes the best of thousands of rules on the models that it tries them on, which is too
large. Here the rule is chosen on some of the models and tried on others, with exact binomial bounds on its errors.
"""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals, populations
from expunge.core import Refused

DELTA = 1e-5
_CUTS = 64  # places between values that an end of the rule is chosen among
_CELLS = 1 << 21


def epsilon_bound(
    unlearned: np.ndarray,
    retrained: np.ndarray,
    unlearned_rest: np.ndarray,
    retrained_rest: np.ndarray,
    level: float = 0.95,
) -> np.ndarray:
    """[n] a lower bound on epsilon of each example that holds with probability `level` (delta = 1e-5), 0 for none.

    On the first models the rule "inside (a, b) is one of the two" is chosen, a and b among 64 places between the values
    (or open); on the rest its false positive and negative rates get Clopper-Pearson upper bounds a, b, which hold both
    with probability `level`, and the bound is max(log(1 - delta - a) - log b, log(1 - delta - b) - log a, 0). Each
    example's bound holds by itself, not all of them together.

    Derived here: no released code has it.

    Args:
        unlearned, retrained: [N, n] and [M, n] margins of the models that the rule is chosen on.
        unlearned_rest, retrained_rest: of other models, of any number.
    """
    chosen, judged = populations.checked(unlearned, retrained), populations.checked(unlearned_rest, retrained_rest)
    if chosen[0].shape[1] != judged[0].shape[1]:
        raise Refused(f"both parts must be of the same examples, found {chosen[0].shape[1]} and {judged[0].shape[1]}")
    low, high = np.empty(chosen[0].shape[1]), np.empty(chosen[0].shape[1])
    ours = np.empty(len(low), dtype=bool)
    ranks = np.unique(np.linspace(0, len(chosen[0]) + len(chosen[1]), _CUTS + 1).round().astype(np.int64))
    pairs = ranks[np.stack(np.triu_indices(len(ranks), 1))]
    size = max(1, _CELLS // pairs.shape[1])
    for start in range(0, len(low), size):
        part = slice(start, start + size)
        low[part], high[part], ours[part] = _choose(chosen[0][:, part], chosen[1][:, part], pairs, level)
    inside = [((table > low) & (table < high)).sum(0) for table in judged]
    bounds = [_bound(judged, inside, mine, level) for mine in (True, False)]
    return np.where(ours, bounds[0], bounds[1])


def _bound(samples: tuple[np.ndarray, np.ndarray], inside: list[np.ndarray], ours: bool, level: float) -> np.ndarray:
    """The bound of the rule "inside is unlearned" (`ours`) or "inside is retrained", from counts inside."""
    mine, other = (0, 1) if ours else (1, 0)
    missed = intervals.clopper_pearson(len(samples[mine]) - inside[mine], len(samples[mine]), level)[1]
    caught = intervals.clopper_pearson(inside[other], len(samples[other]), level)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = np.log(1 - DELTA - caught) - np.log(missed), np.log(1 - DELTA - missed) - np.log(caught)
    return np.fmax(np.fmax(one, two), 0.0)


def _choose(
    ours: np.ndarray, theirs: np.ndarray, pairs: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends [m] of the interval with the largest bound on these models, and whether inside means unlearned."""
    values, first, rest = pooled(ours.T, theirs.T)
    middle = (values[:, 1:] + values[:, :-1]) / 2
    open_end = np.full((len(values), 1), np.inf)
    edges = np.concatenate([-open_end, middle, open_end], 1)
    left, right = pairs
    inside = [first[:, right] - first[:, left], rest[:, right] - rest[:, left]]
    both = (ours, theirs)
    options = [_table(both, mine, level)[inside[0], inside[1]] for mine in (True, False)]
    mine = options[0].max(1) >= options[1].max(1)
    best = np.where(mine, options[0].argmax(1), options[1].argmax(1))
    row = np.arange(len(values))
    return edges[row, left[best]], edges[row, right[best]], mine


def _table(samples: tuple[np.ndarray, np.ndarray], ours: bool, level: float) -> np.ndarray:
    """[N + 1, M + 1] the bound by counts inside."""
    grid = np.indices((len(samples[0]) + 1, len(samples[1]) + 1))
    return _bound(samples, [grid[0], grid[1]], ours, level)


def pooled(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both samples sorted together [m, 2N], and how many of `one` and of `other` are among the first 0 .. 2N."""
    values = np.concatenate([one, other], 1)
    order = np.argsort(values, 1, kind="stable")
    first = np.zeros((len(values), values.shape[1] + 1), dtype=np.int64)
    np.cumsum(order < one.shape[1], axis=1, out=first[:, 1:])
    return np.take_along_axis(values, order, 1), first, np.arange(values.shape[1] + 1) - first
