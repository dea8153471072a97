"""Seconds to train reference models with one worker and with two, and what a killed call repeats when it is given again.

Each call is a process of its own, timed from its start to its end, so that starting Python, torch and the workers counts.
Calls with one and with two workers alternate, and the ratio is of the medians. Then a call with two workers is killed
when half of its models are finished, and given again.

``python bench/reference_speed.py --smoke`` runs it small, and writes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from expunge.version import revision

SEED, ROUNDS, MODELS, EPOCHS = 0, 2, 12, 120
RESULT = Path(__file__).parent / "results" / "reference_speed.json"
CALL = """
import sys
from pathlib import Path
from expunge.data.builtin import Recipe, digits, train_counted
from expunge.data.split import split
from expunge.references import references

folder, workers, models, epochs = Path(sys.argv[1]), *map(int, sys.argv[2:])
suite = digits()
request = split(suite.train, "y == 3")

def train(data, seed):
    model, _ = train_counted(suite.make, data, suite.task, seed, Recipe(epochs=epochs))
    with open(folder / "log", "a") as log:
        log.write(f"{seed}\\n")
    return model

references(train, suite.train, request, task=suite.task, make=suite.make, folder=folder, retrained=models,
           test=suite.test, workers=workers)
"""


def start(folder: Path, workers: int, models: int, epochs: int) -> subprocess.Popen[bytes]:
    """A call in a process of its own."""
    arguments = [str(folder), str(workers), str(models), str(epochs)]
    return subprocess.Popen([sys.executable, "-c", CALL, *arguments])


def timed(workers: int, models: int, epochs: int) -> float:
    """Seconds of one call from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        if start(Path(folder), workers, models, epochs).wait():
            raise SystemExit("a call failed")
        return time.perf_counter() - begin


def restarted(models: int, epochs: int) -> dict[str, int]:
    """Kill a call half-way and give it again: how many were finished, trained afterwards, and trained twice."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = start(folder, 2, models, epochs)
        while len(list(folder.glob("models/*.json"))) < models // 2 and first.poll() is None:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        time.sleep(1.0)  # its workers see that it is gone, and end
        left = [json.loads(path.read_text())["identity"]["seed"] for path in folder.glob("models/*.json")]
        before = len((folder / "log").read_text().split())
        if start(folder, 2, models, epochs).wait():
            raise SystemExit("a call failed")
        counts = Counter(int(seed) for seed in (folder / "log").read_text().split())
        return {
            "finished_before": len(left),
            "trained_after": sum(counts.values()) - before,
            "finished_and_trained_again": sum(counts[seed] > 1 for seed in left),
        }


def main(smoke: bool) -> int:
    """Measure, print, write; 1 where a finished model was trained again."""
    rounds, models, epochs = (1, 4, 4) if smoke else (ROUNDS, MODELS, EPOCHS)
    seconds: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(rounds):
        for workers, found in seconds.items():
            found.append(timed(int(workers), models, epochs))
    middle = {workers: statistics.median(found) for workers, found in seconds.items()}
    restart = restarted(models, epochs)
    result: dict[str, Any] = {
        "work": f"{models} networks of digits, {epochs} epochs each, and what they say of forget, retain and test data",
        "seed": SEED,
        "revision": revision(),
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "seconds": seconds,
        "ratio": middle["1"] / middle["2"],
        "restart": restart,
    }
    print(f"1 worker: {middle['1']:.1f} s; 2 workers: {middle['2']:.1f} s; {result['ratio']:.2f} times as fast")
    print(
        f"killed with {restart['finished_before']} of {models} finished and given again: {restart['trained_after']} "
        f"trained, {restart['finished_and_trained_again']} finished ones trained again"
    )
    if not smoke:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return int(restart["finished_and_trained_again"] > 0)


if __name__ == "__main__":
    sys.exit(main("--smoke" in sys.argv[1:]))
