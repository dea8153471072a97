"""GS-LoRA++ (Zhao et al., TPAMI 2026): GS-LoRA with the classes' prototypes to go away from, or to stay near to."""

from __future__ import annotations

from typing import Literal

from expunge.core import Stage
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method
from expunge.sparse_adapter import ForgetInAdapter, Prototypes, patterns
from expunge.wrap import LoRA

_ROWS = "steps * (min(batch, n_forget) + min(batch, n_retain))"


@method(
    paper="arXiv:2501.09705",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={"forward": f"(steps > 0) * (n_forget + n_retain) + {_ROWS}", "backward": _ROWS},
    departures={
        "layers": "adapters stand on every linear and convolution layer; the paper's on the two linear layers of each "
        "Transformer block's feed-forward part, which targets= names",
        "bound": "of the loss in multiples of log C; the paper's 105 belongs to the scale of CosFace logits",
        "average": "the released continual runs average the weights from an epoch on (decay 0.9), which is not here",
        "warmup": "the sparsity may begin late, as in GS-LoRA; the released continual script has it from the start",
        "epochs": "steps, not epochs",
        "schedule": "a cosine from the first step to 0; the released runs end at 1e-5",
        "mode": "eval mode by default, no dropout; the released runs train in train mode",
        "initial": "A of every request is drawn as peft draws it; the authors draw a third as wide from the second request on",
        "guard": "stopped when the retain loss leaves its bound",
        "contract:adapter": "it brings an adapter of its own, and a layer has one at a time",
    },
)
def gs_lora_pp(
    *,
    rank: AtLeastOne = 8,
    alpha: Positive = 8.0,
    targets: str | None = None,
    groups: Literal["block", "layer", "matrix"] = "block",
    beta: NonNegative = 0.2,
    bound: Positive = 2.0,
    away: NonNegative = 0.01,
    away_bound: Positive = 18.0,
    near: NonNegative = 0.01,
    sparsity: NonNegative = 1e-3,
    warmup: Share = 0.2,
    lr: Positive = 1e-2,
    weight_decay: NonNegative = 0.05,
    steps: Count = 60,
    batch: AtLeastOne = 48,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """As gs_lora, and move forget representations away from their class's mean, and retain representations not.

    The representation is what goes into the last linear layer; the prototype of a class is its mean over the forget and
    retain examples, under the model before this request. Continual as ``gs_lora`` is, with prototypes computed anew. It
    does not promise that a group is exactly 0, nor that nothing of a class can be read from the representations.

    Formula: that of ``gs_lora`` + away max(0, away_bound - mean over B_f of d) + near mean over B_r of d, with
    d = KL(softmax(prototype of the class) || softmax(representation)).

    Args:
        rank, alpha: of the adapters, >= 1 and > 0; the change is (alpha / rank) B A. Released: alpha 1.
        targets: names or shell-style patterns of layers, between commas; None takes every layer that is able.
        groups: one per "block" of the model, per "layer" or per "matrix"; see ``group_lasso.grouped``.
        beta: weight of the forget loss, >= 0.
        bound: that the forget loss is raised to, in multiples of log C, > 0.
        away: weight of the forget data's distance, >= 0. Its pass is that of the forget loss, but in a run in pieces, where
            it has one of its own.
        away_bound: that this distance is raised to, nats, > 0.
        near: weight of the retain data's distance, >= 0.
        sparsity: weight of the group lasso, >= 0.
        warmup: share of the steps before the sparsity begins, in [0, 1].
        lr: learning rate of AdamW, > 0.
        weight_decay: of AdamW, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Raises:
        Refused: where the model's last layer is not linear.

    Published setting (CASIA-100, four requests of 20 classes): beta 0.2 to 0.25, bound 105 nats, away 0.01, away_bound 18,
    sparsity 1e-4, lr 1e-2, 100 epochs, batch 48.
    """
    return ForgetInAdapter(
        LoRA(rank, float(alpha), patterns(targets)),
        groups,
        float(beta),
        float(bound),
        float(sparsity),
        float(warmup),
        float(lr),
        float(weight_decay),
        steps,
        batch,
        norm_stats,
        Prototypes(float(away_bound), float(away), float(near)),
    )
