"""Gradients by coordinates from losses alone, for models that have no backward pass (DeepZero, arXiv:2310.02025)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.combine import State, Weighted
from expunge.compose import ZerothOrder, clock_of
from expunge.core import Combiner, Grads, Key, require
from expunge.oracle import Oracle, Weight, example_weights, per_example, places
from expunge.reuse import Reuse
from expunge.scope import Scope

Positions = dict[str, Tensor]
"""Parameter name -> flat int64 positions of the coordinates that are walked."""


@dataclass(frozen=True)
class Coordinates:
    """Any combiner, its gradients by forward differences of `count` coordinates that are drawn anew every few steps.

    How many of them each tensor gives is decided once, at the first step, by ZO-GraSP: the `count` largest |theta H g|
    over all tensors, g and H g from differences along random directions. Which ones is then drawn uniformly: the
    gradient is sparse, the model is not. Where the scope has no more than `count` coordinates all are walked. A tensor
    that is 0 throughout (an adapter's second factor) would score 0, and never move: it gives its share by size.

    No model is differentiated. The difference is forward, so that an entry is wrong by O(mu); below about 1e-4 in
    float32 it is rounding noise. What is drawn by the model itself (dropout) makes it meaningless: frozen normalisation.

    Departure: directions are Gaussian over all of the scope; the authors' are scaled to one length in each tensor, and
    what they average keeps a factor mu. Here it is a gradient.

    Args:
        inner: any combiner.
        mu: step of the difference, > 0.
        count: coordinates walked at every step, >= 1.
        queries: random directions for each of the two gradients of ZO-GraSP, >= 0; 0 shares out by the tensors' sizes.
        redraw: steps between two draws, >= 1.
        reuse: keep what modules give of unchanged inputs (``Reuse``); the same bits for less work and more memory.
        parallel: coordinates of one tensor that are looked at in one batched pass, >= 1; the same up to rounding. In pieces
            or several processes they are looked at one by one.
    """

    inner: Combiner = field(default_factory=Weighted)
    mu: float = 1e-3
    count: int = 128
    queries: int = 8
    redraw: int = 5
    reuse: bool = True
    parallel: int = 1

    def __post_init__(self) -> None:
        require(self.mu > 0, self, "mu", "above 0")
        require(self.queries >= 0, self, "queries", "at least 0")
        for name in ("count", "redraw", "parallel"):
            require(getattr(self, name) >= 1, self, name, "at least 1")

    def init(self) -> State:
        return {"inner": self.inner.init(), "quota": {}}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        with torch.no_grad():
            quota = state["quota"] or self._quota(oracle)
            key = oracle.draws.key.at("coordinates", oracle.step // self.redraw)
            walked = drawn(oracle.case.scope, oracle.parameters, quota, key)
            grads, inner = self.inner.combine(_Walk(oracle, self, walked), state["inner"])  # type: ignore[arg-type]
        return grads, {"inner": inner, "quota": quota}

    def _quota(self, oracle: Oracle) -> dict[str, int]:
        """How many coordinates of each tensor are walked."""
        free = {name: len(free_positions(oracle.case.scope, name, p)) for name, p in oracle.parameters.items()}
        if sum(free.values()) <= self.count:
            return free
        if self.queries == 0:
            return shared_out({name: float(n) for name, n in free.items()}, free, self.count)
        scores = grasp(oracle, self.mu, self.queries)
        sizes = shared_out({name: float(n) for name, n in free.items()}, free, self.count)
        zero = {name: sizes[name] for name, p in oracle.parameters.items() if not bool(runtime.whole(p).any())}
        scores = {name: score for name, score in scores.items() if name not in zero}
        return {**zero, **_largest(scores, self.count - sum(zero.values()))}

    def settle(self, after: Oracle, state: State) -> State:
        """Hand the look at the new weights to the inner combiner."""
        settle = getattr(self.inner, "settle", None)
        return state if settle is None else {**state, "inner": settle(after, state["inner"])}

    def clock(self, role: str, step: int) -> int:
        return clock_of(self.inner)(role, step)


def free_positions(scope: Scope, name: str, parameter: Tensor) -> Tensor:
    """The flat positions of a parameter's coordinates in scope."""
    mask = scope.mask(name, parameter)
    if mask is None:
        return torch.arange(parameter.numel())
    return torch.nonzero(runtime.whole(mask).flatten().cpu()).flatten()


def shared_out(sizes: Mapping[str, float], most: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` shared out in proportion to `sizes`, whole numbers, by the largest remainder; never more than `most`."""
    whole = sum(sizes.values())
    exact = {name: count * size / whole for name, size in sizes.items()}
    found = {name: min(int(value), most[name]) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: found[n] - exact[n])[: count - sum(found.values())]:
        found[name] = min(found[name] + 1, most[name])
    return found


def _largest(scores: Grads, count: int) -> dict[str, int]:
    """How many of the `count` largest scores lie in each tensor."""
    if not scores:
        return {}
    kept = torch.topk(torch.cat([s.flatten() for s in scores.values()]), count).indices
    owner = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(scores.values())])
    return dict(zip(scores, torch.bincount(owner[kept.cpu()], minlength=len(scores)).tolist(), strict=True))


def drawn(scope: Scope, parameters: Mapping[str, Tensor], quota: Mapping[str, int], key: Key) -> Positions:
    """As many coordinates of each tensor as its quota, uniformly among those in scope, in ascending order."""
    found = {}
    for name, parameter in parameters.items():
        free = free_positions(scope, name, parameter)
        order = torch.randperm(len(free), generator=key.at(name).generator())
        found[name] = free[order[: quota.get(name, 0)]].sort().values
    return found


def grasp(oracle: Oracle, mu: float, queries: int) -> Grads:
    """ZO-GraSP: |theta H g| by coordinate of the sum of all roles, from 2 (queries + 1) looks; -inf out of scope."""
    estimate = ZerothOrder(Weighted(), mu, queries)
    first, _ = estimate.combine(oracle, {})
    moved = oracle.at({name: mu * grad for name, grad in first.items()})
    second, _ = estimate.combine(moved, {})
    scores = {}
    for name, parameter in oracle.parameters.items():
        score = (parameter * (second[name] - first[name]) / mu).abs().detach()
        mask = oracle.case.scope.mask(name, parameter)
        scores[name] = runtime.whole(
            score if mask is None else torch.where(mask, score, torch.full_like(score, -torch.inf))
        )
    return scores


class _Walk:
    """An oracle whose gradients are differences along the coordinates walked."""

    def __init__(self, oracle: Oracle, plan: Coordinates, walked: Positions):
        self._oracle, self._plan, self._walked = oracle, plan, walked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def view(self, roles: tuple[str, ...], pattern: str | None = None) -> _Walk:
        return _Walk(self._oracle.view(roles, pattern), self._plan, self._walked)

    def at(self, shift: Grads) -> _Walk:
        return _Walk(self._oracle.at(shift), self._plan, self._walked)

    def grad(self, weights: Mapping[str, Weight], scope: Scope | None = None) -> Grads:
        oracle = self._oracle
        scope = oracle.case.scope if scope is None else scope
        parameters = {name: p for name, p in oracle.parameters.items() if name in scope}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for role, weight in weights.items():
            if callable(weight) or weight != 0.0:
                self._add(total, role, weight)
        return scope.cut(total, oracle.case.model)

    def _add(self, total: Grads, role: str, weight: Weight) -> None:
        oracle, plan = self._oracle, self._plan
        oracle.draws.batch(role)  # before anything is kept: a draw may call the model too
        kept = Reuse(oracle.case.model) if plan.reuse else None
        with kept.recording() if kept is not None else contextlib.nullcontext():
            base = oracle.losses.known[role] = oracle.evaluate(role)
        factor = (weight(base) if callable(weight) else weight) / plan.mu
        for name, grad in total.items():
            flat = torch.zeros(grad.numel(), dtype=grad.dtype, device=grad.device)
            for chunk in self._walked[name].split(plan.parallel):
                with kept.replaying(oracle.parameters[name]) if kept is not None else contextlib.nullcontext():
                    losses = self._looks(role, name, chunk)
                flat[chunk.to(grad.device)] = (factor * (losses - base)).to(grad)
            grad.add_(runtime.shard_like(flat.reshape(grad.shape), grad))

    def _looks(self, role: str, name: str, chunk: Tensor) -> Tensor:
        """[n] float64, the role's loss with each of these coordinates moved by mu."""
        oracle, p = self._oracle, self._oracle.parameters[name]
        alone = oracle.accumulate == 1 and runtime.world() == 1 and oracle.shift is None
        if alone and self._plan.parallel > 1 and oracle.roles[role].source is not None:
            moved = p.detach().flatten().repeat(len(chunk), 1)
            moved[torch.arange(len(chunk)), chunk] += self._plan.mu
            before = oracle.case.meter.forward
            try:
                return together(oracle, role, name, moved.reshape(len(chunk), *p.shape))
            except RuntimeError as error:
                oracle.case.meter.forward = before
                why = str(error).splitlines()[0][:120]
                oracle.case.meter.note(
                    f"coordinates were looked at one by one: the model cannot be batched over them ({why})"
                )
        found = []
        for index in chunk.tolist():
            unit = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
            unit.view(-1)[index] = self._plan.mu
            found.append(oracle.at({name: runtime.shard_like(unit, p)}).evaluate(role))
        return torch.tensor(found, dtype=torch.float64)


class _Loss(nn.Module):
    """A role's loss as a module, so that the model's parameters can be swapped."""

    def __init__(self, oracle: Oracle, role: str):
        super().__init__()
        self.model = oracle.case.model
        case, objective, batch = oracle.case, oracle.roles[role].objective, oracle.draws.batch(role)
        weight = example_weights(case, objective, batch)
        self._call = lambda: (per_example(case, objective, batch) * (weight / weight.sum())).sum()

    def forward(self) -> Tensor:
        return self._call()


def together(oracle: Oracle, role: str, name: str, values: Tensor) -> Tensor:
    """[n] float64: the role's loss with parameter `name` at each of `values` [n, ...], in one batched pass.

    What stands before that parameter is computed once for all.

    Raises:
        RuntimeError: torch's own, for a model that cannot be batched (its control flow depends on its numbers).
    """
    module, before = _Loss(oracle, role), oracle.case.meter.forward
    where = [f"model.{place}" for place, own in places(oracle.case.model).items() if own == name]

    def loss(value: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict.fromkeys(where, value), (), tie_weights=False)

    found = torch.func.vmap(loss, randomness="error")(values)
    rows = oracle.case.meter.forward - before
    oracle.case.meter.forward += rows * (len(values) - 1)
    return found.double().cpu()
