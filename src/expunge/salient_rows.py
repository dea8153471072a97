"""An update on the neurons of largest forget gradient only (SURE, arXiv:2410.16454)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge import runtime
from expunge.combine import State, Weighted
from expunge.compose import clock_of
from expunge.core import Combiner, Grads, Refused, require
from expunge.oracle import Oracle, Weight
from expunge.scope import Scope


@dataclass(frozen=True)
class SalientRows:
    """The inner combiner's update on the neurons of largest forget gradient; 0 elsewhere (SURE, arXiv:2410.16454).

    A neuron is a row along the first dimension of a tensor (one coordinate of a vector). Its saliency is the norm of its
    row of the forget gradient; kept are those at or above the percentile of all rows in scope, over all tensors at once,
    drawn anew at each step. The percentile is NumPy's, linear between ranks.

    The mask is on the gradient, as in the paper: momentum and weight decay of an optimizer move the other rows on. A row
    without any forget gradient is never kept, whatever the percentile (embeddings of tokens that do not occur would
    otherwise bring it down to 0, and keep every row).

    Args:
        inner: any combiner. percentile: in [0, 100]. of: the role whose gradient decides.
    """

    inner: Combiner = field(default_factory=Weighted)
    percentile: float = 90.0
    of: str = "forget"

    def __post_init__(self) -> None:
        require(0 <= self.percentile <= 100, self, "percentile", "in [0, 100]")

    def init(self) -> State:
        return self.inner.init()

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        if self.of not in oracle.draws.roles:
            raise Refused(f"SalientRows names role {self.of!r}: expected one of {', '.join(oracle.draws.roles)}")
        heard = _Heard(oracle, self.of)
        grads, state = self.inner.combine(heard, state)  # type: ignore[arg-type]
        masks = salient_rows(heard.rows or row_norms(oracle.grad({self.of: 1.0}), oracle), self.percentile)
        kept = sum(float(mask.sum()) for mask in masks.values())
        oracle.report["rows_kept"] = kept / max(1, sum(mask.numel() for mask in masks.values()))
        return {name: _masked(grad, masks.get(name)) for name, grad in grads.items()}, state

    def settle(self, after: Oracle, state: State) -> State:
        """The inner combiner looks at the new weights."""
        settle = getattr(self.inner, "settle", None)
        return state if settle is None else settle(after, state)

    def clock(self, role: str, step: int) -> int:
        return clock_of(self.inner)(role, step)


class _Heard:
    """An oracle that keeps the row norms of one role's gradient in passing, at no further pass."""

    def __init__(self, oracle: Oracle, of: str):
        self._oracle, self._of = oracle, of
        self.rows: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def grad(self, weights: Mapping[str, Weight], scope: Scope | None = None) -> Grads:
        if weights.get(self._of, 0.0) == 0.0:
            return self._oracle.grad(weights, scope)
        own = self._oracle.grad({self._of: weights[self._of]}, scope)
        self.rows = row_norms(own, self._oracle)
        rest = {role: weight for role, weight in weights.items() if role != self._of}
        return runtime.linear((1.0, own), (1.0, self._oracle.grad(rest, scope))) if rest else own


def row_norms(grads: Grads, oracle: Oracle) -> dict[str, Tensor]:
    """name -> [rows] norm of each row of a gradient, whole, in float32 at least; -1 where no coordinate is in scope."""
    found = {}
    for name, grad in grads.items():
        whole = runtime.whole(grad.detach())
        norms = _rows(whole.to(torch.promote_types(whole.dtype, torch.float32))).norm(dim=1)
        mask = oracle.case.scope.masks[name]
        if isinstance(mask, Tensor):
            inside = _rows(runtime.whole(mask).to(whole.device)).any(dim=1)
            norms = torch.where(inside, norms, -torch.ones_like(norms))
        found[name] = norms
    return found


def salient_rows(norms: Mapping[str, Tensor], percentile: float) -> dict[str, Tensor]:
    """name -> [rows] bool: norm above 0, and at or above the percentile over all rows with a norm of 0 or more."""
    ranked = torch.cat([part[part >= 0].cpu() for part in norms.values()]).double().numpy()
    level = float(np.percentile(ranked, percentile)) if ranked.size else math.inf
    return {name: (part.double() >= level) & (part > 0) for name, part in norms.items()}


def _rows(tensor: Tensor) -> Tensor:
    """[rows, rest]: a vector's coordinates, or a number, are rows of their own."""
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)


def _masked(grad: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:  # the forget loss does not reach this tensor at all
        return grad.mul_(0.0)
    shaped = keep.reshape(-1, *[1] * (grad.ndim - 1)) if grad.ndim else keep.reshape(())
    if runtime.sharded(grad):
        shaped = runtime.shard_like(shaped.expand(grad.shape).contiguous(), grad)
    return grad.mul_(shaped.to(grad.dtype))
