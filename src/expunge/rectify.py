"""Two gradients rectified against each other tensor by tensor, and weighed by how well the protected loss stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge import runtime
from expunge.combine import State, others
from expunge.core import Grads, require
from expunge.oracle import Oracle


@dataclass(frozen=True)
class Rectified:
    """Direction-rectified, magnitude-adjusted gradients (GDR-GMA, Lin et al., ACM MM 2024).

    In every tensor for itself: where <g_f, g_r> < 0, the protected gradient loses its part along g_f and the free one its
    part along g_r. The free gradient of the last tensor in scope, from the second pass over the forget data on, also
    loses its part along the mean of those of its last `bank` values that oppose it, where that mean does. The update is
    (1 - lambda) g_r + lambda g_f with lambda = 1 / (1 + exp(gamma (R - epsilon))), R the protected loss of this batch: at
    the published gamma a switch, which forgets while R is below epsilon and repairs while it is above.

    It promises no descent of either loss: tensors are rectified one by one, whatever the whole gradients do.

    Departures: projections of the original gradients ("original"); "released" projects g_f with the inner product and norm
    of the original g_r along the g_r that was already projected, which leaves the two neither orthogonal nor as they were.
    The sum of stored gradients is not taken in place, which in the authors' code spoils the first of them.

    Args:
        gamma: steepness of lambda, >= 0; 0 weighs both by a half.
        epsilon: the protected loss at which both weigh a half, in its own unit.
        bank: how many gradients of the last tensor are kept: the number of batches in a pass; 0 keeps none.
        projection: "original" or "released".
        protect: the role whose loss decides.
    """

    gamma: float = 100.0
    epsilon: float = 0.02
    bank: int = 0
    projection: Literal["original", "released"] = "original"
    protect: str = "retain"

    def __post_init__(self) -> None:
        require(self.gamma >= 0, self, "gamma", "at least 0")
        require(self.bank >= 0, self, "bank", "at least 0")
        require(self.projection in ("original", "released"), self, "projection", "'original' or 'released'")

    def init(self) -> State:
        return {"stored": [], "steps": 0}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        free = others(oracle, self.protect)
        kept = oracle.grad({self.protect: 1.0})
        grads = oracle.grad(dict.fromkeys(free, 1.0))
        last = list(grads)[-1]
        old = [kept_before.to(grads[last]) for kept_before in state["stored"]]  # a checkpoint is read to the CPU
        stored = [*old, grads[last].clone()][-self.bank :] if self.bank else []
        new = {"stored": stored, "steps": state["steps"] + 1}
        conflicts = 0
        for name in [name for name in grads if name in kept]:  # in one order on every process
            inner = _dot(grads[name], kept[name])
            if inner < 0:
                conflicts += 1
                kept[name], grads[name] = self._apart(kept[name], grads[name], inner)
        if self.bank and state["steps"] >= self.bank:
            grads[last] = _off_mean(grads[last], stored)
        weight = _falling(self.gamma * (oracle.losses[self.protect] - self.epsilon))
        oracle.report.update({"weight": weight, "conflicts": conflicts / len(grads)})
        return runtime.linear((1.0 - weight, kept), (weight, grads)), new

    def _apart(self, kept: Tensor, free: Tensor, inner: float) -> tuple[Tensor, Tensor]:
        """Both without their part along the other."""
        parted = kept - inner / _dot(free, free) * free
        along = kept if self.projection == "original" else parted
        return parted, free - inner / _dot(kept, kept) * along


def _off_mean(grad: Tensor, stored: list[Tensor]) -> Tensor:
    """`grad` without its part along the mean of the stored ones that oppose it, where it opposes the mean."""
    against = [old for old in stored if _dot(old, grad) < 0]
    if not against:
        return grad
    mean = torch.stack(against).mean(0)
    inner = _dot(grad, mean)
    return grad - inner / _dot(mean, mean) * mean if inner < 0 else grad


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in float64, over all processes."""
    return runtime.dot({"": a}, {"": b})


def _falling(x: float) -> float:
    """1 / (1 + exp(x)), for any x."""
    return 1.0 / (1.0 + math.exp(x)) if x < 0 else math.exp(-x) / (1.0 + math.exp(-x))
