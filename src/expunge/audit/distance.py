"""How far a model is from retrained ones, and how far those are from each other (the floor).

A distance to retraining means nothing by itself: retrained models differ too. Each distance is therefore given beside
the same distance of every retrained model to the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from expunge.audit import intervals
from expunge.audit.subject import Outputs, Reading, Subject
from expunge.registry import measure


@measure
def average_gap(subject: Subject) -> Reading | None:
    """Mean distance, in points, of forget, retain and test accuracy and membership AUC from the mean of retrained models.

    gap = mean over metrics of |metric(model) - mean over retrained of metric|, the AUC times 100; losses, where a task
    has no labels, are in percent of the loss of knowing nothing. The interval resamples the retrained models, then the
    examples (the same for every model). With few retrained models it is too narrow. The reference is the floor: each
    retrained model against the others. A gap within the floor does not prove that anything was forgotten.
    """
    return _gap_reading(subject, "average_gap", subject.retrained, _against_mean)


@measure
def average_gap_each(subject: Subject) -> Reading | None:
    """The same distance from each retrained model on its own, averaged afterwards: signs do not cancel between them."""
    return _gap_reading(subject, "average_gap_each", subject.retrained, _against_each)


@measure
def forget_output_distance(subject: Subject) -> Reading | None:
    """Jensen-Shannon distance (0 to 1) of the outputs on forget examples from those of each retrained model, on average.

    Where a task has no classes, the mean absolute difference of the loss per unit. Bootstrap interval over examples.
    """
    return _distance_reading(subject, "forget_output_distance", "forget")


@measure
def test_output_distance(subject: Subject) -> Reading | None:
    """The same on test examples: what else changed."""
    return _distance_reading(subject, "test_output_distance", "test")


test_output_distance.__test__ = False  # its name begins as a test's does


def metrics(subject: Subject) -> tuple[str, ...]:
    """The metrics of the average gap that this audit has the data for."""
    kind = "loss" if subject.outputs("forget").correct is None else "accuracy"
    wanted = [("forget", f"forget_{kind}"), ("retain", f"retain_{kind}"), ("test", f"test_{kind}"), ("test", "membership_auc")]
    return tuple(name for data, name in wanted if subject.has(data))


def points(subject: Subject, model: nn.Module) -> np.ndarray:
    """[metrics] in points."""
    return subject.cache.get(model, "points", lambda: np.array([_point(subject, model, name) for name in metrics(subject)]))


def resampled(subject: Subject, model: nn.Module) -> np.ndarray:
    """[draws, metrics] in points; the same examples in each draw for every model."""
    return subject.cache.get(model, "resampled", lambda: np.stack(
        [_samples(subject, model, name) for name in metrics(subject)], axis=1))


def difference(subject: Subject, name: str) -> tuple[float, float, float] | None:
    """Model less the mean of the retrained, in points, with its interval: examples paired, retrained resampled."""
    if not subject.retrained or name not in metrics(subject):
        return None
    column = metrics(subject).index(name)
    value = points(subject, subject.after)[column] - np.mean([points(subject, m)[column] for m in subject.retrained])
    targets = np.stack([resampled(subject, m)[:, column] for m in subject.retrained], axis=1)
    samples = resampled(subject, subject.after)[:, column] - (targets * _picks(subject, len(subject.retrained))).sum(1)
    return float(value), *intervals.percentile(samples)


def floor(subject: Subject, against: Callable[..., np.ndarray] | None = None) -> tuple[float, float, float] | None:
    """The average gap of each retrained model to the others: mean, and its interval. None with fewer than two."""
    count = len(subject.retrained)
    if count < 2:
        return None
    against = _against_mean if against is None else against
    values, samples = [], []
    for number in range(count):
        held = subject.held_out(number)
        value, drawn = _gap(held, held.retrained, against)
        values.append(value)
        samples.append(drawn)
    mixed = (np.stack(samples, axis=1) * _picks(subject, count)).sum(1)
    low, high = intervals.distance_interval(float(np.mean(values)), mixed)
    return float(np.mean(values)), low, max(high, max(values))


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[n] square root of the Jensen-Shannon divergence in bits: a metric, 0 for equal rows, 1 for disjoint ones.

    Args:
        p, q: [n, C] probabilities, rows sum to 1.
    """
    middle = (p + q) / 2
    divergence = np.zeros(len(p))
    for one in (p, q):
        ratio = np.divide(one, middle, out=np.ones_like(one), where=one > 0)
        divergence += (one * np.log2(ratio)).sum(1) / 2
    return np.sqrt(np.clip(divergence, 0.0, 1.0))


def _point(subject: Subject, model: nn.Module, name: str) -> float:
    if name == "membership_auc":
        found = subject.outputs("forget", model).membership
        return 100 * intervals.auc(found, subject.unseen(model).membership)
    outputs = subject.outputs(name.split("_")[0], model)
    if outputs.correct is not None:
        return 100 * float(outputs.correct.mean())
    return 100 * float(np.average(outputs.loss, weights=outputs.units)) / _chance(subject)


