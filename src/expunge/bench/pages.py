"""The page of a benchmark, from its results file alone: tables in Markdown and trade-off plots in SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.audit.drawing import GREY, PALETTE
from expunge.bench import turns
from expunge.bench.words import CONTROL, HEAD, cells, failures
from expunge.journal import write_bytes

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 280, 58, 14, 30, 42
Point = tuple[str, float, float]


def page(found: Mapping[str, Any], figure: str) -> str:
    """Markdown: what was run, a table per request, the plots, and what failed.

    Args:
        found: a results file of ``expunge bench``.
        figure: path of the SVG that ``drawing`` gives, from the page.
    """
    spec, seeds = found["spec"], found["spec"]["seeds"]
    parts = [
        f"# {found['name']}",
        f"Suite `{spec['suite']}`, originals of seeds {_list(seeds['train'])}, unlearning seeds {_list(seeds['unlearn'])}, "
        f"{spec['retrained']} retrained models for each request. Revision {found['revision']}, torch "
        f"{found['machine']['torch']}, one thread a process. Training data {found['data']['train'][:12]}, test data "
        f"{found['data']['test'][:12]}.",
        "*Average gap*: mean distance of forget, retain and test accuracy and membership AUC from retrained models, in "
        "points; nearer to the line *retrain* is better, and so is each other column. *Left*: the share of do-nothing's gap "
        "that is left. *Rows*: examples differentiated, as a share of retraining's. Intervals: 95 %, over the seeds of the "
        "originals where there are several, over examples otherwise.",
        f"![trade-offs]({figure})",
    ]
    for request, lines in found["table"].items():
        about = found["requests"][request]
        often = f" in {about['turns']} requests, one after the other" if about["turns"] > 1 else ""
        parts.append(f"## {request}\n\n{sum(about['forget']):,} records to forget{often}, {about['retain']:,} to keep.")
        time = found["time"].get(request, {})
        table = [[*cells(line), _seconds(time.get(line["row"]))] for line in lines]
        parts.append(_markdown([*HEAD[1:], "time"], table))
    for one, many in turns.pairs(found):
        parts.append(
            f"## {many} beside {one}\n\nThe same records in {found['requests'][many]['turns']} requests and in one. *The same*: "
            f"runs whose verdict is the same both ways; where it is not, the method does not take requests one by one with "
            f"the settings that it has for one. A gap that turns make smaller is below 0."
        )
        parts.append(_markdown(turns.HEAD, turns.beside(found, one, many)))
    refused = failures(found)
    if refused:
        parts.append("## Refused\n\n" + "\n".join(f"- {line}" for line in refused))
    return "\n\n".join(parts) + "\n"


def write(found: Mapping[str, Any], folder: Path) -> Path:
    """``page.md`` and its drawing, in a folder; returns the page."""
    write_bytes(folder / "page.svg", drawing(found).encode())
    write_bytes(folder / "page.md", page(found, "page.svg").encode())
    return folder / "page.md"


def drawing(found: Mapping[str, Any]) -> str:
    """Two panels per request: what was forgotten against what still works, and price against distance."""
    panels, names = [], []
    for request, lines in found["table"].items():
        own = [line for line in lines if line["scores"]]
        names += [line["row"] for line in own if line["row"] not in CONTROL]
        panels.append((request, own))
    names = list(dict.fromkeys(names))
    colours = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(names)} | dict.fromkeys(CONTROL, GREY)
    shapes = {name: n // len(PALETTE) for n, name in enumerate(names)} | {"original": -1, "retrain": -2}
    below = TOP + (HEIGHT * len(panels)) + 18 * math.ceil((len(names) + 2) / 4) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" viewBox="0 0 {2 * WIDTH} {below}" '
        f'font-family="sans-serif" font-size="11" fill="{GREY}">'
    ]
    mark: Callable[[str, float, float], str] = lambda name, x, y: _mark(x, y, colours[name], shapes[name])  # noqa: E731
    for n, (request, lines) in enumerate(panels):
        kind = "accuracy" if any("test_accuracy" in line["scores"] for line in lines) else "loss"
        trade = [p for line in lines if (p := _point(line, f"forget_{kind}", f"test_{kind}"))]
        parts.append(_panel(f"{request}: trade-off", f"forget {kind}", f"test {kind}", trade, 0, n * HEIGHT, mark))
        price = [
            (line["row"], 100 * line["cost"], line["scores"]["average_gap"]["value"])
            for line in lines
            if line["cost"] and "average_gap" in line["scores"]
        ]
        level = {line["row"]: line["scores"].get("average_gap", {}).get("value") for line in lines}
        title, x = f"{request}: price", "rows differentiated, % of retraining's (log)"
        parts.append(
            _panel(
                title, x, "average gap, points", price, WIDTH, n * HEIGHT, mark, level.get("retrain"), logarithmic=True
            )
        )
    for n, name in enumerate([*CONTROL, *names]):
        across, down = 24 + 205 * (n % 4), TOP + HEIGHT * len(panels) + 18 * (n // 4)
        parts += [
            mark(name, across, down),
            f'<text x="{across + 12}" y="{down + 4}">{html.escape(CONTROL.get(name, name))}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _point(line: Mapping[str, Any], x: str, y: str) -> Point | None:
    scores = line["scores"]
    return (line["row"], scores[x]["value"], scores[y]["value"]) if x in scores and y in scores else None


def _panel(
    title: str,
    x: str,
    y: str,
    points: Sequence[Point],
    right: int,
    down: int,
    mark: Callable[[str, float, float], str],
    level: float | None = None,
    logarithmic: bool = False,
) -> str:
    """One set of axes with its marks; the retrained models' place as dashed lines."""
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    left, top = right + LEFT, down + TOP
    parts = [
        f'<rect x="{left}" y="{top}" width="{inner}" height="{tall}" fill="none" stroke="{GREY}" stroke-opacity=".5"/>',
        f'<text x="{left}" y="{top - 10}" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{left + inner / 2}" y="{down + HEIGHT - 8}" text-anchor="middle">{html.escape(x)}</text>',
        f'<text transform="translate({right + 14} {top + tall / 2}) rotate(-90)" text-anchor="middle">{html.escape(y)}</text>',
    ]
    if not points:
        return "\n".join(parts)
    place: Callable[[float], float] = math.log10 if logarithmic else float
    ys = [point[2] for point in points] + ([] if level is None else [level])
    (x0, x1), (y0, y1) = _ends([place(point[1]) for point in points]), _ends(ys)

    def at(px: float, py: float) -> tuple[float, float]:
        return round(left + inner * (px - x0) / (x1 - x0), 1), round(top + tall * (y1 - py) / (y1 - y0), 1)

    for n in range(5):
        px, py = x0 + (x1 - x0) * n / 4, y0 + (y1 - y0) * n / 4
        shown = 10**px if logarithmic else px
        parts.append(f'<text x="{at(px, y0)[0]}" y="{top + tall + 15}" text-anchor="middle">{shown:.3g}</text>')
        parts.append(f'<text x="{left - 6}" y="{at(x0, py)[1] + 4}" text-anchor="end">{py:.3g}</text>')
    known = {name: (px, py) for name, px, py in points}
    if level is not None or "retrain" in known:
        across = level if level is not None else known["retrain"][1]
        parts.append(f'<path d="M{left} {at(x0, across)[1]}h{inner}" stroke="{GREY}" stroke-dasharray="4 3"/>')
    if level is None and "retrain" in known:
        parts.append(
            f'<path d="M{at(known["retrain"][0], y0)[0]} {top}v{tall}" stroke="{GREY}" stroke-dasharray="4 3"/>'
        )
    parts += [mark(name, *at(place(px), py)) for name, px, py in points]
    return "\n".join(parts)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the range of the values."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(0.5, 0.01 * abs(high))
    return low - margin, high + margin


def _mark(x: float, y: float, colour: str, shape: int) -> str:
    """A cross for doing nothing, an open diamond for retraining, else a disc, a square, a triangle or a ring."""
    fill = f'fill="{colour}"'
    return {
        -2: f'<path d="M{x} {y - 6}l6 6l-6 6l-6 -6z" fill="none" stroke="{colour}" stroke-width="2"/>',
        -1: f'<path d="M{x - 4} {y - 4}l8 8m0 -8l-8 8" stroke="{colour}" stroke-width="2"/>',
        0: f'<circle cx="{x}" cy="{y}" r="4" {fill}/>',
        1: f'<rect x="{x - 4}" y="{y - 4}" width="8" height="8" {fill}/>',
        2: f'<path d="M{x} {y - 5}l5 9h-10z" {fill}/>',
    }.get(shape, f'<circle cx="{x}" cy="{y}" r="4" fill="none" stroke="{colour}" stroke-width="2"/>')


def _seconds(time: Sequence[float | None] | None) -> str:
    if not time or time[0] is None:
        return ""
    share = "" if time[1] is None else f" ({100 * time[1]:.1f} %)"
    return f"{time[0]:.2f} s{share}"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
