"""Combiners around combiners: turns, clipping, sharpness-aware, zeroth order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge import runtime
from expunge.combine import TINY, State, Weighted
from expunge.core import Combiner, Grads, require
from expunge.oracle import Oracle, Weight
from expunge.scope import Scope


@dataclass(frozen=True)
class Turn:
    """A run of steps in which only some roles act, on a part of the scope.

    Args:
        roles: the roles that act. steps: for how many steps in a row.
        scope: shell-style pattern of parameter names, or None for the whole scope.
        combine: how these roles are combined.
    """

    roles: tuple[str, ...]
    steps: int = 1
    scope: str | None = None
    combine: Combiner = field(default_factory=Weighted)

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "at least 1")


@dataclass(frozen=True)
class Alternate:
    """Turns one after the other, round and round, in one Descend: phases, min-max games, alternating networks.

    The optimizer's state lives through the turns; what does not act in a turn is not stepped at all (no decay, no
    moments). A role reads the next batch of its source at each of its own turns.
    """

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        require(len(self.turns) > 0, self, "turns", "at least one Turn")

    def init(self) -> State:
        return {str(i): turn.combine.init() for i, turn in enumerate(self.turns)}

    def _at(self, step: int) -> int:
        offset = step % sum(turn.steps for turn in self.turns)
        for number, turn in enumerate(self.turns):
            if offset < turn.steps:
                return number
            offset -= turn.steps
        raise AssertionError("unreachable: the offset is below the cycle's length")

    def clock(self, role: str, step: int) -> int:
        """How often the role has acted before this step."""
        cycle = sum(turn.steps for turn in self.turns)
        per_cycle = sum(turn.steps for turn in self.turns if role in turn.roles)
        count, left = (step // cycle) * per_cycle, step % cycle
        for turn in self.turns:
            inside = min(left, turn.steps)
            count += inside if role in turn.roles else 0
            left -= inside
        return count

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        number = self._at(oracle.step)
        turn = self.turns[number]
        grads, inner = turn.combine.combine(oracle.view(turn.roles, turn.scope), state[str(number)])
        return grads, {**state, str(number): inner}

    def settle(self, after: Oracle, state: State) -> State:
        """Hand the look at the new weights to the turn that acted."""
        number = self._at(after.step)
        turn = self.turns[number]
        settle = getattr(turn.combine, "settle", None)
        return (
            state
            if settle is None
            else {**state, str(number): settle(after.view(turn.roles, turn.scope), state[str(number)])}
        )


@dataclass(frozen=True)
class Clip:
    """Clip the norm of the inner combiner's update, after the combination (before it would clip nothing).

    Args:
        inner: any combiner. max_norm: > 0.
    """

    inner: Combiner = field(default_factory=Weighted)
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_norm > 0, self, "max_norm", "above 0")

    def init(self) -> State:
        return self.inner.init()

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        grads, state = self.inner.combine(oracle, state)
        norm = math.sqrt(runtime.dot(grads, grads))
        scale = min(1.0, self.max_norm / (norm + TINY))
        oracle.report["update_norm"] = norm
        if "retain_slope" in oracle.report:
            oracle.report["retain_slope"] *= scale  # of the step that is taken, as the realised change will be
        return runtime.linear((scale, grads)), state

    def settle(self, after: Oracle, state: State) -> State:
        return _settle(self.inner, after, state)

    def clock(self, role: str, step: int) -> int:
        return clock_of(self.inner)(role, step)


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware: the inner combiner at weights moved by `radius` up the gradient of the roles in `along`.

    Foret et al. 2021. Every role is seen at the moved weights; in arXiv:2502.05374 only the forget gradient is, which is
    ``smooth.Smoothed``. Twice the price.

    Args:
        inner: any combiner. radius: length of the move, > 0. along: roles whose loss is climbed (default: all).
    """

    inner: Combiner = field(default_factory=Weighted)
    radius: float = 0.05
    along: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.radius > 0, self, "radius", "above 0")

    def init(self) -> State:
        return self.inner.init()

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        up = oracle.grad(dict.fromkeys(self.along or tuple(oracle.roles), 1.0))
        norm = math.sqrt(runtime.dot(up, up))
        shift = runtime.linear((self.radius / (norm + TINY), up))
        moved = oracle.at(shift)
        moved.report = oracle.report
        grads, state = self.inner.combine(moved, state)
        if hasattr(self.inner, "settle"):
            state = {**state, "shifts": [*state.get("shifts", []), shift]}
        return grads, state

    def settle(self, after: Oracle, state: State) -> State:
        """The inner combiner compares before and after the step, both at the same move; it is forgotten then."""
        if not hasattr(self.inner, "settle"):
            return state
        *others, shift = state["shifts"]
        rest = {name: value for name, value in state.items() if name != "shifts"}
        return _settle(self.inner, after.at(shift), {**rest, "shifts": others} if others else rest)

    def clock(self, role: str, step: int) -> int:
        return clock_of(self.inner)(role, step)


