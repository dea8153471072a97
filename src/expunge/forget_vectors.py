"""Forget vectors: one vector added to every input, learnt, or put together from the vectors of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.combine import Weighted
from expunge.core import Case, Data, Refused, fork
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.objectives import NLL, Margin, Norm
from expunge.optim import SGD, Exponential
from expunge.scope import Scope
from expunge.wrap import InputVector, with_input_vector

BANK = "vectors"
"""Name, among the request's extra data, of vectors that the request brings: one row each, under the input's column."""


@dataclass(frozen=True)
class Shift:
    """Descend on the loss of a forget vector, in whatever is in scope: the vector, or coefficients (arXiv:2412.16780).

    The two means are weighed by the shares of forget and retain data in their union, as sums over a mixed batch divided
    by its size are on average. Does not promise that the retain examples keep their answers.

    Formula: retain_weight n_r/n mean over D_r of CE + forget_weight n_f/n mean over D_f of
    max(f_y - max_{k != y} f_k, -slack) + size_weight |v|_2 / (rows of a step, or 1), n = n_f + n_r.

    Args:
        slack: tau, logits, >= 0. forget_weight, retain_weight, size_weight: beta, alpha and lambda, >= 0.
        per_row: divide the norm by the rows of a step, as for a vector; not for coefficients.
        lr, momentum, weight_decay: of SGD; the decay acts on what is learnt.
        end: factor of the learning rate at the end of the run, reached exponentially.
        steps: >= 0. batch: examples of each side per step.
    """

    slack: float = 1.0
    forget_weight: float = 5.0
    retain_weight: float = 1.0
    size_weight: float = 1.0
    per_row: bool = True
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    end: float = 0.01
    steps: int = 100
    batch: int = 32

    def __call__(self, case: Case) -> Case:
        forget, retain = (len(case.request.data(name)) for name in ("forget", "retain"))
        rows = min(self.batch, forget) + min(self.batch, retain)
        weights = {
            "forget": self.forget_weight * forget / (forget + retain),
            "retain": self.retain_weight * retain / (forget + retain),
            "size": self.size_weight / (rows if self.per_row else 1),
        }
        return Descend(
            forget=Margin(self.slack),
            retain=NLL(),
            others={"size": Norm()},
            combine=Weighted(weights),
            optimizer=SGD(self.lr, self.momentum, self.weight_decay),
            schedule=Exponential(self.end),
            steps=self.steps,
            batch=self.batch,
        )(case)


@dataclass(frozen=True)
class LearnVector:
    """Freeze the model and learn one vector that is added to every input; no steps, and the model stays as it is.

    Args:
        shift: how it is learnt.
    """

    shift: Shift

    def __call__(self, case: Case) -> Case:
        return with_input_vector(self.shift)(case) if self.shift.steps else case

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this stage leaves `model` in, for saved `weights` to be read into."""
        return InputVector(model, tuple(weights["vector"].shape)) if "vector" in weights else model


