"""Random labelling (Golatkar et al. 2020; Amnesiac, Graves et al. 2021): teach a wrong answer for the forget data."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, AnyLabel, RandomLabel
from expunge.optim import by_name
from expunge.passes import FORGET_STEPS, InPasses
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method

FORGET = f"(steps if turns == 'together' else {FORGET_STEPS}) * min(batch, n_forget)"
RETAIN = f"(retain_weight > 0) * (steps if turns == 'together' else steps - {FORGET_STEPS}) * min(batch, n_retain)"


@method(
    paper="arXiv:2010.10981",
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={"forward": f"(1 + relabel) * {FORGET} + {RETAIN}", "backward": f"{FORGET} + {RETAIN}"},
    departures={
        "labels": "never the true one by default, as in Amnesiac; the code of SalUn and EUPMU draws over all classes, "
        "which is labels='any'",
        "batches": "one forget and one retain batch of their own in every step by default; authors' code makes a pass "
        "over the forget set and then one over the retain set (CIFAR-10), which is turns='passes', or shuffles their "
        "union (CIFAR-100)",
        "weights": "the retain weight is 2 by default, not 1",
        "optimizer": "Adam without weight decay by default; the published image runs are optimizer='sgd' with both",
        "guard": "stopped when the retain loss leaves its bound; the authors have no guard, which is rise=None",
        "norm_stats": "frozen by default; the published image runs train with live batch statistics",
    },
)
def random_label(
    *,
    retain_weight: NonNegative = 2.0,
    labels: Literal["wrong", "any"] = "wrong",
    turns: Literal["together", "passes"] = "together",
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 1e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.25,
) -> Stage:
    """Minimise the loss of a random wrong answer on the forget data and of the true answer on the retain data.

    The wrong answers are drawn anew at every step, so the model is driven towards equal odds over the others. It does
    not promise to look like a retrained model: forgotten examples become less certain than unseen ones, which an
    attacker can see.

    Formula: min_theta mean over D_f of NLL(x, y'), y' != y uniform, + retain_weight mean over D_r of NLL.

    Args:
        retain_weight: of the retain loss, >= 0.
        labels: "wrong": never the true answer; "any": a class drawn over all of them, in classification only.
        turns: "together": a forget and a retain batch in every step; "passes": steps through all of the forget data, then
            through all of the retain data, round and round.
        optimizer: "adam" or "sgd".
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        steps: optimizer steps, over all turns, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1]; None: no guard looks.

    Raises:
        Refused: for ``labels="any"`` on a task without classes.

    Published settings: Adam, lr 1e-4, 3 epochs (Amnesiac); SGD, momentum 0.9, weight decay 5e-4, batch 256, 10 epochs
    in passes, retain weight 1, any label, lr about 0.01, live statistics (CIFAR-10, ResNet-18).
    """
    descend = Descend(
        forget=RandomLabel() if labels == "wrong" else AnyLabel(),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=None if rise is None else Guard(rise),
    )
    return descend if turns == "together" else InPasses(descend)
