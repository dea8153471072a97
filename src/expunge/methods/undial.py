"""UNDIAL (Dong et al., NAACL 2025): learn from the original model with the true token held down."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method
from expunge.token_objectives import UNDIAL

RETAIN = "(retain_weight > 0) * min(batch, n_retain)"


@method(
    paper="arXiv:2402.10052",
    needs={"forget", "retain", "teacher:original"},
    tasks=("classification", "causal_lm"),
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss is held to the "
    "benchmark's own code",
    cost={
        "forward": f"steps * (2 * min(batch, n_forget) + {RETAIN})",
        "backward": f"steps * (min(batch, n_forget) + {RETAIN})",
    },
    departures={
        "mask": "answer tokens only; the benchmark's code averages over prompt and padding too, and holds down "
        "the token 100 before the end of the vocabulary there",
        "weights": "retain weight 1 by default, not 0: without it a small language model leaves the bound on its "
        "retain loss before half of the steps",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay "
        "0.01, a warm-up and a linear decay",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def undial(
    *,
    strength: NonNegative = 10.0,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 5e-4,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Distil the original model, its logit of the true token lowered, on the forget data; descend on the retain data.

    The target is fixed, so it converges and its loss is bounded below. It does not promise that the target resembles
    what a model says that never saw the data: the other tokens keep the original's order.

    Formula: min_theta mean over tokens of D_f of CE(softmax(z_original - strength e_true), p_theta) + retain_weight
    mean over D_r of NLL.

    Args:
        strength: logits taken off the true token, >= 0 (beta of the paper).
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published settings: Llama-2-7b, strength 10 (3 to 30), LoRA of rank 8, lr 1e-4, 32 examples a step, 10 epochs, no
    retain data; GPT-Neo-125M, strength 3, lr 1e-6, 64 examples a step, 10 epochs.
    """
    return Descend(
        forget=UNDIAL(strength),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
