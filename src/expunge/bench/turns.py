"""A sequence of requests beside one request for their union: does it end with the same verdict?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.audit import intervals
from expunge.bench.words import CONTROL

HEAD = ("method", "verdicts at once", "in turn", "the same", "average gap in turn less at once")


def pairs(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(request in one turn, the same records in several turns), by the hash of what is forgotten."""
    asked = found["requests"]
    return [
        (one, many)
        for many, about in asked.items()
        for one, other in asked.items()
        if about["turns"] > 1 and other["turns"] == 1 and other["hash"] == about["hash"]
    ]


def beside(found: Mapping[str, Any], one: str, many: str) -> list[list[str]]:
    """A line per method: its verdicts both ways, in how many runs they are the same, and what turns do to the gap.

    The difference of the gaps is in points, paired by run, with Student's 95 % interval where there are several.
    """
    runs = {
        name: {tuple(run[key] for key in ("train", "unlearn", "audit")): run["rows"] for run in _of(found, name)}
        for name in (one, many)
    }
    lines = []
    for line in found["table"][one]:
        row = line["row"]
        both = [key for key in runs[one] if row in runs[one][key] and row in runs[many].get(key, {})]
        if row in CONTROL or not both:
            continue
        verdicts = [[runs[name][key][row]["verdict"] for key in both] for name in (one, many)]
        same = sum(first == second for first, second in zip(*verdicts, strict=True))
        gaps = [runs[many][key][row]["average_gap"][0] - runs[one][key][row]["average_gap"][0] for key in both]
        lines.append([row, *map(_counted, verdicts), f"{same} of {len(both)}", _difference(gaps)])
    return lines


def _of(found: Mapping[str, Any], request: str) -> list[Any]:
    return [run for run in found["runs"] if run["request"] == request]


def _counted(verdicts: list[str]) -> str:
    return ", ".join(f"{verdicts.count(one)} x {one}" for one in dict.fromkeys(sorted(verdicts)))


def _difference(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.2f}"
    low, high = intervals.t_interval(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
