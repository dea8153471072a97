"""Prototypes of classes: the mean representation of each, and how far examples are from that of their own (GS-LoRA++)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Key, Refused
from expunge.likeness import representations
from expunge.oracle import prepared
from expunge.tasks.classification import kl


def prototypes(case: Case, head: str, chunk: int, key: Key) -> Tensor:
    """[C, d] mean over the forget and retain examples of each class of what goes into `head`, in float64; zeros for a
    class without examples.

    Args:
        head: see ``likeness.head_name``. chunk: examples per forward pass. key: of what the task draws.
    """
    task: Any = case.task
    if not hasattr(task, "labels"):
        raise Refused(f"prototypes are of classes, which task {task.name!r} does not have")
    vectors, labels = [], []
    with torch.no_grad(), case.meter.watch(case.model):
        for name in ("forget", "retain"):
            for batch in prepared(case, case.request.data(name), chunk, key.at(name)):
                vectors.append(representations(case, case.model, batch, head).double())
                labels.append(task.labels(batch))
    every, label = torch.cat(vectors), torch.cat(labels)
    total = every.new_zeros(task.classes, every.shape[1]).index_add_(0, label, every)
    return total / torch.bincount(label, minlength=task.classes).clamp_min(1)[:, None]


@dataclass(frozen=True)
class Seen:
    """(answers, representations) of a batch, of one forward pass: what objectives that name it may share (``Oracle.grad``).

    Args:
        head: the module whose input is the representation.
    """

    head: str

    def __call__(self, case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
        said: list[Tensor] = []
        vectors = representations(case, case.model, batch, self.head, said.append)
        return said[0], vectors


@dataclass(frozen=True)
class Answered:
    """NLL of the true label, as ``NLL``, from a pass that may be shared.

    Args:
        one_pass: what is shared.
    """

    one_pass: Seen

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return self.of(case, batch, self.one_pass(case, batch))

    def of(self, case: Case, batch: Batch, seen: tuple[Tensor, Tensor]) -> Tensor:
        """[b] from what the pass gave."""
        task: Any = case.task
        return torch.nn.functional.cross_entropy(seen[0], task.labels(batch), reduction="none")


@dataclass(frozen=True, eq=False)
class ToPrototype:
    """weight KL(softmax(prototype of the example's class) || softmax(representation)), nats; plus NLL where `nll`.

    Both are of the same forward pass.

    Args:
        means: [C, d], from ``prototypes``. head: the module whose input is the representation.
        weight: >= 0. nll: whether to add the NLL of the true label.
    """

    means: Tensor = field(repr=False)
    head: str
    weight: float = 1.0
    nll: bool = False

    @property
    def one_pass(self) -> Seen:
        """What may be shared."""
        return Seen(self.head)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return self.of(case, batch, self.one_pass(case, batch))

    def of(self, case: Case, batch: Batch, seen: tuple[Tensor, Tensor]) -> Tensor:
        """[b] from what the pass gave."""
        task: Any = case.task
        vectors = seen[1]
        far = self.weight * kl(vectors, self.means.to(vectors)[task.labels(batch)], 1.0)
        return far + Answered(self.one_pass).of(case, batch, seen) if self.nll else far
