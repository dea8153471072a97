"""Forgetting losses that treat every answer token on its own: re-weighted ascent, and targets without the true token.

Each returns the mean over the judged tokens of an example and weighs the example by their number, so that the batch
mean is the mean over tokens, whatever the split. A classifier's label counts as one token. Weights and targets are
constants: no gradient flows through them, so a value is not the integral of its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Batch, Case, Key, Objective, Refused, Task, require
from expunge.tasks.causal_lm import IGNORED


@dataclass(frozen=True)
class WGA:
    """Weighted gradient ascent (arXiv:2502.19301): -p^beta ell per token, p = exp(-ell) a constant.

    The pull on a token fades as its probability does. At beta 0 it is gradient ascent. Its gradient is that of
    p^beta / beta, which is bounded; the value itself is the authors', and rises again once p < exp(-1 / beta).

    Args:
        beta: exponent of the weight, >= 0.
    """

    beta: float = 1.0
    constants: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.beta >= 0, self, "beta", "0 or above")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        losses, judged = _token_losses(self, case.task, case.model, batch)
        return -_mean(torch.exp(-self.beta * losses.detach()) * losses, judged)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class TNPO:
    """NPO token by token (arXiv:2502.19301): -w ell, w = 2 p^(beta + extra) / (p^beta + p_ref^beta + 1e-5), a constant.

    With ``extra`` above 0 it is WTNPO (the paper's is 1.5), which also fades where p is small in itself. At the first
    step w is 1 (times p^extra) up to the 1e-5, which is in the authors' code and lets go of tokens that the original
    model gave less than about 1e-5^(1 / beta).

    Args:
        beta: exponent of the ratio, > 0.
        extra: further exponent of p, >= 0.
        teacher: name of the reference model.
    """

    beta: float = 4.0
    extra: float = 0.0
    teacher: str = "original"
    constants: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.beta > 0, self, "beta", "above 0")
        require(self.extra >= 0, self, "extra", "0 or above")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the teacher's loss on every token, [b, U] nats, in column ``teacher_tokens``.

        Read from the column ``reference_tokens`` where the data have it.
        """
        if "reference_tokens" in batch:
            width = _token_labels(self, case.task, batch).shape[1]
            cached = batch["reference_tokens"][:, :width]  # as wide as the widest example of all
            return {**batch, "teacher_tokens": F.pad(cached, (0, width - cached.shape[1]))}
        with case.teacher(self.teacher) as model:
            return {**batch, "teacher_tokens": _token_losses(self, case.task, model, batch)[0]}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        losses, judged = _token_losses(self, case.task, case.model, batch)
        now, before = -losses.detach(), -batch["teacher_tokens"]
        below = torch.exp(self.beta * now) + torch.exp(self.beta * before) + 1e-5
        weight = 2.0 * torch.exp((self.beta + self.extra) * now) / below
        return -_mean(weight * losses, judged)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class SatImp:
    """Saturation and importance (arXiv:2505.11953): -p^saturation (1 - p)^importance ell per token, weights constants.

    The first factor lets go of tokens that are forgotten, the second spares tokens that the model is sure of. With
    both exponents 0 it is gradient ascent, with importance 0 it is WGA. A token of probability 1 gets no gradient.

    Args:
        saturation, importance: beta1 and beta2 of the paper, >= 0.
    """

    saturation: float = 5.0
    importance: float = 1.0
    constants: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.saturation >= 0, self, "saturation", "0 or above")
        require(self.importance >= 0, self, "importance", "0 or above")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        losses, judged = _token_losses(self, case.task, case.model, batch)
        held = losses.detach()
        weight = torch.exp(-self.saturation * held) * (-torch.expm1(-held)).clamp_min(0.0) ** self.importance
        return -_mean(weight * losses, judged)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class CEU:
    """Cross-entropy to the model's own prediction without the true token (arXiv:2503.01224), that target a constant.

    Its gradient on the logits is p - q: it pushes the true token with strength p_y and stops by itself; it is that of
    -log(1 - p_y). The first tokens of an answer are left alone, as in the release. An answer that is no longer than
    that has no weight.

    Args:
        skip: answer tokens left alone at the start of each answer, >= 0; 0 for a task of one label.
    """

    skip: int = 1
    constants: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.skip >= 0, self, "skip", "0 or above")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        labels, judged = self._judged(case.task, batch)
        logits, label = _wide(_judged_logits(case.task, case.model, batch, judged)), labels[judged][:, None]
        target = torch.softmax(logits.detach().scatter(1, label, -torch.inf), -1)
        return _mean(_spread(_cross_entropy(target, logits), judged), judged)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example that are not skipped."""
        return self._judged(case.task, batch)[1].sum(1)

    def _judged(self, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels [b, U], and True where they are judged."""
        labels = _token_labels(self, task, batch)
        answer = labels != IGNORED
        if self.skip and not hasattr(task, "token_nll"):
            raise Refused(f"objective CEU leaves nothing of task {task.name!r}, which has one label: use skip=0")
        return labels, answer & (answer.cumsum(1) > self.skip)


