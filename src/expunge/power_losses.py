"""The generalised cross-entropy family: losses that are a power of the probability of the true answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Refused, require
from expunge.tasks.causal_lm import IGNORED


@dataclass(frozen=True)
class GeneralisedCrossEntropy:
    """(1 - p^power) / power, p the probability of the true label; of each answer token, mean over tokens.

    Its gradient is p^power times that of the NLL: a positive power spares what the model thinks is unlikely (a wrong
    label, noise), a negative one presses on it. Members of the family: power 1 is 1 - p, half the absolute error of the
    probabilities; 0 is the NLL, the limit; -1 is 1/p - 1, the sum of exp(z_j - z_y) over the other classes. The comp-sum
    losses of arXiv:2304.07288 (tau = 1 + power) with tau from 0 to 2 are these. Powers above 0 are bounded by 1 / power,
    and so is ascent on them, which lets go of what is forgotten: ``Ascent(GeneralisedCrossEntropy(q))`` has the gradient of
    ``WGA(q)``, and unlike it is that gradient's integral.

    Truncated (arXiv:1805.07836, eq. 8): a probability below `least` counts as `least`, and has no gradient. The paper
    prunes by the loss at a number of epochs and trains on what is left; here the loss itself says so at every step.

    It does not promise robustness: a label that the model gives no chance is not learnt, be it right.

    Args:
        power: q of the paper, in [-1, 1]; published 0.7.
        least: k of the paper, in [0, 1); 0 truncates nothing; published 0.5.
    """

    power: float = 0.7
    least: float = 0.0

    def __post_init__(self) -> None:
        require(-1.0 <= self.power <= 1.0, self, "power", "in [-1, 1]")
        require(0.0 <= self.least < 1.0, self, "least", "in [0, 1)")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        losses, judged = _losses(case, batch)
        if self.least > 0:
            losses = losses.clamp(max=-math.log(self.least))
        values = losses if self.power == 0 else -torch.expm1(-self.power * losses) / self.power
        return torch.where(judged, values, torch.zeros_like(values)).sum(1) / judged.sum(1).clamp_min(1)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)


def _losses(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    """[b, U] -log p in float32 at least, and [b, U] True where a token is judged; a classifier has one column."""
    task: Any = case.task  # labels and logits are capabilities, which not every Task has
    if not (hasattr(task, "labels") and hasattr(task, "logits")):
        raise Refused(
            f"objective GeneralisedCrossEntropy needs the probability of a label, which task {task.name!r} does not have"
        )
    if hasattr(task, "token_nll"):
        losses, judged = task.token_nll(case.model, batch), task.labels(batch) != IGNORED
    else:
        losses = task.nll(case.model, batch)[:, None]
        judged = torch.ones_like(losses, dtype=torch.bool)
    return losses if losses.dtype == torch.float64 else losses.float(), judged
