"""The figures and the guide's numbers of mini-TOFU, from bench/results/mini_tofu.json alone: plain SVG, no plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.audit.drawing import GREY, PALETTE

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/guides/mini-tofu.md"
FIGURES = ROOT / "docs/figures"
START, STOP = "<!-- numbers: written by bench/mini_tofu.py write -->", "<!-- end of numbers -->"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 260, 56, 12, 30, 42
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One run: a point per x, of several worlds; the mean is drawn thick, each world thin."""

    label: str
    xs: Sequence[float]
    worlds: Sequence[Sequence[float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes and the lines in them.

    Attributes:
        title, x, y: words. low, high: of y. lines: to draw. level: a dashed line across, and its name. logarithmic: x.
    """

    title: str
    x: str
    y: str
    low: float
    high: float
    lines: Sequence[Line]
    level: tuple[str, float] | None = None
    logarithmic: bool = False


def draw(panels: Sequence[Panel]) -> str:
    """Panels side by side, and one legend below; colours hold on white and on near-black."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colours = {label: PALETTE[n % len(PALETTE)] for n, label in enumerate(labels)}
    width, per_row = WIDTH * len(panels), max(1, WIDTH * len(panels) // 190)
    height = HEIGHT + 18 * math.ceil(len(labels) / per_row) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{GREY}">'
    ]
    parts += [_panel(panel, n * WIDTH, colours) for n, panel in enumerate(panels)]
    for n, label in enumerate(labels):
        x, y = 20 + 190 * (n % per_row), HEIGHT + 12 + 18 * (n // per_row)
        parts.append(f'<path d="M{x} {y}h22" stroke="{colours[label]}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{html.escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, shift: int, colours: Mapping[str, str]) -> str:
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    xs = [x for line in panel.lines for x in line.xs]
    place: Callable[[float], float] = (lambda x: math.log(x)) if panel.logarithmic else (lambda x: x)
    first, last = place(min(xs)), place(max(xs))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (place(x) - first) / ((last - first) or 1)
        up = (min(max(y, panel.low), panel.high) - panel.low) / (panel.high - panel.low)
        return round(shift + LEFT + inner * share, 1), round(TOP + tall * (1 - up), 1)

    parts = [
        f'<rect x="{shift + LEFT}" y="{TOP}" width="{inner}" height="{tall}" fill="none" stroke="{GREY}" '
        f'stroke-opacity=".5"/>',
        f'<text x="{shift + LEFT}" y="{TOP - 10}" font-weight="bold">{html.escape(panel.title)}</text>',
        f'<text x="{shift + LEFT + inner / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(panel.x)}</text>',
        f'<text transform="translate({shift + 14} {TOP + tall / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(panel.y)}</text>",
    ]
    for n in range(5):
        value = panel.low + (panel.high - panel.low) * n / 4
        _, y = at(math.exp(first) if panel.logarithmic else first, value)
        parts.append(f'<text x="{shift + LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for x in _ticks(xs):
        parts.append(f'<text x="{at(x, 0)[0]}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:g}</text>')
    if panel.level is not None:
        y = at(xs[0], panel.level[1])[1]
        parts.append(f'<path d="M{shift + LEFT} {y}h{inner}" stroke="{GREY}" stroke-dasharray="4 3"/>')
        parts.append(
            f'<text x="{shift + LEFT + inner - 4}" y="{y - 4}" text-anchor="end">{html.escape(panel.level[0])}</text>'
        )
    parts += [_line(line, at, colours[line.label]) for line in panel.lines]
    return "\n".join(parts)


def _line(line: Line, at: Callable[[float, float], tuple[float, float]], colour: str) -> str:
    """Each world thin, their mean thick, with a dot at every point."""
    dash = ' stroke-dasharray="6 3"' if line.dashed else ""
    mean = [sum(values) / len(values) for values in zip(*line.worlds, strict=True)]
    drawn = []
    for values, width, opacity in (*((world, 0.8, 0.45) for world in line.worlds), (mean, 2.2, 1.0)):
        spots = [at(x, y) for x, y in zip(line.xs, values, strict=True)]
        path = "L".join(f"{x} {y}" for x, y in spots)
        drawn.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"{dash}/>'
        )
    drawn += [
        f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>'
        for x, y in (at(x, y) for x, y in zip(line.xs, mean, strict=True))
    ]
    return "\n".join(drawn)


def _ticks(xs: Sequence[float]) -> list[float]:
    """At most seven of the values that there are."""
    values = sorted(set(xs))
    step = math.ceil(len(values) / 7)
    return values[::step]


def line(rows: Sequence[Row], run: str, what: str, *, x: str = "step", label: str = "", dashed: bool = False) -> Line:
    """One number of one run along the way, of every world; the original (x = 0) is left out where x is logarithmic."""
    worlds: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["run"] == run and not (x == "alpha" and row["alpha"] == 0):
            worlds.setdefault(row["seed"], []).append((row[x], row[what]))
    first = next(iter(worlds.values()))
    return Line(label or run, [x for x, _ in first], [[y for _, y in points] for points in worlds.values()], dashed)


def level_of(rows: Sequence[Row], what: str) -> tuple[str, float]:
    """The retrained models' mean, as a dashed line."""
    values = [row[what] for row in rows if row["run"] == "retrained"]
    return "retrained", sum(values) / len(values)


def figures(found: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    rows = found["rows"]
    lowest = min(row["log10_quality"] for row in rows)
    quality = ("log10 forget quality", min(-8.0, 4.0 * math.floor(lowest / 4)), 0.0)

    there = {row["run"] for row in rows}

    def panel(title: str, y: str, what: str, runs: Sequence[str], low: float, high: float, **more: Any) -> Panel:
        return Panel(title, "steps", y, low, high, [line(rows, run, what) for run in runs if run in there], **more)

    def pair(runs: Sequence[str]) -> list[Panel]:
        name, low, high = quality
        threshold = ("p = 0.05", math.log10(0.05))
        return [
            panel("Forget quality", name, "log10_quality", runs, low, high, level=threshold),
            panel("Utility", "MU_mini", "utility", runs, 0.0, 0.8, level=level_of(rows, "utility")),
        ]

    def lengths(what: str, title: str) -> Panel:
        level = level_of(rows, what)
        return panel(title, "forget probability", what, ("npo_retain", "simnpo"), 0.0, 1.0, level=level)

    vector = [
        Panel(
            title,
            "alpha",
            y,
            low,
            high,
            [line(rows, "task_vector", what, x="alpha")],
            level=level_of(rows, what),
            logarithmic=True,
        )
        for title, y, what, low, high in (
            ("Utility", "MU_mini", "utility", 0.0, 0.8),
            ("Membership", "AUC", "membership_loss", 0.0, 1.0),
        )
    ]
    rounded = [
        Panel(
            f"Forget probability, {run}",
            "steps",
            "probability",
            0.0,
            1.0,
            [
                line(rows, run, "forget_probability", label="as trained"),
                line(rows, run, "forget_probability_int8", label="8 bits", dashed=True),
                line(rows, run, "forget_probability_int4", label="4 bits", dashed=True),
            ],
            level=level_of(rows, "forget_probability"),
        )
        for run in ("npo_retain", "npo_slow")
        if run in there
    ]
    idk = ("idk_nll", "npo_retain")
    drawn = {
        "collapse": pair(found["drawn"]["collapse"]),
        "length": [
            lengths("forget_probability_short", "Short answers"),
            lengths("forget_probability_long", "Long answers"),
        ],
        "idk": [
            panel("Membership", "AUC", "membership_loss", idk, 0.0, 1.0, level=level_of(rows, "membership_loss")),
            panel("Greedy answers", "ROUGE-L", "forget_rouge", idk, 0.0, 1.0, level=level_of(rows, "forget_rouge")),
        ],
        "task_vector": vector,
        "quantise": rounded,
        "surgery": pair(("npo_retain", "npo_projection", "npo_eupmu")),
    }
    return {f"mini_tofu_{name}.svg": draw(panels) for name, panels in drawn.items()}


def numbers(found: Mapping[str, Any]) -> str:
    """What stands between the marks of the guide."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        f"Worlds {seeds}; expunge {found['expunge']}; torch {found['torch']}, {found['machine']}, one thread; "
        f"{found['minutes']:.0f} minutes of one core in all.",
        "",
        "| Finding | Verdict | Claim | Mean | 95% interval | Wanted |",
        "|---|---|---|---:|---|---|",
    ]
    for finding in found["findings"].values():
        for n, claim in enumerate(finding["claims"]):
            head = f"{finding['title']} | **{finding['verdict']}**" if n == 0 else " | "
            low, high = claim["interval"]
            wanted = f"{claim['side']} {claim['bound']:.2f}{'' if claim['holds'] else ', does not hold'}"
            lines.append(
                f"| {head} | {claim['criterion']} | {claim['mean']:.2f} | {low:.2f} to {high:.2f} | {wanted} |"
            )
    lines += ["", *_models(found["rows"])]
    return "\n".join(lines)


def _models(rows: Sequence[Row]) -> list[str]:
    """A table of the models, and of each run at its end, mean over the worlds."""
    columns = {
        "log10_quality": "log10 FQ",
        "utility": "MU_mini",
        "forget_probability": "Forget prob.",
        "forget_rouge": "Forget ROUGE",
        "extraction_strength": "ES",
        "membership_loss": "AUC",
        "retain_probability": "Retain prob.",
        "world_facts_rouge": "World ROUGE",
    }
    lines = [f"| At the end | {' | '.join(columns.values())} |", "|---|" + "---:|" * len(columns)]
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        places = dict.fromkeys(row["alpha"] if run == "task_vector" else "end" for row in mine)
        for place in places:
            last = mine if run == "task_vector" else [r for r in mine if r["step"] == mine[-1]["step"]]
            chosen = [row for row in last if place == "end" or row["alpha"] == place]
            values = [sum(row[name] for row in chosen) / len(chosen) for name in columns]
            title = f"`{run}`" + (f", alpha {place:g}" if place != "end" else "")
            lines.append(f"| {title} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return lines


def guide(text: str, found: Mapping[str, Any]) -> str:
    """The guide with its numbers put in anew."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{numbers(found)}\n\n{STOP}{rest.split(STOP)[1]}"


def write(found: Mapping[str, Any]) -> None:
    """Figures and guide."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, svg in figures(found).items():
        (FIGURES / name).write_text(svg)
    GUIDE.write_text(guide(GUIDE.read_text(), found))
