"""TNPO and WTNPO (Wang et al., ICLR 2025): NPO with a weight for each token instead of each answer."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method
from expunge.token_objectives import TNPO

RETAIN = "(retain_weight > 0) * min(batch, n_retain)"


@method(
    paper="arXiv:2502.19301",
    needs={"forget", "retain", "teacher:original|column:reference_tokens"},
    tasks=("classification", "causal_lm"),
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss is held to "
    "plain torch",
    cost={
        "forward": f"steps * (2 * min(batch, n_forget) + {RETAIN})",
        "backward": f"steps * (min(batch, n_forget) + {RETAIN})",
    },
    departures={
        "weights": "beta 4 and retain weight 1 as in the paper's search; WTNPO is the setting extra, off by default",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay "
        "0.01, a warm-up and a linear decay",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def tnpo(
    *,
    beta: Positive = 4.0,
    extra: NonNegative = 0.0,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 5e-4,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Ascend on each forget token until it is unlikely beside the original model, and descend on the retain data.

    Each token has its own weight, so one forgotten token does not let go of the others of its answer, as it does in
    NPO. It does not promise to stop at the loss of a model that never saw the data.

    Formula: min_theta -mean over tokens of D_f of w NLL + retain_weight mean over D_r of NLL, with the constant
    w = 2 p^(beta + extra) / (p^beta + p_original^beta + 1e-5), p = exp(-NLL).

    p_original is read from the forget data's column ``reference_tokens`` where there is one:
    ``chain(CacheReference(tokens=True), tnpo())`` needs no second model.

    Args:
        beta: exponent of the ratio to the original model, > 0.
        extra: further exponent of p, >= 0; above 0 it is WTNPO, which has 1.5 in the paper's code.
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (TOFU): beta 4, lr 1e-5 (Llama-2-7b) or 2e-5 (Phi-1.5), 16 examples a step, 5 epochs, retain
    weight of 0.1, 1 or 10.
    """
    return Descend(
        forget=TNPO(beta, extra),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
