"""GDR-GMA (Lin et al., ACM MM 2024): gradient ascent and descent, rectified against each other and switched between."""

from __future__ import annotations

from math import ceil
from typing import Literal

from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import AdamW
from expunge.rectify import Rectified
from expunge.registry import AtLeastOne, Count, Finite, NonNegative, Positive, method

_ROWS = "steps * (min(batch, n_forget) + min(batch, n_retain))"


@method(
    status="reproduced",
    paper="openreview:52NGERGnlz",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "projection": "both gradients are projected off the other as it was; the released code projects the second along the "
        "first that it has already changed, with the old inner product: the setting projection='released'",
        "bank": "the mean of stored gradients is taken aside; the released code adds them up in the first that it stores",
        "stopping": "stopped when the retain loss leaves its bound; the authors have no guard",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def gdr_gma(
    *,
    gamma: NonNegative = 100.0,
    epsilon: Finite = 0.02,
    projection: Literal["original", "released"] = "original",
    lr: Positive = 1e-3,
    weight_decay: NonNegative = 0.01,
    steps: Count = 40,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Climb the forget loss while the retain loss is low, descend on the retain loss while it is not.

    Both gradients are taken in every step. In every tensor for itself, where they oppose each other each loses its part
    along the other; the last tensor's forget gradient, from the second pass over the forget data on, also its part along
    earlier ones that it opposes. At the published gamma the weight is a switch at the retain loss epsilon: a network that
    cannot reach epsilon on a batch never forgets. The forget loss is unbounded; it does not promise to look like a
    retrained model.

    Formula: theta - lr AdamW((1 - l) g_r' + l g_f'), l = 1 / (1 + exp(gamma (L_r - epsilon))), L_r of the batch, g_f the
    gradient of minus the NLL; g_r' = g_r - (<g_f, g_r> / |g_f|^2) g_f and the like where <g_f, g_r> < 0.

    Args:
        gamma: steepness of the weight, >= 0; 0 weighs both by a half.
        epsilon: retain loss of a batch at which both weigh a half, in nats per label.
        projection: of the second gradient: "original" or "released", see ``rectify.Rectified``.
        lr: learning rate of AdamW, > 0.
        weight_decay: of AdamW, decoupled, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (CIFAR-10, ResNet-18): gamma 100, epsilon 0.02, AdamW, lr 1e-4, batch 256, 10 epochs of the forget
    data, a fifth of the data forgotten.
    """

    def forget(case: Case) -> Case:
        size = len(case.request.data("forget"))
        descend = Descend(
            forget=Ascent(NLL()),
            retain=NLL(),
            combine=Rectified(gamma, epsilon, ceil(size / min(batch, size)), projection),
            optimizer=AdamW(lr, weight_decay=weight_decay),
            steps=steps,
            batch=batch,
            norm_stats=norm_stats,
            guard=Guard(),
        )
        return descend(case)

    return forget
