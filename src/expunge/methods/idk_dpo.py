"""IdkDPO (TOFU, Maini et al. 2024; DPO, Rafailov et al. 2023): prefer a refusal to the answer that is to be forgotten."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.preference import DPO
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

RETAIN = "(retain_weight > 0) * min(batch, n_retain)"


@method(
    paper="arXiv:2305.18290",
    tasks=("classification", "causal_lm"),
    needs={"forget", "retain", "teacher:original|column:win_reference|column:refusal_references"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss is held to the "
    "benchmark's own code",
    cost={
        "forward": f"steps * (4 * min(batch, n_forget) + {RETAIN})",
        "backward": f"steps * (2 * min(batch, n_forget) + {RETAIN})",
    },
    departures={
        "factor": "2 / beta before the logarithm, as in the unlearning benchmarks' code; DPO's paper has 1",
        "refusals": "never the true answer; the released code draws over all lines",
        "weights": "beta 1 and retain weight 5 by default, for one label per example; the published runs have 0.1 and 1 "
        "for answers of many tokens",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay 0.01, "
        "one epoch of warm-up and a linear decay",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def idk_dpo(
    *,
    beta: Positive = 1.0,
    retain_weight: NonNegative = 5.0,
    lr: Positive = 5e-4,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Make a refusal more likely against the forget answer than under the original model; minimise the retain loss.

    It does not promise that a refusal becomes the likely answer: only the difference of two log-ratios is judged, and
    the forget answer, being longer, dominates it.

    Formula: min_theta -(2 / beta) mean over D_f of log sigmoid(beta (r_w - r_l)) + retain_weight mean over D_r of NLL,
    r = S_original - S, S the summed NLL of an answer; w the refusal, l the forget answer. The refusal is the data's
    nested column ``win``, or drawn by the task at every step. S_original is read from the columns ``reference`` and
    ``win_reference``, or ``refusal_references`` of the task's list of refusals, where the data have them:
    ``chain(CacheReference(preferred=True), idk_dpo())`` needs no second model.

    Args:
        beta: inverse temperature, > 0.
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    The declared cost is with a teacher; each cached reference saves one pass of the forget data per step.
    Published setting (TOFU): beta 0.1, weight 1, AdamW, lr 1e-5, 32 examples per step, 10 epochs.
    """
    return Descend(
        forget=DPO(beta),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
