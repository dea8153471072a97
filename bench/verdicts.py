"""Does the audit say the right thing where the right answer is known? On digits and on CIFAR-10, K of each:

original        trained on everything: nothing was forgotten, every one of them must fail
retrained       trained without the forget set, each held out and judged by the others: they must pass
random_label    at a destructive strength: must fail as over-forgotten
gradient_ascent at a destructive strength: must fail as over-forgotten
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import expunge as ex
from expunge import demo
from expunge.audit import compare
from expunge.compose import Clip
from expunge.core import Key
from expunge.data import builtin
from expunge.data.builtin import Recipe
from expunge.data.formats import data_folder
from expunge.data.networks import small_network
from expunge.data.real import cifar10_data
from expunge.data.sources import fingerprint
from expunge.journal import write_bytes
from expunge.objectives import Ascent, RandomLabel
from expunge.optim import SGD
from expunge.references import References, references
from expunge.version import __version__, revision

RESULT = Path(__file__).parent / "results" / "verdicts.json"
OUT = Path("out/bench-verdicts")
SEED, K, RUINED = 0, 16, 4
# The methods' own guard would stop them: here the point is to do damage.
DESTRUCTIVE = {
    "random_label": lambda steps: ex.Descend(forget=RandomLabel(), optimizer=SGD(0.1), steps=steps),
    "gradient_ascent": lambda steps: ex.Descend(forget=Ascent(), combine=Clip(), optimizer=SGD(0.05), steps=steps),
}


@dataclass(frozen=True)
class Work:
    """Data, network and recipe, the request, and how long the destruction lasts."""

    train: ex.Data
    test: ex.Data
    make: Callable[[], nn.Module]
    recipe: Recipe
    request: ex.Request
    steps: int


def digits_class() -> Work:
    """A whole class."""
    suite = builtin.digits()
    return Work(suite.train, suite.test, suite.make, suite.recipe, ex.split(suite.train, forget="y == 3"), 60)


def digits_memorised() -> Work:
    """The tenth that models which did not see it are worst at."""
    suite = builtin.digits()
    return Work(suite.train, suite.test, suite.make, suite.recipe, demo.most_memorised(suite, suite.train, SEED), 60)


def digits_random() -> Work:
    """A random tenth: retrained models are right on it too, so that hardly anything is to be forgotten."""
    suite = builtin.digits()
    return Work(suite.train, suite.test, suite.make, suite.recipe, drawn(suite.train, len(suite.train) // 10), 60)


def cifar10_random() -> Work:
    """A random tenth of 5,000 images, which the network learns by heart."""
    train, test = cifar10_data(train=5000, test=5000)
    return Work(train, test, small_network, Recipe(epochs=12, lr=0.05, batch=64), drawn(train, 500), 100)


def _has_cifar10() -> bool:
    try:
        return data_folder("cifar10", "CIFAR-10").is_dir()
    except ex.Refused:
        return False


def drawn(train: ex.Data, count: int) -> ex.Request:
    """A request for examples drawn at random."""
    rng = np.random.default_rng(Key(SEED).at("forget").seed)
    return ex.split(train, forget=np.sort(rng.choice(train.ids.numpy(), count, replace=False)).tolist())


SETS: dict[str, Callable[[], Work]] = {
    "digits_class": digits_class,
    "digits_memorised": digits_memorised,
    "digits_random": digits_random,
    "cifar10_random": cifar10_random,
}


def judge(name: str, work: Work, count: int, workers: int) -> dict[str, Any]:
    """One set: train what is missing, ruin some, and compare all in one table."""
    request, task = work.request, ex.Classification(10)
    started = time.perf_counter()
    found = references(
        work.recipe,
        work.train,
        request,
        task=task,
        make=work.make,
        folder=OUT / name.split("_")[0],
        retrained=count,
        originals=count,
        test=work.test,
        seed=SEED,
        workers=workers,
    )
    trained = time.perf_counter() - started
    models: dict[str, Any] = {f"original {n}": (model, None) for n, model in enumerate(found.originals[1:], 1)}
    models |= ruined(found, request, task, work.steps)
    started = time.perf_counter()
    report = compare(
        found.originals[0],
        models,
        request,
        task,
        work.test,
        found.retrained,
        found.records,
        title=f"Verdicts on {name}",
        key=Key(SEED),
        store=found.store,
        originals=found.originals,
    )
    report.save(OUT / name)
    rows = {row.name: row for row in report.rows}
    words = {
        kind: [row.verdict for name, row in rows.items() if name.startswith(kind)]
        for kind in ("original", *DESTRUCTIVE)
    }
    return {
        "train": fingerprint(work.train),
        "test": fingerprint(work.test),
        "forget": fingerprint(request.data("forget")),
        "examples": {
            "forget": len(request.data("forget")),
            "retain": len(request.data("retain")),
            "test": len(work.test),
        },
        "recipe": asdict(work.recipe),
        "retrained_pass": rows["retrain"].verdict,
        "retrained_failures": list(rows["retrain"].reasons),
        "originals_not_forgotten": f"{words['original'].count('not forgotten')} of {len(words['original'])}",
        **{
            f"{kind}_over_forgotten": f"{words[kind].count('over-forgotten')} of {len(words[kind])}"
            for kind in DESTRUCTIVE
        },
        "rows": [_row(row) for row in report.rows],
        "seconds": {"training": round(trained, 1), "audit": round(time.perf_counter() - started, 1)},
    }


def ruined(found: References, request: ex.Request, task: Any, steps: int) -> dict[str, tuple[nn.Module, Any]]:
    """Each destructive method on some of the originals."""
    made = {}
    for method, build in DESTRUCTIVE.items():
        for number, model in enumerate(found.originals[:RUINED]):
            outcome = ex.unlearn(model.load(), request, task=task, method=build(steps), seed=number)
            made[f"{method} {number}"] = (outcome.model, outcome.record)
    return made


def _row(row: Any) -> dict[str, Any]:
    shown = (
        "forget_accuracy",
        "retain_accuracy",
        "test_accuracy",
        "membership_auc",
        "forget_margin_shift",
        "recall",
        "lira",
    )
    readings = {name: row.readings[name].to_json() for name in shown if name in row.readings}
    kept = ("value", "low", "high", "reference", "verdict")
    short = {name: {part: reading[part] for part in kept} for name, reading in readings.items()}
    return {"model": row.name, "verdict": row.verdict, "reasons": list(row.reasons), "readings": short}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=K, help="originals and retrained models of each set")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "sets", nargs="*", default=[name for name in SETS if not name.startswith("cifar10") or _has_cifar10()]
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text())["sets"] if RESULT.is_file() else {}
    for name in given.sets:
        found = judge(name, SETS[name](), given.models, given.workers)
        known[name] = found
        said = {key: value for key, value in found.items() if key.endswith(("pass", "forgotten"))}
        print(name, json.dumps(said), found["seconds"])
        machine = {"machine": platform.machine(), "processors": os.cpu_count(), "torch": torch.__version__}
        head = {"expunge": __version__, "revision": revision(), "seed": SEED, "models": given.models, **machine}
        write_bytes(RESULT, (json.dumps({**head, "sets": known}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
