"""The same forgetting loss with and without surgery: what each keeps at equal forgetting.

    EXPUNGE_DATA=... python bench/surgery_utility.py

One forgetting loss on the originals of the fashion_mnist suite: plainly weighted, by one-sided projection (surgery) and
implicitly (eupmu), each with the settings that its search found (bench/suites/found). For the class the loss is that of a
random label (random_label), for the memorised records that of the runner-up (boundary_shrink_retain), all three by Adam along a
cosine. Each is run for several numbers of steps. Retain and test accuracy are read off, by linear interpolation along those, where
the forget accuracy is that of models retrained without the records (at the nearest point of a path that does not reach it).
Differences are paired by original, with Student's interval over them. Writes ``bench/results/surgery_utility.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import expunge as ex
from expunge.audit import intervals
from expunge.bench.requests import union
from expunge.bench.runner import Run
from expunge.bench.suite_file import BenchSpec
from expunge.core import Data, Request
from expunge.journal import write_bytes
from expunge.registry import Bound, methods
from expunge.version import revision

HERE = Path(__file__).parent
SUITE, RESULT = HERE / "suites/fashion_mnist.toml", HERE / "results/surgery_utility.json"
WITH = ("surgery", "eupmu")
ROWS = {
    "coats": {"plain": "random_label", "surgery": "surgery", "eupmu": "eupmu"},
    "memorised": {"plain": "boundary_shrink_retain", "surgery": "surgery_runner_up", "eupmu": "eupmu_runner_up"},
}
"""request -> which row of the suite is without surgery, and which are with it."""
SHARES = (0.15, 0.3, 0.5, 0.7, 1.0, 1.3)  # of the steps that the search found


def accuracy(model: nn.Module, data: Data) -> float:
    """In %."""
    with torch.no_grad():
        right = sum(int((model(b["x"]).argmax(1) == b["y"]).sum()) for b in data.batches(1024))
    return 100 * right / len(data)


def path_of(stage: Bound, model: nn.Module, request: Request, run: Run) -> list[list[float]]:
    """[points, 3] forget, retain and test accuracy, from doing nothing to the longest run."""
    test, task = run.material.suite.test, run.material.suite.task
    parts = (request.data("forget"), request.data("retain"), test)
    settings = dict(stage.settings)
    steps = sorted({max(1, round(share * settings["steps"])) for share in SHARES})
    found = [[accuracy(model, part) for part in parts]]
    for count in steps:
        shorter = methods()[stage.name].build(**{**settings, "steps": count})
        made = ex.unlearn(model, request, task=task, method=shorter).model
        found.append([accuracy(made, part) for part in parts])
    return found


def at(path: list[list[float]], forget: float) -> tuple[float, float, float]:
    """(forget, retain, test) where the path first comes down to this forget accuracy; its lowest point if it does not."""
    for (f0, r0, t0), (f1, r1, t1) in itertools.pairwise(path):
        if f1 <= forget <= f0:
            share = 0.0 if f0 == f1 else (f0 - forget) / (f0 - f1)
            return forget, r0 + share * (r1 - r0), t0 + share * (t1 - t0)
    lowest = min(path, key=lambda point: point[0])
    return lowest[0], lowest[1], lowest[2]


def measured(
    run: Run, request: str, target: float, stages: dict[str, Bound], originals: list[nn.Module]
) -> dict[str, Any]:
    """Of one request: paths, and the differences at equal forgetting."""
    asked = union(run.models.asked[request], run.train)
    paths = {name: [path_of(stage, one, asked, run) for one in originals] for name, stage in stages.items()}
    where = {name: np.array([at(path, target) for path in some]) for name, some in paths.items()}
    settings = {name: stage.printed() for name, stage in stages.items()}
    rows = {
        name: {"row": ROWS[request][name], "method": stage.name, **settings[name]} for name, stage in stages.items()
    }
    found: dict[str, Any] = {"forget_accuracy_of_retrained": target, "settings": rows, "paths": paths}
    for name in WITH:
        lines = {}
        for column, part in enumerate(("forget", "retain", "test")):
            values = (where[name] - where["plain"])[:, column]
            low, high = intervals.t_interval(values.tolist())
            lines[part] = {
                "plain": float(where["plain"][:, column].mean()),
                "with": float(where[name][:, column].mean()),
                "difference": float(values.mean()),
                "low": low,
                "high": high,
            }
        found[name] = lines
    return found


def main() -> int:
    """Measure and write; 1 where surgery and eupmu both keep less, by the whole interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", nargs="*", default=list(ROWS), help="the others are kept as they are")
    chosen = parser.parse_args().requests
    torch.set_num_threads(1)
    run = Run(SUITE.stem, BenchSpec.read(SUITE), (Path("out/bench") / SUITE.stem).absolute(), 1, None)
    originals, retrained = run.trained()
    models = [run.models.read(run.shelf.check(made)) for made in originals.values()]
    found = {}
    for request in chosen:
        asked = union(run.models.asked[request], run.train)
        references = [run.models.read(run.shelf.check(made)) for made in retrained[request]]
        target = float(np.mean([accuracy(one, asked.data("forget")) for one in references]))
        stages: Any = run.spec.stages()
        chosen_stages = {name: stages[request, row] for name, row in ROWS[request].items()}
        found[request] = measured(run, request, target, chosen_stages, models)
        for name in WITH:
            print(
                request,
                name,
                {part: round(line["difference"], 2) for part, line in found[request][name].items()},
                flush=True,
            )
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    found = {name: {**one, "revision": revision(), "machine": machine} for name, one in found.items()}
    before = json.loads(RESULT.read_text())["requests"] if RESULT.exists() else {}
    document = {"suite": SUITE.stem, "requests": {**before, **found}}
    write_bytes(RESULT, (json.dumps(document, indent=1) + "\n").encode())
    worse = [
        r for r, one in found.items() for p in ("retain", "test") if all(one[name][p]["high"] < 0 for name in WITH)
    ]
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