@dataclass(frozen=True)
class UNDIAL:
    """Self-distillation with the true token held down (arXiv:2402.10052): CE(softmax(z_teacher - strength e_y), p).

    Only answer tokens count. The benchmark's code averages over prompt and padding too, where it holds down whatever
    token stands 100 before the end of the vocabulary; neither is copied. Distilling the prompt keeps a model near
    itself, so at equal strength this one moves further. At strength 0 its gradient at the teacher is zero.

    Args:
        strength: logits taken off the true token, >= 0 (beta of the paper).
        teacher: name of the teacher in the Case.
    """

    strength: float = 10.0
    teacher: str = "original"

    def __post_init__(self) -> None:
        require(self.strength >= 0, self, "strength", "0 or above")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the teacher's logits, computed once per step and without a graph."""
        _token_labels(self, case.task, batch)
        with case.teacher(self.teacher) as model:
            return {**batch, "teacher": case.task.outputs(model, batch)}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        labels = _token_labels(self, case.task, batch)
        judged = labels != IGNORED
        told = _wide(batch["teacher"]).reshape(*labels.shape, -1)[judged]
        logits, label = _wide(_judged_logits(case.task, case.model, batch, judged)), labels[judged][:, None]
        held = told.scatter_add(1, label, torch.full_like(label, -self.strength, dtype=told.dtype))
        return _mean(_spread(_cross_entropy(torch.softmax(held, -1), logits), judged), judged)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example."""
        return case.task.units(batch)


def _token_losses(owner: Objective, task: Task, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """[b, U] nats per token, at least float32, 0 where it is not judged; and [b, U] True where it is."""
    judged = _token_labels(owner, task, batch) != IGNORED
    token_nll = getattr(task, "token_nll", None)
    losses = task.nll(model, batch)[:, None] if token_nll is None else token_nll(model, batch)
    return _wide(losses), judged


def _token_labels(owner: Objective, task: Task, batch: Batch) -> Tensor:
    """[b, U] int64, -100 where there is nothing to judge; a classifier has one column of them."""
    find = getattr(task, "labels", None)
    if find is None or not hasattr(task, "logits"):
        raise Refused(
            f"objective {type(owner).__name__} needs labels and logits over a vocabulary or classes, which task "
            f"{task.name!r} does not have: use NPO or Ascent there"
        )
    labels = find(batch)
    return labels[:, None] if labels.ndim == 1 else labels


def _judged_logits(task: Any, model: nn.Module, batch: Batch, judged: Tensor) -> Tensor:
    """[M, V] at the M places of [b, U] that are judged, in the model's precision; of answers alone where it can."""
    if hasattr(task, "answer_logits"):
        chosen = judged[task.labels(batch) != IGNORED]
        found = task.answer_logits(model, batch)
        return found if bool(chosen.all()) else found[chosen]
    logits: Tensor = task.outputs(model, batch)
    return (logits[:, None] if logits.ndim == 2 else logits)[judged]


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """[M] nats of [M, V]; a token of target 0 counts nothing, even where the model rules it out."""
    logs = torch.log_softmax(logits, -1)
    return -(target * logs.masked_fill(target == 0, 0.0)).sum(-1)


def _spread(values: Tensor, judged: Tensor) -> Tensor:
    """[M] values at their places in [b, U], 0 elsewhere."""
    return torch.zeros(judged.shape, dtype=values.dtype, device=values.device).masked_scatter(judged, values)


def _mean(values: Tensor, judged: Tensor) -> Tensor:
    """[b], the mean over the judged tokens of each example; 0 where there are none."""
    return torch.where(judged, values, torch.zeros_like(values)).sum(1) / judged.sum(1).clamp_min(1)


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()
