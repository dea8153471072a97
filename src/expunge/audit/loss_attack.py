"""The loss-based attack of the NeurIPS 2023 starter kit and of SCRUB: logistic regression on one number per example.

Its target is the accuracy that it has on a retrained model, not 50 %. The starter kit calls it a simple check and not
its metric: one threshold for all examples, on one side, sees neither losses that are too alike nor single examples.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from sklearn.model_selection import StratifiedShuffleSplit

from expunge.audit import intervals
from expunge.audit.roc import scores_of
from expunge.audit.subject import Reading, Subject
from expunge.core import Key, Refused
from expunge.registry import measure

LEAST = 10  # of each side after balancing: a tenth for the test must hold one of each


@dataclass(frozen=True)
class Attack:
    """What the attack got: mean accuracy with its interval, the accuracy of each split, examples per side."""

    accuracy: float
    low: float
    high: float
    splits: np.ndarray
    size: int


def loss_attack_accuracy(
    forget_losses: ArrayLike,
    test_losses: ArrayLike,
    *,
    splits: int = 10,
    test_share: float = 0.1,
    clip: float | None = None,
    key: Key = Key(0),
) -> Attack:
    """Cross-validated accuracy of telling forget losses from test losses, both sides equally many: 0.5 for no clue.

    The larger side is drawn down without repetition. Splits are stratified and random (``StratifiedShuffleSplit``); the
    attacker is a logistic regression on the loss with an L2 penalty of 1/2 w^2, as scikit-learn has it by default.

    The interval is Wilson's over examples, all verdicts about one example counted as one. Where the attacker has no clue
    the fitted sides depend on the tested ones, and it covers a little less than it says: 94 % in simulations with 200
    examples on a side and more, 88 % with 50. It does not hold the draw of the larger side, nor the seed of the model.

    Args:
        forget_losses, test_losses: [p], [q] finite, at least 10 each.
        splits: >= 1; 10 in the starter kit, 5 in SCRUB. test_share: in (0, 1).
        clip: losses are cut to [-clip, clip]; None in the starter kit, 100 in SCRUB (which keeps only the test examples
            of classes that are forgotten: choose them before).
        key: of the draws.
    """
    sides = [scores_of(forget_losses, "forget"), scores_of(test_losses, "test")]
    _check(sides, splits, test_share, clip)
    size = min(map(len, sides))
    sides = [_drawn(side, size, key.at(name)) for side, name in zip(sides, ("forget", "test"), strict=True)]
    losses = np.concatenate(sides) if clip is None else np.clip(np.concatenate(sides), -clip, clip)
    members = np.arange(2 * size) < size
    tested = tested_examples(size, splits, test_share, key)
    weight, bias = logistic(losses, members, ~tested)
    right = ((weight[:, None] * losses + bias[:, None] > 0) == members) & tested
    accuracies = right.sum(1) / tested.sum(1)
    low, high = _interval(float(accuracies.mean()), tested.sum(0))
    return Attack(float(accuracies.mean()), low, high, accuracies, size)


@functools.lru_cache(maxsize=16)
def tested_examples(size: int, splits: int, test_share: float, key: Key) -> np.ndarray:
    """[splits, 2 size] bool: what each split keeps for its test, as many of the first half as of the second.

    Kept for the next call, as every model of an audit is asked with the same splits; do not write to it.
    """
    members = np.arange(2 * size) < size
    maker = StratifiedShuffleSplit(n_splits=splits, test_size=test_share, random_state=key.at("splits").seed % 2**32)
    tested = np.zeros((splits, len(members)), dtype=bool)
    for number, (_, test) in enumerate(maker.split(members, members)):
        tested[number, test] = True
    tested.flags.writeable = False
    return tested


def logistic(values: np.ndarray, members: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [s] and biases [s] of s regressions: minimum of sum log(1 + exp(-y (w x + b))) + w^2 / 2 over `used`.

    Newton's method with halved steps, on standardised values; one fit on all examples is the start of every other.

    Args:
        values: [n]. members: [n] bool. used: [s, n] bool, with examples of both sides.
    """
    centre, scale = float(values.mean()), float(values.std()) or 1.0
    x, sign = (values - centre) / scale, np.where(members, 1.0, -1.0)
    start = _newton(x, sign, np.ones((1, len(x))), np.zeros((1, 2)), 1 / scale**2)
    found = _newton(x, sign, used.astype(np.float64), np.repeat(start, len(used), 0), 1 / scale**2)
    weight = found[:, 0] / scale
    return weight, found[:, 1] - weight * centre


