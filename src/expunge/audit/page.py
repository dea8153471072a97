"""One self-contained page for one or more reports: no network, light and dark, phone and desk."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from expunge.audit import words
from expunge.audit.drawing import styles
from expunge.audit.plots import figures
from expunge.audit.report import Report, Row
from expunge.audit.subject import Reading, holdable
from expunge.audit.table import MAIN
from expunge.journal import write_bytes
from expunge.version import __version__

MARKS = {"under-forgot": "bad", "over-forgot": "bad", "lost utility": "bad", "outside": "bad", "above": "plain"}


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        title: heading. report: what it shows. text: a paragraph in plain language; the report's own summary where "".
    """

    title: str
    report: Report
    text: str = ""


def write_page(path: str | Path, title: str, sections: Sequence[Section], *, intro: str = "") -> Path:
    """Write one HTML page, whole or not at all; returns its path.

    The page carries its own scripts and asks the network for nothing. Every name in it stays text.
    """
    path = Path(path)
    write_bytes(path, render(title, sections, intro).encode())
    return path


def render(title: str, sections: Sequence[Section], intro: str = "") -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("expunge.audit").joinpath("report.html").read_text(encoding="utf-8")
    parts = [_section(section, number) for number, section in enumerate(sections)]
    plots = {
        figure["id"]: {"data": figure["data"], "layout": figure["layout"]}
        for part in parts
        for figure in part["figures"]
    }
    return environment.from_string(source).render(
        title=title,
        intro=intro,
        sections=parts,
        promises=words.PROMISES,
        version=__version__,
        plots=_embedded(plots),
        plotly=_plotly(),
    )


def _embedded(tree: Any) -> Any:
    """JSON that cannot close its script element."""
    from markupsafe import Markup

    text = json.dumps(holdable(tree), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@functools.cache
def _plotly() -> Any:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _section(section: Section, number: int) -> dict[str, Any]:
    report = section.report
    every = words.ordered(report.rows)
    main = [name for name in every if name in MAIN or name == "forgotten_class_accuracy"]
    rest = [name for name in every if name not in main]
    drawn = [{**figure, "id": f"plot-{number}-{index}"} for index, figure in enumerate(figures(report))]
    legend = [
        {"number": index, "name": row.name, **style}
        for index, (row, style) in enumerate(zip(report.rows, styles(report.rows), strict=True))
    ]
    return {
        "id": f"section-{number}",
        "title": section.title,
        "verdict": _verdict(report),
        "text": section.text or report.summary,
        "notes": report.notes,
        "main": _table(report.rows, main),
        "rest": _table(report.rows, rest) if rest else None,
        "figures": drawn,
        "legend": legend,
        "exchanges": [
            {
                "part": exchange.part,
                "question": exchange.question,
                "lines": [("the data", exchange.truth), *exchange.said.items()],
            }
            for exchange in report.exchanges
        ],
        "facts": flat(report.facts),
        "records": _records(report.rows),
    }


MEANINGS = {
    "forgotten": "By these measures the model cannot be told from models that were retrained without the forget examples.",
    "not forgotten": "By these measures the model is nearer to one that was trained on the forget examples than retrained "
    "models are.",
    "over-forgotten": "The model went beyond what retraining gives: that gives the forget examples away as well, or it lost "
    "what it was to keep.",
    "cannot tell": "There is too little to go by. This is no finding for or against the model.",
    "audit broken": "The audit failed its own controls, so nothing it says about the model counts.",
}


def _verdict(report: Report) -> dict[str, Any] | None:
    """The banner of an audit of one model; a table of several has a verdict in each line."""
    rows = [row for row in report.rows if row.kind == "method"]
    if len(rows) != 1 or rows[0].verdict not in MEANINGS:
        return None
    row = rows[0]
    return {
        "word": row.verdict,
        "mark": _bad(row),
        "name": row.name,
        "meaning": MEANINGS[row.verdict],
        "reasons": row.reasons,
        "needed": row.needed,
    }


def _table(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Headings, one line of cells per row, and the range expected of one more retrained model."""
    heads, bands, methods = [], [], [row for row in rows if row.kind == "method"]
    for name in names:
        first = next(row.readings[name] for row in rows if name in row.readings)
        band = next(
            (
                row.readings[name].reference
                for row in rows
                if name in row.readings and row.kind == "control" and row.readings[name].reference is not None
            ),
            None,
        )
        heads.append({"title": words.title(name), "unit": first.unit})
        bands.append(
            "" if band is None else f"{words.number(band[0], first.unit)} to {words.number(band[1], first.unit)}"
        )
    lines = [
        {
            "name": row.name,
            "kind": row.kind,
            "verdict": row.verdict,
            "bad": _bad(row),
            "notes": (*row.notes, *(row.reasons if len(methods) > 1 and row.kind == "method" else ())),
            "cells": [_cell(row.readings.get(name)) for name in names],
        }
        for row in rows
    ]
    return {"heads": heads, "bands": bands if any(bands) else [], "lines": lines}


def _bad(row: Row) -> str:
    if row.kind == "control":
        return "plain"
    bad = ("not forgotten", "over-forgotten", "audit broken", "not judged")
    return "good" if row.verdict == "forgotten" else "bad" if row.verdict in bad else "plain"


def _cell(reading: Reading | None) -> dict[str, str]:
    if reading is None:
        return {"value": "–", "between": "", "mark": "", "arrow": "", "word": ""}
    arrow = ""
    if reading.verdict in MARKS and reading.reference is not None:
        arrow = "▲" if reading.value > reading.reference[1] else "▼"
    between = words.spread(reading)
    if not between and "ratio_to_retraining" in reading.detail:
        between = f"{reading.detail['ratio_to_retraining']:.2g}× retrain"
    return {
        "value": words.number(reading.value, reading.unit),
        "between": between,
        "mark": MARKS.get(reading.verdict, ""),
        "arrow": arrow,
        "word": reading.verdict if arrow else "",
    }


def _records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"name": row.name, "items": flat(row.record)} for row in rows if row.record]


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every value in a nest; long lists are counted, not listed."""
    found: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            shown = ", ".join(str(part) for part in value) if len(value) <= 8 else f"{len(value)} entries"
            found.append((f"{prefix}{name}", shown))
        elif value is not None:
            found.append((f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)))
    return found
