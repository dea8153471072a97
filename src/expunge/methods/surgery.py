"""Explicit one-sided gradient surgery: forget as far as the retain loss does not rise, to first order."""

from __future__ import annotations

from typing import Literal

from expunge.combine import OneSidedProjection
from expunge.compose import Clip
from expunge.core import Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import by_name, schedule_by_name
from expunge.registry import AtLeastOne, Count, Finite, NonNegative, Positive, method
from expunge.told import forget_told

_ROWS = "steps * (min(batch, n_forget) + min(batch, n_retain))"


@method(
    paper="arXiv:2510.22124",
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={"forward": f"{_ROWS} + steps * relabel * min(batch, n_forget)", "backward": _ROWS},
    departures={
        "batches": "forget and retain batches of their own; the authors cut one mixed batch, which weighs the two "
        "losses by their shares",
        "denominator": "a bound on the multiplier in place of 1e-8 added to |g_r|^2",
        "labels": "random labels never include the true one; the authors draw over all classes",
        "tolerance": "-1 by default: a fall of the retain loss is demanded; 0 in the authors' code",
        "guard": "stops where the retain loss leaves its bound: the constraint holds to first order only",
    },
)
def surgery(
    *,
    forget: Objective = RandomLabel(),
    tolerance: Finite = -1.0,
    max_multiplier: Positive = 100.0,
    max_norm: Positive = 1.0,
    optimizer: Literal["sgd", "adam"] = "sgd",
    schedule: Literal["constant", "cosine"] = "constant",
    lr: Positive = 0.05,
    momentum: NonNegative = 0.0,
    weight_decay: NonNegative = 0.0,
    steps: Count = 40,
    batch: AtLeastOne = 64,
) -> Stage:
    """Descend along the direction nearest to the forget gradient that does not raise the retain loss.

    ``d = g_f + max(0, (-g_r . g_f - tolerance) / |g_r|^2) g_r``, then clipped to `max_norm`, then a step (EUPMU eq. 2,
    Proposition 3.2). Without conflict d = g_f: the retain gradient is NOT added, so nothing repairs retain performance
    that second-order effects cost; that is what the guard and a negative tolerance are for.

    It promises no rise of the retain loss only for this batch, this step, to first order, without momentum.

    Args:
        forget: objective on the forget data, minimised.
        tolerance: rate at which the retain loss may rise, per unit step; negative demands a fall.
        max_multiplier: bound on the multiplier of g_r, > 0: near a trained optimum g_r is noise.
        max_norm: of the combined update, > 0.
        optimizer: "sgd", or "adam", whose step is not along d: the promise is then a tendency.
        schedule: the learning rate is "constant", or falls along half a "cosine" to 0.
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; above 0 the promise is a tendency; "adam" does not read it.
        weight_decay: >= 0; outside the promise.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples of each kind per step, >= 1.
    """
    combine = Clip(OneSidedProjection(tolerance, max_multiplier=max_multiplier), max_norm)
    descend = Descend(
        forget=forget,
        retain=NLL(),
        combine=combine,
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        schedule=schedule_by_name(schedule),
        steps=steps,
        batch=batch,
        guard=Guard(),
        watch=10,
    )
    return forget_told(descend)
