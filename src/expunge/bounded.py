"""A combiner for ascent that ends: roles whose loss is raised to a bound and then left alone (GS-LoRA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expunge.combine import State
from expunge.core import Grads, Refused
from expunge.oracle import Oracle, Weight

Weighing = float | Callable[[float], float]


@dataclass(frozen=True)
class After:
    """A weight that is 0 for the first share of the run and `value` from there on (a warm-up of sparsity)."""

    share: float
    value: float

    def __call__(self, progress: float) -> float:
        """The weight at `progress` (0 .. 1)."""
        return self.value if progress >= self.share else 0.0


@dataclass(frozen=True)
class Bounded:
    """sum_k w_k L_k over the roles without a bound + sum_k w_k max(0, b_k - L_k) over those with one (arXiv:2403.11530).

    L_k is the mean over the whole batch of the role, whatever the pieces. A bounded role is raised, and has no gradient
    once its loss is at its bound, where the derivative is taken as 0. It does not promise that the loss stays there.
    The price is one forward and one backward pass per role, at the bound too.

    Args:
        weights: role -> number, or a function of the run's progress; roles not named weigh 1.
        bounds: role -> bound of its loss, in the loss's own unit.

    Raises:
        Refused: for a role that the run does not have.
    """

    weights: Mapping[str, Weighing] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        for role in (*self.weights, *self.bounds):
            if role not in oracle.draws.roles:
                raise Refused(f"Bounded names role {role!r}: expected one of {', '.join(oracle.draws.roles)}")
        asked: dict[str, Weight] = {}
        for role in oracle.roles:
            weight = self.weights.get(role, 1.0)
            number = weight(oracle.progress) if callable(weight) else weight
            asked[role] = _raised(number, self.bounds[role]) if role in self.bounds and number else number
        return oracle.grad(asked), state


def _raised(weight: float, bound: float) -> Callable[[float], float]:
    return lambda loss: -weight if loss < bound else 0.0
