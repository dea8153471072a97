"""A benchmark's results for people: lines of a table, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = ("request", "method", "average gap", "left", "forget", "retain", "test", "membership AUC", "rows", "verdicts")
CONTROL = {"original": "do nothing", "retrain": "retrain"}


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line per request and row."""
    return [[request, *cells(line)] for request, lines in found["table"].items() for line in lines]


def cells(line: Mapping[str, Any]) -> list[str]:
    """The cells of one line, all but the request."""
    scores, name = line["scores"], line["row"]
    kind = "accuracy" if "test_accuracy" in scores else "loss"
    return [
        CONTROL.get(name, name),
        interval(scores.get("average_gap")),
        "" if line["left"] is None or name == "retrain" else f"{100 * line['left']:.0f} %",
        *(interval(scores.get(f"{part}_{kind}")) for part in ("forget", "retain", "test")),
        interval(scores.get("membership_auc")),
        "" if line["cost"] is None else f"{100 * line['cost']:.1f} %",
        ", ".join(v if name == "retrain" else f"{count} x {v}" for v, count in line["verdicts"].items()),
    ]


def interval(score: Mapping[str, float] | None) -> str:
    """A number over its interval: "1.52 (1.1 to 1.9)"."""
    if score is None or score["value"] is None:
        return ""
    value, low, high = (_number(score[part]) for part in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def _number(value: float | None) -> str:
    """Three digits; what is only rounding is 0."""
    return "?" if value is None else f"{value if abs(value) > 1e-9 else 0.0:.3g}"


def failures(found: Mapping[str, Any]) -> list[str]:
    """A sentence per row that refused a request."""
    return [f"{row} on {request}: {why}" for request, all in found["failed"].items() for row, why in all.items()]
