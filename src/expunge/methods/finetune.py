"""Fine-tuning on the retain set (Warnecke et al. 2021, Golatkar et al. 2020): forget by not being reminded."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method


@method(
    paper="arXiv:1911.04933",
    needs={"retain"},
    dose="steps",
    status="reproduced",
    cost={"forward": "steps * min(batch, n_retain)", "backward": "steps * min(batch, n_retain)"},
    departures={
        "norm_stats": "frozen by default; the published image runs train with live batch statistics",
        "guard": "stopped when the retain loss leaves its bound; authors have no guard, which is rise=None",
    },
)
def finetune(
    *,
    lr: Positive = 0.01,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 5e-4,
    steps: Count = 100,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.25,
) -> Stage:
    """Minimise the loss on the retain data, from the trained weights.

    Catastrophic forgetting does the work; it does not promise that anything is forgotten, and on memorised examples
    little is. Formula: min_theta mean over D_r of NLL.

    Args:
        lr: learning rate of SGD, > 0.
        momentum: of SGD, >= 0.
        weight_decay: of SGD, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1]; None: no guard looks.

    A published setting, CIFAR-10 and ResNet-18 (arXiv:2304.04934): lr 0.01, momentum 0.9, weight decay 5e-4, batch 256, 10
    epochs, live statistics.
    """
    return Descend(
        retain=NLL(),
        optimizer=SGD(lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=None if rise is None else Guard(rise),
    )
