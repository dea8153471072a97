"""Fine-tuning a copy of a model and looking at it after every mini-batch: what relearning attacks are made of."""

from __future__ import annotations

import contextlib
import copy as copying
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.audit import intervals
from expunge.audit.subject import Curve, Outputs, Subject
from expunge.audit.subject import run as outputs_of
from expunge.combine import Weighted
from expunge.core import Case, Data, Grads, Key, Refused, Request
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import Optimizer
from expunge.oracle import Diverged, Oracle
from expunge.scope import Scope

LEAST_GAP = 0.02
"""Below this gap between the original and retrained models a normalised recovery would be noise over noise."""


@dataclass(frozen=True)
class Finetune:
    """How an attacker trains: NLL on all parameters, modes as in evaluation."""

    optimizer: Optimizer
    steps: int
    batch: int


@dataclass(frozen=True)
class Look:
    """What a model says of a data set: [n] correct (0 or 1), or the loss per unit for a task without labels."""

    values: np.ndarray
    labelled: bool


@dataclass(frozen=True)
class Run:
    """One fine-tuning: ``held`` [steps + 1, n] and ``test`` [steps + 1] at each look; whether it diverged."""

    held: np.ndarray
    test: np.ndarray
    labelled: bool
    diverged: bool


@dataclass(frozen=True)
class Recovery:
    """All runs of one model: held [doses, rates, seeds, steps + 1, n], test [doses, rates, seeds, steps + 1]."""

    held: np.ndarray
    test: np.ndarray
    labelled: bool
    diverged: int

    @staticmethod
    def of(runs: Sequence[Sequence[Sequence[Run]]]) -> Recovery:
        """From runs by dose, rate and seed."""
        flat = [run for dose in runs for rate in dose for run in rate]
        held = np.array([[[run.held for run in rate] for rate in dose] for dose in runs])
        test = np.array([[[run.test for run in rate] for rate in dose] for dose in runs])
        return Recovery(held, test, flat[0].labelled, sum(run.diverged for run in flat))

    def areas(self) -> np.ndarray:
        """[doses, rates, seeds, n] trapezoid under each example's curve, over the number of steps."""
        return (self.held[..., 1:, :] + self.held[..., :-1, :]).mean(3) / 2

    def by_dose(self) -> np.ndarray:
        """[doses] mean area."""
        return self.areas().mean((1, 2, 3))

    def curve(self) -> np.ndarray:
        """[steps + 1] mean over everything but the step."""
        return self.held.mean((0, 1, 2, 4))

    def side_effects(self) -> dict[str, float]:
        """Test accuracy (or loss) during recovery, of the mean curve; and how many runs diverged."""
        line, scale = self.test.mean((0, 1, 2)), 100.0 if self.labelled else 1.0
        found = {"diverged_runs": float(self.diverged)}
        if np.isfinite(line).all():
            worst = line.min() if self.labelled else line.max()
            found |= {"test_worst": scale * float(worst), "test_at_end": scale * float(line[-1])}
        return found


def normalised_recovery(
    unlearned: np.ndarray, retrained: np.ndarray, original: float, least: float = LEAST_GAP
) -> np.ndarray:
    """[steps + 1] rho(t) = (a_u(t) - a_r(t)) / (a_o - a_r(t)): 0 as a retrained model, 1 as the original.

    NaN where the gap between the original and the retrained models is below `least`: nothing is left to recover.

    Args:
        unlearned, retrained: [steps + 1] accuracies in 0 .. 1 (or losses), the latter a mean over retrained models.
        original: before any step.
    """
    ours, theirs = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    if ours.shape != theirs.shape or ours.size == 0:
        raise Refused(
            f"the normalised recovery needs the curve of retrained models at the same steps: expected shape {ours.shape}, "
            f"found {theirs.shape}"
        )
    gap = original - theirs
    good = np.abs(gap) >= least
    return np.where(good, (ours - theirs) / np.where(good, gap, 1.0), np.nan)


def nested_interval(table: np.ndarray, draws: int, key: Key, *, shares: bool = False) -> tuple[float, float]:
    """Percentile interval of the mean of a table [seeds, examples], resampling seeds first and then examples.

    With few seeds their spread is underestimated: with one it is not seen at all. For `shares`, in [0, 1], that are all
    alike it is Wilson's over the examples.
    """
    weights = [
        np.concatenate([_counted(rows, size) for rows in intervals.choices(size, draws, key.at(axis), size)]) / size
        for size, axis in zip(table.shape, ("seeds", "examples"), strict=True)
    ]
    samples = ((weights[0] @ table) * weights[1]).sum(1)
    return intervals.share_interval(samples, table.shape[1]) if shares else intervals.percentile(samples)