def _samples(subject: Subject, model: nn.Module, name: str) -> np.ndarray:
    key = subject.key.at("resample")
    if name == "membership_auc":
        unseen = "test_forgotten" if subject.has("test_forgotten") else "test"
        return 100 * intervals.resampled_auc(subject.outputs("forget", model).membership, subject.outputs(unseen, model).membership,
                                             subject.draws, (key.at("forget"), key.at(unseen)))
    data = name.split("_")[0]
    outputs = subject.outputs(data, model)
    if outputs.correct is not None:
        return 100 * intervals.resampled_mean(outputs.correct, subject.draws, key.at(data))
    return 100 / _chance(subject) * intervals.resampled_ratio(outputs.loss * outputs.units, outputs.units, subject.draws,
                                                              key.at(data))


def _chance(subject: Subject) -> float:
    """Absolute loss per unit of knowing nothing: the scale on which losses become points."""
    batch = next(iter(subject.request.data("forget").batches(subject.batch)))
    return max(abs(float(subject.task.chance(batch))), 1e-12)


def _picks(subject: Subject, count: int) -> np.ndarray:
    """[draws, count] the weight of each retrained model in each resample; rows sum to 1."""
    drawn = np.concatenate(list(intervals.choices(count, subject.draws, subject.key.at("retrained", count))))
    return np.stack([(drawn == number).mean(1) for number in range(count)], axis=1)


def _against_mean(mine: np.ndarray, theirs: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """[draws]: mine [draws, metrics] from the picked mean of theirs [draws, models, metrics]."""
    return np.abs(mine - (theirs * picks[:, :, None]).sum(1)).mean(1)


def _against_each(mine: np.ndarray, theirs: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """[draws]: the picked mean of the distances from each."""
    return (np.abs(mine[:, None] - theirs).mean(2) * picks).sum(1)


def _gap(subject: Subject, retrained: tuple[nn.Module, ...], against: Callable[..., np.ndarray]) -> tuple[float, np.ndarray]:
    even = np.full((1, len(retrained)), 1 / len(retrained))
    value = against(points(subject, subject.after)[None], np.stack([points(subject, m) for m in retrained])[None], even)
    drawn = against(resampled(subject, subject.after), np.stack([resampled(subject, m) for m in retrained], axis=1),
                    _picks(subject, len(retrained)))
    return float(value[0]), drawn


def _gap_reading(subject: Subject, name: str, retrained: tuple[nn.Module, ...],
                 against: Callable[..., np.ndarray]) -> Reading | None:
    if not retrained:
        return None
    value, samples = _gap(subject, retrained, against)
    low, high = intervals.distance_interval(value, samples)
    parts = zip(metrics(subject), points(subject, subject.after), np.mean([points(subject, m) for m in retrained], axis=0),
                strict=True)
    detail = {part: float(mine - target) for part, mine, target in parts}
    level = floor(subject, against)
    if level is None:
        return Reading(name, value, low, high, len(retrained), "points", "lower", detail=detail)
    verdict = "within" if value <= level[2] else "outside"
    return Reading(name, value, low, high, len(retrained), "points", "lower", (level[1], level[2]), verdict,
                   {**detail, "floor": level[0]})


def _distances(subject: Subject, data: str) -> np.ndarray:
    """[n] mean over the retrained models of the distance of outputs."""
    mine = subject.outputs(data)
    return np.mean([_between(mine, subject.outputs(data, model)) for model in subject.retrained], axis=0)


def _between(mine: Outputs, theirs: Outputs) -> np.ndarray:
    if mine.probabilities is None or theirs.probabilities is None:
        return np.abs(mine.loss - theirs.loss)
    return jensen_shannon(mine.probabilities, theirs.probabilities)


def _distance_reading(subject: Subject, name: str, data: str) -> Reading | None:
    if not subject.retrained or not subject.has(data):
        return None
    each = _distances(subject, data)
    low, high = intervals.percentile(intervals.resampled_mean(each, subject.draws, subject.key.at("resample", data)))
    unit = "" if subject.outputs(data).probabilities is not None else subject.task.unit
    count = len(subject.retrained)
    if count < 2:
        return Reading(name, float(each.mean()), low, high, len(each), unit, "lower")
    between = [float(_distances(subject.held_out(number), data).mean()) for number in range(count)]
    band = intervals.next_interval(between) if count > 2 else (min(between), max(between))
    band = (max(0.0, band[0]), band[1])
    verdict = "outside" if low > band[1] else "within"
    return Reading(name, float(each.mean()), low, high, len(each), unit, "lower", band, verdict, {"floor": float(np.mean(between))})
