"""The cells of a benchmark: a trained model, an unlearned model, an audit. Each is made once and kept in a folder.

A cell is known by what it is made of (data, settings, seeds, revision), so that a run that was killed goes on where it was,
and a method that is added to a suite costs only its own cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy import ndarray
from torch import nn

from expunge.bench.requests import union
from expunge.core import Data, Key, Refused, Request, RunFailed, Stage, described
from expunge.data.sources import fingerprint
from expunge.run import rebuilt, unlearn
from expunge.shelf import FORMAT, Job, Made, Shelf, said
from expunge.store import Kept, Store
from expunge.trainer import Trainer, source_of
from expunge.version import revision
from expunge.weights import load_weights

_COST = ("seconds", "forward", "backward", "peak_bytes")


@dataclass(frozen=True)
class Models:
    """How a model is trained or unlearned.

    Args:
        trainer: of the suite. data: by name.
        asked: requests by name, each one or several in turn. stages: by "request/row".
    """

    trainer: Trainer
    data: Mapping[str, Data]
    asked: Mapping[str, tuple[Request, ...]] = field(default_factory=dict)
    stages: Mapping[str, Stage] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)

    def training(self, label: str, data: str, seed: int, rows: Any = None) -> Job:
        """A model of some data, or of some rows of it."""
        part = self.data[data] if rows is None else self.data[data].select(rows)
        identity = {"format": FORMAT, **self.trainer.identity(), "data": fingerprint(part), "seed": seed}
        return Job(f"{label} (seed {seed})", identity, seed, data, rows)

    def unlearning(self, request: str, row: str, start: Made, seed: int) -> Job:
        """What a row's method makes of a trained model."""
        stage = self.stages[f"{request}/{row}"]
        parts = [{n: getattr(turn, n) for n in ("forget", "retain", "valid")} for turn in self.asked[request]]
        identity = {
            "format": FORMAT,
            "start": start.name,
            "settings": described(stage),
            "source": source_of(stage),
            "task": described(self.trainer.task),
            "request": [{n: fingerprint(p) for n, p in turn.items() if p is not None} for turn in parts],
            "seed": seed,
            "revision": revision(),
        }
        return Job(f"{row} on {request} (seed {seed})", identity, seed, f"{request}/{row}", start=start.key)

    def model(self, job: Job, start: Path | None) -> tuple[nn.Module, dict[str, Any]]:
        """Train or unlearn; a method that refuses the request, or fails on it, gives no model but a record that says so."""
        try:
            if start is None:
                data = self.data[job.data]
                made, cost = self.trainer.trained(data if job.rows is None else data.select(job.rows), job.seed)
                return made, {"cost": cost}
            return self._unlearned(job, start)
        except (Refused, RunFailed) as error:
            if start is None:
                raise RunFailed(f"{job.label} could not be made: {said(error)}") from error
            return nn.Module(), {"failed": said(error)}
        except Exception as error:
            raise RunFailed(f"{job.label} could not be made: {said(error)}") from error

    def _unlearned(self, job: Job, start: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Each request in turn, of the model that the one before it left."""
        model = load_weights(self.trainer.blank(), start).eval()
        stage, cost, notes, record = self.stages[job.data], dict.fromkeys(_COST, 0.0), {}, {}
        for request in self.asked[job.data.partition("/")[0]]:
            outcome = unlearn(model, request, task=self.trainer.task, method=stage, seed=job.seed)
            model, record = outcome.model.eval(), outcome.record
            for name in _COST:
                new = record["cost"].get(name) or 0
                cost[name] = max(cost[name], new) if name == "peak_bytes" else cost[name] + new
            notes.update(dict.fromkeys(record["notes"]))
        return model, {
            "cost": cost,
            "notes": list(notes),
            **{name: record[name] for name in ("method", "settings", "promise", "result", "examples")},
        }

    def opened(self, path: Path, job: Job) -> nn.Module:
        """The model of the weights file of a job."""
        return self.read(path, "" if job.start is None else job.data)

    def read(self, path: Path, key: str = "") -> nn.Module:
        """The model of a weights file; `key` is "request/row" for one that was unlearned."""
        blank = self.trainer.blank()
        if key:
            blank = rebuilt(self.stages[key], blank, path)
        return load_weights(blank, path).eval()

    def missing(self, made: Made) -> list[str]:
        """Nothing is kept of a model but itself."""
        return []

    def said(self, model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, ndarray]]:
        """Nothing, as above."""
        return {}

    def keep(self, made: Made, outputs: Mapping[str, Mapping[str, ndarray]]) -> None:
        """Nothing, as above."""


@dataclass(frozen=True)
class Audit:
    """One table: the rows of one request, of one original, of one seed.

    Args:
        request: name. original, retrained: the controls. rows: name -> what the method made.
        seed: of the audit's draws.
    """

    request: str
    original: Made
    retrained: tuple[Made, ...]
    rows: Mapping[str, Made]
    seed: int

    def job(self, test: str, label: str) -> Job:
        """Its cell. `test`: hash of the test data."""
        identity = {
            "format": FORMAT,
            "audit": self.request,
            "original": self.original.name,
            "retrained": [made.name for made in self.retrained],
            "rows": {name: made.name for name, made in self.rows.items()},
            "test": test,
            "seed": self.seed,
            "revision": revision(),
        }
        return Job(label, identity, self.seed, Job(label, identity, self.seed).key)


@dataclass(frozen=True)
class Audits(Models):
    """How a table is made of models that are there.

    Args:
        shelf: where they are. store: what they say. audits: by the key of their job. test: unseen examples.
    """

    shelf: Shelf = Shelf(Path())
    store: Store = Store(Path())
    audits: Mapping[str, Audit] = field(default_factory=dict)
    test: Data | None = None

    def model(self, job: Job, start: Path | None) -> tuple[nn.Module, dict[str, Any]]:
        """No model, and the table as the record."""
        from expunge.audit import compare

        asked = self.audits[job.data]
        turns = self.asked[asked.request]
        try:
            report = compare(
                self._kept(asked.original),
                {row: (self._kept(made, f"{asked.request}/{row}"), made.record) for row, made in asked.rows.items()},
                union(turns, self.data["train"]),
                self.trainer.task,
                self.test,
                [self._kept(made) for made in asked.retrained],
                [made.record["cost"] for made in asked.retrained],
                key=Key(asked.seed),
                store=self.store,
            )
        except (Refused, RunFailed) as error:
            raise RunFailed(f"{job.label} could not be made: {said(error)}") from error
        return nn.Module(), {"rows": [_row(row) for row in report.rows]}

    def _kept(self, made: Made, key: str = "") -> Kept:
        return Kept(made.name, lambda: self.read(self.shelf.check(made), key))


def _row(row: Any) -> dict[str, Any]:
    readings = {name: reading.to_json() for name, reading in row.readings.items()}
    for reading in readings.values():
        for name in ("curves", "axes"):
            reading.pop(name, None)
    return {
        "row": row.name,
        "kind": row.kind,
        "verdict": row.verdict,
        "reasons": list(row.reasons),
        "readings": readings,
    }
