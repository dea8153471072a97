"""What forgetting costs beside retraining, as the retain set grows from 1,000 to 50,000 records, measured in one run.

One trained model forgets 1,000 of Fashion-MNIST's records. For each size of the retain set: the seconds of retraining on it
by the suite's recipe, the seconds of the whole call of each method (its checks, copies and hashes with it) and of the method
alone, and the rows that each differentiates. Methods and settings are those of bench/suites/fashion_mnist.toml and
fashion_mnist_memorised.toml for the memorised records, beside which 9,000 are kept there. The sizes are gone through in
turn, so that a machine that slows down slows all alike; retraining on more than 9,000 records is timed once. Writes
``bench/results/price.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expunge as ex
from expunge.bench.suite_file import BenchSpec
from expunge.core import Request
from expunge.data import builtin
from expunge.data.builtin import train_counted
from expunge.data.sources import fingerprint
from expunge.journal import write_bytes
from expunge.registry import Bound, methods
from expunge.version import revision

HERE = Path(__file__).parent
SUITES, RESULT = ("fashion_mnist", "fashion_mnist_memorised"), HERE / "results/price.json"
FORGET, SIZES, ROUNDS = 1000, (1000, 5000, 9000, 20000, 50000), 3
OFTEN = 9000  # retraining on no more than so many is timed in every round
REQUEST = "memorised"


def requests(suite: builtin.Suite) -> dict[int, Request]:
    """size of the retain set -> a request; the records to forget are the same."""
    forget = suite.train.select(torch.arange(FORGET))
    return {size: Request(forget, suite.train.select(torch.arange(FORGET, FORGET + size))) for size in SIZES}


def rows() -> dict[str, Bound]:
    """suite/row -> method with its settings."""
    read: dict[str, Any] = {name: BenchSpec.read(HERE / f"suites/{name}.toml").stages() for name in SUITES}
    return {
        f"{name}/{row}": stage for name in SUITES for (request, row), stage in read[name].items() if request == REQUEST
    }


def timed(model: Any, request: Request, suite: builtin.Suite, stage: Bound) -> dict[str, float]:
    """One run."""
    start = time.perf_counter()
    outcome = ex.unlearn(model, request, task=suite.task, method=stage)
    cost = outcome.record["cost"]
    return {"call": time.perf_counter() - start, "method": cost["seconds"], "backward": cost["backward"]}


def main() -> int:
    """Measure; 1 where a method of a fixed number of steps differentiates more rows than it declares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    suite = builtin.suite("fashion_mnist_full")
    recipe = builtin.suite("fashion_mnist").recipe
    found = rows()
    asked = requests(suite)
    model = suite.fit(asked[SIZES[0]].data("retain"), 0)
    runs: dict[str, dict[int, list[dict[str, float]]]] = {row: {size: [] for size in SIZES} for row in found}
    retrained: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for number in range(ROUNDS):
        for size, request in asked.items():
            for row, stage in found.items():
                runs[row][size].append(timed(model, request, suite, stage))
            if number == 0 or size <= OFTEN:
                retrained[size].append(train_counted(suite.make, request.data("retain"), suite.task, 1, recipe)[1])
        print("round", number, flush=True)
    retraining = {
        size: {"seconds": float(np.median([one["seconds"] for one in some])), "backward": some[0]["backward"]}
        for size, some in retrained.items()
    }
    table = {
        row: {str(size): _line(some, retraining[size]) for size, some in sizes.items()} for row, sizes in runs.items()
    }
    document = {
        "forget": FORGET,
        "request": REQUEST,
        "settings": {row: {"method": stage.name, **stage.printed()} for row, stage in found.items()},
        "retraining": {str(size): cost for size, cost in retraining.items()},
        "methods": table,
        "data": fingerprint(suite.train),
        "revision": revision(),
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }
    write_bytes(RESULT, (json.dumps(document, indent=1) + "\n").encode())
    for row, lines in table.items():
        print(
            f"{row:46s}", *(f"{size}: {one['call']:.2f} s ({100 * one['share']:.1f} %)" for size, one in lines.items())
        )
    fixed = {row for row, stage in found.items() if _declared(stage, SIZES[0]) == _declared(stage, SIZES[-1])}
    print("the same number of steps whatever the retain set, unless a guard ends the run:", ", ".join(sorted(fixed)))
    most = {row: max(one["backward"] for one in lines.values()) for row, lines in table.items()}
    return int(any(most[row] > _declared(found[row], SIZES[0]) for row in fixed))


def _declared(stage: Bound, retain: int) -> int:
    """Rows that the method says it differentiates."""
    return methods()[stage.name].rows(dict(stage.settings), FORGET, retain)["backward"]


def _line(runs: list[dict[str, float]], retraining: dict[str, float]) -> dict[str, float]:
    call = float(np.median([run["call"] for run in runs]))
    return {
        "call": call,
        "method": float(np.median([run["method"] for run in runs])),
        "backward": runs[0]["backward"],
        "share": call / retraining["seconds"],
        "rows_share": runs[0]["backward"] / retraining["backward"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
