"""Combiners that know more than the roles' mean losses: a bound that one of them must keep, or how many tokens it has.

State is explicit, as in ``combine``.
"""

from __future__ import annotations

from dataclasses import dataclass

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
