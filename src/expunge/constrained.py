"""Combiners that know more than the roles' mean losses: a bound that one of them must keep, or how many tokens it has.

State is explicit, as in ``combine``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from expunge import runtime
from expunge.combine import State, others
from expunge.core import Grads, require
from expunge.oracle import Oracle, example_weights


@dataclass(frozen=True)
class PrimalDual:
    """Minimise the other roles subject to protected loss <= `epsilon`, by dual ascent (PDU, arXiv:2506.05314).

    The update is the gradient of F + w R, F the sum of the other roles' losses and R the protected one; then
    w <- max(0, w + dual_lr (R - epsilon)), R of this step's batch, once per optimizer step and not before `warmup` of
    them. While w is 0 the protected role is not differentiated. A constraint met on average over the run: no promise
    for any one step, and w overshoots as dual ascent does.

    Departures: the released code updates w once per micro-batch, so w moves as often as gradients are accumulated;
    here a batch in pieces gives the same w. Warm-up is counted in steps, not epochs. The form with one dual update per
    epoch over all retain data is not here.

    Args:
        epsilon: bound of the protected loss, in its own unit. dual_lr: eta_d of the paper, >= 0.
        start: first value of w, >= 0. warmup: steps in which w stays at `start`, >= 0.
        protect: the role whose loss is bounded.
    """

    epsilon: float = 0.3
    dual_lr: float = 1.0
    start: float = 1.0
    warmup: int = 0
    protect: str = "retain"

    def __post_init__(self) -> None:
        for setting in ("dual_lr", "start", "warmup"):
            require(getattr(self, setting) >= 0, self, setting, "at least 0")

    def init(self) -> State:
        return {"w": float(self.start), "steps": 0}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        weight, steps = state["w"], state["steps"]
        grads = oracle.grad({**dict.fromkeys(others(oracle, self.protect), 1.0), self.protect: weight})
        oracle.report["multiplier"] = weight
        if steps >= self.warmup:
            weight = max(0.0, weight + self.dual_lr * (oracle.losses[self.protect] - self.epsilon))
        return grads, {"w": weight, "steps": steps + 1}


@dataclass(frozen=True)
class SafeGrad:
    """Both gradients, the free one without what opposes the protected one (SafeGrad, arXiv:2508.07172).

    g_u is the gradient of the other roles together and g_a that of the protected role. Where <g_u, g_a> < 0,
    g_u <- g_u - (<g_u, g_a> / |g_a|^2) g_a; the update is g_u + rho g_a. With rho = 0 it is one-sided surgery; without
    conflict it is a weighted sum. Inner products are accumulated in float64; two graphs, one after the other.

    It promises that the protected loss falls to first order, along the raw update only: not after momentum or Adam.

    Args:
        rho: weight of the protected gradient, >= 0. Not given in what of the paper could be read.
        per_tensor: one inner product and one projection per tensor, instead of one over all of them.
        protect: the role that is protected.
    """

    rho: float = 1.0
    per_tensor: bool = False
    protect: str = "retain"

    def __post_init__(self) -> None:
        require(self.rho >= 0, self, "rho", "at least 0")

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        free = others(oracle, self.protect)
        kept = oracle.grad({self.protect: 1.0})
        grads = oracle.grad(dict.fromkeys(free, 1.0))
        inner, square = runtime.dot(grads, kept), runtime.dot(kept, kept)
        free_square = runtime.dot(grads, grads)
        length = free_square * square
        oracle.report["cosine"] = inner / math.sqrt(length) if length > 0 else 0.0
        if self.per_tensor:
            parts = [({name: grad}, {name: kept[name]}) for name, grad in grads.items() if name in kept]
            away = [(part, -_opposed(runtime.dot(*part), *(runtime.dot(p, p) for p in part[::-1]))) for part in parts]
            for (part, held), share in away:
                runtime.linear((1.0, part), (share, held))
        else:
            runtime.linear((1.0, grads), (-_opposed(inner, square, free_square), kept))
        grads = runtime.linear((1.0, grads), (self.rho, kept))
        oracle.report["retain_slope"] = runtime.dot(grads, kept)
        return grads, state


ROUNDING = 1e-10
"""Share of the other's squared length below which a gradient is rounding, and points nowhere."""


def _opposed(inner: float, square: float, free: float) -> float:
    """<g_u, g_a> / |g_a|^2 where it is below 0; else 0, and where g_a is 0 but for rounding, as at a run's first step."""
    return inner / square if inner < 0 and square > ROUNDING * free else 0.0


@dataclass(frozen=True)
class Pooled:
    """One mean over the examples of all roles together, as if their batches were one batch.

    sum_k N_k L_k / sum_k N_k, N_k the sum of the example weights of a role's drawn batch: tokens for NLL, examples for
    an objective that has no weights of its own. So a role with short answers counts for little, which is what a loss over
    concatenated batches does. A penalty on parameters counts as one example.
    """

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        totals = {
            role: float(example_weights(oracle.case, on.objective, oracle.draws.batch(role)).sum())
            for role, on in oracle.roles.items()
        }
        whole = sum(totals.values())
        for role, total in totals.items():
            oracle.report[f"share/{role}"] = total / whole
        return oracle.grad({role: total / whole for role, total in totals.items()}), state
