"""Write the pages that are made from the code and from committed results.

docs/methods, docs/reference and the README's table of methods are made from the code; docs/benchmarks and what
``expunge recommend`` knows from bench/results.

python docs/generate.py            # write them
python docs/generate.py --check    # exit status 1 if one of them is stale, missing or left over
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from expunge.bench.pages import drawing
from expunge.bench.pages import page as bench_page
from expunge.bench.runner import FORMAT
from expunge.bench.suite_file import CONTROLS
from expunge.bench.words import interval
from expunge.catalogue import KINDS, catalogue, link, page, table
from expunge.recommend import collected

ROOT = Path(__file__).resolve().parents[1]
RESULTS, BENCHMARKS = ROOT / "bench/results", ROOT / "docs/benchmarks"
MEASURED = ROOT / "src/expunge/bench/measured.json"
METHODS, REFERENCE, README = ROOT / "docs/methods", ROOT / "docs/reference", ROOT / "README.md"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
BENCH, BENCH_END = "<!-- bench:begin -->", "<!-- bench:end -->"
SIDE_BY_SIDE, REPRODUCTION = RESULTS / "side_by_side", ROOT / "docs/reproduction"
NUMBERS, NUMBERS_END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
RESULT_NOTE = "<!-- Made by docs/generate.py from bench/results: run `expunge bench`, then `make docs`. -->\n\n"
NOTE = "<!-- Made by docs/generate.py from the code: change the docstrings, then run `make docs`. -->\n\n"


def pages() -> dict[Path, str]:
    """Every generated file and its content."""
    found = {METHODS / f"{method['name']}.md": NOTE + page(method["name"]) for method in catalogue("methods")}
    for kind in KINDS:
        found[REFERENCE / f"{kind}.md"] = f"{NOTE}# {kind.capitalize()}\n\n{listing(kind, '../methods')}\n"
    found.update(benchmarks())
    found.update(reproductions())
    if README.exists():
        found[README] = readme(README.read_text(encoding="utf-8"))
    return found


def results() -> list[dict[str, Any]]:
    """The committed results of ``expunge bench``, by name."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [one for one in read if isinstance(one, dict) and one.get("format") == FORMAT]


def benchmarks() -> dict[Path, str]:
    """A page and a drawing for each result, and the lines that ``expunge recommend`` goes by."""
    measured = collected(results())
    found = {MEASURED: "[\n" + ",\n".join(json.dumps(line) for line in measured) + "\n]\n"}
    for one in results():
        found[BENCHMARKS / f"{one['name']}.md"] = RESULT_NOTE + bench_page(one, f"{one['name']}.svg")
        found[BENCHMARKS / f"{one['name']}.svg"] = drawing(one)
    return found


