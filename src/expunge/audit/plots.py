"""The figures of a page, as data for plotly.js."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from expunge.audit import words
from expunge.audit.curves import curves
from expunge.audit.drawing import BAND, GREY, PALETTE, Figure, figure, styles, text
from expunge.audit.lines import equivalence, lines
from expunge.audit.report import Report
from expunge.audit.subject import Reading


def figures(report: Report) -> list[Figure]:
    """Every figure that the report has the numbers for: title, note, data and layout each."""
    found = [
        equivalence(report),
        _gaps(report),
        _trade(report, ("forget_accuracy", "retain_accuracy")),
        _trade(report, ("forget_loss", "retain_loss")),
        _trade(report, ("membership_auc", "test_accuracy")),
        _trade(report, ("membership_auc", "test_loss")),
        _cost(report),
        *lines(report),
        *curves(report),
    ]
    return [one for one in found if one is not None]


def _bars(low: float, value: float, high: float) -> tuple[float, float]:
    """Upper and lower arm of an error bar; none where the interval is not finite."""
    return (max(0.0, high - value), max(0.0, value - low)) if math.isfinite(low) and math.isfinite(high) else (0.0, 0.0)


def _error(readings: Iterable[Reading], colour: Any = None) -> dict[str, Any]:
    arms = [_bars(r.low, r.value, r.high) for r in readings]
    return {
        "type": "data",
        "symmetric": False,
        "array": [a for a, _ in arms],
        "arrayminus": [b for _, b in arms],
        "thickness": 1.5,
        "width": 0,
        **({} if colour is None else {"color": colour}),
    }


def _gaps(report: Report) -> Figure | None:
    """One line per model, the floor shaded."""
    rows = [
        (row, style)
        for row, style in zip(report.rows, styles(report.rows), strict=True)
        if "average_gap" in row.readings
    ]
    if not rows:
        return None
    data = []
    for row, style in rows:
        reading = row.readings["average_gap"]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [reading.value],
                "y": [text(row.name)],
                "showlegend": False,
                "marker": {"color": style["colour"], "symbol": style["symbol"], "size": 10},
                "name": "",
                "error_x": _error([reading], style["colour"]),
                "hoverlabel": {"namelength": -1},
                "hovertemplate": "%{x:.1f} points<extra></extra>",
            }
        )
    band = next(
        (r.readings["average_gap"].reference for r, _ in rows if r.readings["average_gap"].reference is not None), None
    )
    shapes = (
        []
        if band is None
        else [
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": 0,
                "x1": band[1],
                "y0": 0,
                "y1": 1,
                "fillcolor": BAND,
                "line": {"width": 0},
                "layer": "below",
            }
        ]
    )
    return figure(
        "Gap to retraining",
        "Points, with 95% interval. Shaded: how far retrained models are from each other.",
        data,
        shapes=shapes,
        rows=len(rows),
        xaxis={"title": {"text": "points"}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "type": "category"},
    )


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
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [across.value],
                "y": [up.value],
                "name": text(row.name),
                "meta": number,
                "marker": {"color": style["colour"], "symbol": style["symbol"], "size": 11},
                "error_x": _error([across], style["colour"]),
                "error_y": _error([up], style["colour"]),
            }
        )
    if not data:
        return None
    shapes = (
        []
        if band is None
        else [
            {
                "type": "rect",
                "x0": band[0][0],
                "x1": band[0][1],
                "y0": band[1][0],
                "y1": band[1][1],
                "fillcolor": BAND,
                "line": {"color": PALETTE[2], "width": 1},
                "layer": "below",
            }
        ]
    )
    labels = (
        []
        if band is None
        else [
            {
                "x": sum(band[0]) / 2,
                "y": sum(band[1]) / 2,
                "text": "retrained",
                "ax": 46,
                "ay": 34,
                "arrowhead": 0,
                "arrowwidth": 1,
                "arrowcolor": PALETTE[2],
                "font": {"color": PALETTE[2]},
            }
        ]
    )
    first = next(row for row in report.rows if x in row.readings and y in row.readings)
    titles = [words.title(name) + (f" ({unit})" if (unit := first.readings[name].unit) else "") for name in axes]
    note = (
        "Green: where one more retrained model is expected. Right of it too little is forgotten, left of it too much."
    )
    if x == "forget_loss":
        note = "Green: where one more retrained model is expected. Left of it too little is forgotten, right too much."
    return figure(
        f"{words.title(x)} and {words.title(y).lower()}",
        note,
        data,
        shapes=shapes,
        annotations=labels,
        xaxis={"title": {"text": titles[0]}},
        yaxis={"title": {"text": titles[1]}},
    )


def _cost(report: Report) -> Figure | None:
    """Seconds and rows differentiated, as a share of what retraining took."""
    rows = [
        row
        for row in report.rows
        if row.kind == "method"
        and any(
            "ratio_to_retraining" in row.readings[name].detail
            for name in ("seconds", "backward_rows")
            if name in row.readings
        )
    ]
    if not rows:
        return None
    data = []
    for name, label, colour in (("seconds", "time", PALETTE[0]), ("backward_rows", "backward passes", PALETTE[1])):
        shares = [
            row.readings[name].detail.get("ratio_to_retraining") if name in row.readings else None for row in rows
        ]
        shown = [None if share is None else f"{share:.2g}" for share in shares]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [text(row.name) for row in rows],
                "x": shares,
                "name": label,
                "text": shown,
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {"color": colour},
                "showlegend": True,
                "hovertemplate": "%{x:.3g} of retraining<extra></extra>",
            }
        )
    line = {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": 1,
        "x1": 1,
        "y0": 0,
        "y1": 1,
        "line": {"color": GREY, "width": 1.5, "dash": "dot"},
    }
    return figure(
        "Cost",
        "As a share of one retraining (dotted line at 1).",
        data,
        shapes=[line],
        barmode="group",
        rows=2 * len(rows),
        showlegend=True,
        xaxis={"title": {"text": "share of retraining"}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "type": "category"},
    )
