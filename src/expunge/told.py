"""What a teacher says of each example, asked once before a descent that would ask it again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Case, Data, Key, Stage
from expunge.descend import Descend
from expunge.oracle import prepared


class Asks(Protocol):
    """An objective that asks a teacher, and reads the answer from a column of that name where there is one."""

    @property
    def column(self) -> str: ...

    def told(self, case: Case, batch: Batch) -> Tensor: ...


def told(case: Case, asked: Mapping[str, tuple[Asks, int]], size: int = 256) -> Case:
    """The Case with the teacher's answers as columns of its request's data, where that is the cheaper way.

    That is where more rows would be read than there are. Nothing is kept where an answer is large or differs from time to
    time: for a task without ``kept_outputs``, for data that are not in memory (they may be augmented), with several processes.
    Answers are those of the descent's own asking up to rounding, which depends on the rows that are asked together.

    Args:
        asked: source -> (objective, rows of it that the descent will read).
        size: rows asked together.
    """
    if runtime.world() > 1 or not getattr(case.task, "kept_outputs", 0):
        return case
    request: Any = case.request
    for source, (objective, rows) in asked.items():
        data = case.request.data(source)
        if rows >= len(data) and getattr(data.source, "in_memory", False):
            answers = _answers(case, data, objective, min(size, len(data)))
            request = replace(request, **{source: data.annotate(objective.column, answers)})
    return replace(case, request=request)


def forget_told(descend: Descend) -> Stage:
    """The descent; where its forget objective asks a teacher, of a request that `told` was given first.

    Args:
        descend: of a fixed number of steps, each of which reads one forget batch.
    """
    return _ForgetTold(descend) if hasattr(descend.forget, "told") else descend


@dataclass(frozen=True)
class _ForgetTold:
    descend: Descend

    def __call__(self, case: Case) -> Case:
        objective: Any = self.descend.forget
        rows = (self.descend.steps or 0) * min(self.descend.size("forget"), len(case.request.data("forget")))
        return replace(self.descend(told(case, {"forget": (objective, rows)})), request=case.request)


def _answers(case: Case, data: Data, objective: Asks, size: int) -> Tensor:
    modules = [t for t in case.teachers.values() if isinstance(t, nn.Module)]
    with torch.no_grad(), case.meter.watch(case.model, *modules):
        return torch.cat([objective.told(case, batch).cpu() for batch in prepared(case, data, size, Key(0))])
