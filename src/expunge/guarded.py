"""An edit without descent, taken only as far as the retain loss allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from expunge import runtime
from expunge.core import Case, Data, Grads, Key, eval_mode
from expunge.objectives import NLL
from expunge.oracle import mean_loss
from expunge.scope import edit

STEPS, FACTOR = 20, 0.7


def guarded_edit(
    case: Case, at: Callable[[float], Grads], dose: float, key: Key, *, name: str, rise: float, probe: int = 256
) -> float:
    """Edit the model to ``at(dose)``, or to the first of ``at(0.7 dose)``, ``at(0.49 dose)``, ... that keeps its bound.

    The bound is on the task's NLL per unit over a fixed probe of retain examples (validation, where there are none):
    the loss before, plus `rise` of the way from there to the loss of a predictor that knows nothing. A reduced dose is
    noted. Without data to watch, the whole dose is taken, which is noted. The losses are metered as checks, not work.

    Args:
        case: its model is changed, in scope.
        at: dose -> canonical name -> new value; ``at(0)`` is the identity.
        dose: the whole dose. name: what the dose is called, for the note.
        key: of the choice of the probe.
        rise: share of the way to chance, in [0, 1].
        probe: examples looked at.

    Returns:
        The dose taken; 0 where no tried dose kept the bound, and then the model is as before.
    """
    data = _probe(case, probe, key)
    if data is None or dose == 0:
        if dose:
            case.meter.note("no retain or validation data was given: nothing could watch the loss of utility")
        edit(case, at(dose))
        return dose
    before = {n: p.detach().clone() for n, p in case.scope.parameters(case.model).items()}
    start = _loss(case, data, key)
    chance = case.task.chance(next(iter(data.batches(len(data)))))
    bound = start + rise * max(chance - start, 0.05 * abs(chance))
    taken = _first(case, at, dose, lambda: _loss(case, data, key) <= bound)
    if taken == 0:
        edit(case, before)
    if taken != dose:
        case.meter.note(
            f"{name} was lowered from {dose:g} to {taken:g}: at {dose:g} the retain loss would have risen "
            f"from {start:.4g} to above its bound {bound:.4g}"
        )
    return taken


def _first(case: Case, at: Callable[[float], Grads], dose: float, good: Callable[[], bool]) -> float:
    for number in range(STEPS + 1):
        tried = dose * FACTOR**number
        values = at(tried)
        if runtime.finite(values):
            edit(case, values)
            if good():
                return tried
    return 0.0


def _probe(case: Case, size: int, key: Key) -> Data | None:
    data = case.request.retain or case.request.valid
    if data is None:
        return None
    order = torch.randperm(len(data), generator=key.at("probe").generator())
    return data.select(order[:size].sort().values)


def _loss(case: Case, data: Data, key: Key) -> float:
    with case.meter.checking(), eval_mode(case.model):
        loss = mean_loss(case, data, NLL(), min(256, len(data)), key)
    return loss if math.isfinite(loss) else math.inf
