"""How far a model is from retrained ones, and how far those are from each other (the floor).

A distance to retraining means nothing by itself: retrained models differ too. Each distance is therefore given beside
the same distance of every retrained model to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from expunge.audit import intervals
from expunge.audit.subject import Model, Outputs, Reading, Subject
from expunge.registry import measure

_KEPT = 1 << 26  # resampling weights that are kept for all models; more are drawn anew for each


@measure
def average_gap(subject: Subject) -> Reading | None:
    """Mean distance of forget, retain and test accuracy and membership AUC from the retrained mean, in points.

    gap = mean over metrics of |metric(model) - mean over retrained of metric|, the AUC times 100; losses, where a task
    has no labels, are in percent of the loss of knowing nothing. The interval is over examples (the same for every model)
    and over the seeds of the retrained models, by Student's law; see ``intervals.gap_interval``. The reference is the floor: each
    retrained model against the others. A gap within the floor does not prove that anything was forgotten.

    In the detail: the signed part of each metric; ``same_number``, the gap to as many retrained models as the floor has
    to compare with (one fewer); ``standardised``, the gap with each part in retrained standard deviations, so that the
    part that varies most does not decide.
    """
    return _gap_reading(subject, "average_gap", each=False)


@measure
def average_gap_each(subject: Subject) -> Reading | None:
    """The same distance from each retrained model on its own, averaged afterwards: signs do not cancel between them."""
    return _gap_reading(subject, "average_gap_each", each=True)


@measure
def forget_output_distance(subject: Subject) -> Reading | None:
    """Jensen-Shannon distance (0 to 1) of the outputs on forget examples to those of each retrained model, averaged.

    Where a task has no classes, the mean absolute difference of the loss per unit. Bootstrap interval over examples.
    """
    return distance_reading(subject, "forget_output_distance", "forget", "js", _between)


@measure
def test_output_distance(subject: Subject) -> Reading | None:
    """The same on test examples: what else changed."""
    return distance_reading(subject, "test_output_distance", "test", "js", _between)


test_output_distance.__test__ = False  # its name begins as a test's does


def metrics(subject: Subject) -> tuple[str, ...]:
    """The metrics of the average gap that this audit has the data for."""
    kind = "loss" if subject.outputs("forget").correct is None else "accuracy"
    wanted = [
        ("forget", f"forget_{kind}"),
        ("retain", f"retain_{kind}"),
        ("test", f"test_{kind}"),
        ("test", "membership_auc"),
    ]
    return tuple(name for data, name in wanted if subject.has(data))


def points(subject: Subject, model: Model) -> np.ndarray:
    """[metrics] in points."""
    return subject.cache.get(
        model, "points", lambda: np.array([_point(subject, model, name) for name in metrics(subject)])
    )


def resampled(subject: Subject, model: Model) -> np.ndarray:
    """[draws, metrics] in points; the same examples in each draw for every model."""
    return subject.cache.get(
        model, "resampled", lambda: np.stack([_samples(subject, model, name) for name in metrics(subject)], axis=1)
    )


@dataclass(frozen=True)
class Floor:
    """How far retrained models are from each other: value with its interval, and the limit for one more of them."""

    value: float
    low: float
    high: float
    limit: float


def floor(subject: Subject, each: bool = False) -> Floor | None:
    """The average gap of each retrained model to the others, averaged. None with fewer than two retrained models.

    The limit is the upper end of the resampled floor, or the largest gap of a retrained model where that is larger.
    """
    count = len(subject.retrained)
    if count < 2:
        return None
    gaps = [_gap(subject.held_out(number), each) for number in range(count)]
    values, picks = np.array([gap.value for gap in gaps]), _picks(subject, count)
    samples = (np.stack([gap.samples for gap in gaps], axis=1) * picks).sum(1)
    noise = (np.stack([gap.noise for gap in gaps], axis=1) * picks).sum(1) + np.abs((picks - 1 / count) @ values)
    low, high = intervals.distance_interval(float(values.mean()), noise)
    return Floor(float(values.mean()), low, high, max(intervals.percentile(samples)[1], float(values.max())))


def chance(subject: Subject) -> float:
    """Absolute loss per unit of knowing nothing: the scale on which losses become points.

    From the retain data where there are any: the targets of what is forgotten may be all alike, which is no scale.
    """
    data = subject.request.data("forget" if subject.request.retain is None else "retain")
    batch = next(iter(data.batches(1024)))
    return max(abs(float(subject.task.chance(batch))), 1e-12)


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


def _point(subject: Subject, model: Model, name: str) -> float:
    if name == "membership_auc":
        found = subject.outputs("forget", model).membership
        return 100 * intervals.auc(found, subject.outputs("test", model).membership)
    outputs = subject.outputs(name.split("_")[0], model)
    if outputs.correct is not None:
        return 100 * float(outputs.correct.mean())
    return 100 * float(np.average(outputs.loss, weights=outputs.units)) / chance(subject)


def _samples(subject: Subject, model: Model, name: str) -> np.ndarray:
    key = subject.key.at("resample")
    if name == "membership_auc":
        return 100 * intervals.resampled_auc(
            subject.outputs("forget", model).membership,
            subject.outputs("test", model).membership,
            subject.draws,
            (key.at("forget"), key.at("test")),
        )
    data = name.split("_")[0]
    outputs = subject.outputs(data, model)
    if outputs.correct is not None:
        if subject.draws * len(outputs) > _KEPT:
            return 100 * intervals.resampled_mean(outputs.correct, subject.draws, key.at(data))
        return (
            100
            * (_weights(subject, data, len(outputs)) @ outputs.correct.astype(np.float32))
            / np.float64(len(outputs))
        )
    return (
        100
        / chance(subject)
        * intervals.resampled_ratio(outputs.loss * outputs.units, outputs.units, subject.draws, key.at(data))
    )


def _weights(subject: Subject, data: str, size: int) -> np.ndarray:
    """[draws, size] float32: how often each example is in each resample. Sums of counts of right answers are exact."""

    def count() -> np.ndarray:
        blocks = intervals.choices(size, subject.draws, subject.key.at("resample").at(data))
        return np.concatenate([_tally(block, size) for block in blocks]).astype(np.float32)

    return subject.cache.get(subject.request, f"weights {data} {subject.draws} {subject.key.seed}", count)


def _tally(block: np.ndarray, size: int) -> np.ndarray:
    """[k, size] how often each position is in each row of a block [k, drawn]."""
    flat = block + np.arange(len(block))[:, None] * size
    return np.bincount(flat.ravel(), minlength=len(block) * size).reshape(len(block), size)


def _picks(subject: Subject, count: int) -> np.ndarray:
    """[draws, count] the weight of each retrained model in each resample; rows sum to 1."""

    def draw() -> np.ndarray:
        blocks = intervals.choices(count, subject.draws, subject.key.at("retrained", count))
        return np.concatenate([_tally(block, count) for block in blocks]) / count

    return subject.cache.get(subject.request, f"picks {count} {subject.draws} {subject.key.seed}", draw)


@dataclass(frozen=True)
class _Gap:
    """A gap, its resampled values [draws], the resampled size of its errors [draws], and its interval."""

    value: float
    samples: np.ndarray
    noise: np.ndarray
    interval: tuple[float, float]


def _gap(subject: Subject, each: bool) -> _Gap:
    """From the mean of the retrained models, or from each of them and then averaged."""
    count = len(subject.retrained)
    picks, even = _picks(subject, count), np.full((1, count), 1 / count)
    mine, theirs = points(subject, subject.after)[None], np.stack([points(subject, m) for m in subject.retrained])[None]
    drawn, theirs_drawn = (
        resampled(subject, subject.after),
        np.stack([resampled(subject, m) for m in subject.retrained], axis=1),
    )
    if each:
        seen, again = mine[:, None] - theirs, drawn[:, None] - theirs_drawn
    else:
        seen = (mine - (theirs * even[:, :, None]).sum(1))[:, None]
        again = (drawn - (theirs_drawn * picks[:, :, None]).sum(1))[:, None]
        picks, even = np.ones((len(picks), 1)), np.ones((1, 1))
    sizes = np.abs(seen).mean(2)[0]
    noise = (np.abs(again - seen).mean(2) * picks).sum(1) + np.abs((picks - even) @ sizes)
    value = float((even @ sizes)[0])
    interval = intervals.distance_interval(value, noise)
    if not each:
        interval = intervals.gap_interval(seen[0, 0], _errors(subject, drawn - mine, theirs[0], theirs_drawn - theirs))
    return _Gap(value, (np.abs(again).mean(2) * picks).sum(1), noise, interval)


def _errors(subject: Subject, ours: np.ndarray, theirs: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """[draws, metrics] errors of the difference from the retrained mean: of the examples, and of the seeds.

    Resampled examples move each retrained model in a way of its own too. That part of the spread between models is in the
    first kind of error, so only the rest of it makes the second.

    Args:
        ours: [draws, metrics], how far resampling moves the model. theirs: [K, metrics] the retrained models.
        moved: [draws, K, metrics], how far it moves each of those.
    """
    errors, count = ours - moved.mean(1), len(theirs)
    if count < 2:
        return errors
    own = (moved - moved.mean(1, keepdims=True)).var(0).mean(0) * count / (count - 1)
    spread = theirs.var(0, ddof=1)
    rest = np.sqrt(np.clip(1 - np.divide(own, spread, out=np.ones_like(own), where=spread > 0), 0.0, 1.0))
    return errors - rest * intervals.student_errors(theirs, subject.draws, subject.key.at("seeds"))


def _gap_reading(subject: Subject, name: str, each: bool) -> Reading | None:
    count = len(subject.retrained)
    if count == 0:
        return None
    gap = _gap(subject, each)
    low, high = gap.interval
    signed = points(subject, subject.after) - np.mean([points(subject, m) for m in subject.retrained], axis=0)
    detail = {part: float(value) for part, value in zip(metrics(subject), signed, strict=True)}
    detail |= _comparable(subject, each)
    level = floor(subject, each)
    if level is None:
        return Reading(name, gap.value, low, high, count, "points", "lower", detail=detail)
    verdict = "within" if gap.value <= level.limit else "outside"
    return Reading(
        name,
        gap.value,
        low,
        high,
        count,
        "points",
        "lower",
        (0.0, level.limit),
        verdict,
        {**detail, "floor": level.value},
    )


def _comparable(subject: Subject, each: bool) -> dict[str, float]:
    """The gap to one retrained model fewer, as in the floor, and the gap in retrained standard deviations."""
    count, mine = len(subject.retrained), points(subject, subject.after)
    if count < 2:
        return {}
    theirs = np.stack([points(subject, model) for model in subject.retrained])
    fewer = theirs if each else (theirs.sum(0) - theirs) / (count - 1)
    found = {"same_number": float(np.abs(mine - fewer).mean())}
    if count < 3:
        return found
    chance_of_examples = np.mean([resampled(subject, model).var(0) for model in subject.retrained], axis=0)
    deviation = np.sqrt(((count - 1) * theirs.var(0, ddof=1) + chance_of_examples) / count)
    known = deviation > 0
    gaps = np.abs(mine - (theirs if each else theirs.mean(0)[None]))
    if known.any():
        found["standardised"] = float((gaps[:, known] / deviation[known]).mean())
    return found


Between = Callable[[Outputs, Outputs], np.ndarray]
"""Distance per example [n] of two models' outputs; the same whichever comes first."""


