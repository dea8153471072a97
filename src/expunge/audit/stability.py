"""The stability gap: how bad a model was on the way, beside how it ended. Read from the record of a watched run.

Nothing is measured here: ``unlearn(watch=Watch(...))`` did, on fixed examples that are the same at every step. Without it
there is no reading. Retraining has no such path: the model before goes on serving while it trains, so the reference of a
worst value is what retrained models have at their end, and that of a gap is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from expunge.audit import accuracy, intervals
from expunge.audit.subject import Curve, Reading, Subject
from expunge.registry import measure

POINTS = 240  # of a curve
_Z = 1.959963984540054


@dataclass(frozen=True)
class Path:
    """What a run was like on one data set.

    Attributes:
        steps: [k] steps done before each look. values: [k], in percent or a loss; the first is the start, the last the
            end. errors: [k] standard errors of a loss; None for accuracy. examples: of the data set.
    """

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None
    examples: int

    @property
    def worst(self) -> int:
        """The place of the worst value after the start: the least accuracy, the largest loss."""
        return 1 + int(self.values[1:].argmin() if self.errors is None else self.values[1:].argmax())

    @property
    def gap(self) -> float:
        """How much worse the worst value is than the end, >= 0."""
        worst, end = float(self.values[self.worst]), float(self.values[-1])
        return 0.0 if worst == end else abs(worst - end)  # both infinite: no detour


@measure
def worst_retain(subject: Subject) -> Reading | None:
    """Worst accuracy on retain examples after any watched step (loss per unit where there are no labels).

    Wilson interval over the watched examples at that step. The least of many steps is low by chance too: it is a bound
    on what was seen, not an unbiased value. None where the run was not watched.
    """
    return _worst(subject, "retain")


@measure
def worst_test(subject: Subject) -> Reading | None:
    """The same on unseen examples: the watched data called test, else the request's valid data."""
    return _worst(subject, "test")


@measure
def stability_gap_retain(subject: Subject) -> Reading | None:
    """How much worse on retain examples the run was at its worst watched step than at its end; 0 for no detour.

    In points of accuracy, or of the loss per unit. The interval is that of a difference of two proportions (Newcombe's
    tenth method), as if the examples at the two steps were different ones: they are the same, so it is too wide rather
    than too narrow. What the run ends below its start is no gap, but in the detail as ``start_to_worst``.
    """
    return _gap(subject, "retain")


@measure
def stability_gap_test(subject: Subject) -> Reading | None:
    """The same on unseen examples."""
    return _gap(subject, "test")


worst_test.__test__ = False  # its name ends as a test's begins


def path(record: Mapping[str, Any], name: str) -> Path | None:
    """The looks at data `name` of a run's record, in order; None where the run was not watched on it.

    Steps of all stages count on. A value that is not a number is taken for the worst there is.
    """
    watch, watched = record.get("watch"), record.get("watched")
    if not watch or not watched or name not in watch["probes"]:
        return None
    column, error = f"watch/{name}", f"watch_error/{name}"
    history = record.get("history", ())
    rows = [(0, watched["start"])]
    rows += [(number + 1, row) for number, row in enumerate(history) if column in row]
    end = watched["end"]
    if rows[-1][0] < len(history) or rows[-1][0] == 0 or rows[-1][1][column] != end[column]:
        rows.append((max(len(history), rows[-1][0] + 1), end))
    labelled = watch["unit"] == "%"
    values = np.array([float(row[column]) for _, row in rows])
    values = np.where(np.isnan(values), 0.0 if labelled else math.inf, values)
    errors = None if labelled else np.array([float(row[error]) for _, row in rows])
    return Path(np.array([step for step, _ in rows]), values, errors, int(watch["probes"][name]["examples"]))


def proportions_difference(first: float, second: float, examples: int) -> tuple[float, float]:
    """Newcombe's hybrid score interval (method 10) of second - first, two shares of as many examples each.

    Wilson's interval of each gives the length in its direction: value -+ sqrt of the sum of squares.

    Args:
        first, second: shares, 0 to 1. examples: >= 1.

    Paper: Newcombe 1998, Statistics in Medicine 17, 873-890.
    """
    (low1, low2), (high1, high2) = (
        [float(end) for end in ends] for ends in intervals.wilson(np.array([first, second]) * examples, examples)
    )
    difference = second - first
    return difference - math.hypot(second - low2, high1 - first), difference + math.hypot(high2 - second, first - low1)


