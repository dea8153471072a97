"""Losses balanced so that all of them fall at the same relative rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expunge import runtime
from expunge.combine import TINY, State
from expunge.core import Grads, RunFailed, require
from expunge.oracle import Oracle


@dataclass(frozen=True)
class FAMO:
    """Fast adaptive multitask optimisation (Liu et al., NeurIPS 2023, arXiv:2306.03792).

    Minimises (1 / c) sum_k z_k log D_k with z = softmax(w), D_k = L_k - floor_k + 1e-8 and c = sum_k z_k / D_k held
    constant, so that the update is a convex combination of the gradients. After the step the losses of the same batches
    are looked at again; w then descends, by Adam, on sum_k z_k (log D_k - log D_k'): what fell the most weighs less. One
    joint backward pass and one extra forward pass, whatever the number of roles.

    It protects no role: all are balanced alike, and a role that cannot fall draws the weight to itself. Losses must stay
    above their floors, so that gradient ascent does not fit.

    Args:
        floors: role -> known lower bound of its loss; 0 where not given.
        lr: step size of w, > 0. decay: its weight decay (coupled), >= 0; 0.01 in the authors' code.
    """

    floors: Mapping[str, float] = field(default_factory=dict)
    lr: float = 0.025
    decay: float = 0.01

    def __post_init__(self) -> None:
        require(self.lr > 0, self, "lr", "above 0")
        require(self.decay >= 0, self, "decay", "at least 0")

    def init(self) -> State:
        return {"w": {}, "m": {}, "v": {}, "t": 0, "logs": {}}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        shares = _softmax({role: state["w"].get(role, 0.0) for role in oracle.roles})
        above: dict[str, float] = {}

        def slope(role: str) -> Callable[[float], float]:
            def weigh(loss: float) -> float:
                above[role] = self._above(role, loss)
                return shares[role] / above[role]

            return weigh

        grads = oracle.grad({role: slope(role) for role in oracle.roles})
        total = sum(shares[role] / above[role] for role in oracle.roles)
        oracle.report.update({f"share/{role}": shares[role] / above[role] / total for role in oracle.roles})
        logs = {role: math.log(value) for role, value in above.items()}
        return runtime.linear((1.0 / total, grads)), {**state, "logs": logs}

    def settle(self, after: Oracle, state: State) -> State:
        """One Adam step of w from what the step did to each loss, on the same batches."""
        fell = {
            role: before - math.log(self._above(role, after.losses[role])) for role, before in state["logs"].items()
        }
        shares = _softmax({role: state["w"].get(role, 0.0) for role in fell})
        mean = sum(shares[role] * fell[role] for role in fell)
        t = state["t"] + 1
        w, m, v = ({**state[name]} for name in ("w", "m", "v"))
        for role in fell:
            old = w.get(role, 0.0)
            gradient = shares[role] * (fell[role] - mean) + self.decay * old
            m[role] = 0.9 * m.get(role, 0.0) + 0.1 * gradient
            v[role] = 0.999 * v.get(role, 0.0) + 0.001 * gradient * gradient
            w[role] = old - self.lr * (m[role] / (1 - 0.9**t)) / (math.sqrt(v[role] / (1 - 0.999**t)) + TINY)
        return {"w": w, "m": m, "v": v, "t": t, "logs": {}}

    def _above(self, role: str, loss: float) -> float:
        value = loss - self.floors.get(role, 0.0) + TINY
        if value <= 0:
            raise RunFailed(
                f"FAMO takes the logarithm of the loss of role {role!r} above its floor {self.floors.get(role, 0.0):g}, and "
                f"found {loss:g}: use a loss that is bounded below, or give its floor"
            )
        return value


def _softmax(w: Mapping[str, float]) -> dict[str, float]:
    top = max(w.values())
    powers = {role: math.exp(value - top) for role, value in w.items()}
    total = sum(powers.values())
    return {role: power / total for role, power in powers.items()}
