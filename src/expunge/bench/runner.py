"""Run a suite file, cell by cell, and write its results."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from expunge.bench.cells import Audit, Audits, Models
from expunge.bench.requests import Material, drawn, folds, hardest, kept, most_memorised, union
from expunge.bench.suite_file import BenchSpec, Drawn
from expunge.bench.table import table
from expunge.core import Data, Key, Request
from expunge.data import builtin
from expunge.data.sources import fingerprint
from expunge.journal import write_bytes
from expunge.run import writing
from expunge.shelf import Made, Shelf
from expunge.store import Store
from expunge.trainer import Trainer
from expunge.training_pool import make_all
from expunge.version import __version__, revision

FORMAT = "expunge-bench-2"


def bench(
    path: Path, results: Path, cells: Path | None = None, workers: int = 1, ray: str | None = None
) -> dict[str, Any]:
    """Run a suite file and write ``results/<name>.json``; returns what was written.

    Every model and every audit is kept in `cells` when it is finished: the same call after a break goes on from there, and
    ends in the same table to the bit (not in the same seconds). Several processes, or several calls, share the work.

    Args:
        path: of the suite file. results: folder for the results.
        cells: folder for models and audits; ``out/bench/<name>`` by default.
        workers: processes on this machine, each with one thread.
        ray: address of a Ray cluster that trains and unlearns in place of the processes.

    Raises:
        Refused: for a suite file that cannot work, before any training.
        RunFailed: for a model that cannot be trained; what is finished is kept.
    """
    spec = BenchSpec.read(path)
    run = Run(path.stem, spec, (cells or Path("out/bench") / path.stem).absolute(), workers, ray)
    found = run.results()
    with writing(results):
        write_bytes(results / f"{path.stem}.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


class Run:
    """One call: its folder, and what is made so far."""

    def __init__(self, name: str, spec: BenchSpec, folder: Path, workers: int, ray: str | None):
        self.name, self.spec, self.folder, self.workers, self.ray = name, spec, folder, workers, ray
        self.shelf = Shelf(folder / "cells")
        self.material = Material.of(builtin.suite(spec.suite), spec)
        self.stages = {f"{request}/{row}": stage for (request, row), stage in spec.stages().items()}
        suite = self.material.suite
        self.models = Models(Trainer(suite.recipe, suite.make, suite.task), {"train": suite.train})

    def made(self, models: Models, jobs: list[Any], label: str) -> list[Made]:
        """The cells of the jobs, in their order."""
        ray = None if isinstance(models, Audits) else self.ray  # an audit opens many models: where the folder is
        found, _ = make_all(self.shelf, models, jobs, self.workers, ray, f"{self.name}: {label}")
        return [found[job.key] for job in jobs]

    def results(self) -> dict[str, Any]:
        """Train, unlearn, audit, and the table."""
        originals, retrained = self.trained()
        rows = self.unlearned(originals)
        return self.summary(self.models.asked, retrained, self.audited(originals, retrained, rows), rows)

    def trained(self) -> tuple[dict[int, Made], dict[str, list[Made]]]:
        """(originals by seed, references by request); afterwards ``models`` knows every request."""
        seeds = self.spec.seeds
        for rule in self.spec.requests.values():  # what cannot be drawn is refused before any training
            if not isinstance(rule, Drawn) or rule.rule[0] in ("random", "identified"):
                drawn(self.material, rule, lambda rule, count: torch.empty(0))
        jobs = [self.models.training("original", "train", seed) for seed in seeds.train]
        originals = dict(zip(seeds.train, self.made(self.models, jobs, "training originals"), strict=True))
        asked = self.requests(originals[seeds.train[0]])
        clean = {f"clean/{name}": self.material.clean(union(turns, self.train)) for name, turns in asked.items()}
        self.models = replace(self.models, data={**self.models.data, **clean}, asked=asked, stages=self.stages)
        return originals, self.retrained(list(asked))

    @property
    def train(self) -> Data:
        """The training data, bad examples among them."""
        return self.material.suite.train

    def requests(self, original: Made) -> dict[str, tuple[Request, ...]]:
        """Every request, the models trained that finding it takes."""

        def ids(rule: str, count: int) -> torch.Tensor:
            about: dict[str, str] = {"rule": rule, "count": str(count), "data": fingerprint(self.train)}
            if rule == "worst_case":
                model = self.models.read(self.shelf.check(original))
                about |= {"model": original.name, "revision": revision()}
                return kept(
                    self.folder / "requests", about, lambda: hardest(self.train, self.models.trainer.task, model, count)
                )
            made = self.made(self.models, self.fold_jobs(), "training folds")
            models = [self.models.read(self.shelf.check(one)) for one in made]
            about |= {"models": " ".join(one.name for one in made)}
            task = self.models.trainer.task
            return kept(self.folder / "requests", about, lambda: most_memorised(self.train, task, models, count))

        return {name: drawn(self.material, asked, ids) for name, asked in self.spec.requests.items()}

    def fold_jobs(self) -> list[Any]:
        """A model of all rows outside each fold."""
        jobs = []
        for fold, inside in enumerate(folds(self.train)):
            outside = torch.ones(len(self.train), dtype=torch.bool)
            outside[inside] = False
            rows = torch.nonzero(outside).flatten()
            jobs.append(self.models.training(f"model without fold {fold}", "train", _seed("fold", fold), rows))
        return jobs

    def retrained(self, requests: list[str]) -> dict[str, list[Made]]:
        """The references of every request, with seeds of their own."""
        jobs = {
            name: [
                self.models.training(f"retrained for {name}", f"clean/{name}", _seed("retrained", n))
                for n in range(self.spec.retrained)
            ]
            for name in requests
        }
        found = iter(self.made(self.models, [job for some in jobs.values() for job in some], "retraining"))
        return {name: [next(found) for _ in some] for name, some in jobs.items()}

    def unlearned(self, originals: dict[int, Made]) -> dict[tuple[str, str, int, int], Made]:
        """(request, row, train seed, unlearn seed) -> what the method made."""
        keys, jobs = [], []
        for key, (train, start), seed in product(self.stages, originals.items(), self.spec.seeds.unlearn):
            request, row = key.split("/", 1)
            keys.append((request, row, train, seed))
            jobs.append(self.models.unlearning(request, row, start, seed))
        return dict(zip(keys, self.made(self.models, jobs, "unlearning"), strict=True))

    def audited(self, originals: Any, retrained: Any, rows: Any) -> list[dict[str, Any]]:
        """One table per request and seeds."""
        test, seeds = self.material.suite.test, self.spec.seeds
        asked, jobs, about = {}, [], []
        for request, train, seed, own in product(self.models.asked, seeds.train, seeds.unlearn, seeds.audit):
            these = {row: made for (r, row, t, s), made in rows.items() if (r, t, s) == (request, train, seed)}
            good = {row: made for row, made in these.items() if "failed" not in made.record}
            one = Audit(request, originals[train], tuple(retrained[request]), good, own)
            job = one.job(fingerprint(test), f"audit of {request}, seeds {train}, {seed}, {own}")
            asked[job.data] = one
            jobs.append(job)
            about.append({"request": request, "train": train, "unlearn": seed, "audit": own})
        audits = Audits(
            self.models.trainer,
            self.models.data,
            self.models.asked,
            self.models.stages,
            {},
            self.shelf,
            Store(self.folder / "outputs"),
            asked,
            test,
        )
        made = self.made(audits, jobs, "auditing")
        return [{**said, "rows": one.record["rows"]} for said, one in zip(about, made, strict=True)]

    def summary(self, asked: Any, retrained: Any, audits: list[dict[str, Any]], rows: Any) -> dict[str, Any]:
        """All that is written."""
        suite = self.material.suite
        data = {"train": fingerprint(suite.train), "test": fingerprint(suite.test)}
        requests = {
            name: {
                "turns": len(turns),
                "forget": [len(turn.data("forget")) for turn in turns],
                "retain": len(turns[-1].data("retain")),
                "hash": fingerprint(union(turns, self.train).data("forget")),
            }
            for name, turns in asked.items()
        }
        return {
            "format": FORMAT,
            "name": self.name,
            "task": suite.task.name,
            "spec": self.spec.model_dump(exclude_none=True),
            "expunge": __version__,
            "revision": revision(),
            "data": data,
            "requests": requests,
            "machine": _machine(self.workers),
            **table(audits, retrained, rows),
        }


def _seed(*what: Any) -> int:
    """A seed that any library takes, apart from those of the originals."""
    return Key(0).at("bench", *what).seed % 2**31


def _machine(workers: int) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "workers": workers,
        "threads": 1,
    }
