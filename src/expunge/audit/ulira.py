"""U-LiRA: was this example made to be forgotten, or never seen? One attacker per example, from models that unlearned.

Both arms go through the unlearning method: models that were trained on the example and then made to forget it, and
models that never had it and were made to forget something else. Otherwise the attack would find out that a model has
unlearned, not that the example was in it. Pure functions on arrays first, then the measures.

Papers: Hayes et al. 2024, arXiv 2403.01218 (normal fits); RULI, Naderloui et al. 2025 (Gaussian kernels). Fewer than 64
models per arm give a weak attack: what it does not find is then no evidence. The attack can be led astray by constant
outputs on the forget data: read it beside utility and a distance to retraining.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from expunge.audit import intervals
from expunge.audit.gaussian import ENOUGH, Fit, Variance, fit, without_each
from expunge.audit.lira import online_arms, shadows_apart
from expunge.audit.roc import matched
from expunge.audit.subject import FORGOTTEN, IN, OUT, Reading, Subject
from expunge.core import Key, Refused
from expunge.registry import measure

LEAST = 4
"""Models per arm that an example must have: three are left where one is left out."""

BANDWIDTH = 1.0  # of the kernels, in units of the margin: the released code leaves scikit-learn's default
_CELLS = 1 << 24


@dataclass(frozen=True)
class Pairs:
    """Log odds of models whose state is known, two by two: one that forgot the example and one that never had it.

    Both of a pair are scored by fits without either: where the states leave no trace, the two may be exchanged.

    Attributes:
        forgotten, never: [p, n] log odds that the example was forgotten by the model; NaN where there is no pair.
        models: [2, p, n] their numbers.
    """

    forgotten: np.ndarray
    never: np.ndarray
    models: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """[n] share of right verdicts about each example, log odds of 0 counted half."""
        return np.nanmean(self.verdicts, axis=0)

    @property
    def verdicts(self) -> np.ndarray:
        """[p, n] 0 to 1: how many of the two are called right; NaN where there is no pair."""
        right = np.heaviside(self.forgotten, 0.5) + np.heaviside(-self.never, 0.5)
        return np.where(np.isnan(self.forgotten), np.nan, right / 2)

    @property
    def area(self) -> float:
        """Area under the ROC curve over all pairs."""
        there = ~np.isnan(self.forgotten)
        return intervals.auc(self.forgotten[there], self.never[there])


def log_odds(
    target: ArrayLike, margins: ArrayLike, forgotten: ArrayLike, never: ArrayLike, variance: Variance | None = None
) -> np.ndarray:
    """[n] log N(margin; forgotten) - log N(margin; never seen): q of the paper is its logistic function.

    Args:
        target: [n] or [t, n] margins of the attacked models.
        margins: [m, n] of the shadow models. forgotten, never: [m, n] bool, their states.
        variance: as ``gaussian.fit``; one choice for both arms.
    """
    value, (first, second, kind) = np.asarray(target, np.float64), _both(forgotten, never, variance)
    return fit(margins, first, kind).log_density(value) - fit(margins, second, kind).log_density(value)


def kernel_log_odds(
    target: ArrayLike, margins: ArrayLike, forgotten: ArrayLike, never: ArrayLike, bandwidth: float = BANDWIDTH
) -> np.ndarray:
    """The same with Gaussian-kernel densities, in logarithms, so that far margins do not end in 0 / 0.

    Args:
        target: [n] or [t, n]. bandwidth: standard deviation of each kernel, above 0.
    """
    values, (first, second, _) = np.asarray(margins, np.float64), _both(forgotten, never, "pooled")
    wanted = np.atleast_2d(np.asarray(target, np.float64))
    none = np.full(wanted.shape, -1)
    found = _density(wanted, values, first, none, bandwidth) - _density(wanted, values, second, none, bandwidth)
    return found.reshape(np.shape(target))


def paired_log_odds(
    margins: ArrayLike,
    forgotten: ArrayLike,
    never: ArrayLike,
    key: Key,
    variance: Variance | None = None,
    bandwidth: float | None = None,
) -> Pairs:
    """The attack on the shadow models themselves: its accuracy is what the method gives away, 50 % for nothing.

    For each example, models of the two arms are paired at random; where one arm is larger its others serve the fits
    only. Expected accuracy and area are exactly 0.5 where states are drawn at random and leave no trace.

    Args:
        margins, forgotten, never, variance: as ``log_odds``, with at least 4 models per arm and example.
        key: of the pairing. bandwidth: Gaussian kernels instead of normal fits, where given.
    """
    values, (first, second, kind) = np.asarray(margins, np.float64), _both(forgotten, never, variance)
    for arm in (first, second):
        if arm.shape != values.shape or not arm.size or arm.sum(0).min() < LEAST:
            raise Refused(
                f"too few shadow models for U-LiRA: expected margins and states [models, examples] with at least {LEAST} "
                f"models per arm for each example, found shapes {values.shape} and {arm.shape}"
            )
    models = np.stack([_order(first, key.at("forgotten")), _order(second, key.at("never"))])
    count = np.minimum(first.sum(0), second.sum(0))
    models = models[:, : count.max()]
    there = np.arange(count.max())[:, None] < count
    asked = [np.take_along_axis(values, chosen, 0) for chosen in models]
    if bandwidth is None:
        fits = [
            _taken(without_each(values, arm, kind), chosen) for arm, chosen in zip((first, second), models, strict=True)
        ]
        odds = [fits[0].log_density(value) - fits[1].log_density(value) for value in asked]
    else:
        odds = [
            _density(value, values, first, models[0], bandwidth) - _density(value, values, second, models[1], bandwidth)
            for value in asked
        ]
    return Pairs(np.where(there, odds[0], np.nan), np.where(there, odds[1], np.nan), models)


def held_against(
    target: ArrayLike,
    margins: ArrayLike,
    inside: ArrayLike,
    never: ArrayLike,
    key: Key,
    variance: Variance | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of one model, and those of every shadow model that never had the example, each judged as the other.

    A shadow model is judged without itself; the attacked model without one of them, drawn by key for each example, so
    that where it is like them their scores have the same distribution.

    Args:
        target: [n] margins of the attacked model. The rest as ``log_odds``; `inside` is the other arm, forgotten or IN.

    Returns:
        [n] and [m, n], NaN where a model is not of the arm `never`.
    """
    values, (first, second, kind) = np.asarray(margins, np.float64), _both(inside, never, variance)
    above, below = fit(values, first, kind), without_each(values, second, kind)
    others = above.log_density(values) - below.log_density(values)
    drawn = _taken(below, _order(second, key)[:1])
    value = np.asarray(target, np.float64)
    return above.log_density(value) - drawn.log_density(value)[0], others


