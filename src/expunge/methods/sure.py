"""SURE (Zhang et al., ICLR 2025): only the neurons that the forget data pull at most, so that quantisation finds less."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, SimNPO
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method
from expunge.salient_rows import SalientRows

ROWS = "steps * (min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))"


@method(
    paper="arXiv:2410.16454",
    needs={"forget", "retain"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the mask is held to a "
    "computation by hand",
    cost={"forward": ROWS, "backward": ROWS},
    departures={
        "mask": "applied; in the release it stands in a function that the trainer does not call",
        "forget gradient": "counted once; the release differentiates the forget loss for the mask, and adds it again",
        "rows": "a row without any forget gradient is never kept, whatever the percentile",
        "forget": "SimNPO by default, which needs no second model; the paper takes gradient ascent and NPO",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW",
        "stopping": "stopped when the loss on retain data leaves its bound",
    },
)
def sure(
    *,
    percentile: Annotated[float, Range(0, 100)] = 90.0,
    forget: Objective = SimNPO(),
    retain_weight: NonNegative = 5.0,
    lr: Positive = 2e-3,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Descend on a forgetting loss and the retain loss, in each step only on the neurons of largest forget gradient.

    Few rows move, each of them further (a larger learning rate), so that rounding the weights to 4 bits takes back less
    of the change. It does not promise that: quantise the model and look. Adam's momentum moves a row on after the step
    that it was chosen in.

    Formula: the gradient of `forget` + retain_weight NLL, times 1[|row of the forget gradient| >= tau], tau the
    `percentile` of these norms over the rows of all tensors in scope, at every step anew.

    Args:
        percentile: in [0, 100]; 0 keeps every row with a forget gradient.
        forget: per-example objective on the forget data, minimised; the declared cost is that of the default: a
            teacher's passes (NPO) come on top.
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    The paper's finding: methods with a utility constraint keep a fifth of the knowledge in full precision, and most of it
    is back after quantisation to 4 bits.
    """
    return Descend(
        forget=forget,
        retain=NLL(),
        combine=SalientRows(Weighted({"retain": retain_weight}), percentile),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
