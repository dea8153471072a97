"""Pruning as a stage: the least of the weights are set to 0 and leave the scope, so that they stay 0 whatever follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Case, Grads, Key, Refused, RunFailed, map_tensors, only_looked_at, require
from expunge.oracle import differentiable, prepared, sum_gradient
from expunge.saliency import top
from expunge.scope import Scope, edit


@dataclass(frozen=True)
class Prune:
    """Set the share `share` of the weights with the smallest scores to 0, and narrow the Case's scope to the others.

    Before any method: ``chain(Prune(0.95), recover, method)``, where `recover` trains what is left (arXiv:2304.04934:
    a sparse model is nearer to its retrained one after the same approximate unlearning). Weights are ranked over all
    tensors at once, among those in scope of at least `dimensions` dimensions; those of a tensor below that (biases,
    normalisation) stay, in value and in scope. No later stage moves a pruned weight: it is 0 to the bit. The same stage
    repeated, with training between, is iterative pruning.

    "magnitude": |w| (OMP). "synflow": |w d(sum of outputs) / d|w|| of the model with every parameter and buffer
    replaced by its absolute value, in eval mode, at one input of ones: no data, no label (arXiv:2006.05467). After cut k
    of n, (1 - share)^(k / n) of the weights are left, and scores are taken anew.

    It does not promise that anything is forgotten, nor that the model is of use before it is trained again; see
    ``rewind.Rewind`` for the weights of early training.

    Args:
        share: of the weights that are ranked, in [0, 1]; 0 changes nothing. Ties are kept, and scores of 0 are not, so
            that fewer or more may go.
        by: what scores a weight.
        dimensions: of the tensors that are pruned, at least, >= 1; 2 prunes linear layers too, 3 only convolutions.
        cuts: of synflow, >= 1, each one row forward and backward; magnitudes are the same after a cut as before it.

    Raises:
        Refused: where no tensor is left to prune; for "synflow", where the input is not made of floating tensors.
        RunFailed: where the sum of a deep model's outputs is too large a number.
    """

    share: float = 0.95
    by: Literal["magnitude", "synflow"] = "magnitude"
    dimensions: int = 2
    cuts: int = 100

    def __post_init__(self) -> None:
        require(0.0 <= self.share <= 1.0, self, "share", "in [0, 1]")
        require(self.by in ("magnitude", "synflow"), self, "by", "'magnitude' or 'synflow'")
        require(self.dimensions >= 1, self, "dimensions", "at least 1")
        require(self.cuts >= 1, self, "cuts", "at least 1")

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.share == 0.0:
            return replace(case, rng=rng)
        weights = {n: p for n, p in case.scope.parameters(case.model).items() if p.ndim >= self.dimensions}
        if not weights:
            raise Refused(f"Prune: no weight in scope has {self.dimensions} dimensions or more; lower dimensions")
        whole, cuts = self._count(case, weights), self.cuts if self.by == "synflow" else 1
        for cut in range(cuts):
            left = (1.0 - self.share) ** ((cut + 1) / cuts) * whole
            case = self._cut(case, weights, left, key)
        case.meter.history.append({"pruned": float(whole - self._count(case, weights)), "of": float(whole)})
        return replace(case, rng=rng)

    def _cut(self, case: Case, weights: dict[str, nn.Parameter], left: float, key: Key) -> Case:
        """Leave so many of the weights."""
        scores = magnitudes(weights) if self.by == "magnitude" else flow(case, weights, key)
        keep = min(1.0, left / max(1, self._count(case, weights)))
        kept = top(case, scores, keep).masks
        edit(case, {name: torch.where(torch.as_tensor(kept[name]), p.detach(), 0) for name, p in weights.items()})
        masks = {**dict.fromkeys(case.scope.masks, True), **kept}
        return replace(case, scope=case.scope & Scope(masks, case.scope.universe))

    def _count(self, case: Case, weights: dict[str, nn.Parameter]) -> int:
        """How many of the weights are in scope."""
        return (case.scope & Scope(dict.fromkeys(weights, True), case.scope.universe)).count(case.model)


def magnitudes(weights: dict[str, nn.Parameter]) -> Grads:
    """|w|."""
    return {name: p.detach().abs() for name, p in weights.items()}


def flow(case: Case, weights: dict[str, nn.Parameter], key: Key) -> Grads:
    """|w d(sum of outputs) / d|w|| per weight, in float32 at least, with an input of ones through absolute weights.

    Args:
        weights: name -> parameter, in scope. A weight that the outputs do not depend on scores 0.
        key: of what the task draws.
    """
    task: Any = case.task
    if not hasattr(task, "inputs"):
        raise Refused(
            f"Prune: synflow needs an input of ones, which task {task.name!r} has none of; use by='magnitude'"
        )
    data = case.request.retain or case.request.data("forget")
    found = []

    def one(tensor: Tensor) -> Tensor:
        found.append(tensor.is_floating_point())
        return torch.ones_like(tensor)

    batch = next(prepared(case, data.select([0]), 1, key))
    batch[task.inputs] = map_tensors(one, batch[task.inputs])
    if not found or not all(found):
        raise Refused("Prune: synflow needs floating inputs to set to 1, and these are not; use by='magnitude'")
    with only_looked_at(case.model), _absolute(case.model), differentiable(case), case.meter.watch(case.model):
        grads = sum_gradient(case, _Sum(), batch)
    scores = {}
    for name, p in weights.items():
        wide = p.detach().to(torch.promote_types(p.dtype, torch.float32))
        scores[name] = (wide * grads[name].to(wide.dtype)).abs() if name in grads else torch.zeros_like(wide)
    if not runtime.finite(scores):
        raise RunFailed(
            "Prune: synflow's scores are not finite, the model is too deep for its type; use by='magnitude'"
        )
    return scores


@dataclass(frozen=True)
class _Sum:
    """The sum of all outputs of each example."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.outputs(case.model, batch).flatten(1).sum(1)


@contextlib.contextmanager
def _absolute(model: nn.Module) -> Iterator[None]:
    """Every parameter and floating buffer replaced by its absolute value; put back to the bit."""
    tensors = [t.data for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    held = [t.clone() for t in tensors]
    try:
        for tensor in tensors:
            tensor.abs_()
        yield
    finally:
        for tensor, value in zip(tensors, held, strict=True):
            tensor.copy_(value)