def reproductions() -> dict[Path, str]:
    """The pages of docs/reproduction with their numbers, and the list of all, from bench/results/side_by_side."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SIDE_BY_SIDE.glob("*.json"))]
    found = {}
    for path in sorted(REPRODUCTION.glob("*.md")):
        own = [run for run in runs if run["method"] == path.stem]
        text = path.read_text(encoding="utf-8")
        if NUMBERS in text and NUMBERS_END in text:
            before, rest = text.split(NUMBERS, 1)
            made = "\n\n".join([*(side_by_side(run) for run in own), *capacities(path.stem)])
            found[path] = f"{before}{NUMBERS}\n\n{made}\n\n{NUMBERS_END}{rest.split(NUMBERS_END, 1)[1]}"
    if runs:
        found[REPRODUCTION / "README.md"] = RESULT_NOTE + overview(runs)
    return found


def side_by_side(run: dict[str, Any]) -> str:
    """The table of one run."""
    scores = run["scores"]
    rows = [
        [
            name.replace("_", " "),
            *(f"{mean_of([seed[side][name] for seed in run['seeds']]):.2f}" for side in ("original", "retrained")),
            f"{one['theirs']:.2f}",
            f"{one['ours']:.2f}",
            f"{one['difference']:+.2f} ± {one['half_width']:.2f}",
            "yes" if one["within"] else "no",
        ]
        for name, one in scores.items()
    ]
    time = run["time_ratio"]
    head = ("score, %", "do nothing", "retrained", "authors", "ours", "difference", "within")
    return (
        f"`{run['name']}`: {run['suite']}, {run['sizes']['forget']:,} records to forget, {run['sizes']['retain']:,} to keep, "
        f"{len(run['seeds'])} originals; {run['repository']}; revision {run['revision']}.\n\n{table(head, rows)}\n\n"
        f"Seconds of the authors' code over ours: {time['value']:.2f} ({time['low']:.2f} to {time['high']:.2f})."
    )


def capacities(method: str) -> list[str]:
    """The table of bench/deletion_capacity.py, on the page of S3T."""
    path = RESULTS / "deletion_capacity.json"
    if method != "s3t" or not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))

    def said(one: dict[str, float] | None) -> str:
        return "" if one is None else f"{one['mean']:.2f} ± {1.96 * one['error']:.2f} ({one['runs']:,})"

    rows = [
        [
            f"[{row['method']}](../methods/{row['method']}.md)",
            str(row["budget"]) if row["method"] == "s3t" else "",
            f"{row['expected']:g}",
            *(said(row[kind]) for kind in ("structure", "theirs")),
            said(row["whole"]) if row["method"] == "sisa" else f"the same, {row['whole']['runs']:,} runs",
        ]
        for row in found["rows"]
    ]
    head = ("method", "budget", "expected", "structure", "authors", "whole method")
    return [f"{found['shards']} shards, {found['slices']} slices; revision {found['revision']}.\n\n{table(head, rows)}"]


def overview(runs: list[dict[str, Any]]) -> str:
    """All runs in one table, and the geometric mean of their time ratios: over methods, each that of its runs."""
    rows = [
        [
            f"[{run['name']}]({run['method']}.md)",
            run["repository"],
            ", ".join(f"{one['difference']:+.1f} ± {one['half_width']:.1f}" for one in run["scores"].values()),
            "all" if all(one["within"] for one in run["scores"].values()) else "no",
            f"{run['time_ratio']['value']:.2f} ({run['time_ratio']['low']:.2f} to {run['time_ratio']['high']:.2f})",
        ]
        for run in runs
    ]
    logs: dict[str, list[float]] = {}
    for run in runs:
        logs.setdefault(run["method"], []).append(math.log(run["time_ratio"]["value"]))
    mean = math.exp(mean_of([mean_of(some) for some in logs.values()]))
    head = (
        "run",
        "authors' code",
        "ours less theirs: forget, retain, test accuracy (or error), membership, %",
        "within",
        "time ratio",
    )
    return (
        "# Beside the authors' own code\n\nThe same network, data, trained models and examples to forget; see each page for "
        "what was called and what differs. *Within*: the difference is inside the two's joint 95 % interval. *Time ratio*: "
        f"seconds of theirs over ours; the geometric mean over {len(logs)} methods is {mean:.2f}.\n\n{table(head, rows)}\n"
    )


def mean_of(values: list[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def listing(kind: str, folder: str) -> str:
    """One table: a line for each entry."""
    entries = catalogue(kind)
    if kind == "methods":
        rows = [
            [
                f"[{e['name']}]({folder}/{e['name']}.md)",
                e["summary"],
                link(e["paper"]),
                ", ".join(e["tasks"]),
                e["status"],
            ]
            for e in entries
        ]
        return table(("method", "what it does", "paper", "tasks", "status"), rows)
    if kind == "measures":
        return table(("name", "runs", "what it is"), [[f"`{e['name']}`", e["runs"], e["summary"]] for e in entries])
    rows = [
        [
            f"`{e['name']}`",
            e["summary"],
            ", ".join(f"`{name}={value}`" for name, value in e.get("settings", {}).items()),
        ]
        for e in entries
    ]
    if not any(row[2] for row in rows):
        return table(("name", "what it is"), [row[:2] for row in rows])
    return table(("name", "what it is", "settings"), rows)


def readme(text: str) -> str:
    """The README with its tables made again, where it has their markers."""
    for begin, end, made in (
        (BEGIN, END, lambda: listing("methods", "docs/methods")),
        (BENCH, BENCH_END, best),
    ):
        if begin in text and end in text:
            before, rest = text.split(begin, 1)
            text = f"{before}{begin}\n{made()}\n{end}{rest.split(end, 1)[1]}"
    return text


def best() -> str:
    """A line per suite and request: do nothing, retraining, and the method nearest to retraining."""
    rows = []
    for found in results():
        for request, lines in found["table"].items():
            known = [line for line in lines if "average_gap" in line["scores"]]
            controls = {line["row"]: line for line in known if line["row"] in CONTROLS}
            methods = [line for line in known if line["row"] not in CONTROLS]
            if methods and len(controls) == len(CONTROLS):
                rows.append(
                    [f"[{found['name']}](docs/benchmarks/{found['name']}.md)", request, *_best(controls, methods)]
                )
    head = ("suite", "request", "do nothing", "retrain", "nearest method", "its average gap", "gap left", "rows")
    return table(head, rows)


def _best(controls: dict[str, Any], methods: list[dict[str, Any]]) -> list[str]:
    nearest = min(methods, key=lambda line: line["scores"]["average_gap"]["value"])
    return [
        *(f"{controls[name]['scores']['average_gap']['value']:.2f}" for name in CONTROLS),
        nearest["row"],
        interval(nearest["scores"]["average_gap"]),
        f"{100 * nearest['left']:.0f} %",
        f"{100 * nearest['cost']:.1f} %",
    ]


def left_over(found: dict[Path, str]) -> list[Path]:
    """Generated pages of things that are gone."""
    return [
        path for folder in (METHODS, REFERENCE, BENCHMARKS) for path in sorted(folder.glob("*.*")) if path not in found
    ]


def main(check: bool) -> int:
    """Write, or compare."""
    os.chdir(ROOT)  # benchmark suites are listed by their path from here
    found = pages()
    stale = [path for path, text in found.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    gone = left_over(found)
    if check:
        for path in (*stale, *gone):
            print(f"{os.path.relpath(path, ROOT)} is stale: run `make docs`", file=sys.stderr)
        return 1 if stale or gone else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found[path], encoding="utf-8")
    for path in gone:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
