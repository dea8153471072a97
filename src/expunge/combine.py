"""Losses and gradients of several roles -> one update. Weighting and surgery differ only in how often they ask the
oracle for a gradient, so a combiner's price can be read off its code (and the meter checks it).

State is explicit: ``init`` makes it, ``combine`` and ``settle`` return the next one; a checkpoint is a copy of it.
The sign of a tolerance is documented once, in ``gramian.one_sided``: positive allows the retain loss to rise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from expunge import gramian, runtime
from expunge.core import Combiner, Grads, Refused, RunFailed, require
from expunge.oracle import Diverged, Oracle, Weight
from expunge.scope import Scope

State = dict[str, Any]
TINY = 1e-8


@dataclass(frozen=True)
class Decay:
    """A weight that falls linearly from `start` to 0 over the run."""

    start: float

    def __call__(self, progress: float) -> float:
        """The weight at `progress` (0 .. 1)."""
        return self.start * (1.0 - progress)


@dataclass(frozen=True)
class Weighted:
    """sum_k w_k L_k: one accumulated gradient, whatever the number of roles.

    Args:
        weights: role -> number, or a function of the run's progress; roles not named weigh 1.
    """

    weights: Mapping[str, float | Callable[[float], float]] = field(default_factory=dict)

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        weights = {}
        for role in self.weights:
            if role not in oracle.draws.roles:
                raise Refused(f"Weighted names role {role!r}: expected one of {', '.join(oracle.draws.roles)}")
        for role in oracle.roles:
            weight = self.weights.get(role, 1.0)
            weights[role] = weight(oracle.progress) if callable(weight) else weight
        return oracle.grad(weights), state


def _pair(oracle: Oracle, protect: str) -> tuple[Grads, Grads]:
    """The gradient of every other role together, and that of the protected one; two separate graphs."""
    others = _others(oracle, protect)
    kept = oracle.grad({protect: 1.0})
    return oracle.grad(dict.fromkeys(others, 1.0)), kept


def _others(oracle: Oracle, protect: str) -> list[str]:
    """The roles that the protected one is protected from."""
    if protect not in oracle.roles or len(oracle.roles) < 2:
        raise RunFailed(
            f"this combiner protects role {protect!r} from the others: expected that role and at least one "
            f"more, found {', '.join(oracle.roles)}"
        )
    return [role for role in oracle.roles if role != protect]


def _report(oracle: Oracle, table: Tensor, weights: Tensor) -> None:
    """Write what the two-objective table says into the step's record."""
    a, b, c = float(table[0, 0]), float(table[0, 1]), float(table[1, 1])
    oracle.report.update(
        {
            "forget_norm": math.sqrt(a),
            "retain_norm": math.sqrt(c),
            "cosine": b / math.sqrt(a * c) if a > 0 and c > 0 else 0.0,
            "multiplier": float(weights[1] / weights[0]) if float(weights[0]) else 0.0,
            "retain_slope": float(weights[0] * b + weights[1] * c),
        }
    )


def table_of(grads: list[Grads]) -> Tensor:
    """The Gramian [n, n] of n gradients, float64."""
    table = torch.zeros(len(grads), len(grads), dtype=torch.float64)
    for i, first in enumerate(grads):
        for j in range(i, len(grads)):
            table[i, j] = table[j, i] = runtime.dot(first, grads[j])
    if not bool(torch.isfinite(table).all()):
        raise Diverged(
            "a gradient has entries that are not finite, though the losses are: lower the learning rate, or look for a "
            "square root or a logarithm at 0 in the model"
        )
    return table


@dataclass(frozen=True)
class OneSidedProjection:
    """Explicit one-sided surgery (EUPMU eq. 2, arXiv:2510.22124): the update nearest to the forget gradient that
    raises the protected loss at no more than `tolerance` per unit step. Without conflict it is the forget gradient.

    It promises this for the raw gradient step only: after momentum, Adam or weight decay it is a tendency; the
    realised change is recorded beside the predicted one.

    Args:
        tolerance: see ``gramian.one_sided``.
        protect: the role whose loss must not rise.
        max_multiplier: bound of the multiplier, where the protected gradient nearly vanishes.
    """

    tolerance: float = 0.0
    protect: str = "retain"
    max_multiplier: float = 100.0

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        forget, retain = _pair(oracle, self.protect)
        table = table_of([forget, retain])
        weights = gramian.one_sided(table, tolerance=self.tolerance, max_multiplier=self.max_multiplier)
        _report(oracle, table, weights)
        return runtime.linear((float(weights[0]), forget), (float(weights[1]), retain)), state


