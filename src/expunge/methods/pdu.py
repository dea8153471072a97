"""PDU: constrained entropic unlearning (Entesari et al. 2025): flat logits under a bound on the retain loss."""

from __future__ import annotations

from typing import Literal

from expunge.confidence import LogitSpread
from expunge.constrained import PrimalDual
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method


@method(
    paper="arXiv:2506.05314",
    tasks=("classification", "causal_lm"),
    needs={"forget", "retain"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; its multipliers are "
    "held to the released code where that is right",
    cost={side: "steps * (min(batch, n_forget) + min(batch, n_retain))" for side in ("forward", "backward")},
    departures={
        "shift": "the logits that predict each answer token; the released code takes those at the token, which predict "
        "the next one",
        "dual": "one dual update per optimizer step; the released code has one per micro-batch",
        "warmup": "counted in steps; the released code counts epochs",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with warm-up",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def pdu(
    *,
    epsilon: NonNegative = 0.1,
    start: NonNegative = 100.0,
    dual_lr: NonNegative = 5.0,
    warmup: Count = 10,
    lr: Positive = 1e-3,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Make the logits on the forget data flat, subject to a bound on the loss on the retain data.

    The weight of the retain loss is a multiplier: it rises while that loss is above the bound and falls while it is
    below. It does not promise the bound at any one step, and a uniform prediction is not that of a retrained model.

    Formula: min_theta mean over answer tokens of D_f of (max_v z_v - mean_v z_v)^2 subject to mean over D_r of NLL <=
    epsilon; w <- max(0, w + dual_lr (retain loss of the step - epsilon)).

    Args:
        epsilon: bound of the retain loss, nats per unit, >= 0: somewhat above what the model has before.
        start: first value of the multiplier, >= 0; the scale is that of squared logits.
        dual_lr: step size of the multiplier, >= 0.
        warmup: steps in which the multiplier stays at `start`, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    While the multiplier is 0 the retain data are passed forward only, so the declared cost is an upper bound.
    Published setting (TOFU): epsilon 0.3, start 100, dual_lr 5, warm-up of 5 of 10 epochs, lr 1e-5.
    """
    return Descend(
        forget=LogitSpread(),
        retain=NLL(),
        combine=PrimalDual(epsilon, dual_lr, start, warmup),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
