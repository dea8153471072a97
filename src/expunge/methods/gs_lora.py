"""GS-LoRA (Zhao et al., CVPR 2024): forget in low-rank adapters, most of whose groups a group lasso switches off."""

from __future__ import annotations

from typing import Literal

from expunge.core import Stage
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method
from expunge.sparse_adapter import ForgetInAdapter, patterns
from expunge.wrap import LoRA

_ROWS = "steps * (min(batch, n_forget) + min(batch, n_retain))"


@method(
    status="reproduced",
    paper="arXiv:2403.11530",
    tasks=("classification", "regression", "causal_lm"),
    needs={"forget", "retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "layers": "adapters stand on every linear and convolution layer; the paper's on the two linear layers of each "
        "Transformer block's feed-forward part, which targets= names",
        "bound": "in multiples of the loss of a predictor that knows nothing; the paper's 105 and 110 belong to the scale "
        "of CosFace logits",
        "epochs": "steps, not epochs; the warm-up of the sparsity is a share of them",
        "schedule": "a cosine from the first step to 0; the released runs end at 1e-5",
        "mode": "eval mode by default, no dropout; the released runs train in train mode",
        "initial": "A of every request is drawn as peft draws it; the authors draw a third as wide from the second request on",
        "guard": "stopped when the retain loss leaves its bound",
        "contract:adapter": "it brings an adapter of its own, and a layer has one at a time",
    },
)
def gs_lora(
    *,
    rank: AtLeastOne = 8,
    alpha: Positive = 8.0,
    targets: str | None = None,
    groups: Literal["block", "layer", "matrix"] = "block",
    beta: NonNegative = 0.2,
    bound: Positive = 2.0,
    sparsity: NonNegative = 1e-3,
    warmup: Share = 0.2,
    lr: Positive = 1e-2,
    weight_decay: NonNegative = 0.05,
    steps: Count = 60,
    batch: AtLeastOne = 48,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Raise the forget loss to a bound and keep the retain loss, in adapters of which few groups are to change; merge them.

    Continual: give the model that comes back to this method with the next request; the adapters begin anew on the merged
    weights, and the retain data must hold nothing that was forgotten before. The run's history ends with the norm of each
    group and how many are selected (at least a hundredth of the largest). It does not promise that a group is exactly 0,
    nor that forgetting lasts: only the output is raised to the bound.

    Formula, over the A and B of the adapters: mean over B_r of NLL + beta max(0, bound chance - mean over B_f of NLL)
    + sparsity(t) sum over groups g of sqrt(sum over W in g of |W|_F^2), chance = log C for C classes.

    Args:
        rank, alpha: of the adapters, >= 1 and > 0; the change is (alpha / rank) B A. Released: alpha 1.
        targets: names or shell-style patterns of layers, between commas; None takes every layer that is able.
        groups: one per "block" of the model, per "layer" or per "matrix"; see ``group_lasso.grouped``.
        beta: weight of the forget loss, >= 0.
        bound: that the forget loss is raised to, in multiples of chance, > 0.
        sparsity: weight of the group lasso, >= 0.
        warmup: share of the steps before the sparsity begins, in [0, 1].
        lr: learning rate of AdamW, > 0.
        weight_decay: of AdamW, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (CASIA-100 faces, ViT of 6 blocks, CosFace): rank 8, beta 0.05, sparsity 0.005, 20 of 100 epochs of
    warm-up, bound 110 nats, lr 1e-2, batch 48, replay of a tenth of the retain data.
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
    )
