"""Gradients that are smoothed over the weights around (arXiv:2502.05374), so that a flat place is preferred.

A smoothing stands between an inner combiner and the oracle: whatever the inner one does with gradients (weigh, project,
take turns), it does with the smoothed ones. State is the inner combiner's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from expunge import runtime
from expunge.combine import TINY, State, Weighted
from expunge.compose import clock_of
from expunge.core import Combiner, Grads, Refused, require
from expunge.oracle import Oracle, Weight
from expunge.scope import Scope


class Smoothing(Protocol):
    """How the gradient of L = sum_k weights[k] L_k is smoothed; no weight is 0."""

    def gradient(self, oracle: Oracle, weights: Mapping[str, float], scope: Scope | None) -> Grads: ...


@dataclass(frozen=True)
class Sharpness:
    """The gradient where L is larger: at theta + radius g / |g|, g the gradient of L at theta (SAM, Foret et al. 2021).

    In arXiv:2502.05374 of the forget loss alone. |g| is over all coordinates in scope. Two passes for one.

    Args:
        radius: length of the move, > 0.
    """

    radius: float = 0.01

    def __post_init__(self) -> None:
        require(self.radius > 0, self, "radius", "above 0")

    def gradient(self, oracle: Oracle, weights: Mapping[str, float], scope: Scope | None) -> Grads:
        up = oracle.grad(weights, scope)
        return oracle.at(_of_length(up, self.radius)).grad(weights, scope)


@dataclass(frozen=True)
class RandomNoise:
    """The mean gradient of L at theta + noise, noise ~ N(0, scale^2) in every coordinate (randomised smoothing).

    The loss that is recorded is the mean over the same draws. Drawn on the CPU, the same on every device and process.

    Args:
        scale: standard deviation, > 0, to be held against the size of the weights. draws: >= 1; three in
            the authors' code. One pass per draw.
    """

    scale: float = 1e-3
    draws: int = 3

    def __post_init__(self) -> None:
        require(self.scale > 0, self, "scale", "above 0")
        require(self.draws >= 1, self, "draws", "at least 1")

    def gradient(self, oracle: Oracle, weights: Mapping[str, float], scope: Scope | None) -> Grads:
        total: Grads = {}
        losses = dict.fromkeys(weights, 0.0)
        for number in range(self.draws):
            moved = oracle.at(self._noise(oracle, number, scope))
            part = moved.grad(weights, scope)
            total = runtime.linear((1.0, total), (1.0, part)) if total else part
            losses = {role: losses[role] + moved.losses[role] / self.draws for role in losses}
        oracle.losses.known.update(losses)
        return runtime.linear((1.0 / self.draws, total))

    def _noise(self, oracle: Oracle, number: int, scope: Scope | None) -> Grads:
        generator = oracle.draws.key.at("smoothing", oracle.step, number).generator()
        shift = {
            name: runtime.shard_like(_normal(p, generator), p)
            for name, p in oracle.parameters.items()
            if scope is None or name in scope
        }
        for part in (oracle.case.scope, scope):
            if part is not None:
                part.cut(shift, oracle.case.model)
        return runtime.linear((self.scale, shift))


@dataclass(frozen=True)
class GradientNorm:
    """The gradient of L + strength |grad L|, by differentiating twice: a flat place is preferred.

    Weights that are sharded over processes cannot be differentiated twice, and are refused (so for ``Curvature``).

    In the authors' code the norm is turned into a number before it is added, so that it has no gradient and nothing is
    regularised, and its weight is 0.01 whatever was asked for. Here it is the formula of the paper.

    Args:
        strength: > 0.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        require(self.strength > 0, self, "strength", "above 0")

    def gradient(self, oracle: Oracle, weights: Mapping[str, float], scope: Scope | None) -> Grads:
        grads = oracle.grad(weights, scope)
        norm = _norm(grads)
        oracle.report["penalty"] = norm
        if norm == 0:
            return grads
        return runtime.linear((1.0, grads), (self.strength / norm, _curved(oracle, weights, grads, scope)))


