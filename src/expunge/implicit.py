"""Implicit gradient surgery: the multiplier of the utility constraint is learnt from step to step, not solved for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from expunge import runtime
from expunge.combine import TINY, State, others
from expunge.core import Grads, RunFailed, require
from expunge.oracle import Oracle, Weight


def _dual_adam(state: State, slope: float, lr: float, decay: float) -> State:
    """One Adam step of the scalar multiplier, with coupled weight decay (as torch's Adam, written out for a float)."""
    slope = slope + decay * state["w"]
    t = state["t"] + 1
    m = 0.9 * state["m"] + 0.1 * slope
    v = 0.999 * state["v"] + 0.001 * slope * slope
    step = lr * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + TINY)
    return {**state, "w": state["w"] - step, "m": m, "v": v, "t": t}


def _log(role: str, loss: float, floor: float) -> float:
    if loss - floor + TINY <= 0:
        raise RunFailed(
            f"the log form needs the loss of role {role!r} above its floor {floor:g}, found {loss:g}: use a "
            f"forgetting loss that is bounded below, give its floor, or use form='raw'"
        )
    return math.log(loss - floor + TINY)


@dataclass(frozen=True)
class ImplicitSurgery:
    """Implicit one-sided surgery (EUPMU, arXiv:2510.22124): the multiplier is learnt, not solved for.

    Minimises F + w R where w rises while the retain loss R rises faster than allowed, read off from R before and
    after the step on the same batch: one joint backward and one extra forward of the retain half.

    ``form="log"``, the authors' current code: log F + w log R, w by Adam on log R - log R' + tolerance.
    ``form="raw"``, their first release: F + w R, the same dual step.
    ``form="paper"``, their eq. 8: F + w R, w <- max(0, w - dual_lr ((R - R') / lr + tolerance)).
    In the log and raw forms the tolerance is relative (a share of R per step), in the paper's form it is the rate per
    unit step of ``gramian.one_sided``; a negative tolerance demands a fall in each (the code's e is -tolerance).

    Departures: separate forget and retain batches, so no weighting by their shares; w is clamped at 0 where it is
    stored, so that it does not have to climb back; a stateless log has no per-step guarantee.

    Args:
        dual_lr: step size of the multiplier. dual_decay: its weight decay (Adam forms).
        start: first value of the multiplier, >= 0.
        floor: known lower bound of the forget loss (log form).
    """

    form: Literal["log", "raw", "paper"] = "log"
    tolerance: float = -0.01
    dual_lr: float = 1.0
    dual_decay: float = 0.01
    start: float = 0.0
    floor: float = 0.0
    protect: str = "retain"
    max_multiplier: float = 100.0

    def __post_init__(self) -> None:
        require(self.form in ("log", "raw", "paper"), self, "form", "one of 'log', 'raw', 'paper'")

    def init(self) -> State:
        return {"w": self.start, "m": 0.0, "v": 0.0, "t": 0, "before": 0.0}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        weight = min(state["w"], self.max_multiplier)
        free = others(oracle, self.protect)
        if self.form == "log":
            grads = self._log_gradient(oracle, free, weight)
        else:
            grads = oracle.grad({**dict.fromkeys(free, 1.0), self.protect: weight})
        oracle.report["multiplier"] = weight
        return grads, {**state, "before": oracle.losses[self.protect]}

    def _log_gradient(self, oracle: Oracle, free: list[str], weight: float) -> Grads:
        """grad log L = grad L / L, with L read off as its own graph is built."""
        if len(free) != 1:
            raise RunFailed(
                f"the log form takes one role beside {self.protect!r}, found {', '.join(free)}: use form='raw'"
            )

        def slope(role: str, scale: float, floor: float) -> Callable[[float], float]:
            return lambda loss: scale / math.exp(_log(role, loss, floor))

        weights: dict[str, Weight] = {free[0]: slope(free[0], 1.0, self.floor)}
        if weight > 0:
            weights[self.protect] = slope(self.protect, weight, 0.0)
        return oracle.grad(weights)

    def settle(self, after: Oracle, state: State) -> State:
        """One dual step from the retain loss after the step, on the same batch."""
        before, now = state["before"], after.losses[self.protect]
        if self.form == "paper":
            rise = (now - before) / after.lr if after.lr > 0 else 0.0
            return {**state, "w": max(0.0, state["w"] + self.dual_lr * (rise - self.tolerance))}
        slope = _log(self.protect, before, 0.0) - _log(self.protect, now, 0.0) + self.tolerance
        state = _dual_adam(state, slope, self.dual_lr, self.dual_decay)
        return {**state, "w": min(max(0.0, state["w"]), self.max_multiplier)}


@dataclass(frozen=True)
class FastImplicitSurgery:
    """EUPMU-fast (arXiv:2510.22124): no extra pass; the retain loss of the next batch stands in for the loss after.

    F / (1 + w) + w R / (1 + w), with w by Adam on log R_before - log R + tolerance. Noisy: the change of batch is
    read as a change of the model. w is clamped at 0 where it is stored (the authors drop to F alone below 0, which is
    the same value, and let w drift).

    Args:
        tolerance: relative, as in ``ImplicitSurgery``. dual_lr, dual_decay, start: of the multiplier.
    """

    tolerance: float = -0.01
    dual_lr: float = 1.0
    dual_decay: float = 0.01
    start: float = 1.0
    protect: str = "retain"
    max_multiplier: float = 100.0

    def init(self) -> State:
        return {"w": self.start, "m": 0.0, "v": 0.0, "t": 0, "before": None}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        new = dict(state)

        def weigh(now: float) -> float:
            """The dual step, taken between the retain batch's forward and backward pass."""
            if new["before"] is not None:
                slope = _log(self.protect, new["before"], 0.0) - _log(self.protect, now, 0.0) + self.tolerance
                new.update(_dual_adam(new, slope, self.dual_lr, self.dual_decay))
            new["before"], new["w"] = now, min(max(0.0, new["w"]), self.max_multiplier)
            return new["w"]

        grads = oracle.grad({**dict.fromkeys(others(oracle, self.protect), 1.0), self.protect: weigh})
        oracle.report["multiplier"] = new["w"]
        return runtime.linear((1.0 / (1.0 + new["w"]), grads)), new