def _by_table(oracle: Oracle, rule: Callable[[Tensor], Tensor]) -> Grads:
    """One gradient per role, their Gramian, the rule's weights, one linear combination."""
    grads = [oracle.grad({role: 1.0}) for role in oracle.roles]
    table = table_of(grads)
    weights = rule(table) if len(grads) > 1 else torch.ones(1, dtype=torch.float64)
    if len(grads) == 2:
        _report(oracle, table, weights)
    return runtime.linear(*((float(w), g) for w, g in zip(weights, grads, strict=True)))


@dataclass(frozen=True)
class PCGrad:
    """Projecting conflicting gradients (arXiv:2001.06782), summed; global, in an order drawn from the run's key."""

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        generator = oracle.draws.key.at("pcgrad", oracle.step).generator()
        return _by_table(oracle, lambda table: gramian.pcgrad(table, generator)), state


@dataclass(frozen=True)
class UPGrad:
    """Mean of the gradients projected on the dual cone (arXiv:2406.16232)."""

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        return _by_table(oracle, gramian.upgrad), state


@dataclass(frozen=True)
class MGDA:
    """The shortest convex combination (Desideri 2012). Stalls where one gradient vanishes, as at a trained optimum."""

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        return _by_table(oracle, gramian.mgda), state


@dataclass(frozen=True)
class CAGrad:
    """Conflict-averse gradient (arXiv:2110.14048).

    Args:
        c: radius of the search around the mean gradient, in its norms, >= 0.
    """

    c: float = 0.4

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        return _by_table(oracle, lambda table: gramian.cagrad(table, self.c)), state


@dataclass(frozen=True)
class IMTLG:
    """Equal projections on every unit gradient (IMTL-G, Liu et al., ICLR 2021)."""

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        return _by_table(oracle, gramian.imtl_g), state


@dataclass(frozen=True)
class Nash:
    """The Nash bargaining solution (Nash-MTL, arXiv:2202.01017); closed form for two roles."""

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        return _by_table(oracle, gramian.nash), state


@dataclass(frozen=True)
class AlignedMTL:
    """Equal singular values of the gradient matrix (Aligned-MTL, arXiv:2305.19000)."""

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        return _by_table(oracle, gramian.aligned), state


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
        others = _others(oracle, self.protect)
        if self.form == "log":
            grads = self._log_gradient(oracle, others, weight)
        else:
            grads = oracle.grad({**dict.fromkeys(others, 1.0), self.protect: weight})
        oracle.report["multiplier"] = weight
        return grads, {**state, "before": oracle.losses[self.protect]}

    def _log_gradient(self, oracle: Oracle, others: list[str], weight: float) -> Grads:
        """grad log L = grad L / L, with L read off as its own graph is built."""
        if len(others) != 1:
            raise RunFailed(
                f"the log form takes one role beside {self.protect!r}, found {', '.join(others)}: use form='raw'"
            )

        def slope(role: str, scale: float, floor: float) -> Callable[[float], float]:
            return lambda loss: scale / math.exp(_log(role, loss, floor))

        weights: dict[str, Weight] = {others[0]: slope(others[0], 1.0, self.floor)}
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

        grads = oracle.grad({**dict.fromkeys(_others(oracle, self.protect), 1.0), self.protect: weigh})
        oracle.report["multiplier"] = new["w"]
        return runtime.linear((1.0 / (1.0 + new["w"]), grads)), new


@dataclass(frozen=True)
class OfMeans:
    """Minimise any differentiable function of the roles' mean losses (FLAT, log forms, FAMO-like weightings).

    One gradient per role, then the chain rule: exact for any split into pieces, no extra forward pass.

    Args:
        function: role -> 0-dim Tensor, to a 0-dim Tensor.
    """

    function: Callable[[dict[str, Tensor]], Tensor]

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        grads = {role: oracle.grad({role: 1.0}) for role in oracle.roles}
        losses = {
            role: torch.tensor(oracle.losses[role], dtype=torch.float64, requires_grad=True) for role in oracle.roles
        }
        slopes = torch.autograd.grad(self.function(losses), list(losses.values()), allow_unused=True)
        terms = [
            (0.0 if slope is None else float(slope), grads[role]) for role, slope in zip(losses, slopes, strict=True)
        ]
        return runtime.linear(*terms), state


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

    Foret et al. 2021; with ``along=("forget",)`` the smoothed unlearning of arXiv:2502.05374. Twice the price.

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