@dataclass(frozen=True)
class Curvature:
    """The gradient of L + strength |grad L(theta + radius u) - grad L(theta)|, u = grad L / |grad L| a constant.

    By differentiating twice, at both places. The authors' code turns the norm into a number before it is added, so that
    nothing is regularised, and adds the forget gradient a second time. Here it is the formula of the paper.

    Args:
        strength: > 0. radius: length of the step to the second place, > 0; 0.01 in the authors' code.
    """

    strength: float = 0.1
    radius: float = 0.01

    def __post_init__(self) -> None:
        require(self.strength > 0, self, "strength", "above 0")
        require(self.radius > 0, self, "radius", "above 0")

    def gradient(self, oracle: Oracle, weights: Mapping[str, float], scope: Scope | None) -> Grads:
        grads = oracle.grad(weights, scope)
        moved = oracle.at(_of_length({name: grad.clone() for name, grad in grads.items()}, self.radius))
        change = runtime.linear((1.0, moved.grad(weights, scope)), (-1.0, grads))
        norm = _norm(change)
        oracle.report["penalty"] = norm
        if norm == 0:
            return grads
        share = self.strength / norm
        there, here = (_curved(place, weights, change, scope) for place in (moved, oracle))
        return runtime.linear((1.0, grads), (share, there), (-share, here))


@dataclass(frozen=True)
class Smoothed:
    """An inner combiner that sees the smoothed gradient of some roles, and the plain one of all others.

    With ``roles=("forget",)`` it is the smoothed unlearning of arXiv:2502.05374: the forget gradient is smoothed, the
    retain gradient is taken at the weights as they are. ``compose.SAM`` shows every role at the moved weights instead.
    It does not promise that a model so trained withstands relearning.

    Args:
        inner: any combiner. by: ``Sharpness``, ``RandomNoise``, ``GradientNorm`` or ``Curvature``.
        roles: the roles that are smoothed; none named means all. Not the one that the inner combiner protects.
    """

    inner: Combiner = field(default_factory=Weighted)
    by: Smoothing = field(default_factory=Sharpness)
    roles: tuple[str, ...] = ()

    def init(self) -> State:
        return self.inner.init()

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        for role in self.roles:
            if role not in oracle.draws.roles:
                raise Refused(f"Smoothed names role {role!r}: expected one of {', '.join(oracle.draws.roles)}")
        return self.inner.combine(_Smooth(oracle, self.by, self.roles), state)  # type: ignore[arg-type]

    def settle(self, after: Oracle, state: State) -> State:
        """The inner combiner looks at the new weights, not smoothed."""
        settle = getattr(self.inner, "settle", None)
        return state if settle is None else settle(after, state)

    def clock(self, role: str, step: int) -> int:
        return clock_of(self.inner)(role, step)


class _Smooth:
    """An oracle whose gradient of some roles is smoothed."""

    def __init__(self, oracle: Oracle, by: Smoothing, roles: tuple[str, ...]):
        self._oracle, self._by, self._roles = oracle, by, roles

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def view(self, roles: tuple[str, ...], pattern: str | None = None) -> _Smooth:
        return _Smooth(self._oracle.view(roles, pattern), self._by, self._roles)

    def at(self, shift: Grads) -> _Smooth:
        return _Smooth(self._oracle.at(shift), self._by, self._roles)

    def grad(self, weights: Mapping[str, Weight], scope: Scope | None = None) -> Grads:
        chosen = {role: weight for role, weight in weights.items() if not self._roles or role in self._roles}
        numbers = {
            role: weight(self._oracle.losses[role]) if callable(weight) else weight for role, weight in chosen.items()
        }
        active = {role: number for role, number in numbers.items() if number != 0.0}
        smooth = self._by.gradient(self._oracle, active, scope) if active else {}
        rest = {role: weight for role, weight in weights.items() if role not in chosen}
        plain = self._oracle.grad(rest, scope) if rest else {}
        return runtime.linear((1.0, smooth), (1.0, plain)) if smooth else plain


def _curved(oracle: Oracle, weights: Mapping[str, float], vector: Grads, scope: Scope | None) -> Grads:
    """The Hessian of sum_k weights[k] L_k times a vector."""
    vectors = {
        role: vector if weight == 1.0 else {name: weight * v for name, v in vector.items()}
        for role, weight in weights.items()
    }
    found = oracle.hvp(vectors)
    return found if scope is None else scope.cut(found, oracle.case.model)


def _norm(grads: Grads) -> float:
    return math.sqrt(runtime.dot(grads, grads))


def _of_length(grads: Grads, length: float) -> Grads:
    """The direction of a gradient, that long; a gradient of (nearly) 0 gives a shorter one."""
    return runtime.linear((length / max(_norm(grads), TINY), grads))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator, dtype=wide).to(device=like.device, dtype=like.dtype)
