"""FAMO as an unlearner (Liu et al., NeurIPS 2023; a baseline of EUPMU): forget and retain losses fall at one rate."""

from __future__ import annotations

from expunge.balance import FAMO
from expunge.compose import Clip
from expunge.core import Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

_FORGET, _RETAIN = "min(batch, n_forget)", "min(batch, n_retain)"


@method(
    paper="arXiv:2306.03792",
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={
        "forward": f"steps * ((2 + relabel) * {_FORGET} + 2 * {_RETAIN})",
        "backward": f"steps * ({_FORGET} + {_RETAIN})",
    },
    departures={
        "use": "the paper is on tasks to be learnt together; as an unlearner it is a baseline of EUPMU (arXiv:2510.22124)",
        "decay": "0.01 by default, as in FAMO's own code; 1e-5 in that of EUPMU",
        "batches": "forget and retain batches of their own; EUPMU's code cuts one mixed batch",
        "labels": "random labels never include the true one; EUPMU's code draws over all classes",
        "clip": "after the backward pass, as in FAMO's own code; EUPMU's clips before it, which with cleared gradients is void",
        "guard": "stops where the retain loss leaves its bound; neither has a guard",
        "norm_stats": "frozen: running statistics are used; the published image runs train with live ones",
    },
)
def famo(
    *,
    forget: Objective = RandomLabel(),
    weight_lr: Positive = 0.025,
    decay: NonNegative = 0.01,
    max_norm: Positive = 1.0,
    lr: Positive = 0.1,
    momentum: NonNegative = 0.0,
    weight_decay: NonNegative = 0.0,
    steps: Count = 40,
    batch: AtLeastOne = 64,
) -> Stage:
    """Descend on forget and retain loss together, weighed so that both fall by the same share per step.

    Update (1 / c) sum_k (z_k / L_k) grad L_k, z = softmax(w); w falls for the loss that the step lowered the most. A
    retain loss that is already near 0 falls by a large share for next to nothing, and weighs much: 1 / L_k is large. It
    protects neither loss, and promises no utility.

    Formula: min_theta (1 / c) sum_k z_k log L_k, c = sum_k z_k / L_k; w <- w - Adam(grad_w sum_k z_k (log L_k - log L_k')),
    L_k' on the same batch after the step.

    Args:
        forget: objective on the forget data, minimised and above 0: its logarithm is taken.
        weight_lr: step size of w, > 0.
        decay: weight decay of w, >= 0.
        max_norm: of the combined gradient, > 0.
        lr: learning rate of SGD, > 0.
        momentum: of SGD, >= 0.
        weight_decay: of SGD, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples of each kind per step, >= 1.

    Raises:
        RunFailed: where a loss is not above 0, as that of gradient ascent.
    """
    return Descend(
        forget=forget,
        retain=NLL(),
        combine=Clip(FAMO(lr=weight_lr, decay=decay), max_norm),
        optimizer=SGD(lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        guard=Guard(),
    )
