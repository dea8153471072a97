"""Colours, symbols and names of a page's figures: they hold on white and on near-black, and names stay text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from expunge.audit.report import RETRAIN, Row

PALETTE = ("#2f80c3", "#d17a22", "#2a9a6c", "#c0508c", "#8568cf", "#1f9fb0", "#a98f1c", "#cf4a55")
"""At least 3 : 1 against both page backgrounds, and told apart with the common colour-vision deficiencies."""
SYMBOLS = ("circle", "square", "triangle-up", "cross", "pentagon", "star", "hexagon", "triangle-down")
GREY, BAND = "#7c858f", "rgba(42, 154, 108, 0.18)"
LETTERS = 26
Figure = dict[str, Any]


def styles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Colour and symbol of each row: grey for the controls."""
    made, count = [], 0
    for row in rows:
        if row.kind == "control":
            made.append({"colour": GREY, "symbol": "diamond-open" if row.name == RETRAIN else "x"})
        else:
            made.append(
                {
                    "colour": PALETTE[count % len(PALETTE)],
                    "symbol": SYMBOLS[count // len(PALETTE) % len(SYMBOLS)]
                    if count >= len(PALETTE)
                    else SYMBOLS[count],
                }
            )
            count += 1
    return made


def text(name: str) -> str:
    """A name for plotly, which reads tags in its labels: escaped, and cut where it would push the plot aside."""
    return html.escape(name if len(name) <= LETTERS else name[: LETTERS - 1] + "…", quote=False)


def figure(title: str, note: str, data: list[dict[str, Any]], **layout: Any) -> Figure:
    return {"title": title, "note": note, "data": data, "layout": layout}