class Combined(nn.Module):
    """A model whose input is shifted by sum_k w_k v_k: the vectors v stand still, the coefficients w are learnt.

    Args:
        model: any module that an ``InputVector`` can wrap.
        vectors: [n, ...], the shape of one input each.
    """

    def __init__(self, model: nn.Module, vectors: Tensor):
        super().__init__()
        self.shifted = InputVector(model, tuple(vectors.shape[1:]))
        own = self.shifted.vector
        self.register_buffer("vectors", vectors.to(own))
        self.coefficients = nn.Parameter(torch.zeros(len(vectors), dtype=own.dtype, device=own.device))
        self.training = model.training

    def vector(self) -> Tensor:
        """The vector that these coefficients give."""
        vectors: Any = self.vectors
        return torch.tensordot(self.coefficients, vectors, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says of the shifted input."""
        return torch.func.functional_call(self.shifted, {"vector": self.vector()}, args, kwargs)


@dataclass(frozen=True)
class Combine:
    """Learn the coefficients of given vectors, whose sum is then the model's input vector; no weight moves.

    The vectors are the rows of the request's extra data ``vectors``; without them, `learn` makes one for each of the
    `basis` most frequent classes of the retain data, forgetting that class and keeping the other retain examples: the
    class to forget is unseen by all of them. It does not promise that any combination forgets.

    Args:
        shift: how the coefficients are learnt, from 0.
        learn: how a vector that is missing is learnt.
        basis: how many are learnt at most, >= 1.

    Raises:
        Refused: for vectors of another shape than the input, or retain data of fewer than two classes to learn from.
    """

    shift: Shift
    learn: Shift
    basis: int = 4

    def __call__(self, case: Case) -> Case:
        if not self.shift.steps:
            return case
        key, rng = case.rng.take()
        vectors = self.vectors(replace(case, rng=key)).to(runtime.device_of(case.model))
        plain, names = case.model, tuple(f"model.{name}" for name in case.scope.universe)
        work = Combined(plain, vectors)
        done = self.shift(replace(case, model=work, scope=_only("coefficients", work), rng=rng))
        with torch.no_grad():
            work.shifted.vector.copy_(work.vector())
        found = ", ".join(f"{value:.4g}" for value in work.coefficients.tolist())
        case.meter.note(f"the input vector is a sum of {len(vectors)} vectors with coefficients {found}")
        outer = Scope({f"model.{name}": mask for name, mask in case.scope.masks.items()}, names)
        return replace(done, model=work.shifted, scope=outer)

    def vectors(self, case: Case) -> Tensor:
        """[n, ...], those of the request, or learnt here."""
        task: Any = case.task
        if BANK in case.request.extra:
            data = case.request.data(BANK)
            return data.batch(torch.arange(len(data)))[task.inputs]
        retain = case.request.data("retain")
        label = torch.cat([task.labels(batch) for batch in retain.batches(1024)])
        kinds, counts = label.unique(return_counts=True)
        if len(kinds) < 2:
            raise Refused(
                f"the retain data have {len(kinds)} class: expected at least two to learn vectors of classes from; give "
                f"the request extra data {BANK!r}"
            )
        often = kinds[torch.argsort(counts, descending=True, stable=True)][: self.basis]
        return torch.stack([self._learnt(case, retain, label == kind, int(kind)) for kind in often])

    def _learnt(self, case: Case, retain: Data, gone: Tensor, kind: int) -> Tensor:
        """The vector that forgets one class of the retain data."""
        parts = [retain.select(torch.nonzero(rows).flatten()) for rows in (gone, ~gone)]
        request = replace(case.request, forget=parts[0], retain=parts[1], extra={})
        side = fork(replace(case, rng=case.rng.at("class", kind)), request=request)
        model: Any = with_input_vector(self.learn)(side).model
        return model.vector.detach().clone()

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this stage leaves `model` in, for saved `weights` to be read into."""
        return LearnVector(self.shift).rebuilt(model, weights)


def _only(name: str, model: nn.Module) -> Scope:
    return Scope({name: True}, tuple(other for other, _ in model.named_parameters()))


def bank(models: Sequence[nn.Module], labels: Sequence[int], task: Any) -> Data:
    """The vectors of models that ``forget_vector`` gave back, as data for ``Request(extra={"vectors": ...})``.

    Args:
        models: each an ``InputVector`` with vectors of one shape.
        labels: the class that each vector forgets; a name only.
        task: the classification task, which says what the columns are called.

    Raises:
        Refused: for a model without a vector, or numbers of models and labels that differ.
    """
    plain = next((model for model in models if not isinstance(model, InputVector)), None)
    if plain is not None or len(models) != len(labels):
        found = f"a {type(plain).__name__}" if plain is not None else f"{len(models)} models, {len(labels)} labels"
        raise Refused(
            f"expected models with an input vector, as forget_vector gives, and a label for each, found {found}"
        )
    vectors: list[Tensor] = [model.vector.detach().cpu() for model in models if isinstance(model, InputVector)]
    return as_data({task.inputs: torch.stack(vectors), task.label: torch.as_tensor(labels)})
