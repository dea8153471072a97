"""Fine-tuning on the retain set (Warnecke et al. 2021, Golatkar et al. 2020): forget by not being reminded."""

from __future__ import annotations

from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method


@method(
    paper="arXiv:1911.04933",
    needs={"retain"},
    dose="steps",
    cost={"forward": "steps * min(batch, n_retain)", "backward": "steps * min(batch, n_retain)"},
)
def finetune(
    *,
    lr: Positive = 0.01,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 5e-4,
    steps: Count = 100,
    batch: AtLeastOne = 64,
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
    """
    return Descend(retain=NLL(), optimizer=SGD(lr, momentum, weight_decay), steps=steps, batch=batch, guard=Guard())