def accuracy_interval(pairs: Pairs, level: float = 0.95) -> intervals.Interval:
    """Interval of the mean accuracy over examples and shadow models: the squared errors of both add up (conservative).

    With few shadow models it is too narrow, as their own spread is then poorly known.
    """
    share, verdicts = pairs.accuracy, pairs.verdicts
    mean, there = float(share.mean()), ~np.isnan(verdicts)
    errors = (verdicts - mean) / there.sum(0) / len(share)
    by_example, by_model = np.nansum(errors, axis=0), np.zeros(int(pairs.models.max()) + 1)
    for side in pairs.models:
        by_model += np.bincount(side[there], errors[there] / 2, minlength=len(by_model))
    half = float(special.ndtri(0.5 + level / 2)) * math.sqrt(float((by_example**2).sum() + (by_model**2).sum()))
    return max(0.0, mean - half), min(1.0, mean + half)


def _both(forgotten: ArrayLike, never: ArrayLike, variance: Variance | None) -> tuple[np.ndarray, np.ndarray, Variance]:
    """The two arms, and one kind of variance for both."""
    first, second = np.asarray(forgotten, bool), np.asarray(never, bool)
    if first.shape != second.shape or (first & second).any():
        raise Refused(
            "a shadow model has one state per example: expected two masks of one shape that exclude each other"
        )
    fewest = min(int(arm.sum(0).min(initial=ENOUGH)) for arm in (first, second))
    return first, second, variance or ("each" if fewest >= ENOUGH else "pooled")


def _order(mask: np.ndarray, key: Key) -> np.ndarray:
    """[m, n] model numbers in random order, those of the mask first."""
    drawn = np.random.Generator(np.random.PCG64(key.seed)).random(mask.shape)
    return np.argsort(np.where(mask, drawn, 2.0), axis=0, kind="stable")


def _taken(found: Fit, models: np.ndarray) -> Fit:
    return Fit(*(np.take_along_axis(part, models, 0) for part in (found.mean, found.deviation)))