def _pair(subject: Subject, data: str, kind: str, between: Between, one: Model, other: Model) -> np.ndarray:
    """[n] the distance of two models, computed once however many readings need it."""
    first, second = sorted((one, other), key=id)  # the cache holds both models, so their identities stay
    ours, theirs = subject.outputs(data, first), subject.outputs(data, second)
    return subject.cache.get(first, f"distance {kind} {data} {id(second)}", lambda: between(ours, theirs))


def _between(mine: Outputs, theirs: Outputs) -> np.ndarray:
    if mine.probabilities is None or theirs.probabilities is None:
        return np.abs(mine.loss - theirs.loss)
    return jensen_shannon(mine.probabilities, theirs.probabilities)


def distance_reading(subject: Subject, name: str, data: str, kind: str, between: Between) -> Reading | None:
    """Mean distance per example to each retrained model, beside that of each retrained model to the others.

    Args:
        name: of the measure. data: as ``Subject.outputs``. kind: names `between`, for what is kept of it.
        between: the distance per example, symmetric.
    """
    if not subject.retrained or not subject.has(data):
        return None
    each = np.mean([_pair(subject, data, kind, between, subject.after, m) for m in subject.retrained], axis=0)
    low, high = intervals.percentile(intervals.resampled_mean(each, subject.draws, subject.key.at("resample", data)))
    unit = "" if subject.outputs(data).probabilities is not None else subject.task.unit
    count = len(subject.retrained)
    if count < 2:
        return Reading(name, float(each.mean()), low, high, len(each), unit, "lower")
    table = np.zeros((count, count))
    for i, j in zip(*np.triu_indices(count, 1), strict=True):
        pair = _pair(subject, data, kind, between, subject.retrained[i], subject.retrained[j])
        table[i, j] = table[j, i] = pair.mean()
    floors = table.sum(1) / (count - 1)
    band = intervals.one_more(floors)
    band = (max(0.0, band[0]), band[1])
    verdict = "outside" if low > band[1] else "within"
    return Reading(
        name, float(each.mean()), low, high, len(each), unit, "lower", band, verdict, {"floor": float(floors.mean())}
    )