def _path(subject: Subject, name: str) -> Path | None:
    record = subject.record or {}
    found = path(record, name)
    return path(record, "valid") if found is None and name == "test" else found


def _worst(subject: Subject, name: str) -> Reading | None:
    found = _path(subject, name)
    if found is None:
        return None
    place, value = found.worst, float(found.values[found.worst])
    if found.errors is None:
        low, high = (100 * float(end) for end in intervals.wilson(value / 100 * found.examples, found.examples))
    else:
        low, high = _about(value, float(found.errors[place]))
    reference, verdict = _standing(subject, name, found, low, high)
    return Reading(
        f"worst_{name}",
        value,
        low,
        high,
        found.examples,
        _unit(subject, found),
        "higher" if found.errors is None else "lower",
        reference,
        verdict,
        _detail(found),
        _curves(subject),
        ("step", "accuracy, %" if found.errors is None else f"loss, {subject.task.unit}"),
    )


def _gap(subject: Subject, name: str) -> Reading | None:
    found = _path(subject, name)
    if found is None:
        return None
    place = found.worst
    if found.errors is None:
        worst, end = (float(found.values[at]) / 100 for at in (place, -1))
        ends = proportions_difference(worst, end, found.examples)
        low, high = 100 * ends[0], 100 * ends[1]
    else:
        low, high = _about(found.gap, math.hypot(float(found.errors[place]), float(found.errors[-1])))
    unit = "points" if found.errors is None else subject.task.unit
    return Reading(
        f"stability_gap_{name}",
        found.gap,
        max(0.0, low),
        high,
        found.examples,
        unit,
        "lower",
        detail=_detail(found),
    )


def _about(value: float, error: float) -> tuple[float, float]:
    """value -+ 1.96 errors; a value that is infinite (a run that broke on its way) is surely so."""
    return (value - _Z * error, value + _Z * error) if math.isfinite(value) else (value, value)


def _unit(subject: Subject, found: Path) -> str:
    return "%" if found.errors is None else subject.task.unit


def _detail(found: Path) -> dict[str, float]:
    start, worst, end = (float(found.values[place]) for place in (0, found.worst, -1))
    sign = 1.0 if found.errors is None else -1.0
    return {
        "start": start,
        "end": end,
        "worst_step": float(found.steps[found.worst]),
        "start_to_worst": sign * (start - worst),
    }


def _standing(
    subject: Subject, name: str, found: Path, low: float, high: float
) -> tuple[tuple[float, float] | None, str]:
    """What one more retrained model would have at its end, and whether the worst is surely below that."""
    if not subject.retrained or not subject.has(name):
        return None, ""
    kind = "accuracy" if found.errors is None else "loss"
    measure_of = getattr(accuracy, f"{name}_{kind}")
    ends = [measure_of(subject.judging(model)) for model in subject.retrained]
    band = min(end.low for end in ends), max(end.high for end in ends)
    if len(ends) > 2:
        prior = float(np.mean([((end.high - end.low) / (2 * _Z)) ** 2 for end in ends]))
        band = intervals.next_interval([end.value for end in ends], prior=prior)
    if found.errors is None:
        return (band[0], 100.0), "outside" if high < band[0] else "within"
    return (min(0.0, band[0]), band[1]), "outside" if low > band[1] else "within"


def _curves(subject: Subject) -> dict[str, Curve]:
    """Steps against values, of each data set that was watched; a long run keeps the worst of neighbours."""
    found = {}
    for name in ("retain", "forget", "test"):
        one = _path(subject, name)
        if one is not None:
            found[name] = thinned(one)
    return found


def thinned(found: Path) -> Curve:
    """At most ``POINTS`` + 2 points of a path: start, end, and the worst of each group of neighbours between."""
    inner = np.arange(1, len(found.values) - 1)
    groups = np.array_split(inner, min(len(inner), POINTS)) if len(inner) else []
    sign = 1 if found.errors is None else -1
    kept = [0, *(int(group[(sign * found.values[group]).argmin()]) for group in groups), len(found.values) - 1]
    return tuple(found.steps[kept].astype(float).tolist()), tuple(found.values[kept].tolist())
