"""How much models lean on each of their examples: memorisation, influence, and strata to forget by.

    mem(i)      = P[h(x_i) = y_i], trained on data with i, less the same trained without it
    infl(i, j)  = the same difference on another example j

Both are estimated at once from models trained on random subsets (0.7 of the data in the literature): every model is a
sample "with" for the examples inside its subset and "without" for the others. The models of an audit's ``shadows`` and
what they say, kept in its store, are enough: nothing is trained here. Retraining without a little memorised example
changes nothing there, so that doing nothing is right; report strata apart. ``difficulty`` has cheaper scores.

Paper: Feldman and Zhang, "What Neural Networks Memorize and Why" (NeurIPS 2020, arXiv:2008.03703); strata as
Zhao et al., "What makes unlearning hard and what to do about it" (NeurIPS 2024, arXiv:2406.01257).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expunge.audit import intervals
from expunge.audit.subject import IN, OUT, Reading, Subject
from expunge.core import Refused, Request
from expunge.data.sources import as_data
from expunge.data.split import split
from expunge.registry import measure

LEVELS = ("low", "medium", "high")
FEWEST = 4  # models with and without an example, below which a measure says nothing of it


@dataclass(frozen=True)
class Estimate:
    """A difference of two probabilities per example (or per pair), and how sure it is.

    Attributes:
        value: in [-1, 1]; NaN where no model was trained with, or none without, the example.
        error: standard error of ``centre``, with one success and one failure added to each side (Agresti and Caffo
            2000), so that agreement of a few models is not certainty: sqrt(p q / (n_in + 2) + p' q' / (n_out + 2)).
        centre: the difference of the proportions with those added: the middle of the interval.
        n_in, n_out: [n] models trained with and without each example.
    """

    value: np.ndarray
    error: np.ndarray
    centre: np.ndarray
    n_in: np.ndarray
    n_out: np.ndarray

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Nominal 95 % for each example on its own: centre -+ 1.96 error, inside [-1, 1]."""
        return np.clip(self.centre - 1.96 * self.error, -1, 1), np.clip(self.centre + 1.96 * self.error, -1, 1)


def memorisation(correct: np.ndarray, inside: np.ndarray) -> Estimate:
    """[n] mem of every example.

    Args:
        correct: [models, n] bool, or in [0, 1]: whether each model labels example i correctly.
        inside: [models, n] bool: whether each model was trained on it. Or int8 states as ``Shadows.states``, of which
            FORGOTTEN counts on neither side.
    """
    right, members, others = _sides(correct, inside)
    if right.shape != members.shape:
        raise Refused(f"expected one entry per model and example in both, found {right.shape} and {members.shape}")
    return _difference((right * members).sum(0), members.sum(0), (right * others).sum(0), others.sum(0))


def influence(correct: np.ndarray, inside: np.ndarray) -> Estimate:
    """[n, k] influence of every training example on every one of k other examples, by two matrix products.

    Args:
        correct: [models, k] of the other examples. inside: [models, n] as ``memorisation``. Memory: several [n, k] arrays.
    """
    right, members, others = _sides(correct, inside)
    if len(right) != len(members):
        raise Refused(f"expected rows of the same models in both, found {len(right)} and {len(members)}")
    found = _difference(members.T @ right, members.sum(0)[:, None], others.T @ right, others.sum(0)[:, None])
    return Estimate(found.value, found.error, found.centre, found.n_in[:, 0], found.n_out[:, 0])


