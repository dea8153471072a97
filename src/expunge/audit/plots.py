"""The figures of a page, as plain data for plotly.js: colours that hold on white and on near-black, names that stay text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from expunge.audit import words
from expunge.audit.report import RETRAIN, Report, Row
from expunge.audit.subject import Reading

PALETTE = ("#2f80c3", "#d17a22", "#2a9a6c", "#c0508c", "#8568cf", "#1f9fb0", "#a98f1c", "#cf4a55")
"""At least 3 : 1 against both page backgrounds, and told apart with the common colour-vision deficiencies."""
SYMBOLS = ("circle", "square", "triangle-up", "cross", "pentagon", "star", "hexagon", "triangle-down")
GREY, BAND = "#7c858f", "rgba(42, 154, 108, 0.18)"
POINTS, LETTERS, CUT = 240, 26, 3
Figure = dict[str, Any]


def figures(report: Report) -> list[Figure]:
    """Every figure that the report has the numbers for: title, note, data and layout each."""
    found = [_gaps(report), _trade(report, ("forget_accuracy", "retain_accuracy")), _trade(report, ("forget_loss", "retain_loss")),
             _trade(report, ("membership_auc", "test_accuracy")), _trade(report, ("membership_auc", "test_loss")),
             _cost(report), *_curves(report)]
    return [figure for figure in found if figure is not None]


def styles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Colour and symbol of each row: grey for the controls."""
    made, count = [], 0
    for row in rows:
        if row.kind == "control":
            made.append({"colour": GREY, "symbol": "diamond-open" if row.name == RETRAIN else "x"})
        else:
            made.append({"colour": PALETTE[count % len(PALETTE)], "symbol": SYMBOLS[count // len(PALETTE) % len(SYMBOLS)]
                         if count >= len(PALETTE) else SYMBOLS[count]})
            count += 1
    return made


def text(name: str) -> str:
    """A name for plotly, which reads tags in its labels: escaped, and cut where it would push the plot aside."""
    return html.escape(name if len(name) <= LETTERS else name[:LETTERS - 1] + "…", quote=False)


def _figure(title: str, note: str, data: list[dict[str, Any]], **layout: Any) -> Figure:
    return {"title": title, "note": note, "data": data, "layout": layout}


def _bars(low: float, value: float, high: float) -> tuple[float, float]:
    """Upper and lower arm of an error bar; none where the interval is not finite."""
    return (max(0.0, high - value), max(0.0, value - low)) if math.isfinite(low) and math.isfinite(high) else (0.0, 0.0)


def _error(readings: Iterable[Reading], colour: Any = None) -> dict[str, Any]:
    arms = [_bars(r.low, r.value, r.high) for r in readings]
    return {"type": "data", "symmetric": False, "array": [a for a, _ in arms], "arrayminus": [b for _, b in arms],
            "thickness": 1.5, "width": 0, **({} if colour is None else {"color": colour})}


def _gaps(report: Report) -> Figure | None:
    """One line per model, the floor shaded."""
    rows = [(row, style) for row, style in zip(report.rows, styles(report.rows), strict=True) if "average_gap" in row.readings]
    if not rows:
        return None
    data = []
    for row, style in rows:
        reading = row.readings["average_gap"]
        data.append({"type": "scatter", "mode": "markers", "x": [reading.value], "y": [text(row.name)], "showlegend": False,
                     "marker": {"color": style["colour"], "symbol": style["symbol"], "size": 10}, "name": "",
                     "error_x": _error([reading], style["colour"]), "hoverlabel": {"namelength": -1},
                     "hovertemplate": "%{x:.1f} points<extra></extra>"})
    band = next((r.readings["average_gap"].reference for r, _ in rows if r.readings["average_gap"].reference is not None), None)
    shapes = [] if band is None else [{"type": "rect", "xref": "x", "yref": "paper", "x0": 0, "x1": band[1], "y0": 0, "y1": 1,
                                       "fillcolor": BAND, "line": {"width": 0}, "layer": "below"}]
    return _figure("Gap to retraining", "Points, with 95% interval. Shaded: how far retrained models are from each other.", data,
                   shapes=shapes, rows=len(rows), xaxis={"title": {"text": "points"}, "rangemode": "tozero"},
                   yaxis={"autorange": "reversed", "type": "category"})


def _trade(report: Report, axes: tuple[str, str]) -> Figure | None:
    """Two readings against each other, the region of retrained models shaded."""
    x, y = axes
    data, band = [], None
    for number, (row, style) in enumerate(zip(report.rows, styles(report.rows), strict=True)):
        if x not in row.readings or y not in row.readings:
            continue
        across, up = row.readings[x], row.readings[y]
        if across.reference is not None and up.reference is not None and band is None:
            band = (across.reference, up.reference)
        data.append({"type": "scatter", "mode": "markers", "x": [across.value], "y": [up.value], "name": text(row.name),
                     "meta": number, "marker": {"color": style["colour"], "symbol": style["symbol"], "size": 11},
                     "error_x": _error([across], style["colour"]), "error_y": _error([up], style["colour"])})
    if not data:
        return None
    shapes = [] if band is None else [{"type": "rect", "x0": band[0][0], "x1": band[0][1], "y0": band[1][0], "y1": band[1][1],
                                       "fillcolor": BAND, "line": {"color": PALETTE[2], "width": 1}, "layer": "below"}]
    labels = [] if band is None else [{"x": sum(band[0]) / 2, "y": sum(band[1]) / 2, "text": "retrained", "ax": 46, "ay": 34,
                                       "arrowhead": 0, "arrowwidth": 1, "arrowcolor": PALETTE[2], "font": {"color": PALETTE[2]}}]
    first = next(row for row in report.rows if x in row.readings and y in row.readings)
    titles = [words.title(name) + (f" ({unit})" if (unit := first.readings[name].unit) else "") for name in axes]
    note = "Green: where one more retrained model is expected. Left of it is over-forgetting as right of it is under-forgetting."
    if x == "forget_loss":
        note = "Green: where one more retrained model is expected. Right of it is over-forgetting as left of it is under-forgetting."
    return _figure(f"{words.title(x)} and {words.title(y).lower()}", note, data, shapes=shapes, annotations=labels,
                   xaxis={"title": {"text": titles[0]}}, yaxis={"title": {"text": titles[1]}})


def _cost(report: Report) -> Figure | None:
    """Seconds and rows differentiated, as a share of what retraining took."""
    rows = [row for row in report.rows if row.kind == "method" and any(
        "ratio_to_retraining" in row.readings[name].detail for name in ("seconds", "backward_rows") if name in row.readings)]
    if not rows:
        return None
    data = []
    for name, label, colour in (("seconds", "time", PALETTE[0]), ("backward_rows", "backward passes", PALETTE[1])):
        shares = [row.readings[name].detail.get("ratio_to_retraining") if name in row.readings else None for row in rows]
        shown = [None if share is None else f"{share:.2g}" for share in shares]
        data.append({"type": "bar", "orientation": "h", "y": [text(row.name) for row in rows], "x": shares, "name": label,
                     "text": shown, "textposition": "outside", "cliponaxis": False, "marker": {"color": colour},
                     "showlegend": True, "hovertemplate": "%{x:.3g} of retraining<extra></extra>"})
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": 1, "x1": 1, "y0": 0, "y1": 1,
            "line": {"color": GREY, "width": 1.5, "dash": "dot"}}
    return _figure("Cost", "As a share of one retraining (dotted line at 1).", data, shapes=[line], barmode="group", rows=2 * len(rows),
                   showlegend=True, xaxis={"title": {"text": "share of retraining"}, "rangemode": "tozero"},
                   yaxis={"autorange": "reversed", "type": "category"})


