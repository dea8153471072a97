"""Random labelling (Golatkar et al. 2020; Amnesiac, Graves et al. 2021): teach a wrong answer for the forget data."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method


@method(
    paper="arXiv:2010.10981",
    needs={"forget", "retain"},
    dose="steps",
    cost={
        "forward": "steps * ((1 + relabel) * min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))",
        "backward": "steps * (min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))",
    },
    departures={
        "labels": "never the true one, as in Amnesiac; the code of SalUn and EUPMU draws over all classes, the "
        "truth too",
        "batches": "one forget and one retain batch of their own in every step; authors' code makes a pass over "
        "the forget set and then one over the retain set (CIFAR-10), or shuffles their union "
        "(CIFAR-100)",
        "weights": "the retain weight is 2 by default, not 1",
        "norm_stats": "frozen by default; the published image runs train with live batch statistics",
    },
)
def random_label(
    *,
    retain_weight: NonNegative = 2.0,
    lr: Positive = 1e-3,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Minimise the loss of a random wrong answer on the forget data and of the true answer on the retain data.

    The wrong answers are drawn anew at every step, so the model is driven towards equal odds over the others. It does
    not promise to look like a retrained model: forgotten examples become less certain than unseen ones, which an
    attacker can see.

    Formula: min_theta mean over D_f of NLL(x, y'), y' != y uniform, + retain_weight mean over D_r of NLL.

    Args:
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published settings: Adam, lr 1e-4, 3 epochs (Amnesiac); SGD, momentum 0.9, weight decay 5e-4, batch 256, 10 epochs,
    lr about 0.01 (CIFAR-10, ResNet-18).
    """
    return Descend(
        forget=RandomLabel(),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
