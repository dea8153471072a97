"""What the model said before unlearning, kept as a column of the data, so that no second model is needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from expunge.core import Case, Refused, eval_mode
from expunge.oracle import prepared


@dataclass(frozen=True)
class CacheReference:
    """Add the column ``reference`` to the forget data: the summed NLL of each example, by the model as it stands.

    Put it first in a chain: ``chain(CacheReference(), npo())`` then needs no teacher and no second model, and spends
    one forward pass over the forget data instead of one per step. It travels with the examples through shuffles,
    selections and shards. It changes no weight.

    It does not promise the very bits of a teacher asked anew in a batch of another shape: they differ by rounding.

    Args:
        batch: examples per pass; for memory only.

    Raises:
        Refused: for a task whose batches are drawn with noise, since a loss would belong to one draw.
    """

    batch: int = 256
    provides: tuple[str, ...] = field(default=("column:reference",), init=False, repr=False)

    def __call__(self, case: Case) -> Case:
        if case.task.stochastic:
            raise Refused(
                f"CacheReference cannot be used with task {case.task.name!r}: its batches are drawn with "
                f"noise, so a reference belongs to one draw; use the original model as a teacher instead"
            )
        key, rng = case.rng.take()
        data = case.request.data("forget")
        with torch.no_grad(), eval_mode(case.model), case.meter.watch(case.model):
            losses = [case.task.nll(case.model, batch).cpu() for batch in prepared(case, data, self.batch, key)]
        request = replace(case.request, forget=data.annotate("reference", torch.cat(losses)))
        return replace(case, request=request, rng=rng)
