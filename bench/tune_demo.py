"""Find the demo's settings on requests that the demo never reports: other digits, other splits, other seeds.

Only the demo's training records are used, split again; its test set and its retrained models are never seen. For each
method every setting of a small grid is run on all tuning requests; the one with the smallest mean share of do-nothing's
average gap, among those that differentiate few enough rows, wins. Writes ``bench/results/demo_settings.json``, which the
demo's table of settings is copied from (a test holds the two together). Naming methods searches those alone and keeps the
other rows of the file: its revision is that of the last search, and an older row may come from a wider grid.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import expunge as ex
from expunge.audit import distance
from expunge.audit.subject import Subject
from expunge.core import Data, Key, Refused, Request, RunFailed
from expunge.data import builtin
from expunge.demo import most_memorised
from expunge.registry import methods
from expunge.version import revision

RESULT = Path(__file__).parent / "results" / "demo_settings.json"
SUITE = (
    Path(__file__).parent / "suites/found/digits.json"
)  # the same search serves the suite of bench/suites/digits.toml
REQUESTS = {"digit": "class_3", "memorised": "memorised"}
DIGITS = {101: 1, 102: 6, 103: 9}  # split seed -> digit; the demo forgets another one
MEMORISED = (201, 202, 203, 204, 205)
SEEDS = (7, 8)  # of each unlearning run
LIMIT = 0.1  # share of retraining's rows that a method may differentiate; seconds would depend on what else runs

GRIDS: dict[str, dict[str, list[Any]]] = {
    "finetune": {"lr": [0.05, 0.2], "steps": [50]},
    "gradient_ascent": {"lr": [2e-4, 4e-4, 1e-3], "steps": [20, 30]},
    "grad_diff": {"lr": [4e-4, 1e-3, 2e-3], "steps": [45], "batch": [32], "forget_weight": [0.05, 0.1]},
    "random_label": {"lr": [4e-3, 6e-3], "steps": [42], "batch": [32], "retain_weight": [3.0, 5.0]},
    "l1_sparse": {"lr": [3e-3, 4e-3, 5e-3], "steps": [48], "alpha": [1.5e-3, 3e-3]},
    "salun": {"lr": [4e-3, 6e-3], "steps": [42], "batch": [32], "retain_weight": [3.0, 5.0]},
    "ssd": {"share": [0.03, 0.06, 0.1], "strength": [0.1, 1.0]},
    "scrub": {
        "lr": [7e-4, 1e-3, 2e-3],
        "epochs": [4],
        "ascent_epochs": [1, 2],
        "retain_steps": [6],
        "temperature": [2.0],
    },
    "bad_teacher": {"lr": [1e-3, 2e-3], "steps": [30, 40], "batch": [32]},
    "influence": {"scale": [2.0, 4.0], "recursion": ["exact"], "samples": [300]},
    "npo": {"lr": [3e-4, 6e-4], "steps": [35, 45], "batch": [32], "beta": [1.0], "retain_weight": [2.0, 5.0]},
    "surgery": {"lr": [0.08, 0.1, 0.15], "tolerance": [-0.5, -1.0], "steps": [25, 32], "max_norm": [1.0, 2.0]},
    "eupmu": {
        "lr": [0.15, 0.2, 0.3],
        "tolerance": [-0.03, -0.5],
        "variant": ["fast", "paper"],
        "max_norm": [1.0, 2.0],
        "steps": [28],
    },
}


@dataclass(frozen=True)
class Problem:
    """A tuning request with its trained models."""

    name: str
    request: Request
    test: Data
    original: nn.Module
    retrained: tuple[nn.Module, ...]
    rows: int


def problems(suite: builtin.Suite) -> Iterator[Problem]:
    """The tuning requests, one at a time."""
    for seed, kind in [*DIGITS.items(), *((seed, None) for seed in MEMORISED)]:
        order = torch.randperm(len(suite.train), generator=Key(seed).generator())
        held = len(order) // 5
        train, test = suite.train.select(order[held:].sort().values), suite.train.select(order[:held].sort().values)
        request = ex.split(train, forget=f"label == {kind}") if kind is not None else most_memorised(suite, train, seed)
        assert request.retain is not None
        original = suite.fit(train, seed)
        retrained = tuple(suite.fit(request.retain, 1000 * seed + i) for i in range(3))
        rows = round(suite.recipe.epochs * len(request.retain))
        yield Problem("memorised" if kind is None else "digit", request, test, original, retrained, rows)


def metrics(problem: Problem, model: nn.Module, task: Any) -> np.ndarray:
    """The four numbers of the average gap, in points."""
    subject = Subject(problem.original, model, problem.request, task, problem.test, problem.retrained, draws=2)
    return distance.points(subject, model)


def settings_of(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def search(names: list[str]) -> dict[str, Any]:
    """method -> request kind -> [(mean share of do-nothing's gap, settings, gaps)], best first."""
    suite = builtin.suite("digits")
    rows: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for problem in problems(suite):
        target = np.mean([metrics(problem, model, suite.task) for model in problem.retrained], axis=0)
        nothing = float(np.abs(metrics(problem, problem.original, suite.task) - target).mean())
        for name in names:
            for settings in settings_of(GRIDS[name]):
                for seed in SEEDS:
                    try:
                        stage = methods()[name].build(**settings)
                        outcome = ex.unlearn(
                            problem.original, problem.request, task=suite.task, seed=seed, method=stage
                        )
                    except (Refused, RunFailed):
                        continue
                    gap = float(np.abs(metrics(problem, outcome.model, suite.task) - target).mean())
                    share = outcome.record["cost"]["backward"] / problem.rows
                    row = (gap / nothing, gap, share)
                    rows.setdefault((name, problem.name, json.dumps(settings)), []).append(row)
        print(problem.name, "do-nothing", round(nothing, 2), flush=True)
    found: dict[str, Any] = {}
    for (name, kind, settings), results in rows.items():
        left, gaps, shares = (list(column) for column in zip(*results, strict=True))
        if len(results) < len(SEEDS) * len(DIGITS) or float(np.median(shares)) > LIMIT:
            continue
        found.setdefault(name, {}).setdefault(kind, []).append(
            {
                "settings": json.loads(settings),
                "left": float(np.mean(left)),
                "worst": max(left),
                "gaps": gaps,
                "share_of_retraining": float(np.median(shares)),
            }
        )
    for kinds in found.values():
        for kind in kinds:
            kinds[kind] = sorted(kinds[kind], key=lambda row: row["left"])[:3]
    return found


def for_suite(document: Mapping[str, Any]) -> dict[str, Any]:
    """The best settings under the names of the suite's requests."""
    rows = {
        row: {
            REQUESTS[kind]: {
                "settings": best[0]["settings"],
                "score": best[0]["left"],
                "trials": len(settings_of(GRIDS[row])),
            }
            for kind, best in kinds.items()
        }
        for row, kinds in document["methods"].items()
    }
    return {"rule": document["rule"], "by": "bench/tune_demo.py", "revision": document["revision"], "methods": rows}


def main() -> None:
    """Search, print the best, write them."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(GRIDS))
    chosen = parser.parse_args().methods
    found = json.loads(RESULT.read_text())["methods"] if RESULT.exists() else {}
    found.update(search(chosen))
    document = {
        "rule": "mean share of do-nothing's gap over the tuning requests",
        "digits": DIGITS,
        "memorised_seeds": MEMORISED,
        "seeds": SEEDS,
        "revision": revision(),
        "methods": found,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    SUITE.write_text(json.dumps(for_suite(document), indent=1) + "\n")
    for name, kinds in found.items():
        for kind, rows in kinds.items():
            print(
                f"{name:16s} {kind:10s} left {rows[0]['left']:.2f} worst {rows[0]['worst']:.2f} "
                f"gaps {np.round(rows[0]['gaps'], 1)} rows {rows[0]['share_of_retraining']:.3f} {rows[0]['settings']}"
            )


if __name__ == "__main__":
    main()
