"""WAGLE (Jia et al., NeurIPS 2024): unlearn with only the weights that the forget data owe most to, retention counted."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Objective, Stage, chain
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method
from expunge.saliency import Attribution

STEPS = "steps * ((forget_weight > 0) * min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))"


@method(
    paper="arXiv:2410.17509",
    needs={"forget", "retain"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the attribution is held "
    "to a closed form",
    cost={side: f"(keep < 1) * (n_forget + n_retain) + {STEPS}" for side in ("forward", "backward")},
    departures={
        "score": "of mean gradients; the authors' code sums the gradients of mini-batch means, so that the size of the "
        "data decides how much a weight's own value counts",
        "mask": "a weight outside it keeps its value to the bit; in the authors' code AdamW's weight decay still "
        "shrinks it",
        "ranking": "a threshold over all tensors, ties kept, and nothing that scores 0; the authors sort all scores",
        "weights": "the forget weight is 0.05 by default, not 1: with equal weights a memorised forget set takes "
        "the retain set down with it",
        "optimizer": "Adam without weight decay; the published runs have decay 0.1",
        "stopping": "gives back the last state whose loss on retain data had risen by at most a twentieth of the "
        "way to chance; the authors stop after a fixed number of epochs",
    },
)
def wagle(
    *,
    keep: Share = 0.95,
    hessian: Positive = 1e-6,
    forget: Objective = Ascent(),
    forget_weight: NonNegative = 0.05,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 1e-3,
    steps: Count = 30,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Forget by gradient difference, or another objective, moving only the weights of highest attribution.

    The attribution of a weight is its influence on the forget loss, corrected for the pull of the retain loss. All other
    weights keep their value to the bit. It does not promise that the weights that are held do not remember.

    Formula: m = 1[|(theta - g_r / hessian) g_f| >= tau], g_r and g_f the mean gradients of NLL over D_r and D_f at the
    weights given; min over m * theta of forget_weight mean over D_f of `forget` + retain_weight mean over D_r of NLL.

    Args:
        keep: share of the weights in scope that may move, in [0, 1]; 0 changes nothing, 1 moves all.
        hessian: the number that stands for the diagonal of the retain loss's Hessian, > 0.
        forget: per-example objective on the forget data, minimised; ``wagle(forget=NPO(0.1), forget_weight=1.0)`` is
            the published variant with NPO. The declared cost is that of the default: a teacher's passes come on top.
        forget_weight, retain_weight: of the two losses, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published settings: TOFU, Llama-2-7b-chat, keep 0.95, lr 7e-6, weights 1 and 1, 4 examples a step, 5 epochs; WMDP,
    Zephyr-7b, keep 0.4, lr 5e-6, 500 steps. With refusals (keep 0.8) the attribution is that of the refusals:
    ``chain(Attribution(0.8, objective=RandomLabel()), Descend(forget=RandomLabel(), ...))``.
    """
    descend = Descend(
        forget=forget,
        retain=NLL(),
        combine=Weighted({"forget": forget_weight, "retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(rise=0.05, checks=15, patience=15, share=None),
    )
    return chain(Attribution(keep, hessian), descend)