def _sides(correct: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correctness, trained with, trained without: float64 [models, ...]."""
    right, state = np.asarray(correct, np.float64), np.asarray(inside)
    if right.ndim != 2 or state.ndim != 2:
        raise Refused(f"expected two matrices with a row per model, found shapes {right.shape} and {state.shape}")
    if right.size and not (right.min() >= 0 and right.max() <= 1):
        raise Refused("correctness must lie in [0, 1]: give bool, or the probability of the true label")
    return right, (state == IN).astype(np.float64), (state == OUT).astype(np.float64)


def _difference(k1: np.ndarray, n1: np.ndarray, k0: np.ndarray, n0: np.ndarray) -> Estimate:
    with np.errstate(invalid="ignore", divide="ignore"):
        value = k1 / n1 - k0 / n0
    p1, p0 = (k1 + 1) / (n1 + 2), (k0 + 1) / (n0 + 2)
    error = np.sqrt(p1 * (1 - p1) / (n1 + 2) + p0 * (1 - p0) / (n0 + 2))
    return Estimate(value, error, p1 - p0, n1.astype(np.int64), n0.astype(np.int64))


def of_shadows(subject: Subject, data: str = "forget") -> Estimate:
    """[n] mem of the audit's forget or retain examples, from what its shadow models say; no model is trained.

    Args:
        subject: an audit with ``shadows``. data: "forget", "retain" or other data that the shadows were trained on.

    Raises:
        Refused: without shadow models, for shadows that were made to forget, and for a task without labels.
    """
    correct, states = _shadow_table(subject, data, data)
    return memorisation(correct, states)


def influence_of_shadows(subject: Subject, data: str = "forget", on: str = "test") -> Estimate:
    """[n, k] influence of the audit's examples `data` on the examples `on`, as ``of_shadows``."""
    correct, states = _shadow_table(subject, data, on)
    return influence(correct, states)


def _shadow_table(subject: Subject, data: str, on: str) -> tuple[np.ndarray, np.ndarray]:
    """(correct [m, k] on the examples `on`, states [m, n] of the examples `data`)."""
    shadows = subject.shadows
    if shadows is None or shadows.unlearned:
        raise Refused(
            "memorisation is estimated from shadow models that were trained and not made to forget: give the audit "
            "such shadows"
        )
    correct = [subject.outputs(on, model).correct for model in shadows.models]
    if any(row is None for row in correct):
        raise Refused(f"memorisation needs right and wrong answers: task {subject.task.name!r} has no classes")
    return np.stack([row for row in correct if row is not None]), shadows.of(subject.ids(data))


def strata(
    train: Any, scores: np.ndarray, size: int, levels: Sequence[str] = LEVELS, valid: Any = None
) -> dict[str, Request]:
    """level -> a Request to forget `size` examples of low, medium or high score, and keep all others.

    Low and high are the ends of the order; medium are those nearest to the median in rank. No example is in two strata.
    Equal scores go by position. An example whose score is not known is in no stratum, and always retained.

    Args:
        train: the training set, in any form that ``as_data`` takes.
        scores: [n], one per example in the order of the data: ``Estimate.value``, or a score of ``difficulty``. NaN: unknown.
        size: examples per stratum, >= 1, at most a third of those with a score.
        levels: which of "low", "medium" and "high". valid: goes into every request.
    """
    data = as_data(train)
    scores = np.asarray(scores, np.float64)
    if scores.shape != (len(data),):
        raise Refused(f"expected one score for each of {len(data)} examples, found shape {scores.shape}")
    known = np.flatnonzero(~np.isnan(scores))
    if not 1 <= size <= len(known) // 3:
        raise Refused(
            f"size must lie in 1 to {len(known) // 3}, a third of the {len(known)} examples with a score, found {size!r}"
        )
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise Refused(f"unknown stratum {unknown[0]!r}: expected one of {', '.join(LEVELS)}")
    order = known[np.argsort(scores[known], kind="stable")]
    start = (len(order) - size) // 2
    parts = {"low": order[:size], "medium": order[start : start + size], "high": order[-size:]}
    return {level: split(data, data.ids[torch.from_numpy(np.sort(parts[level]))], valid=valid) for level in levels}


@measure
def memorised_forget_accuracy(subject: Subject) -> Reading | None:
    """Accuracy on the most memorised third of the forget examples, where retraining changes the most; Wilson interval.

    Memorisation comes from the audit's shadow models: at least four with and four without each example that counts. The
    other two thirds, and the mean memorisation of each, are in the detail. None without such shadows.
    """
    if subject.shadows is None or subject.shadows.unlearned or subject.outputs("forget").correct is None:
        return None
    found = subject.cache.get(subject.shadows, "memorisation of forget", lambda: of_shadows(subject))
    known = np.flatnonzero((found.n_in >= FEWEST) & (found.n_out >= FEWEST))
    if len(known) < 2 * len(LEVELS):
        return None
    thirds = dict(zip(LEVELS, np.array_split(known[np.argsort(found.value[known], kind="stable")], 3), strict=True))
    return _stratified(subject, found, thirds)


def _stratified(subject: Subject, found: Estimate, thirds: Mapping[str, np.ndarray]) -> Reading:
    correct = np.asarray(subject.outputs("forget").correct)
    high = correct[thirds["high"]]
    low_end, high_end = intervals.wilson(high.sum(), len(high))
    detail = {
        name: value
        for level, place in thirds.items()
        for name, value in (
            (f"accuracy_{level}", 100 * float(correct[place].mean())),
            (f"memorisation_{level}", float(found.value[place].mean())),
        )
    }
    return Reading(
        "memorised_forget_accuracy",
        100 * float(high.mean()),
        100 * float(low_end),
        100 * float(high_end),
        len(high),
        "%",
        detail=detail,
    )
