"""Normal distributions of what many models say of each example: with a variance per example, or one for all.

Shared by the attacks that learn from shadow models. Pure functions on arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from expunge.core import Refused

ENOUGH = 64
"""Models per arm from which each example has its own variance. Below it a variance of a few values costs an attack more
than the differences between examples give it back (the paper's observation, provisional in its exact number)."""

LEAST = 2
"""Models per arm that an example must have."""

Variance = Literal["each", "pooled"]
_FLOOR = 1e-30  # added to a deviation, as in the released code: equal margins give a finite score


@dataclass(frozen=True)
class Fit:
    """Normal distributions of margins: mean [n] or [k, n], deviation of a shape that broadcasts to it."""

    mean: np.ndarray
    deviation: np.ndarray

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """(value - mean) / deviation."""
        return (values - self.mean) / (self.deviation + _FLOOR)

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """log N(value; mean, deviation)."""
        return -0.5 * self.standardised(values) ** 2 - np.log(self.deviation + _FLOOR) - 0.5 * np.log(2 * np.pi)


def fit(margins: ArrayLike, chosen: ArrayLike, variance: Variance | None = None) -> Fit:
    """Median and deviation of each example over the models that are chosen for it.

    each: deviation of the example's own margins (population divisor, as the released code). pooled: one deviation for
    all, sqrt(sum of squares within examples / (number of margins - number of examples)).

    Args:
        margins: [m, n], or [m, n, a] with query augmentations, which are fitted apart.
        chosen: [m, n] bool: which models are of this arm; at least 2 per example ("each"), or 1 and some of 2.
        variance: "pooled" below 64 models for some example by default, "each" otherwise.

    Raises:
        Refused: shapes that do not belong together, NaN, an example without models.
    """
    values, mask = _arrays(margins, chosen)
    arm = _arm(values, mask)
    if _kind(variance, arm.count) == "each":
        _at_least(arm.count, LEAST)
        deviation = np.sqrt(arm.squares / arm.count)
    else:
        deviation = np.full(1, np.sqrt(arm.squares.sum() / _freedom(arm.count)))
    shape = np.shape(margins)[1:]
    wide = deviation.reshape(shape) if len(deviation) > 1 else deviation
    return Fit(_median(arm.ordered, arm.count).reshape(shape), wide)


def without_each(margins: ArrayLike, chosen: ArrayLike, variance: Variance | None = None) -> Fit:
    """[m, n] the same fits with each model in turn left out for the example: what an attack on that model may know.

    Leaving a model out of one example only is enough for scores of models whose states are drawn by example.

    Args:
        margins: [m, n]. chosen: [m, n] bool, at least 3 per example ("each") or 2 ("pooled").

    Returns:
        A Fit that is NaN where a model is not chosen.
    """
    values, mask = _arrays(margins, chosen)
    if np.ndim(margins) != 2:
        raise Refused(f"leaving models out needs margins [models, examples], found shape {np.shape(margins)}")
    arm = _arm(values, mask)
    kind = _kind(variance, arm.count)
    _at_least(arm.count, LEAST + (kind == "each"))
    rank = np.argsort(np.argsort(np.where(mask, values, np.inf), axis=0, kind="stable"), axis=0)
    rest = arm.count - 1
    halves = []
    for place in (
        (rest - 1) // 2,
        rest // 2,
    ):  # in the order of what is left; one further for what stands after the gap
        halves.append(np.take_along_axis(arm.ordered, np.minimum(place + (rank <= place), len(values) - 1), 0))
    squares = np.maximum(arm.squares - (values - arm.mean) ** 2 * arm.count / rest, 0.0)
    if kind == "each":
        deviation = np.sqrt(squares / rest)
    else:
        deviation = np.sqrt((arm.squares.sum() - arm.squares + squares) / max(1, _freedom(arm.count) - 1))
    return Fit(np.where(mask, (halves[0] + halves[1]) / 2, np.nan), np.where(mask, deviation, np.nan))


@dataclass(frozen=True)
class _Arm:
    """ordered: [m, n] chosen margins, sorted, then infinity. count, mean, squares: [n], squares about the mean."""

    ordered: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray


def _arm(values: np.ndarray, mask: np.ndarray) -> _Arm:
    count = mask.sum(0)
    _at_least(count, 1)
    mean = np.where(mask, values, 0.0).sum(0) / count
    squares = (np.where(mask, values - mean, 0.0) ** 2).sum(0)
    return _Arm(np.sort(np.where(mask, values, np.inf), axis=0), count, mean, squares)


def _median(ordered: np.ndarray, count: np.ndarray) -> np.ndarray:
    middle = [np.take_along_axis(ordered, place[None], 0)[0] for place in ((count - 1) // 2, count // 2)]
    return (middle[0] + middle[1]) / 2


def _kind(variance: Variance | None, count: np.ndarray) -> Variance:
    if variance not in (None, "each", "pooled"):
        raise Refused(f"variance must be 'each' or 'pooled', found {variance!r}")
    return variance or ("each" if count.min() >= ENOUGH else "pooled")


def _freedom(count: np.ndarray) -> int:
    free = int(count.sum()) - len(count)
    if free < 1:
        raise Refused("too few models for a variance: expected at least 2 for some example, found 1 for each")
    return free


def _at_least(count: np.ndarray, least: int) -> None:
    if len(count) == 0 or count.min() < least:
        found = f"{int((count < least).sum())} examples with fewer" if len(count) else "no examples"
        raise Refused(f"too few models for an attack: expected at least {least} per example and arm, found {found}")


def _arrays(margins: ArrayLike, chosen: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """[m, N] margins and [m, N] bool, augmentations side by side."""
    values, mask = np.asarray(margins, np.float64), np.asarray(chosen, bool)
    if values.ndim not in (2, 3) or mask.shape != values.shape[:2]:
        raise Refused(
            f"expected margins [models, examples] (or with augmentations) and a choice [models, examples], found shapes "
            f"{values.shape} and {mask.shape}"
        )
    if not np.isfinite(values).all():
        raise Refused("margins of the models: expected finite numbers, found NaN or infinity")
    if values.ndim == 3:
        mask = np.repeat(mask, values.shape[2], axis=1)
    return values.reshape(len(values), -1), mask