_LINES = (
    ("loss/forget", "Forget objective", "As each method minimises it: an ascent goes down here while the loss goes up.", "solid"),
    ("loss/retain", "Retain objective", "On the batch of each step.", "solid"),
    ("cosine", "Conflict: cosine of the two gradients", "Below 0 the forget and the retain gradient pull apart.", "solid"),
    ("multiplier", "Multiplier of the retain gradient", "How much a combiner adds to protect what is kept.", "solid"),
)


def _curves(report: Report) -> list[Figure]:
    found = []
    for key, title, note, dash in _LINES:
        data = _lines(report, key, dash)
        if data:
            zero = [_level(0.0)] if key == "cosine" else []
            axis, cut = _cut(report, data) if key.startswith("loss/") else ({}, "")
            found.append(_figure(title, note + cut, data, shapes=zero, xaxis={"title": {"text": "step"}}, yaxis=axis))
    changes = _lines(report, "retain_realised", "solid") + _lines(report, "retain_predicted", "dot")
    if changes:
        axis, cut = _cut(report, changes)
        note = "Solid: as it came out. Dotted: as the gradients predicted." + cut
        found.append(_figure("Change of the retain objective in one step", note, changes, shapes=[_level(0.0)],
                             xaxis={"title": {"text": "step"}}, yaxis=axis))
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
    return {"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": height, "y1": height,
            "line": {"color": GREY, "width": 1, "dash": "dot"}, "layer": "below"}


def _lines(report: Report, key: str, dash: str) -> list[dict[str, Any]]:
    data = []
    for number, (row, style) in enumerate(zip(report.rows, styles(report.rows), strict=True)):
        if row.kind == "control":
            continue
        at, values = thin([step for step in row.history if step.get(key) is not None], key)
        if at:
            data.append({"type": "scatter", "mode": "lines" if len(at) > 1 else "markers", "x": at, "y": values,
                         "name": text(row.name), "meta": number, "line": {"color": style["colour"], "width": 1.8, "dash": dash},
                         "marker": {"color": style["colour"]}})
    return data


def thin(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over neighbours so that a long run fits; steps that repeat (stages) are numbered on."""
    size = max(1, math.ceil(len(history) / POINTS))
    steps = [float(step.get("step", number)) for number, step in enumerate(history)]
    if any(after <= before for before, after in zip(steps, steps[1:], strict=False)):
        steps = [float(number) for number in range(len(steps))]
    values = [float(step[key]) for step in history]
    at, means = [], []
    for start in range(0, len(values), size):
        part = [value for value in values[start:start + size] if math.isfinite(value)]
        if part:
            at.append(steps[start])
            means.append(float(f"{sum(part) / len(part):.6g}"))
    return at, means
