"""Cross-entropy against smoothed labels, by a rate that may be negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Refused, require


@dataclass(frozen=True)
class SmoothedLabel:
    """Cross-entropy against (1 - rate) e_y + (rate / C) 1 (generalised label smoothing, arXiv:2406.07698).

    (1 - rate) l_y + (rate / C) sum_j l_j, l_j = -log p_j over the C classes. Rate 0 is the NLL, rate 1 the cross-entropy
    against equal odds. A negative rate weighs the true class by more than 1 and every other by less than 0, and has no
    lower bound; under gradient ascent it raises l_y and lowers the l_j of all other classes.

    Args:
        rate: alpha of the paper, at most 1.
    """

    rate: float = -0.5

    def __post_init__(self) -> None:
        require(-float("inf") < self.rate <= 1.0, self, "rate", "a finite number of at most 1")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task  # logits and labels are capabilities, which not every Task has
        logits = task.logits(case.model, batch) if hasattr(task, "logits") else None
        if logits is None or logits.ndim != 2:
            raise Refused(
                f"objective SmoothedLabel needs one row of class logits per example, which task {task.name!r} does not have"
            )
        losses = -torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
        true = losses.gather(1, task.labels(batch)[:, None]).squeeze(1)
        return (1.0 - self.rate) * true + self.rate * losses.mean(1)
