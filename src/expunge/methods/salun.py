"""SalUn (Fan et al., ICLR 2024): random labelling of the weights that the forget data pull on the most."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Objective, Stage, chain
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import by_name
from expunge.passes import FORGET_STEPS, InPasses
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, Share, method
from expunge.saliency import Saliency

FORGET = f"(steps if turns == 'together' else {FORGET_STEPS}) * min(batch, n_forget)"
RETAIN = f"(retain_weight > 0) * (steps if turns == 'together' else steps - {FORGET_STEPS}) * min(batch, n_retain)"


@method(
    paper="arXiv:2310.12508",
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={
        "forward": f"(keep < 1) * n_forget + (1 + relabel) * {FORGET} + {RETAIN}",
        "backward": f"(keep < 1) * n_forget + {FORGET} + {RETAIN}",
    },
    departures={
        "mask": "each example weighs the same in the sum of gradients; authors' code sums gradients of batch "
        "means, so that a short last batch weighs more, and clips each batch's gradient for diffusion "
        "models",
        "labels": "never the true one, as in the paper's formula; the authors' code draws over all classes "
        "(images), which is forget=AnyLabel(), or takes the next one (diffusion)",
        "batches": "one forget and one retain batch of their own in every step by default; authors' code makes a "
        "pass over the forget set and then one over the retain set (CIFAR-10), which is turns='passes'",
        "weights": "the retain weight is 2 by default, not 1",
        "optimizer": "Adam without weight decay by default; the published image runs are optimizer='sgd' with both",
        "guard": "stopped when the retain loss leaves its bound; the authors have no guard, which is rise=None",
        "norm_stats": "frozen by default; the published image runs train with live batch statistics, which no "
        "mask holds",
        "soft": "the soft-thresholded variant (SalUn-soft) is not here",
    },
)
def salun(
    *,
    keep: Share = 0.5,
    forget: Objective = RandomLabel(),
    retain_weight: NonNegative = 2.0,
    turns: Literal["together", "passes"] = "together",
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 2e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.25,
) -> Stage:
    """Forget by another objective, moving only the share `keep` of the weights with the largest forget gradient.

    All other weights keep their value to the bit, whatever the optimizer's momentum and decay. It does not promise that
    the weights that are held do not remember.

    Formula: m = 1[|sum over D_f of grad NLL(theta_o)| >= tau]; min over m * theta of mean over D_f of `forget` +
    retain_weight mean over D_r of NLL.

    Args:
        keep: share of the weights in scope that may move, in [0, 1]; 0 changes nothing, 1 moves all.
        forget: per-example objective on the forget data; ``salun(forget=NPO())`` is SalUn with NPO. The declared cost
            is that of the default: a teacher's forward passes come on top.
        retain_weight: of the retain loss, >= 0.
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

    Published settings: CIFAR-10 and ResNet-18, keep 0.5, SGD, momentum 0.9, weight decay 5e-4, lr 0.013, batch 256,
    10 epochs in passes, retain weight 1, any label, live statistics; DDPM, Adam, lr 1e-4, norm clipped at 1, 1000 steps
    of 128 examples: ``chain(Saliency(0.5), Descend(forget=RandomLabel(), retain=NLL(), optimizer=..., ...))``.
    """
    descend = Descend(
        forget=forget,
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=None if rise is None else Guard(rise),
    )
    return chain(Saliency(keep), descend if turns == "together" else InPasses(descend))
