"""Populations of models: what many unlearned and many retrained models say of the same examples, and fair comparisons.

A distance between two populations depends on how many models are in each. So the unlearned models are compared with the
retrained ones at the number of models at which the retrained can be compared with each other: half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from expunge.audit import intervals
from expunge.audit.intervals import Interval
from expunge.core import Key, Refused

SPLITS = 20


def checked(unlearned: np.ndarray, retrained: np.ndarray, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [models, examples].

    Raises:
        Refused: for another shape, different examples, fewer than `least` models, or numbers that are not finite.
    """
    found = []
    for name, values in (("unlearned", unlearned), ("retrained", retrained)):
        table = np.asarray(values, np.float64)
        if table.ndim != 2 or table.shape[0] < least or table.shape[1] < 1:
            raise Refused(
                f"{name} margins have shape {table.shape}: expected [models, examples] with {least} models or more"
            )
        if not np.isfinite(table).all():
            raise Refused(f"{name} margins hold NaN or infinity: expected finite numbers; leave that model out")
        found.append(table)
    if found[0].shape[1] != found[1].shape[1]:
        raise Refused(
            f"unlearned margins are of {found[0].shape[1]} examples and retrained ones of {found[1].shape[1]}: give "
            f"both for the same examples, in the same order"
        )
    return found[0], found[1]


@dataclass(frozen=True)
class Half:
    """Positions [h] of models: some unlearned, two disjoint groups of retrained, and some originals (empty for none)."""

    unlearned: np.ndarray
    retrained: np.ndarray
    others: np.ndarray
    originals: np.ndarray


def halves(unlearned: int, retrained: int, originals: int, key: Key, splits: int = SPLITS) -> list[Half]:
    """`splits` random divisions with h = min(unlearned, retrained // 2) models in each group.

    The groups ``unlearned`` and ``others`` are each compared with ``retrained``: reading and floor share a reference.
    """
    size = min(unlearned, retrained // 2)
    found = []
    for number in range(splits):
        rng = np.random.Generator(np.random.PCG64(key.at("halves", number).seed))
        order = rng.permutation(retrained)
        some = rng.permutation(unlearned)[:size]
        others = rng.permutation(originals)[:size] if originals >= size else np.zeros(0, np.int64)
        found.append(Half(some, order[:size], order[size : 2 * size], others))
    return found


def interval(values: Sequence[float], per_example: np.ndarray, level: float = 0.95) -> Interval:
    """Of a mean over examples, from its values over random halves of the models and its mean values per example.

    value -+ z sqrt(variance over halves + variance of the example mean). The spread over halves (drawn without
    repetition) is that of a mean over all the models: exact for a mean, an approximation for other statistics.
    """
    sample = np.asarray(values, np.float64)
    over_models = sample.var(ddof=1) if len(sample) > 1 else 0.0
    over_examples = per_example.var(ddof=1) / len(per_example) if len(per_example) > 1 else 0.0
    half = float(special.ndtri(0.5 + level / 2)) * float(np.sqrt(over_models + over_examples))
    return float(sample.mean() - half), float(sample.mean() + half)


def band(floors: Sequence[float]) -> Interval:
    """Where the same number of models, retrained once more, would be expected: the 95% prediction interval of halves."""
    return intervals.next_interval(floors)
