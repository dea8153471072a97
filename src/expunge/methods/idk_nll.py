"""IdkNLL (TOFU, Maini et al. 2024: "preference optimisation"): fine-tuning on refusals and retain answers together."""

from __future__ import annotations

from typing import Literal

from expunge.constrained import Pooled
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, Positive, method


@method(
    paper="arXiv:2401.06121",
    tasks=("causal_lm",),
    needs={"forget", "retain"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss is held to "
    "plain torch",
    cost={side: "steps * (min(batch, n_forget) + min(batch, n_retain))" for side in ("forward", "backward")},
    departures={
        "refusals": "never the true answer; the released code draws over all lines",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay 0.01, "
        "one epoch of warm-up and a linear decay",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def idk_nll(
    *,
    lr: Positive = 1e-3,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Minimise one token mean over refusals to the forget prompts and the true answers to the retain prompts.

    One mean, as over concatenated batches: refusals are short, so they weigh less than the retain answers. Separate
    means are another, stronger method: ``random_label``. It does not promise that the knowledge is gone: the model
    learns to say that it does not know, and membership attacks still tell the forget data from unseen ones.

    Formula: min_theta (sum over D_f of S(x, refusal) + sum over D_r of S(x, y)) / (tokens of both), S the summed NLL,
    over each step's batches. The refusal is drawn anew at every step.

    The refusals are the task's, ``CausalLM(refusals=)``, or the data's column ``refusals``; without either the answer
    drawn is of random tokens.

    Args:
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (TOFU): AdamW, lr 1e-5, 32 examples per step, 10 epochs.
    """
    return Descend(
        forget=RandomLabel(),
        retain=NLL(),
        combine=Pooled(),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
