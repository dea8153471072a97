"""EUPMU: utility-preserving unlearning with implicit gradient surgery (Zhou et al., NeurIPS 2025)."""

from __future__ import annotations

from typing import Literal

from expunge.compose import Clip
from expunge.core import Combiner, Objective, Stage
from expunge.descend import Descend, Guard
from expunge.implicit import FastImplicitSurgery, ImplicitSurgery
from expunge.objectives import NLL, RandomLabel
from expunge.optim import by_name, schedule_by_name
from expunge.registry import AtLeastOne, Count, Finite, NonNegative, Positive, method
from expunge.told import forget_told

_FORGET, _RETAIN = "min(batch, n_forget)", "min(batch, n_retain)"


@method(
    paper="arXiv:2510.22124",
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={
        "forward": f"steps * ((1 + relabel) * {_FORGET} + (1 if variant == 'fast' else 2) * {_RETAIN})",
        "backward": f"steps * ({_FORGET} + {_RETAIN})",
    },
    departures={
        "variant": "fast by default: the cheapest, and the one that kept retain accuracy best where it was tried; "
        "the others skip the retain gradient while w is 0, so their cost is an upper bound",
        "batches": "forget and retain batches of their own; the authors cut one mixed batch, which weighs the two "
        "losses by their shares and can leave one of them empty",
        "clip": "after the backward pass; the authors' code clips before it, which with cleared gradients is void",
        "multiplier": "kept at 0 or above where it is stored; the authors clamp its use, so it must climb back",
        "sign": "a positive tolerance allows the retain loss to rise in every variant; the code's e is -tolerance",
        "labels": "random labels never include the true one; the authors draw over all classes",
        "guard": "stops where the retain loss leaves its bound; the authors have no guard",
    },
)
def eupmu(
    *,
    variant: Literal["implicit", "fast", "paper"] = "fast",
    forget: Objective = RandomLabel(),
    tolerance: Finite = -0.01,
    dual_lr: Positive = 1.0,
    dual_decay: NonNegative = 0.01,
    start: NonNegative = 1.0,
    floor: Finite = 0.0,
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
    """Descend on forget loss + w * retain loss, where w rises while the retain loss rises by more than the tolerance.

    w is the multiplier of "the retain loss rises by at most the tolerance", found by dual ascent from what each step
    did to the retain loss rather than from a second gradient. "implicit": log F + w log R, w by Adam on
    log R - log R' + tolerance, R' on the same batch after the step. "fast": (F + w R) / (1 + w), with R of the next
    batch for R'. "paper": F + w R, w <- max(0, w - dual_lr ((R - R') / lr + tolerance)), eq. 8.

    No variant promises anything for a single step: the bound is met on average, once w has settled.

    Args:
        variant: "implicit", "fast" or "paper", see above.
        forget: objective on the forget data, minimised; above `floor` in the variant "implicit", which takes a logarithm.
        tolerance: how much the retain loss may rise: its share per step ("implicit", "fast"), or its rate per unit step
            ("paper"); negative demands a fall.
        dual_lr: step size of w, > 0.
        dual_decay: weight decay of w, >= 0 ("implicit" and "fast").
        start: first value of w, >= 0.
        floor: lower bound of the forget loss, subtracted from it before the logarithm ("implicit"): 0 for NPO, refusals and
            other losses that cannot be negative, -1 / (e beta) for WGA; gradient ascent has none.
        max_multiplier: bound on w, > 0 ("implicit" and "fast"; in "paper" on its use).
        max_norm: of the combined gradient, > 0.
        optimizer: "sgd", or "adam", whose steps are not in proportion to the rate that the variant "paper" divides by.
        schedule: the learning rate is "constant", or falls along half a "cosine" to 0.
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples of each kind per step, >= 1.
    """
    if variant == "fast":
        inner: Combiner = FastImplicitSurgery(tolerance, dual_lr, dual_decay, start, max_multiplier=max_multiplier)
    else:
        inner = ImplicitSurgery(
            "log" if variant == "implicit" else "paper",
            tolerance,
            dual_lr,
            dual_decay,
            start,
            floor,
            max_multiplier=max_multiplier,
        )
    descend = Descend(
        forget=forget,
        retain=NLL(),
        combine=Clip(inner, max_norm),
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        schedule=schedule_by_name(schedule),
        steps=steps,
        batch=batch,
        guard=Guard(),
    )
    return forget_told(descend)
