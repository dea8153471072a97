"""Which reference models there are to be, what each is trained on, and what makes it itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge import shadow_design
from expunge.core import Data, Key, Refused, Request, Stage, described
from expunge.data.sources import fingerprint
from expunge.shelf import FORMAT, Job, Made
from expunge.trainer import Trainer, source_of
from expunge.version import revision


@dataclass(frozen=True)
class Plan:
    """Which models, and what each of them is.

    Args:
        trainer, data, request, seed: as of ``references``. stage, method: what unlearns, and its name.
        pooled: whether forget and retain are pooled, for shadows.
    """

    trainer: Trainer
    data: Data
    request: Request | None
    seed: int
    stage: Stage | None
    method: str
    pooled: bool
    parts: dict[str, Data] = field(init=False)
    prints: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        parts = {"train": self.data}
        if self.request is not None and self.request.retain is not None:
            parts["retain"] = self.request.retain
        if self.pooled:
            parts["pool"] = self.data if self.request is None else _pool(self.data, self.request)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "prints", {name: fingerprint(part) for name, part in parts.items()})

    def _training(self, role: str, number: int, data: str, seed: int, rows: Tensor | None = None) -> Job:
        identity = {"format": FORMAT, **self.trainer.identity(), "data": self.prints[data], "seed": seed}
        if rows is not None:
            identity["rows"] = _hash(self.parts[data].ids[rows])
        return Job(f"{role} model {number + 1} (seed {seed})", identity, seed, data, rows)

    def _derived(self, role: str, number: int) -> int:
        """A seed that any library takes."""
        return Key(self.seed).at("reference", role, number).seed % 2**31

    def retrained(self, count: int) -> list[Job]:
        """Trained on the retain data."""
        return [self._training("retrained", n, "retain", self.seed + 1 + n) for n in range(count)]

    def originals(self, count: int) -> list[Job]:
        """Trained on all data."""
        return [self._training("original", n, "train", self._derived("original", n)) for n in range(count)]

    def inside(self, count: int) -> np.ndarray:
        """[count, pool] bool."""
        return shadow_design.halves(count, len(self.parts["pool"]), Key(self.seed).at("shadows"))

    def states(self, count: int) -> np.ndarray:
        """[count, pool] int8, after the method."""
        if self.request is None or self.request.forget is None:
            raise Refused("unlearning needs forget data")
        target = torch.isin(self.parts["pool"].ids, self.request.forget.ids).numpy()
        return shadow_design.arms(self.inside(count), target, Key(self.seed).at("arms"))

    def shadows(self, count: int) -> list[Job]:
        """Trained on halves of the pool."""
        if not count:
            return []
        rows = [torch.from_numpy(np.flatnonzero(seen)) for seen in self.inside(count)]
        return [self._training("shadow", n, "pool", self._derived("shadow", n), rows[n]) for n in range(count)]

    def unlearned(self, jobs: Sequence[Job], made: Mapping[str, Made]) -> list[Job]:
        """What the method makes of models that are made."""
        asked = _whole_request(self.request)
        return [self._unlearning("unlearned", n, job, made, asked) for n, job in enumerate(jobs)]

    def unlearned_shadows(self, jobs: Sequence[Job], made: Mapping[str, Made]) -> list[Job]:
        """What it makes of shadows, each with a forget set of its own."""
        if not jobs:
            return []
        found, pool, states = [], self.parts["pool"], self.states(len(jobs))
        valid = None if self.request is None or self.request.valid is None else fingerprint(self.request.valid)
        for number, (job, state) in enumerate(zip(jobs, states, strict=True)):
            forget, keep = (
                torch.from_numpy(np.flatnonzero(state == s)) for s in (shadow_design.FORGOTTEN, shadow_design.IN)
            )
            asked = {
                "pool": self.prints["pool"],
                "forget": _hash(pool.ids[forget]),
                "retain": _hash(pool.ids[keep]),
                "valid": valid,
            }
            found.append(self._unlearning("unlearned shadow", number, job, made, asked, keep, forget))
        return found

    def _unlearning(
        self,
        role: str,
        number: int,
        job: Job,
        made: Mapping[str, Made],
        asked: Mapping[str, Any],
        rows: Tensor | None = None,
        forget: Tensor | None = None,
    ) -> Job:
        identity = {
            "format": FORMAT,
            "start": made[job.key].name,
            "method": self.method,
            "settings": described(self.stage),
            "source": source_of(self.stage),
            "task": described(self.trainer.task),
            "request": dict(asked),
            "seed": job.seed,
            "revision": revision(),
        }
        return Job(f"{role} model {number + 1} (seed {job.seed})", identity, job.seed, "pool", rows, job.key, forget)


def _hash(ids: Tensor) -> str:
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).hexdigest()


def _whole_request(request: Request | None) -> dict[str, Any]:
    """What a method may see of a request, by hashes."""
    if request is None:
        return {}
    parts = {**{n: getattr(request, n) for n in ("forget", "retain", "valid")}, **request.extra}
    found = {name: fingerprint(part) for name, part in parts.items() if part is not None}
    return {**found, "concepts": list(request.concepts)}


def _pool(data: Data, request: Request) -> Data:
    """The training examples that are forgotten or kept, in the order of the training data.

    Raises:
        Refused: where the request is not about these data.
    """
    ids = torch.cat([part.ids for part in (request.forget, request.retain) if part is not None])
    inside = torch.isin(data.ids, ids)
    for name, part in (("forget", request.forget), ("retain", request.retain)):
        if part is None or (part.source is data.source and bool(torch.isin(part.ids, data.ids).all())):
            continue
        place = {number: row for row, number in enumerate(data.ids.tolist())}
        rows = [place.get(number) for number in part.ids.tolist()]
        if None in rows or fingerprint(data.select([row for row in rows if row is not None])) != fingerprint(part):
            raise Refused(
                f"the {name} data of the request are not part of the training data: split the very data that is given to "
                f"references(), or leave shadows and originals to another call"
            )
    return data.select(torch.nonzero(inside).flatten())
