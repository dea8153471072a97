"""Gradient ascent on the forget set (Graves et al. 2021, Thudi et al. 2022; NegGrad): undo by going the other way."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import Ascent
from expunge.optim import by_name
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method


@method(
    paper="arXiv:2109.13398",
    needs={"forget"},
    dose="steps",
    status="reproduced",
    cost={"forward": "steps * min(batch, n_forget)", "backward": "steps * min(batch, n_forget)"},
    departures={
        "optimizer": "Adam without weight decay by default; the published runs are optimizer='sgd' with momentum and "
        "weight decay, whose step on memorised examples (gradient near 0) is next to nothing and then too much",
        "stopping": "gives back the last state whose loss on retain or validation data had risen by at most a "
        "twentieth of the way to chance, where there are any such data; the papers stop after a "
        "fixed number of epochs, which is rise=None",
        "norm_stats": "frozen by default; the published image runs train with live batch statistics",
    },
)
def gradient_ascent(
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 5e-4,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    steps: Count = 36,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.05,
) -> Stage:
    """Maximise the loss on the forget data.

    Unbounded: it never settles, so the number of steps is what stops it, and utility collapses soon after the forget
    data are gone. Nothing holds the retain data; where the request has retain or validation data they are only watched,
    and the last state that was harmless to them comes back. It does not promise that anything else survives.

    Formula: min_theta -mean over D_f of NLL.

    Args:
        optimizer: "adam" or "sgd".
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
        rise: how far the watched loss may have risen in the state that comes back, as a share of the way to chance, in
            [0, 1]; None: nothing watches, and the last state comes back, whatever it is.

    The published setting, CIFAR-10 and ResNet-18: optimizer="sgd", momentum 0.9, weight decay 5e-4, lr 1e-4, batch 256, 5
    epochs, live statistics, rise=None.
    """
    # collapse takes a few steps: look after each
    guard = None if rise is None else Guard(rise, checks=max(1, steps), patience=steps + 1, share=None)
    return Descend(
        forget=Ascent(),
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=guard,
    )
