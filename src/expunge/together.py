"""Several objectives on the same examples in one pass: a model that is asked the same again says what it said before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Key, Objective, Refused, require
from expunge.objectives import NLL, Distill


@dataclass(frozen=True)
class Together:
    """A weighted sum of objectives on the same examples, of which each forward pass of the model is made once.

    Equal to a role for each, up to rounding, and cheaper: objectives that ask the model the same share its answer and one
    backward pass. What one of them draws, those after it see, so no two should redraw the same column. In train mode they
    share one draw of dropout.

    Formula: v_i = sum_k weights_k v_ki, weighed in the batch mean as the first objective weighs it.

    Args:
        parts: the objectives, at least one; they read data, and weigh the examples alike (all of one task's per unit).
        weights: a finite factor of each.

    Raises:
        Refused: where the objectives weigh the examples differently.
    """

    parts: tuple[Objective, ...] = field(default_factory=lambda: (NLL(), Distill()))
    weights: tuple[float, ...] = (1.0, 0.5)

    def __post_init__(self) -> None:
        require(len(self.parts) > 0, self, "parts", "at least one objective")
        require(len(self.weights) == len(self.parts), self, "weights", "as many as there are parts")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with what each objective draws."""
        for number, part in enumerate(self.parts):
            draw = getattr(part, "draw", None)
            batch = batch if draw is None else draw(case, batch, rng.at("part", number))
        return batch

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """The weights that all of them give."""
        first, *others = (_weights(case, part, batch) for part in self.parts)
        if not all(torch.equal(first, other) for other in others):
            raise Refused(
                "Together: its objectives weigh the examples differently, so that no sum per example has their batch means: "
                "give each a role of its own"
            )
        return first

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        model: Any = _Once(case.model)
        asked = replace(case, model=model)
        values = [weight * part(asked, batch) for weight, part in zip(self.weights, self.parts, strict=True)]
        return sum(values[1:], start=values[0])


def _weights(case: Case, part: Objective, batch: Batch) -> Tensor:
    weigh = getattr(part, "weigh", None)
    return torch.ones(len(batch["id"])) if weigh is None else weigh(case, batch).cpu()


class _Once:
    """A model that answers what it was asked before from memory. All else is the model's own."""

    def __init__(self, model: Any):
        self._model, self._said = model, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for asked, said in self._said:
            if _same(asked, (args, kwargs)):
                return said
        said = self._model(*args, **kwargs)
        self._said.append(((args, kwargs), said))
        return said


def _same(one: Any, two: Any) -> bool:
    """Whether two nests of arguments are the same; tensors that are differentiated only where they are one object."""
    if one is two:
        return True
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        alike = one.dtype == two.dtype and one.device == two.device and not (one.requires_grad or two.requires_grad)
        return alike and torch.equal(one, two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(map(_same, one, two))
    return type(one) is type(two) and not isinstance(one, Tensor) and bool(one == two)
