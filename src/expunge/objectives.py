"""Per-example losses, all minimised. None draws at random when called: whatever is random is drawn once in ``draw``.

Each returns one number per example. Losses that a task sums over units (tokens, pixels) are given per unit and
weighted by units, so that a batch mean is the unit mean whatever the split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge import runtime
from expunge.core import Batch, Case, Key, Objective, Refused, require
from expunge.tasks.causal_lm import IGNORED
from expunge.tasks.classification import kl


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the true answer, per unit; the batch mean is over units (a token mean)."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch) / case.task.units(batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class Ascent:
    """Minus another objective (default NLL): gradient ascent. Unbounded below: the learning rate is the stopping rule."""

    of: Objective = field(default_factory=NLL)

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """What the inner objective draws."""
        inner = getattr(self.of, "draw", None)
        return batch if inner is None else inner(case, batch, rng)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """The inner objective's weights."""
        inner = getattr(self.of, "weigh", None)
        return torch.ones(len(batch["id"])) if inner is None else inner(case, batch)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return -self.of(case, batch)


@dataclass(frozen=True)
class RandomLabel:
    """NLL of a wrong answer drawn by the task: a random other class, a refusal, another prompt.

    Golatkar et al. 2020, Graves et al. 2021. Never the true answer: authors' code draws over all classes, the formula
    of SalUn (arXiv:2310.12508) excludes the truth, and so does this. Redrawn at every step. Where a wrong answer is
    what the model itself says of a wrong condition (diffusion), the task makes it with ``wrong_target``.
    """

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with wrong answers."""
        wrong_target = getattr(case.task, "wrong_target", None)
        return case.task.relabel(batch, rng) if wrong_target is None else wrong_target(case, batch, rng)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch) / case.task.units(batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class AnyLabel:
    """NLL of a class drawn over all of them, redrawn at every step: one draw in C is the true one.

    What authors' code of random labelling does for pictures (SalUn, EUPMU); the formulas draw as ``RandomLabel`` does.
    """

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with drawn labels."""
        task: Any = case.task  # these are capabilities, which not every Task has
        if not (hasattr(task, "classes") and hasattr(task, "logits")):
            raise Refused(f"objective AnyLabel needs classes to answer with, which task {task.name!r} does not have")
        shape, device = batch[task.label].shape, batch[task.label].device
        return {**batch, task.label: torch.randint(0, task.classes, shape, generator=rng.generator()).to(device)}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch)


def with_reference(case: Case, batch: Batch, teacher: str) -> Batch:
    """The batch with the teacher's summed NLL as column ``reference``, unless the data already carries it."""
    if "reference" in batch:
        if case.task.stochastic:
            raise Refused(
                f"a cached reference cannot be used with task {case.task.name!r}: its batches are drawn with "
                f"noise, so a reference belongs to one draw; use the teacher instead"
            )
        return batch
    with case.teacher(teacher) as model:
        return {**batch, "reference": case.task.nll(model, batch)}


