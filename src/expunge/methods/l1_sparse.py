"""l1-sparse unlearning (Jia et al., NeurIPS 2023): fine-tune on the retain data under a fading l1 penalty."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Decay, Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import L1, NLL
from expunge.optim import by_name
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method


@method(
    paper="arXiv:2304.04934",
    needs={"retain"},
    dose="steps",
    status="reproduced",
    cost={"forward": "steps * min(batch, n_retain)", "backward": "steps * min(batch, n_retain)"},
    departures={
        "decay": "the l1 weight falls at every step by default; authors' code lowers it once per epoch, which is levels=",
        "optimizer": "Adam without weight decay by default, which shrinks a weight that the retain loss does not hold at a "
        "rate of its own size; the paper uses SGD with momentum and weight decay, which is optimizer='sgd'",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
        "guard": "stopped when the retain loss leaves its bound; the authors have no guard, which is rise=None",
    },
)
def l1_sparse(
    *,
    alpha: NonNegative = 3e-3,
    schedule: Literal["falling", "constant", "rising"] = "falling",
    without: Annotated[float, Range(0, 1, open_high=True)] = 0.0,
    levels: Annotated[int | None, Range(1)] = None,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 3e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    steps: Count = 75,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.25,
) -> Stage:
    """Minimise the loss on the retain data plus an l1 norm of all weights whose weight falls linearly to 0.

    Small weights, among them those that only the forget data needed, shrink away, and no weight is cut to exact zero.
    It does not promise that anything is forgotten, as no forget example is looked at.

    Formula: min_theta mean over D_r of NLL + alpha (1 - t / T) ||theta||_1 at step t = 0 .. T - 1, over every parameter in
    scope (normalisation scales and biases too, as the authors do), T = (1 - without) steps; then the NLL alone.

    Args:
        alpha: first weight of the l1 norm, >= 0; 0 is plain fine-tuning.
        schedule: of the l1 weight until T: "falling" to 0, "constant", or "rising" from 0 towards alpha.
        without: share of the steps, the last ones, that are without l1 norm, in [0, 1).
        levels: how many parts of the steps have one l1 weight each (epochs); None: each step its own.
        optimizer: "adam" or "sgd".
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1]; None: no guard looks.

    The published setting, CIFAR-10 and ResNet-18, 10 epochs of 176 batches: optimizer="sgd", lr 0.01, momentum 0.9, weight
    decay 5e-4, batch 256, steps 1760, levels 10, alpha 1e-4, live statistics.
    """
    weights = {"sparsity": Decay(alpha, schedule, 1.0 - without, levels)}
    return Descend(
        retain=NLL(),
        others={"sparsity": L1()},
        combine=Weighted(weights),
        steps=steps,
        batch=batch,
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        norm_stats=norm_stats,
        guard=None if rise is None else Guard(rise),
    )