def _newton(x: np.ndarray, sign: np.ndarray, used: np.ndarray, at: np.ndarray, penalty: float) -> np.ndarray:
    """[s, 2] minimisers (slope, intercept), from `at` [s, 2]."""

    def objective(point: np.ndarray) -> np.ndarray:
        lines = -sign * (point[:, :1] * x + point[:, 1:])
        return (used * np.logaddexp(0, lines)).sum(1) + penalty * point[:, 0] ** 2 / 2

    value = objective(at)
    for _ in range(100):
        odds = special.expit(-sign * (at[:, :1] * x + at[:, 1:])) * used
        curved, pulled = odds * (1 - odds), -odds * sign
        slope = np.stack([pulled @ x + penalty * at[:, 0], pulled.sum(1)], 1)
        ridge = 1e-12 * (1 + used.sum(1))  # where every example is told apart, the intercept alone has no curvature
        a, b, c = curved @ x**2 + penalty + ridge, curved @ x, curved.sum(1) + ridge
        step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], 1)
        step /= np.maximum(a * c - b * b, 1e-300)[:, None]
        size = np.ones(len(at))
        for _ in range(40):
            tried = objective(at - size[:, None] * step)
            worse = ~(tried <= value + 1e-12 * (1 + np.abs(value)))
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        else:
            return at
        at, value = at - size[:, None] * step, tried
        if np.abs(step).max() < 1e-9 * (1 + np.abs(at).max()):
            break
    return at


def _interval(right: float, tested: np.ndarray) -> tuple[float, float]:
    """Wilson's, for as many examples as the verdicts are worth: (sum n)^2 / sum n^2 of the n times each was tested.

    Verdicts about one example count as one. About half of the examples, for ten splits of a tenth.
    """
    worth = tested.sum() ** 2 / (tested**2).sum()
    low, high = intervals.wilson(right * worth, worth)
    return float(low), float(high)


def _drawn(side: np.ndarray, size: int, key: Key) -> np.ndarray:
    if len(side) == size:
        return side
    return side[np.random.Generator(np.random.PCG64(key.seed)).choice(len(side), size, replace=False)]


def _check(sides: list[np.ndarray], splits: int, test_share: float, clip: float | None) -> None:
    size = min(map(len, sides))
    if size < LEAST:
        raise Refused(f"too few examples for an attack: expected at least {LEAST} losses on each side, found {size}")
    if not all(np.isfinite(side).all() for side in sides):
        raise Refused("losses: expected finite numbers, found infinity; clip them")
    if splits < 1 or not 0 < test_share < 1 or not 1 <= math.ceil(2 * size * test_share) <= 2 * size - 2:
        raise Refused(f"expected splits >= 1 and a test share that leaves both parts examples: {splits}, {test_share}")
    if clip is not None and not clip > 0:
        raise Refused(f"clip must be above 0, found {clip!r}")


@measure
def loss_attack(subject: Subject) -> Reading | None:
    """Accuracy, in %, of a logistic regression on the loss that tells forget from unseen examples; starter-kit settings.

    In the detail: ``two_sided``, the same by distance from the median unseen loss, which sees losses that are too
    alike; ``same_class``, SCRUB's settings (test examples of classes that are forgotten, clipped to 100, 5 splits).
    The interval is over examples; it does not hold the seed of the model. None with fewer than ten examples on a side.
    """
    if not subject.has("test"):
        return None
    forget, unseen, key = subject.outputs("forget"), subject.unseen(), subject.key.at("loss_attack")
    if min(len(forget), len(unseen)) < LEAST:
        return None
    found = loss_attack_accuracy(forget.loss, unseen.loss, key=key)
    middle = float(np.median(unseen.loss))
    apart = loss_attack_accuracy(np.abs(forget.loss - middle), np.abs(unseen.loss - middle), key=key.at("two-sided"))
    detail = {"two_sided": 100 * apart.accuracy, "examples_per_side": float(found.size)}
    if forget.labels is not None and unseen.labels is not None:
        near = unseen.loss[np.isin(unseen.labels, forget.labels)]
        if len(near) >= LEAST:
            scrub = loss_attack_accuracy(forget.loss, near, splits=5, clip=100.0, key=key.at("same class"))
            detail["same_class"] = 100 * scrub.accuracy
    return Reading(
        "loss_attack", 100 * found.accuracy, 100 * found.low, 100 * found.high, 2 * found.size, "%", detail=detail
    )
