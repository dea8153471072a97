"""Gradient difference (Liu et al. 2022; NegGrad+, Kurmanji et al. 2023): up on forget data, down on retain data."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import by_name
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method


@method(
    paper="arXiv:2203.12817",
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={
        side: "steps * ((forget_weight > 0) * min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))"
        for side in ("forward", "backward")
    },
    departures={
        "batches": "one forget and one retain batch of their own per step, each with its own mean; authors' "
        "loops run over the retain set and cycle the forget set, which sees each forget example "
        "n_retain / n_forget times",
        "weights": "the forget weight is 0.05 by default, not 1: with equal weights a memorised forget set takes "
        "the retain set down with it",
        "optimizer": "Adam without weight decay by default; the published image runs are optimizer='sgd' with momentum and "
        "weight decay",
        "stopping": "gives back the last state whose loss on retain data had risen by at most a twentieth of the "
        "way to chance; authors stop after a fixed number of epochs, which is rise=None",
        "norm_stats": "frozen by default; the published image runs train with live batch statistics",
    },
)
def grad_diff(
    *,
    forget_weight: NonNegative = 0.05,
    retain_weight: NonNegative = 1.0,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 1e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    steps: Count = 30,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.05,
) -> Stage:
    """Maximise the loss on the forget data while minimising it on the retain data.

    Still unbounded: once the forget examples are gone their gradient stays near its largest while that of the retain
    data vanishes, so the forget term wins in the end; the last state that was harmless to the retain data comes back.
    It does not promise that this state forgot anything.

    Formula: min_theta retain_weight mean over D_r of NLL - forget_weight mean over D_f of NLL. GradDiff has weights
    1 and 1; NegGrad+ with its alpha has retain_weight = alpha, forget_weight = 1 - alpha.

    Args:
        forget_weight, retain_weight: of the two losses, >= 0.
        optimizer: "adam" or "sgd".
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
        rise: how far the retain loss may have risen in the state that comes back, as a share of the way to chance, in
            [0, 1]; None: nothing watches, and the last state comes back, whatever it is.

    Published settings: language models, weights 1 and 1, AdamW, lr 1e-5, 32 examples per step, 10 epochs (TOFU);
    images, weights 1 and 1, SGD, lr 1e-3, 2 epochs (MUFAC); NegGrad+ (released, VGG-16), retain_weight 0.9999, forget_weight
    1e-4, optimizer="sgd", lr 1e-4, momentum 0, weight decay 5e-4, 5 epochs, live statistics, rise=None.
    """
    # an unbounded descent is seldom best at its end
    guard = None if rise is None else Guard(rise, checks=15, patience=15, share=None)
    return Descend(
        forget=Ascent(),
        retain=NLL(),
        combine=Weighted({"forget": forget_weight, "retain": retain_weight}),
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=guard,
    )
