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
from expunge.core import Grads, Refused, RunFailed, require
from expunge.oracle import Diverged, Oracle

State = dict[str, Any]
TINY = 1e-8


@dataclass(frozen=True)
class Decay:
    """A weight that falls linearly from `start` to 0 over the run.

    Args:
        start: the weight at full height.
        form: "falling", "constant" at `start`, or "rising" from 0 towards it.
        until: share of the run after which the weight is 0, in (0, 1]; the line is drawn to there.
        levels: how many equal parts of the run have one weight each, that of their beginning (epochs); None: every step.
    """

    start: float
    form: Literal["falling", "constant", "rising"] = "falling"
    until: float = 1.0
    levels: int | None = None

    def __post_init__(self) -> None:
        require(self.form in ("falling", "constant", "rising"), self, "form", "'falling', 'constant' or 'rising'")
        require(0 < self.until <= 1, self, "until", "in (0, 1]")
        require(self.levels is None or self.levels >= 1, self, "levels", "at least 1, or None")

    def __call__(self, progress: float) -> float:
        """The weight at `progress` (0 .. 1)."""
        if self.levels is not None:
            progress = math.floor(progress * self.levels + 1e-9) / self.levels  # 0.29 * 100 is 28.999...
        if progress > self.until - 1e-9:
            return 0.0
        along = progress / self.until
        return self.start * {"falling": 1.0 - along, "constant": 1.0, "rising": along}[self.form]


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
    free = others(oracle, protect)
    kept = oracle.grad({protect: 1.0})
    return oracle.grad(dict.fromkeys(free, 1.0)), kept


def others(oracle: Oracle, protect: str) -> list[str]:
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
