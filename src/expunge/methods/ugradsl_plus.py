"""UGradSL+ (Di et al., ICLR 2026): gradient ascent on labels that are smoothed the wrong way, beside retain descent."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.compose import Clip
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.label_smoothing import SmoothedLabel
from expunge.objectives import NLL, Ascent
from expunge.optim import SGD
from expunge.oracle import On
from expunge.registry import AtLeastOne, NonNegative, Positive, Range, Share, method

_ROWS = "ceil(epochs * ceil(n_retain / min(batch, n_retain))) * (min(batch, n_forget) + min(batch, n_retain))"


@method(
    paper="arXiv:2406.07698",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="epochs",
    reason="the code that its authors announce could not be had, nor a number of theirs; held to closed forms",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "rate": "one smoothing rate for the whole run; the paper may choose it for each batch by how near retain examples lie "
        "to it, in a way that could not be read",
        "settings": "chosen here: neither code nor the grids of the rate and the weight could be read",
        "stopping": "gives back the last state whose loss on retain data had risen by at most a twentieth of the way to "
        "chance; the paper runs a fixed number of epochs",
        "clip": "the norm of the update is bounded, since the loss is not",
        "norm_stats": "frozen by default; published image runs train with live batch statistics",
    },
)
def ugradsl_plus(
    *,
    rate: Annotated[float, Range(open_low=True, high=0)] = -0.5,
    retain_weight: Share = 0.9,
    max_norm: Positive = 1.0,
    lr: Positive = 0.01,
    momentum: NonNegative = 0.9,
    epochs: Annotated[float, Range(0)] = 5.0,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Climb the loss of negatively smoothed labels on the forget data, descend on the retain data; epochs are of the retain data.

    With a negative rate the ascent raises the loss of the true class and lowers that of every other, so that probability
    goes somewhere instead of only away; at rate 0 it is GradDiff. Unbounded below: few epochs, and the guard, are what
    stops it. It does not promise to look like a retrained model.

    Formula: min_theta retain_weight mean over D_r of NLL - (1 - retain_weight) mean over D_f of
    [(1 - rate) l_y + (rate / C) sum_j l_j], l_j = -log p_j.

    Args:
        rate: alpha of the paper, <= 0.
        retain_weight: w, in [0, 1].
        max_norm: bound of the norm of a step's gradient, > 0.
        lr: learning rate of SGD, > 0.
        momentum: of SGD, >= 0.
        epochs: passes over the retain data, each batch beside one of forget data, >= 0; 0 changes nothing.
        batch: examples of each kind per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
    """
    return Descend(
        retain=NLL(),
        others={"forget": On("forget", Ascent(SmoothedLabel(rate)))},  # after retain, whose epochs are counted
        combine=Clip(Weighted({"forget": 1.0 - retain_weight, "retain": retain_weight}), max_norm),
        optimizer=SGD(lr, momentum),
        epochs=float(epochs),
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(rise=0.05, checks=50, patience=51, share=None),  # collapse takes a few steps
    )
