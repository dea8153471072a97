"""KL minimisation (GA+KL; TOFU, Maini et al. 2024): gradient ascent that stays near the original model elsewhere."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import Ascent, Distill
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

FORGET = "(forget_weight > 0) * min(batch, n_forget)"
RETAIN = "(retain_weight > 0) * min(batch, n_retain)"


@method(
    paper="arXiv:2401.06121",
    needs={"forget", "retain", "teacher:original"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the update is held to "
    "plain torch",
    cost={
        "forward": f"steps * ({FORGET} + 2 * {RETAIN})",
        "backward": f"steps * ({FORGET} + {RETAIN})",
    },
    departures={
        "positions": "the divergence is averaged over answer tokens only; released code averages over all places, prompt "
        "and padding too, so its value depends on the length that examples are padded to",
        "weights": "0.05 and 1 by default, not 1 and 1: with equal weights a memorised forget set takes the retain set "
        "down with it",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay 0.01, "
        "one epoch of warm-up and a linear decay",
        "stopping": "gives back the last state whose loss on retain data had risen by at most a twentieth of the "
        "way to chance; the published runs stop after a fixed number of epochs",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def kl(
    *,
    forget_weight: NonNegative = 0.05,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 1e-3,
    steps: Count = 30,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Maximise the loss on the forget data while the predictions on the retain data stay those of the original model.

    Still unbounded: the ascent wins in the end, and the last state that was harmless to the retain data comes back. It
    does not promise that this state forgot anything. Where the task has no distribution the divergence is its own
    (squared error).

    Formula: min_theta retain_weight mean over answer tokens of D_r of KL(p_original || p_theta) - forget_weight mean
    over D_f of NLL.

    Args:
        forget_weight, retain_weight: of the two losses, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout; the teacher is always in eval
            mode.

    Published setting (TOFU): weights 1 and 1, AdamW, lr 1e-5, 32 examples per step, 5 to 10 epochs.
    """
    return Descend(
        forget=Ascent(),
        retain=Distill(),
        combine=Weighted({"forget": forget_weight, "retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(rise=0.05, checks=15, patience=15, share=None),
    )  # an unbounded descent is seldom best at its end
