"""A folder of models, each known by what it is: what it was trained on, how, from which seed.

Its weights are written whole, then a JSON file that says what they are; a model is finished when both are there and
agree. Whoever makes a model holds a lock on it, which the operating system lets go of when its holder dies.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from numpy import ndarray
from torch import Tensor, nn

from expunge.audit.subject import Subject
from expunge.core import Data, Refused, Request, RunFailed, Stage
from expunge.journal import write_bytes
from expunge.run import rebuilt, unlearn
from expunge.store import Store
from expunge.trainer import Trainer
from expunge.weights import load_weights

FORMAT = "expunge-model-1"


@dataclass(frozen=True)
class Job:
    """One model to be made: trained from scratch, or unlearned from one that is there already.

    Args:
        label: for people, "retrained model 2 (seed 9)".
        identity: what makes it this model and no other; JSON-able.
        seed: of the training or the unlearning.
        data: name of the data in ``Work``. rows: int64 [k], which of them; None for all.
        start: key of the model to start from, for unlearning. forget: int64 [f] rows to forget, and `rows` to keep; None
            for the request of ``Work``.
    """

    label: str
    identity: Mapping[str, Any]
    seed: int
    data: str = ""
    rows: Tensor | None = None
    start: str | None = None
    forget: Tensor | None = None

    @property
    def key(self) -> str:
        """32 hexadecimal digits of the identity."""
        return _digest(json.dumps(self.identity, sort_keys=True).encode())


@dataclass(frozen=True)
class Made:
    """A finished model.

    Attributes:
        key: of its identity. weights: digest of its weights file. record: what it cost.
    """

    key: str
    weights: str
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The content address, which a store knows it by: of its weights and of what it is, for networks may differ."""
        return _digest((self.key + self.weights).encode())


class Making(Protocol):
    """What ``training_pool`` asks of those who know how to make a model; ``Work`` is one."""

    @property
    def addresses(self) -> Mapping[str, str]: ...
    def model(self, job: Job, start: Path | None) -> tuple[nn.Module, dict[str, Any]]: ...
    def opened(self, path: Path, job: Job) -> nn.Module: ...
    def missing(self, made: Made) -> list[str]: ...
    def said(self, model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, ndarray]]: ...
    def keep(self, made: Made, outputs: Mapping[str, Mapping[str, ndarray]]) -> None: ...


@dataclass(frozen=True)
class Work:
    """What every process needs to make any of the models; sent to each once.

    Args:
        trainer: how to train. data: by name.
        subject: says what models say of the request's data. addresses: name of data -> its address in the store.
        store: where that goes. request, stage: what to forget and how, for unlearning.
    """

    trainer: Trainer
    data: Mapping[str, Data]
    store: Store
    subject: Subject | None = None
    addresses: Mapping[str, str] = field(default_factory=dict)
    request: Request | None = None
    stage: Stage | None = None

    def opened(self, path: Path, job: Job) -> nn.Module:
        """The model of the weights file of a job."""
        blank = self.trainer.blank()
        if job.start is not None and self.stage is not None:
            blank = rebuilt(self.stage, blank, path)
        return load_weights(blank, path).eval()

    def model(self, job: Job, start: Path | None) -> tuple[nn.Module, dict[str, Any]]:
        """Train or unlearn; the model and the record of its cost.

        Raises:
            RunFailed: whatever went wrong, in one sentence that names the model.
        """
        try:
            if start is None:
                data = self.data[job.data]
                model, cost = self.trainer.trained(data if job.rows is None else data.select(job.rows), job.seed)
                return model, {"cost": cost}
            return self._unlearned(job, start)
        except Exception as error:  # whatever the user's own code raises
            raise RunFailed(f"{job.label} could not be made: {said(error)}") from error

    def _unlearned(self, job: Job, start: Path) -> tuple[nn.Module, dict[str, Any]]:
        if self.stage is None or self.request is None:
            raise Refused("unlearning needs a method and a request")
        request = self.request
        if job.forget is not None and job.rows is not None:
            pool = self.data[job.data]
            request = Request(pool.select(job.forget), pool.select(job.rows), request.valid)
        before = load_weights(self.trainer.blank(), start).eval()
        outcome = unlearn(before, request, task=self.trainer.task, method=self.stage, seed=job.seed)
        return outcome.model.eval(), {"cost": outcome.record["cost"], "notes": outcome.record["notes"]}

    def missing(self, made: Made) -> list[str]:
        """Names of data of which the store does not have what this model says."""
        return [name for name, address in self.addresses.items() if not self.store.has(made.name, address)]

    def said(self, model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, ndarray]]:
        """What a model says of data, by their names."""
        return {} if self.subject is None else {name: self.subject.said(model, name) for name in names}

    def keep(self, made: Made, outputs: Mapping[str, Mapping[str, ndarray]]) -> None:
        """Put that into the store."""
        for name, arrays in outputs.items():
            self.store.put(made.name, self.addresses[name], arrays)


def said(error: Exception) -> str:
    """An error in one line, with the place in the user's code where it was raised."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, (Refused, RunFailed)):
        return first
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}, line {frame.lineno}: {first}"


@dataclass(frozen=True)
class Shelf:
    """The folder: ``KEY.safetensors``, ``KEY.json`` and the lock ``KEY.lock`` of each model."""

    folder: Path

    def weights(self, key: str) -> Path:
        """Where the weights are, or would be."""
        return self.folder / f"{key}.safetensors"

    def finished(self, key: str) -> bool:
        """Whether both files are there; whether they agree, ``found`` finds out."""
        return self.weights(key).is_file() and (self.folder / f"{key}.json").is_file()

    def found(self, job: Job) -> Made | None:
        """The model if it is there, whole, and what it says it is; None for one that is to be made (again)."""
        try:
            about = json.loads((self.folder / f"{job.key}.json").read_bytes())
            weights = _digest(self.weights(job.key).read_bytes())
            if (about["format"], about["identity"], about["weights"]) == (FORMAT, dict(job.identity), weights):
                return Made(job.key, weights, about["record"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def check(self, made: Made) -> Path:
        """The weights file of a finished model.

        Raises:
            Refused: where it is gone or no longer what it was.
        """
        path = self.weights(made.key)
        try:
            whole = _digest(path.read_bytes()) == made.weights
        except OSError as error:
            raise Refused(
                f"cannot read the reference model {path}: {error.strerror}; train the references again"
            ) from error
        if not whole:
            raise Refused(f"{path} does not hold what was written there: train the references again, it is made anew")
        return path

    def lock(self, key: str) -> FileLock:
        """The lock of one model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{key}.lock")

    def keep(self, job: Job, content: bytes, record: Mapping[str, Any]) -> Made:
        """Write a model, under its lock."""
        for leftover in self.folder.glob(f".{job.key}.*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        made = Made(job.key, _digest(content), record)
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        about = {"format": FORMAT, "weights": made.weights, "identity": dict(job.identity), "record": dict(record)}
        write_bytes(self.weights(job.key), content)
        write_bytes(self.folder / f"{job.key}.json", json.dumps({**about, "machine": machine}, indent=1).encode())
        return made


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
