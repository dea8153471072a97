"""NPO with a smoothed forget gradient (Fan et al., ICML 2025): unlearning that is meant to withstand relearning."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Combiner, Refused, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, NPO
from expunge.optim import Adam, Averaged, Optimizer
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method
from expunge.smooth import Curvature, GradientNorm, RandomNoise, Sharpness, Smoothed, Smoothing

AMOUNT = {"sam": 0.01, "random": 1e-3, "gradient_norm": 0.1, "curvature": 0.1, "averaging": 0.2}
"""Of each smoothing, where none is given."""
FORGET, RETAIN = "min(batch, n_forget)", "(retain_weight > 0) * min(batch, n_retain)"
PASSES = "{{'sam': 2, 'random': draws, 'gradient_norm': {}, 'curvature': {}, 'averaging': 1}}[smoothing]"


@method(
    paper="arXiv:2502.05374",
    needs={"forget", "retain", "teacher:original|column:reference"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; each smoothing is held "
    "to plain torch",
    cost={
        "forward": f"steps * ((1 + {PASSES.format(2, 4)}) * {FORGET} + {RETAIN})",
        "backward": f"steps * ({PASSES.format(3, 6)} * {FORGET} + {RETAIN})",
    },
    departures={
        "penalties": "gradient_norm and curvature are differentiated; in the release the norm is turned into a number "
        "before it is added, so that nothing is regularised (and the weight of the first is always 0.01)",
        "npo": "of the summed loss of each example; the release has the mean loss of the batch, as one example",
        "averaging": "over each of the last steps; the release averages every fifth from the 100th of 125",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW",
        "weights": "beta 1 and retain weight 5 by default, as npo here",
        "stopping": "stopped when the loss on retain data leaves its bound",
    },
)
def npo_sam(
    *,
    smoothing: Literal["sam", "random", "gradient_norm", "curvature", "averaging"] = "sam",
    amount: Annotated[float | None, Range(0, open_low=True)] = None,
    draws: AtLeastOne = 3,
    beta: Positive = 1.0,
    retain_weight: NonNegative = 5.0,
    lr: Positive = 5e-4,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Make the forget answers less likely in all of a neighbourhood of the weights, while minimising the retain loss.

    A model in a flat place of the forget loss is moved out of it less by a few steps of relearning: that is the hope, and
    it does not promise that relearning fails. The retain gradient is taken at the weights as they are.

    Formula: a step along g + retain_weight grad R, F the NPO loss, R the NLL, u = grad F / |grad F|, and g by smoothing:
    "sam": grad F(theta + amount u); "random": mean over `draws` of grad F(theta + amount z), z ~ N(0, 1);
    "gradient_norm": grad (F + amount |grad F|); "curvature": grad (F + amount |grad F(theta + 0.01 u) - grad F(theta)|),
    u a constant; "averaging": grad F, and at the end the mean of the weights after each of the last steps.

    Args:
        smoothing: which g, see above.
        amount: length of the move ("sam"), standard deviation ("random"), weight of the penalty ("gradient_norm",
            "curvature"), or share of the steps, at the end, that is averaged ("averaging", at most 1), > 0; None takes
            0.01, 0.001, 0.1, 0.1, 0.2.
        draws: of "random", >= 1.
        beta: inverse temperature of NPO, > 0.
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published settings (WMDP-Bio, Zephyr-7b, 125 steps of 4): sam 0.01, lr 5e-6, beta 0.015, retain weight 2.25; random
    1e-4, 1e-5, 0.0125, 2; curvature 10, 8.5e-6, 0.035; gradient_norm 10, 7.5e-6, 0.04; averaging, 5.5e-6, 0.05, 2.
    """
    amount = AMOUNT[smoothing] if amount is None else amount
    combine: Combiner = Weighted({"retain": retain_weight})
    optimizer: Optimizer = Adam(lr)
    if smoothing != "averaging":
        by: dict[str, Smoothing] = {
            "sam": Sharpness(amount),
            "random": RandomNoise(amount, draws),
            "gradient_norm": GradientNorm(amount),
            "curvature": Curvature(amount),
        }
        combine = Smoothed(combine, by[smoothing], roles=("forget",))
    elif amount > 1:
        raise Refused(f"npo_sam: amount is the share of the steps that is averaged, at most 1, found {amount!r}")
    elif steps:
        optimizer = Averaged(Adam(lr), steps, math.ceil(amount * steps))
    return Descend(
        forget=NPO(beta),
        retain=NLL(),
        combine=combine,
        optimizer=optimizer,
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
