"""Classification: one label of C classes per example, from any model that gives C logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Data, Key, Refused, map_tensors
from expunge.registry import task


@task
@dataclass(frozen=True)
class Classification:
    """Cross-entropy over `classes` classes; unit: one label.

    Args:
        classes: number of classes C, >= 2.
        inputs: column with the model's input (a Tensor, or a mapping that is passed as keyword arguments).
        label: column with int64 labels, 0 .. C-1.
        call: ``(model, batch) -> logits [b, C]`` for a model of another shape (several inputs, dict output).
    """

    classes: int
    inputs: str = "x"
    label: str = "y"
    call: Callable[[nn.Module, Batch], Tensor] | None = None
    name: str = field(default="classification", init=False)
    unit: str = field(default="nats per label", init=False)
    stochastic: bool = field(default=False, init=False)
    kept_outputs: ClassVar[int] = 1  # a teacher's are one row of numbers per example, and the same each time

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise Refused(f"classes must be at least 2, found {self.classes}")

    def check(self, data: Data, name: str) -> None:
        """Refuse labels outside the classes and inputs that are not finite."""
        for batch in data.batches(1024):
            for column in (self.inputs, self.label):
                if column not in batch:
                    raise Refused(
                        f"{name} data has no column {column!r}: it has {', '.join(batch)}; name the columns in "
                        f"Classification(inputs=..., label=...)"
                    )
            check_finite(batch[self.inputs], batch["id"], name)
            labels = batch[self.label]
            if labels.is_floating_point() or labels.ndim != 1:
                raise Refused(
                    f"{name} labels are {labels.dtype} of shape {tuple(labels.shape)}: expected one whole number "
                    f"per example"
                )
            outside = torch.nonzero((labels < 0) | (labels >= self.classes)).flatten()
            if len(outside):
                row = int(outside[0])
                raise Refused(
                    f"{name} label {int(labels[row])} (id {int(batch['id'][row])}) is outside the {self.classes} classes: "
                    f"expected 0 to {self.classes - 1}"
                )

    def prepare(self, batch: Batch, rng: Key) -> Batch:
        """Nothing is random."""
        return batch

    def labels(self, batch: Batch) -> Tensor:
        """[b] int64."""
        return batch[self.label].long()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, C]."""
        return call_model(model, batch, self.inputs, self.call)

    outputs = logits

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b] cross-entropy of the true label, nats."""
        logits = self.logits(model, batch)
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            raise Refused(
                f"the model returned logits of shape {tuple(logits.shape)}: expected [{len(batch['id'])}, {self.classes}] "
                f"for {self.classes} classes"
            )
        return F.cross_entropy(logits, self.labels(batch), reduction="none")

    def units(self, batch: Batch) -> Tensor:
        """[b] ones."""
        return torch.ones(len(batch["id"]), device=batch[self.label].device)

    def chance(self, batch: Batch) -> float:
        """log C."""
        return math.log(self.classes)

    def divergence(self, model: nn.Module, batch: Batch, target: Tensor, temperature: float = 1.0) -> Tensor:
        """[b] KL(teacher || model) at the temperature, times its square, nats."""
        return kl(self.logits(model, batch), target, temperature)

    def relabel(self, batch: Batch, rng: Key) -> Batch:
        """A label drawn uniformly over the other classes."""
        labels = self.labels(batch)
        draw = torch.randint(1, self.classes, labels.shape, generator=rng.generator())
        return {**batch, self.label: (labels + draw.to(labels.device)) % self.classes}


def call_model(model: nn.Module, batch: Batch, inputs: str, call: Callable[[nn.Module, Batch], Any] | None) -> Tensor:
    """The model's output tensor: `call` where given, else the input column passed as it is, or as keyword arguments."""
    if call is not None:
        return call(model, batch)
    value = batch[inputs]
    output = model(**value) if isinstance(value, dict) else model(value)
    if isinstance(output, Tensor):
        return output
    raise Refused(
        f"the model returned a {type(output).__name__}: expected a tensor; say how to read it with "
        f"call=lambda model, batch: model(batch['{inputs}'])['logits']"
    )


def kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) T^2, summed over the last dimension, never below 0."""
    teacher = F.log_softmax(target / temperature, -1)
    student = F.log_softmax(logits / temperature, -1)
    return (teacher.exp() * (teacher - student)).sum(-1).clamp_min(0.0) * temperature**2


def check_finite(value: Any, ids: Tensor, name: str) -> None:
    """Refuse inputs with NaN or infinity, naming the first example."""

    def look(tensor: Tensor) -> Tensor:
        if not runtime.finite([tensor]):
            bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
            raise Refused(
                f"{name} data has NaN or infinite inputs, first at id {int(ids[bad][0])} ({int(bad.sum())} examples): "
                f"clean or drop them"
            )
        return tensor

    map_tensors(look, value)
