"""Holding a model where it is without retain data: a penalty on leaving the weights that matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import runtime
from expunge.core import Case, Refused, Stage, require
from expunge.curvature import fisher
from expunge.descend import Descend
from expunge.objectives import EWC, NLL
from expunge.registry import Bound, check_needs
from expunge.weights import read_tensors

ROLE = "anchor"


@dataclass(frozen=True, eq=False)
class Anchored:
    """A descent with elastic weight consolidation beside its own objectives (``EWC``, Kirkpatrick et al. 2017).

    Adds the role "anchor": strength / 2 sum_i F_i (theta_i - theta_0i)^2, theta_0 the weights at the stage's entry, F the
    importance of each. What is important is found once: from data that stand for what is kept, or given by the caller,
    who may have found it while there still were retain data. The descent itself then reads none.

    It does not promise that what is kept is what the importance was found on: it is a quadratic about one point, which
    far steps leave. On small networks it bounds how far ascent runs in a number of steps, and at equal forgetting keeps
    about as much as stopping early does. A combiner that protects one role should be told of this one (``protect="anchor"``).

    Example:
        ``importance = curvature.fisher(case, retain, NLL())``; later, without the data,
        ``Anchored(methods.gradient_ascent(), strength=100.0, importance=importance)``.

    Args:
        inner: a ``Descend``, or a method that is one, such as ``methods.gradient_ascent()``.
        strength: of the penalty, >= 0; 0 is the inner stage alone.
        importance: canonical name -> F of every parameter in scope, non-negative, or a safetensors file of them; None
            finds the diagonal Fisher information per example on `source`.
        source: the request's data that it is found on ("retain", "valid" or one of extra), one pass of gradients; None
            takes every weight for equally important, F = 1, and needs no data at all.
        chunk: examples differentiated together, >= 1.

    Raises:
        Refused: for an inner stage that is no single descent, and importance that does not fit the scope.
    """

    inner: Stage
    strength: float = 1.0
    importance: Mapping[str, Tensor] | str | Path | None = field(default=None, repr=False)
    source: str | None = "retain"
    chunk: int = 64

    def __post_init__(self) -> None:
        require(self.strength >= 0, self, "strength", "0 or above")
        require(self.chunk >= 1, self, "chunk", "at least 1")
        _descent(self.inner)

    def __call__(self, case: Case) -> Case:
        if self.strength == 0:
            return self.inner(case)
        if isinstance(self.inner, Bound):
            check_needs(self.inner, case.request, case.teachers)
        found = self._importance(case)
        anchor = {name: p.detach().clone() for name, p in case.scope.parameters(case.model).items()}
        penalty = EWC({name: self.strength * value for name, value in found.items()}, anchor)
        descend = _descent(self.inner)
        return replace(descend, others={**descend.others, ROLE: penalty})(case)

    def _importance(self, case: Case) -> dict[str, Tensor]:
        parameters = case.scope.parameters(case.model)
        if self.importance is None and self.source is None:
            return {name: torch.ones_like(p) for name, p in parameters.items()}
        if self.importance is None:
            key, _ = case.rng.take()
            return fisher(case, case.request.data(str(self.source)), NLL(), self.chunk, key.at("importance"))
        given = self.importance
        given = given if isinstance(given, Mapping) else read_tensors(Path(given))
        for name, p in parameters.items():
            good = name in given and given[name].shape == p.shape and runtime.finite([given[name]])
            if not good or bool((given[name] < 0).any()):
                raise Refused(
                    f"Anchored: importance of {name!r} is {_shown(given, name)}: expected finite numbers, 0 or above, of shape "
                    f"{tuple(p.shape)}, as curvature.fisher gives them"
                )
        return {name: given[name].to(p) for name, p in parameters.items()}


def _shown(given: Mapping[str, Tensor], name: str) -> str:
    return f"of shape {tuple(given[name].shape)}, least {float(given[name].min()):g}" if name in given else "absent"


def _descent(stage: Any) -> Descend:
    """The gradient loop that a stage is."""
    inner = stage.stage if isinstance(stage, Bound) else stage
    if not isinstance(inner, Descend):
        raise Refused(
            f"Anchored: inner is {stage!r}: expected a Descend, or a method that is one gradient loop, such as "
            f"methods.gradient_ascent()"
        )
    if ROLE in inner.others:
        raise Refused("Anchored: the inner descent is anchored already: give one strength")
    return inner