@dataclass(frozen=True)
class NPO:
    """Negative preference optimisation (arXiv:2404.05868, eq. 3): -(2/beta) log sigmoid(beta (S - S_ref)).

    S is the SUMMED negative log-likelihood of an example and S_ref that of the model before unlearning, read from the
    column ``reference`` where there is one, else from the teacher. At the first step it equals (2/beta) log 2; as
    beta tends to 0 its gradient tends to that of gradient ascent.

    Args:
        beta: inverse temperature, > 0.
        teacher: name of the reference model.
    """

    beta: float = 0.1
    teacher: str = "original"

    def __post_init__(self) -> None:
        require(self.beta > 0, self, "beta", "above 0")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with its reference losses."""
        return with_reference(case, batch, self.teacher)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        summed = case.task.nll(case.model, batch)
        return -2.0 / self.beta * F.logsigmoid(self.beta * (summed - batch["reference"]))


@dataclass(frozen=True)
class SimNPO:
    """Reference-free NPO (arXiv:2410.07163): -(2/beta) log sigmoid(beta (A - margin)), A the NLL per unit.

    The margin is inside the factor beta, as in the authors' code; the paper subtracts it outside. Equal at margin 0.

    Args:
        beta: inverse temperature, > 0.
        margin: nats per unit, >= 0.
    """

    beta: float = 2.5
    margin: float = 0.0

    def __post_init__(self) -> None:
        require(self.beta > 0, self, "beta", "above 0")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        per_unit = case.task.nll(case.model, batch) / case.task.units(batch)
        return -2.0 / self.beta * F.logsigmoid(self.beta * (per_unit - self.margin))


@dataclass(frozen=True)
class Distill:
    """Stay near a teacher: the task's divergence from the teacher to the model, per unit.

    For classifiers and language models KL(teacher || model) at `temperature`, times its square (Hinton et al. 2015), or
    KL(model || teacher) where `reverse`. A squared error is the same both ways.

    Args:
        teacher: name of the teacher in the Case.
        temperature: > 0.
        reverse: from the model to the teacher.
    """

    teacher: str = "original"
    temperature: float = 1.0
    reverse: bool = False

    def __post_init__(self) -> None:
        require(self.temperature > 0, self, "temperature", "above 0")

    @property
    def column(self) -> str:
        """Of the data, where what the teacher says of each example was kept (``told.told``)."""
        return f"told/{self.teacher}"

    def told(self, case: Case, batch: Batch) -> Tensor:
        """What the teacher says of each example, without a graph."""
        with case.teacher(self.teacher) as model:
            return case.task.outputs(model, batch)

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the teacher's outputs, computed once per step, or kept from before."""
        kept = batch.get(self.column)
        return {**batch, "teacher": self.told(case, batch) if kept is None else kept}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        if self.reverse and hasattr(case.task, "logits"):
            return self._reversed(case, batch) / case.task.units(batch)
        return case.task.divergence(case.model, batch, batch["teacher"], self.temperature) / case.task.units(batch)

    def _reversed(self, case: Case, batch: Batch) -> Tensor:
        """[b] KL(model || teacher), summed over units."""
        task: Any = case.task
        said, told = (
            t if t.dtype == torch.float64 else t.float() for t in (task.logits(case.model, batch), batch["teacher"])
        )
        each = kl(told, said, self.temperature)
        if each.ndim == 1:
            return each
        return torch.where(task.labels(batch) != IGNORED, each, torch.zeros_like(each)).sum(1)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class Margin:
    """Hinge on the logit margin of the true class: max(f_y - max_{k != y} f_k, -slack) (arXiv:2412.16780, eq. 4).

    Bounded below by -slack, so it stops once the true class is no longer the prediction by that much.

    Args:
        slack: tau of the paper, logits, >= 0.
    """

    slack: float = 1.0

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task  # logits and labels are capabilities, which not every Task has
        if not hasattr(task, "logits"):
            raise Refused(f"objective Margin needs class logits, which task {task.name!r} does not have")
        logits = task.logits(case.model, batch)
        if logits.ndim != 2:
            raise Refused(
                f"objective Margin needs one row of class logits per example; task {task.name!r} gives "
                f"{logits.ndim - 1} dimensions of them"
            )
        label = task.labels(batch)[:, None]
        true = logits.gather(1, label).squeeze(1)
        other = logits.scatter(1, label, -torch.inf).amax(1)
        return torch.clamp(true - other, min=-self.slack)


@dataclass(frozen=True)
class L1:
    """Sum of absolute values of every coordinate in scope (l1-sparse, arXiv:2304.04934, eq. 3). Reads no data."""

    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return sum(runtime.total(p.abs()) for p in case.scope.parameters(case.model).values()).reshape(1)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Norm:
    """Euclidean norm of every coordinate in scope (the size of a forget vector). Reads no data.

    Its gradient at zero is taken as zero.
    """

    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        square = sum(runtime.total(p.square()) for p in case.scope.parameters(case.model).values())
        root = torch.sqrt(torch.where(square > 0, square, torch.ones_like(square)))  # type: ignore[arg-type]
        return torch.where(square > 0, root, torch.zeros_like(root)).reshape(1)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class EWC:
    """Elastic weight consolidation: 1/2 sum_i F_i (theta_i - anchor_i)^2 (Kirkpatrick et al. 2017). Reads no data.

    A retain objective that needs no retain data at unlearning time.

    Args:
        importance: canonical name -> diagonal Fisher, as ``curvature.fisher`` gives it.
        anchor: canonical name -> weights to stay near.
    """

    importance: dict[str, Tensor] = field(repr=False)
    anchor: dict[str, Tensor] = field(repr=False)
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        terms = [
            runtime.total(
                runtime.shard_like(self.importance[name], p) * (p - runtime.shard_like(self.anchor[name], p)).square()
            )
            for name, p in case.scope.parameters(case.model).items()
        ]
        return 0.5 * torch.stack(terms).sum().reshape(1)
