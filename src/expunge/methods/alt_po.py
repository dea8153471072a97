"""AltPO (Mekala et al., COLING 2025): prefer answers that the model made up itself to the one that is to be forgotten."""

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
    paper="arXiv:2409.13474",
    tasks=("causal_lm",),
    needs={"forget", "retain", "column:win", "teacher:original|column:win_reference"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss and the "
    "answers it is made of are held to plain torch",
    cost={
        "forward": f"steps * (4 * min(batch, n_forget) + {RETAIN})",
        "backward": f"steps * (2 * min(batch, n_forget) + {RETAIN})",
    },
    departures={
        "beta": "0.5 by default, of the values that the authors search (0.05, 0.1, 0.5); they report 0.1",
        "factor": "2 / beta before the logarithm, as in the benchmark's code; DPO's paper has 1",
        "batches": "forget and retain examples of their own per step; the authors draw one retain example per forget one",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay 0.01, "
        "one epoch of warm-up and a linear decay",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def alt_po(
    *,
    beta: Positive = 0.5,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 5e-4,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Make plausible other answers more likely against the true one than under the original model; keep the retain loss.

    The forget data hold one example per alternate, so a question several times, each with its alternate as nested column
    ``win``: ``tasks.alternates.make_alternates`` lets the model to unlearn write them, ``read_alternates`` reads them, and
    ``.encode(...)`` gives the data. It does not promise that the alternates are untrue, nor that one of them becomes the
    likely answer: only the difference of two log-ratios is judged. The model learns to answer with confidence what is
    not so.

    Formula: min_theta -(2 / beta) mean over D_f and alternates of log sigmoid(beta (r_w - r_l)) + retain_weight mean
    over D_r of NLL, r = S_original - S, S the summed NLL of an answer; w the alternate, l the true answer. S_original is
    read from the columns ``reference`` and ``win_reference`` where the data have them.

    Args:
        beta: inverse temperature, > 0.
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples (pairs), and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    The declared cost is with a teacher; each cached reference saves one pass of the forget data per step.
    Published setting (TOFU, Llama-2-7b): five alternates, beta 0.1, weight 1, AdamW, lr 5e-5, 35 examples per step,
    2 epochs of five times the forget set.
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
