"""The guard of a descent: the bound on its retain loss, the looks at it, and the last state that was inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import runtime
from expunge.core import Case, Data, Key, eval_mode, lent_stream
from expunge.journal import load_tree, save_tree
from expunge.objectives import NLL
from expunge.oracle import mean_loss

SPILL = 1 << 26
"""Bytes in scope above which a guard keeps its state in the run's folder, not as a second copy in memory."""
FEWEST = 32
"""Examples below which a probe does not shrink: fewer could not tell a rise of the loss from chance."""


@dataclass(frozen=True)
class Guard:
    """Stop a run whose retain loss leaves its bound and stays out, and keep the last state that was inside it.

    Where the run has a folder (``out=``) and what is in scope is large, that state is kept there; else in memory.

    The loss is the task's NLL per unit on a fixed probe of retain examples. Its bound is the loss at the start plus
    `rise` of the way from there to the loss of a predictor that knows nothing (``task.chance``).

    Args:
        rise: share of the way to chance that the retain loss may go, in (0, 1].
        checks: how often over the run, evenly; or after which steps. The last one is at the end in any case.
        patience: checks in a row that must find the loss outside before the run stops; at the end one is enough.
        probe: retain examples looked at, at most.
        share: what the looks together may read, as a share of the rows that the run differentiates. A run too short for
            that is looked at with fewer examples of the probe, the same ones each time, but at least 32; and then less
            often, but at least ``patience + 2`` times and always where `checks` names the steps. The whole probe is read
            at the start, and where the fewer examples are outside: it alone stops a run.
            None: no such limit, for a guard that chooses the dose.
    """

    rise: float = 0.25
    checks: int | tuple[int, ...] = 10
    patience: int = 3
    probe: int = 128
    share: float | None = 0.03

    def plan(self, steps: int, rows: int) -> tuple[set[int], int]:
        """The steps to look after, beside the look at the start, and how many examples each look reads first.

        Args:
            steps: of the run. rows: differentiated in each.
        """
        most = math.inf if self.share is None else self.share * steps * rows
        fewest, named = min(self.probe, FEWEST), self.checks
        if isinstance(named, int):
            checks = named if most >= fewest * (named + 1) else max(self.patience + 2, int(most / fewest) - 1)
            checks = min(named, checks)
            named = tuple(math.ceil((i + 1) * steps / checks) for i in range(checks))
        at = {step for step in named if step < steps} | {steps}
        return at, max(fewest, int(min(self.probe, most / (len(at) + 1))))


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


class Kept:
    """The last state that a guard found good: a file of the run's folder, or a second copy in memory."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.memory: dict[str, Tensor] = {}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these values, in place of what was kept."""
        if self.path is not None:
            save_tree(self.path, tensors)
        else:
            self.memory = {}  # let go of the old state before the new one is copied
            self.memory = {name: value.clone() for name, value in tensors.items()}

    def read(self) -> dict[str, Tensor]:
        """What was kept."""
        return self.memory if self.path is None else load_tree(self.path)


class Sentry:
    """The guard at work over `steps` of `rows` examples each: the probe, its bound, and the last state inside it."""

    def __init__(self, guard: Guard, case: Case, key: Key, steps: int, rows: int):
        self.guard, self.case, self.key = guard, case, key.at("guard")
        self.at, examples = guard.plan(steps, rows)
        self.data = self.few = self._probe()
        if self.data is not None and examples < len(self.data):
            order = torch.randperm(len(self.data), generator=self.key.at("few").generator())
            self.few = self.data.select(order[:examples].sort().values)
        self.bound = self.few_bound = math.inf
        self.kept = Kept()
        self.kept_step, self.outside, self.start = 0, 0, math.nan

    def _probe(self) -> Data | None:
        data = self.case.request.retain or self.case.request.valid
        if data is None:
            self.case.meter.note("no retain or validation data was given: nothing could watch the loss of utility")
            return None
        order = torch.randperm(len(data), generator=self.key.at("probe").generator())
        return data.select(order[: self.guard.probe].sort().values)

    def begin(self, now: Mapping[str, Tensor]) -> None:
        if self.data is not None:
            self.start, self.bound = self._start(self.data)
            self.few_bound = self.bound if self.few is self.data else self._start(self.few)[1]
            self.kept.write(now)

    def _start(self, data: Data | None) -> tuple[float, float]:
        """The loss before the first step, and its bound."""
        assert data is not None
        start, chance = self._loss(data), self.case.task.chance(next(iter(data.batches(len(data)))))
        return start, start + self.guard.rise * max(chance - start, 0.05 * abs(chance))

    def due(self, step: int) -> bool:
        return self.data is not None and step in self.at

    def check(self, step: int, now: Mapping[str, Tensor]) -> str | None:
        """None inside the bound (the state `now` is then kept); outside it, the sentence that says so."""
        assert self.data is not None
        assert self.few is not None
        loss, bound = self._loss(self.few), self.few_bound
        if self.few is not self.data and not loss <= bound:
            loss, bound = self._loss(self.data), self.bound
        if math.isfinite(loss) and loss <= bound:
            if runtime.finite(now):  # a weight that these examples do not use may be broken all the same
                self.kept.write(now)
                self.kept_step, self.outside = step, 0
            return None
        self.outside += 1
        if self.outside < self.guard.patience and step < max(self.at) and math.isfinite(loss):
            return None
        return (
            f"stopped at step {step} of {max(self.at)}: the retain loss rose from {self.start:.4g} to {loss:.4g}, above "
            f"its bound {self.bound:.4g}; the state of step {self.kept_step} was kept"
        )

    def _loss(self, data: Data) -> float:
        with self.case.meter.checking(), eval_mode(self.case.model), lent_stream(self.key):
            return mean_loss(self.case, data, NLL(), min(256, len(data)), self.key)

    def state(self) -> dict[str, Any]:
        return {
            "kept": self.kept.memory,
            "kept_step": self.kept_step,
            "outside": self.outside,
            "start": self.start,
            "bound": self.bound,
            "few_bound": self.few_bound,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.kept.memory, self.kept_step = state["kept"], state["kept_step"]
        self.outside, self.start = state["outside"], state["start"]
        self.bound, self.few_bound = state["bound"], state["few_bound"]