def retrained_band(x: Sequence[float], lines: np.ndarray) -> Curve:
    """The mean of the retrained models' lines [models, points], between the lowest and the highest, for a reading."""
    return tuple(x), *(tuple(line.tolist()) for line in (lines.mean(0), lines.min(0), lines.max(0)))


def _counted(rows: np.ndarray, size: int) -> np.ndarray:
    """[k, size] how often each position occurs in each row."""
    offset = np.arange(len(rows))[:, None] * size
    return np.bincount((rows + offset).ravel(), minlength=len(rows) * size).reshape(len(rows), size)


def parted(data: Data, key: Key) -> tuple[Data, Data]:
    """The examples cut in two at random: the first half (rounded down) to learn from, the second to look at.

    Raises:
        Refused: for fewer than two examples.
    """
    if len(data) < 2:
        raise Refused(
            f"relearning holds out part of the forget set: expected at least 2 forget examples, found {len(data)}"
        )
    order = torch.randperm(len(data), generator=key.generator())
    half = len(data) // 2
    return data.select(order[:half]), data.select(order[half:])


def drawn(data: Data, count: int, key: Key) -> Data:
    """`count` of the examples at random, in their order; all of them where there are no more."""
    if len(data) <= count:
        return data
    return data.select(torch.randperm(len(data), generator=key.generator())[:count].sort().values)


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode of which everything may be trained: what an attacker who has the weights has."""
    copy = copying.deepcopy(model).eval()
    for parameter in copy.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    return copy


def look(subject: Subject, model: nn.Module, data: Data, name: str) -> Look:
    """The model's answers on `data`, as an audit would see them."""
    outputs = Outputs.of(outputs_of(model, subject.task, data, subject.batch, subject.key.at("look", name)))
    if outputs.correct is not None:
        return Look(outputs.correct.astype(np.float64), True)
    return Look(outputs.loss, False)


@dataclass(frozen=True)
class _Looking:
    """The gradient of the one objective; after each step, a look at the model."""

    after_step: Callable[[nn.Module], None] = field(repr=False)

    def init(self) -> dict[str, Any]:
        return {}

    def combine(self, oracle: Oracle, state: dict[str, Any]) -> tuple[Grads, dict[str, Any]]:
        return Weighted().combine(oracle, state)

    def settle(self, after: Oracle, state: dict[str, Any]) -> dict[str, Any]:
        self.after_step(after.case.model)
        return state


def finetune(
    subject: Subject, model: nn.Module, plan: Finetune, data: Data, key: Key, after_step: Callable[[nn.Module], None]
) -> None:
    """Train `model` in place on `data`; the batches depend on the key and the number of examples only."""
    case = Case(model, Request(forget=data), subject.task, Scope.all(model), rng=key.at("batches"))
    Descend(forget=NLL(), combine=_Looking(after_step), optimizer=plan.optimizer, steps=plan.steps, batch=plan.batch)(
        case
    )


def finetuned(
    subject: Subject, model: nn.Module, plan: Finetune, data: Data, watched: tuple[Data, Data | None], key: Key
) -> Run:
    """Fine-tune a copy and look at held-out and test data before the first and after every step."""
    held, test = watched
    looks: list[Look] = []
    tests: list[float] = []

    def see(now: nn.Module) -> None:
        here = look(subject, now, held, "held")
        tests.append(math.nan if test is None else float(look(subject, now, test, "test").values.mean()))
        looks.append(here)

    copy = copied(model)
    see(copy)
    with contextlib.suppress(Diverged):
        finetune(subject, copy, plan, data, key, _or_diverged(see))
    missing = plan.steps + 1 - len(looks)
    looks += [looks[-1]] * missing
    tests = tests[: len(looks) - missing] + [tests[len(looks) - missing - 1]] * missing
    return Run(np.stack([one.values for one in looks]), np.array(tests), looks[0].labelled, missing > 0)


def _or_diverged(see: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """A look refuses outputs that are not finite; once training has begun, that is a run that diverged."""

    def tried(now: nn.Module) -> None:
        try:
            see(now)
        except Refused as error:
            raise Diverged(str(error)) from error

    return tried


class _Met(Exception):
    """The goal is met: no further step is needed."""


def batches_until(
    goal: Callable[[Look], bool], subject: Subject, model: nn.Module, plan: Finetune, data: Data, key: Key
) -> float:
    """Mini-batches of `data` until the goal is met there, checked before the first and after each; else infinite."""
    count = 0

    def see(now: nn.Module) -> None:
        nonlocal count
        count += 1
        if goal(look(subject, now, data, "relearnt")):
            raise _Met

    copy = copied(model)
    if goal(look(subject, copy, data, "relearnt")):
        return 0.0
    try:
        finetune(subject, copy, plan, data, key, _or_diverged(see))
    except _Met:
        return float(count)
    except Diverged:
        return math.inf
    return math.inf