def _density(
    wanted: np.ndarray, values: np.ndarray, mask: np.ndarray, without: np.ndarray, bandwidth: float
) -> np.ndarray:
    """[t, n] log of the mean of Gaussian kernels at the chosen `values` [m, n], at `wanted`, less model `without`."""
    if not bandwidth > 0:
        raise Refused(f"the bandwidth of the kernels must be above 0, found {bandwidth!r}")
    size = max(1, _CELLS // max(1, len(wanted) * len(values)))
    parts, number = [], np.arange(len(values))[None, :, None]
    for start in range(0, values.shape[1], size):
        cut = slice(start, start + size)
        kept = mask[None, :, cut] & (number != without[:, None, cut])
        kernels = -0.5 * ((wanted[:, None, cut] - values[None, :, cut]) / bandwidth) ** 2
        logs = special.logsumexp(np.where(kept, kernels, -np.inf), axis=1)
        parts.append(logs - np.log(kept.sum(1)) - math.log(bandwidth * math.sqrt(2 * math.pi)))
    return np.concatenate(parts, axis=1)


@measure
def ulira(subject: Subject) -> Reading | None:
    """Area between the model and shadow models that never had the forget examples, by U-LiRA on the same examples.

    The score is the log odds of "forgotten" against "never seen", both after unlearning; the model's score on each
    forget example is held against those of the shadow models that never had it. 0.5 where it is like them. The interval
    is over examples, all scores of one together; it does not hold the seed of the model.

    In the detail: ``called_forgotten``, the share (%) of forget examples called forgotten; of the method rather than
    of this model, ``shadow_accuracy`` (%, with its ends) and ``shadow_auc``, the attack on the shadow models
    themselves, and ``kernel_accuracy`` and ``kernel_auc``, the same with Gaussian kernels.

    None where ``why_not`` gives a reason.
    """
    if why_not(subject):
        return None
    margins, forgotten, never = _arms(subject, "forget", FORGOTTEN)
    usable = _usable(forgotten, never)
    margins, forgotten, never = margins[:, usable], forgotten[:, usable], never[:, usable]
    target, key = subject.outputs("forget").membership[usable], subject.key.at("ulira")
    ours, theirs = held_against(target, margins, forgotten, never, key.at("held"))
    return matched(
        "ulira",
        ours,
        theirs,
        **_shadow_detail(subject, margins, forgotten, never),
        called_forgotten=100 * float((ours > 0).mean()),
    )


def _shadow_detail(subject: Subject, margins: np.ndarray, forgotten: np.ndarray, never: np.ndarray) -> dict[str, float]:
    """The attack on the shadow models: the same for every model of an audit, so kept with the shadows."""
    key = subject.key.at("ulira", "pairs")

    def compute() -> dict[str, float]:
        pairs = paired_log_odds(margins, forgotten, never, key)
        kernel = paired_log_odds(margins, forgotten, never, key, bandwidth=BANDWIDTH)
        low, high = accuracy_interval(pairs)
        return {
            "shadow_accuracy": 100 * float(pairs.accuracy.mean()),
            "shadow_accuracy_low": 100 * low,
            "shadow_accuracy_high": 100 * high,
            "shadow_auc": pairs.area,
            "kernel_accuracy": 100 * float(kernel.accuracy.mean()),
            "kernel_auc": kernel.area,
            "models_per_arm": float(min(forgotten.sum(0).min(), never.sum(0).min())),
        }

    found: dict[str, float] = subject.cache.get(subject.shadows, f"ulira {key.seed} {shadows_apart(subject)}", compute)
    return found


@measure
def ulira_retain(subject: Subject) -> Reading | None:
    """The same attack on retain examples: were they kept in training, or never seen? Unlearning can give them away more.

    A retrained model was trained on them too, so its value, not 0.5, is the target. None where ``why_not`` gives a
    reason for retain data.
    """
    if why_not(subject, "retain"):
        return None
    margins, inside, never = _arms(subject, "retain", IN)
    usable = _usable(inside, never)
    target = subject.outputs("retain").membership[usable]
    key = subject.key.at("ulira", "retain")
    ours, theirs = held_against(target, margins[:, usable], inside[:, usable], never[:, usable], key)
    return matched("ulira_retain", ours, theirs)


def why_not(subject: Subject, name: str = "forget") -> str:
    """Why ``ulira`` (or, for "retain", ``ulira_retain``) does not apply; "" where it does."""
    if subject.shadows is None or not subject.shadows.unlearned:
        return "U-LiRA needs shadow models that all went through the audited method: none were given"
    if not subject.has(name):
        return f"U-LiRA needs {name} data: the request has none"
    state, word = (FORGOTTEN, "forgot") if name == "forget" else (IN, "kept")
    states = subject.shadows.of(subject.ids(name))[shadows_apart(subject)]
    if _usable(states == state, states == OUT).sum() < 2:
        return (
            f"U-LiRA needs two {name} examples that at least {LEAST} shadow models {word} and {LEAST} never had: there "
            f"are fewer"
        )
    return ""


def _arms(subject: Subject, name: str, state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    margins, _, never = online_arms(subject, name)
    shadows = subject.shadows
    if shadows is None:
        raise Refused("this audit has no shadow models: give Subject(shadows=...)")
    return margins, shadows.of(subject.ids(name))[shadows_apart(subject)] == state, never


def _usable(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first.sum(0) >= LEAST) & (second.sum(0) >= LEAST)
