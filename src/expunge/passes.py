"""Forget and retain data in passes, one after the other, as code does that reads one loader to its end and then the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from expunge.compose import Alternate, Turn
from expunge.core import Case
from expunge.descend import Descend

_FORGET, _RETAIN = "ceil(n_forget / min(batch, n_forget))", "ceil(n_retain / min(batch, n_retain))"
FORGET_STEPS = f"(steps // ({_FORGET} + {_RETAIN}) * {_FORGET} + min(steps % ({_FORGET} + {_RETAIN}), {_FORGET}))"
"""Of `steps` steps in passes, those on the forget data; for a method's declared cost."""


@dataclass(frozen=True)
class InPasses:
    """A descent on forget and retain data whose roles take turns: all batches of the forget data, then all of the retain data.

    One optimizer lives through all turns, and the steps are counted over all of them; a last round may be cut short. A
    guard looks at the end of each round, for within a round the retain loss is meant to rise first, and at the end. The
    rows that a pass has too many for whole batches are the first of the next pass, so that every batch is as large.

    Args:
        plan: the descent, with ``steps``.
    """

    plan: Descend

    def __call__(self, case: Case) -> Case:
        plan, steps = self.plan, self.plan.steps or 0
        passes = {role: _length(case, role, plan.size(role)) for role in ("forget", "retain")}
        turns = Alternate(tuple(Turn((role,), count, combine=plan.combine) for role, count in passes.items()))
        around = sum(passes.values())
        guard = plan.guard and replace(plan.guard, checks=tuple(range(around, steps + 1, around)))
        return replace(plan, combine=turns, guard=guard)(case)


def _length(case: Case, source: str, batch: int) -> int:
    """Steps in a pass over the data of that name."""
    size = len(case.request.data(source))
    return ceil(size / min(batch, size))
