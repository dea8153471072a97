"""The wrong answer that lies nearest: what the model before forgetting would have said, had it not said the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Key, Refused
from expunge.objectives import Distill


@dataclass(frozen=True)
class RunnerUp:
    """NLL of the likeliest class but the true one, by a teacher: the model as it was before.

    The label of Boundary Shrink (arXiv:2303.11570) whose attack has length zero. A model that never saw a record is wrong
    about it in the direction of the classes it resembles; a random label, ``RandomLabel``, is wrong in all directions.
    It does not promise that a retrained model is wrong about the record at all.

    Args:
        teacher: name of the teacher in the Case.
    """

    teacher: str = "original"

    @property
    def column(self) -> str:
        """Of the data, where what the teacher says of each example was kept (``told.told``)."""
        return Distill(self.teacher).column

    def told(self, case: Case, batch: Batch) -> Tensor:
        """What the teacher says of each example."""
        return Distill(self.teacher).told(case, batch)

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the runner-up for a label; what the teacher says is asked once a step, or was kept (``told.told``)."""
        task: Any = case.task
        if not all(hasattr(task, name) for name in ("logits", "labels", "label", "classes")):
            raise _unfit(task)
        logits = Distill(self.teacher).draw(case, batch, rng)["teacher"]
        if logits.ndim != 2:
            raise _unfit(task)
        true = task.labels(batch)
        runner_up = logits.scatter(1, true[:, None], -torch.inf).argmax(1)
        return {**batch, task.label: runner_up.to(true.dtype)}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch)


def _unfit(task: Any) -> Refused:
    return Refused(
        f"objective RunnerUp needs one label and one row of class logits per example, which task {task.name!r} does not have"
    )
