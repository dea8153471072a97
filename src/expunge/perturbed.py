"""Objectives on made-up inputs: a teacher can be asked anywhere, without retain data and without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Key, Objective, Refused, map_tensors, require
from expunge.objectives import Distill


@dataclass(frozen=True)
class OnPerturbed:
    """Another objective on made-up inputs: keep x + spread N(0, 1), drawn anew at every step.

    ``On("forget", OnPerturbed(Distill()))`` stays near a teacher around the forget data, and with keep = 0 on pure noise: a
    retain objective that needs no retain data and no labels. What the teacher knows of the forget data holds around them
    too, so a small spread holds back forgetting. It does not promise that noise tells of what real inputs would.

    Args:
        of: the objective. Labels stay those of the example, for one that reads them.
        spread: standard deviation of the noise, in units of the input, >= 0.
        keep: factor on the example, in [0, 1].

    Raises:
        Refused: where the task's inputs are not floating, or have noise of their own.
    """

    of: Objective = field(default_factory=Distill)
    spread: float = 1.0
    keep: float = 1.0

    def __post_init__(self) -> None:
        require(self.spread >= 0, self, "spread", "0 or above")
        require(0 <= self.keep <= 1, self, "keep", "in [0, 1]")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with other inputs, and what the inner objective draws on these."""
        task: Any = case.task
        leaves: list[Tensor] = []

        def moved(leaf: Tensor) -> Tensor:
            leaves.append(leaf)
            if not leaf.is_floating_point():
                raise Refused(
                    f"objective OnPerturbed adds noise to inputs: those of task {task.name!r} hold {leaf.dtype}"
                )
            generator = rng.at("noise", len(leaves)).generator()
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            return self.keep * leaf + self.spread * noise.to(leaf)

        if task.stochastic or not hasattr(task, "inputs"):
            raise Refused(
                f"objective OnPerturbed needs floating inputs to add noise to, which task {task.name!r} has none of"
            )
        other = {**batch, task.inputs: map_tensors(moved, batch[task.inputs])}
        inner = getattr(self.of, "draw", None)
        return other if inner is None else inner(case, other, rng)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return self.of(case, batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """The inner objective's weights."""
        inner = getattr(self.of, "weigh", None)
        return torch.ones(len(batch["id"])) if inner is None else inner(case, batch)