class _ForwardOnly:
    """An oracle that estimates gradients from losses alone."""

    def __init__(self, oracle: Oracle, mu: float, directions: int):
        self._oracle, self._mu, self._directions = oracle, mu, directions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def view(self, roles: tuple[str, ...], pattern: str | None) -> _ForwardOnly:
        return _ForwardOnly(self._oracle.view(roles, pattern), self._mu, self._directions)

    def at(self, shift: Grads) -> _ForwardOnly:
        return _ForwardOnly(self._oracle.at(shift), self._mu, self._directions)

    def grad(self, weights: Mapping[str, Weight], scope: Scope | None = None) -> Grads:
        oracle, scope = self._oracle, scope or self._oracle.case.scope
        numbers = {
            role: weight(oracle.losses[role]) if callable(weight) else weight for role, weight in weights.items()
        }
        active = {role: weight for role, weight in numbers.items() if weight != 0.0}
        base = sum(weight * oracle.losses[role] for role, weight in active.items())
        parameters = {name: p for name, p in oracle.parameters.items() if name in scope}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for shift, direction, share in self._probes(parameters, scope):
            moved = oracle.at(shift)
            slope = (sum(weight * moved.losses[role] for role, weight in active.items()) - base) / self._mu
            for name, values in direction.items():
                total[name].add_(values, alpha=slope * share)
        return total

    def _probes(self, parameters: Mapping[str, Tensor], scope: Scope) -> Any:
        if self._directions == 0:
            yield from self._coordinates(parameters, scope)
            return
        generator = self._oracle.draws.key.at("directions", self._oracle.step).generator()
        for _ in range(self._directions):
            direction = {
                name: runtime.shard_like(torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device), p)
                for name, p in parameters.items()
            }
            scope.cut(direction, self._oracle.case.model)
            yield {name: self._mu * values for name, values in direction.items()}, direction, 1.0 / self._directions

    def _coordinates(self, parameters: Mapping[str, Tensor], scope: Scope) -> Any:
        for name, p in parameters.items():
            mask = scope.mask(name, p)
            free = None if mask is None else runtime.whole(mask).flatten()
            for index in range(p.numel()):
                if free is not None and not bool(free[index]):
                    continue
                unit = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
                unit.view(-1)[index] = 1.0
                unit = runtime.shard_like(unit, p)
                yield {name: self._mu * unit}, {name: unit}, 1.0


@dataclass(frozen=True)
class ZerothOrder:
    """Any combiner without a backward pass: gradients by forward differences of the losses (DeepZero, arXiv:2310.02025).

    The difference is forward, so the estimate is biased by O(mu); below about 1e-4 in float32 it is rounding noise.

    Args:
        inner: any combiner. mu: step of the difference, > 0.
        directions: random Gaussian directions per gradient; 0 walks every coordinate in scope (exact up to O(mu)).
    """

    inner: Combiner = field(default_factory=Weighted)
    mu: float = 1e-3
    directions: int = 32

    def __post_init__(self) -> None:
        require(self.mu > 0, self, "mu", "above 0")
        require(self.directions >= 0, self, "directions", "at least 0")

    def init(self) -> State:
        return self.inner.init()

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        with torch.no_grad():
            return self.inner.combine(_ForwardOnly(oracle, self.mu, self.directions), state)  # type: ignore[arg-type]

    def settle(self, after: Oracle, state: State) -> State:
        return _settle(self.inner, after, state)

    def clock(self, role: str, step: int) -> int:
        return clock_of(self.inner)(role, step)


def _settle(inner: Combiner, after: Oracle, state: State) -> State:
    settle = getattr(inner, "settle", None)
    return state if settle is None else settle(after, state)


def clock_of(combiner: Combiner) -> Callable[[str, int], int]:
    """Which batch of its source a role reads at a step; the step itself unless the combiner says otherwise."""
    return getattr(combiner, "clock", lambda role, step: step)
