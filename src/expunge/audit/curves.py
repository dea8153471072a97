"""What happened step by step, from the histories of the runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.audit.drawing import GREY, Figure, figure, styles, text
from expunge.audit.report import Report

POINTS, CUT = 240, 3
_LINES = (
    (
        "loss/forget",
        "Forget objective",
        "As each method minimises it: an ascent goes down here while the loss goes up.",
        "solid",
    ),
    ("loss/retain", "Retain objective", "On the batch of each step.", "solid"),
    (
        "cosine",
        "Conflict: cosine of the two gradients",
        "Below 0 the forget and the retain gradient pull apart.",
        "solid",
    ),
    ("multiplier", "Multiplier of the retain gradient", "How much a combiner adds to protect what is kept.", "solid"),
)


def curves(report: Report) -> list[Figure]:
    """The figures for which any method has a history."""
    found = []
    for key, title, note, dash in _LINES:
        data = _lines(report, key, dash)
        if data:
            zero = [_level(0.0)] if key == "cosine" else []
            axis, cut = _cut(report, data) if key.startswith("loss/") else ({}, "")
            found.append(figure(title, note + cut, data, shapes=zero, xaxis={"title": {"text": "step"}}, yaxis=axis))
    changes = _lines(report, "retain_realised", "solid") + _lines(report, "retain_predicted", "dot")
    if changes:
        axis, cut = _cut(report, changes)
        note = "Solid: as it came out. Dotted: as the gradients predicted." + cut
        found.append(
            figure(
                "Change of the retain objective in one step",
                note,
                changes,
                shapes=[_level(0.0)],
                xaxis={"title": {"text": "step"}},
                yaxis=axis,
            )
        )
    return found


def _cut(report: Report, data: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """An axis that a run which left all bounds does not flatten for the others, and the sentence that says so."""
    chance = report.facts.get("chance") or 0.0
    values = [value for trace in data for value in trace["y"]]
    bound = CUT * chance
    if not chance or max(map(abs, values)) <= 2 * bound:
        return {}, ""
    inside = [value for value in values if abs(value) <= bound] or [-bound, bound]
    low, high = min(inside), max(inside)
    low, high = -bound if min(values) < -bound else low, bound if max(values) > bound else high
    room = 0.04 * (high - low)
    return {"range": [low - room, high + room]}, f" Cut at {CUT} times the loss of knowing nothing."


def _level(height: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "yref": "y",
        "x0": 0,
        "x1": 1,
        "y0": height,
        "y1": height,
        "line": {"color": GREY, "width": 1, "dash": "dot"},
        "layer": "below",
    }


def _lines(report: Report, key: str, dash: str) -> list[dict[str, Any]]:
    data = []
    for number, (row, style) in enumerate(zip(report.rows, styles(report.rows), strict=True)):
        if row.kind == "control":
            continue
        at, values = thin([step for step in row.history if step.get(key) is not None], key)
        if at:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(at) > 1 else "markers",
                    "x": at,
                    "y": values,
                    "name": text(row.name),
                    "meta": number,
                    "line": {"color": style["colour"], "width": 1.8, "dash": dash},
                    "marker": {"color": style["colour"]},
                }
            )
    return data


def thin(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over neighbours so that a long run fits; steps that repeat are numbered on."""
    size = max(1, math.ceil(len(history) / POINTS))
    steps = [float(step.get("step", number)) for number, step in enumerate(history)]
    if any(after <= before for before, after in itertools.pairwise(steps)):
        steps = [float(number) for number in range(len(steps))]
    values = [float(step[key]) for step in history]
    at, means = [], []
    for start in range(0, len(values), size):
        part = [value for value in values[start : start + size] if math.isfinite(value)]
        if part:
            at.append(steps[start])
            means.append(float(f"{sum(part) / len(part):.6g}"))
    return at, means
