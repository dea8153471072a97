"""Figures of the lines that readings bring: ROC curves, accuracy per class, numbers per layer, relearning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expunge.audit import words
from expunge.audit.drawing import BAND, GREY, PALETTE, Figure, figure, styles, text
from expunge.audit.report import Report, Row
from expunge.audit.subject import Curve, Reading

NOTES = {
    "roc": "How well each forget example is told from unseen ones. On the dotted diagonal nothing is told; both axes are "
    "logarithmic, because a few certain hits matter more than an average.",
}
LIMIT = 6  # margins: where a difference is cut, so that one ruined model does not flatten the others
MOST = 40  # classes whose names fit below a figure
LEAST = 1e-3  # where logarithmic axes of a ROC begin


def lines(report: Report) -> list[Figure]:
    """One figure per measure that brings lines: of every model where it brings one, else of the first method."""
    found = []
    for name in words.ordered(report.rows):
        rows = [(row, style) for row, style in zip(report.rows, styles(report.rows), strict=True) if _has(row, name)]
        if not rows:
            continue
        first = next((row for row, _ in rows if row.kind == "method"), rows[0][0]).readings[name]
        made = _of_models(report, name, first) if len(first.curves) == 1 else _of_one(name, first)
        if first.axes[0] == "class":
            _named(made, report.facts.get("class_names") or ())
        found.append(made)
    return found


def _named(made: Figure, names: Sequence[str]) -> None:
    """Points by class are no line: ranges become bars, and the names of the classes stand below."""
    bands = [trace["y"] for trace in made["data"] if trace["line"].get("width") == 0]
    made["data"] = [trace for trace in made["data"] if trace["line"].get("width") != 0]
    for place, trace in enumerate(made["data"]):
        trace["mode"], trace["marker"]["size"] = "markers", 8
        if len(bands) == 2 * len(made["data"]):
            low, high = bands[2 * place : 2 * place + 2]
            trace["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": [end - y for end, y in zip(high, trace["y"], strict=True)],
                "arrayminus": [y - end for end, y in zip(low, trace["y"], strict=True)],
                "width": 0,
                "thickness": 1.5,
            }
    numbers = sorted({value for trace in made["data"] for value in trace["x"]})
    known = [text(names[int(number)]) if number < len(names) else f"{number:g}" for number in numbers]
    made["layout"]["xaxis"] |= {"tickvals": numbers, "ticktext": known} if len(numbers) <= MOST else {}


def _has(row: Row, name: str) -> bool:
    return name in row.readings and bool(row.readings[name].curves)


def _of_models(report: Report, name: str, first: Reading) -> Figure:
    """The same line of every model."""
    data: list[dict[str, Any]] = []
    key = next(iter(first.curves))
    for number, (row, style) in enumerate(zip(report.rows, styles(report.rows), strict=True)):
        if _has(row, name) and key in row.readings[name].curves:
            data += _line(
                row.readings[name].curves[key], text(row.name), style["colour"], number, row.kind == "control"
            )
    return _drawn(name, first, data, key == "roc")


def _of_one(name: str, reading: Reading) -> Figure:
    """The lines of one model's reading under their own names."""
    colours = {"original": GREY, "retrained": PALETTE[2]}
    free = [colour for colour in PALETTE if colour != PALETTE[2]]
    data: list[dict[str, Any]] = []
    for number, (line, curve) in enumerate(reading.curves.items()):
        colour = colours.get(line, free[number % len(free)])
        data += _line(curve, text(line.replace("_", " ")), colour, None, line in colours)
    made = _drawn(name, reading, data, False)
    made["layout"]["showlegend"] = True
    return made


def _line(curve: Curve, name: str, colour: str, row: int | None, dashed: bool) -> list[dict[str, Any]]:
    """A line, and the range about it where it has one."""
    x, y = list(curve[0]), list(curve[1])
    shared: dict[str, Any] = {"type": "scatter", "x": x, "name": name, **({} if row is None else {"meta": row})}
    made: list[dict[str, Any]] = []
    if len(curve) == 4:
        quiet = {**shared, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        made.append({**quiet, "y": list(curve[2])})
        made.append({**quiet, "y": list(curve[3]), "fill": "tonexty", "fillcolor": _faint(colour)})
    style = {"color": colour, "width": 1.8, **({"dash": "dot"} if dashed else {})}
    mode = "lines+markers" if len(x) <= 12 else "lines"
    made.append({**shared, "y": y, "mode": mode, "line": style, "marker": {"color": colour, "size": 5}})
    return made


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def _drawn(name: str, reading: Reading, data: list[dict[str, Any]], roc: bool) -> Figure:
    across, up = reading.axes
    layout: dict[str, Any] = {"xaxis": {"title": {"text": text(across)}}, "yaxis": {"title": {"text": text(up)}}}
    note = NOTES["roc"] if roc else ""
    if roc:
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"type": "log", "range": [-3, 0], "dtick": 1}
        for trace in data:  # a logarithm has no zero
            trace["x"], trace["y"] = ([max(LEAST / 10, value) for value in trace[axis]] for axis in ("x", "y"))
        data.append(_diagonal())
    return figure(words.title(name), note, data, **layout)


def _diagonal() -> dict[str, Any]:
    ends = [LEAST, 1.0]
    line = {"color": GREY, "width": 1, "dash": "dot"}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "line": line,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def equivalence(report: Report) -> Figure | None:
    """Each deciding measure of each model: its difference from retraining, in units of what counts as none."""
    data: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for number, (row, style) in enumerate(zip(report.rows, styles(report.rows), strict=True)):
        tests = [test for test in row.tests if test.margin > 0 and math.isfinite(test.difference)]
        if not tests:
            continue
        names |= {test.name: None for test in tests}
        at = [max(-LIMIT, min(LIMIT, test.difference / test.margin)) for test in tests]
        arm = [(test.high - test.low) / 2 / test.margin for test in tests]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": at,
                "y": [words.title(test.name) for test in tests],
                "name": text(row.name),
                "meta": number,
                "marker": {"color": style["colour"], "symbol": style["symbol"], "size": 10},
                "error_x": {"type": "data", "array": arm, "thickness": 1.5, "width": 0, "color": style["colour"]},
                "hovertemplate": "%{x:.2f} of the margin<extra>%{fullData.name}</extra>",
            }
        )
    if not data:
        return None
    band = {"type": "rect", "xref": "x", "yref": "paper", "x0": -1, "x1": 1, "y0": 0, "y1": 1, "fillcolor": BAND}
    return figure(
        "Difference from retraining",
        "One is the margin: the largest difference that counts as none, from the spread of the retrained models. A model is "
        f"equivalent where its 90% interval lies in the shade. Cut at {LIMIT}.",
        data,
        shapes=[{**band, "line": {"width": 0}, "layer": "below"}],
        rows=2 * len(names),
        xaxis={"title": {"text": "difference from the retrained mean, in margins"}},
        yaxis={"autorange": "reversed", "type": "category"},
    )
