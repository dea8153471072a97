"""Several optimizers over the same parameters, one after the other, each with moments and a rate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expunge.core import require
from expunge.optim import Optimizer


@dataclass(frozen=True)
class InTurns:
    """Step k is taken by optimizer k modulo their number, the others neither see its gradient nor age.

    For turns of ``compose.Alternate`` that authors give separate optimizers.

    Args:
        optimizers: settings from ``optim``, at least one.
    """

    optimizers: tuple[Optimizer, ...]

    def __post_init__(self) -> None:
        require(len(self.optimizers) > 0, self, "optimizers", "at least one optimizer")

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""
        return _Several([each.build(parameters) for each in self.optimizers])


class _Several(torch.optim.Optimizer):
    def __init__(self, inner: list[torch.optim.Optimizer]):
        super().__init__([p for group in inner[0].param_groups for p in group["params"]], {})
        self.inner, self.turn = inner, 0
        self._share_groups()

    def _share_groups(self) -> None:
        """A schedule that writes a rate into a group writes it into the inner optimizer's."""
        self.param_groups = [group for each in self.inner for group in each.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the optimizer whose turn it is."""
        self.inner[self.turn % len(self.inner)].step(closure)
        self.turn += 1

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is, and the state of each."""
        return {"turn": self.turn, "inner": [each.state_dict() for each in self.inner]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.turn = state_dict["turn"]
        for each, state in zip(self.inner, state_dict["inner"], strict=True):
            each.load_state_dict(state)
        self._share_groups()
