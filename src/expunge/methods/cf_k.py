"""Catastrophic forgetting of the last k layers (CF-k, Goel et al. 2022): fine-tune only them on the retain data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.layers import last_layers, retain_nll
from expunge.optim import SGD, Restarts
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method


@method(
    status="reproduced",
    paper="arXiv:2201.06640",
    needs={"retain"},
    dose="steps",
    cost={"forward": "(steps > 0) + steps * min(batch, n_retain)", "backward": "steps * min(batch, n_retain)"},
    departures={
        "layers": "counted in the order of the calls, any weight of two dimensions or more; a weight shared with an earlier "
        "layer is that layer's. The authors count Conv2d and Linear modules in the order of their definition",
        "cycles": "the learning rate is constant by default; the authors restart a cosine (cycles, lr_floor)",
        "clip": "gradients are not clipped; the authors clip their norm at 10, which their runs beside ours never reached",
        "stopping": "stopped when the loss on the retain data leaves its bound",
        "norm_stats": "frozen by default; the authors train with live batch statistics, of the frozen layers too",
    },
)
def cf_k(
    *,
    k: AtLeastOne = 2,
    lr: Positive = 0.03,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 5e-4,
    cycles: AtLeastOne = 1,
    lr_floor: Share = 0.05,
    steps: Count = 100,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Minimise the loss on the retain data, moving the weights of the last k layers only.

    What the earlier layers hold of the forget data stays, to the bit; in the last ones forgetting is left to chance, as in
    fine-tuning. It does not promise that anything is forgotten. Where the model is a plain ``nn.Sequential``, what the
    frozen layers compute is computed once per example.

    Formula: min over the last k layers' theta of the mean over D_r of NLL.

    Args:
        k: number of layers, from the end, >= 1; a layer has a weight of two dimensions or more.
        lr: learning rate of SGD, > 0.
        momentum: of SGD, >= 0.
        weight_decay: of SGD, >= 0.
        cycles: of the learning rate over the run, each a fall along half a cosine, each twice as long as the one before, from 1
            to 30; 1 is a constant rate, n are the authors' schedule of 2^n - 1 epochs.
        lr_floor: share of lr that several cycles fall towards, in [0, 1].
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, of the whole model.

    A released run (CIFAR-10, ResNet-110): k 10 or 50, lr 0.1, weight decay 5e-5, lr_floor 0.05, batch 64, 30 epochs, live
    statistics.

    Raises:
        Refused: for a model of fewer layers than k.
    """
    descend = Descend(
        optimizer=SGD(lr, momentum, weight_decay),
        schedule=Restarts(cycles, lr_floor),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )

    def forget(case: Case) -> Case:
        if steps == 0:
            return case
        inside, nll = retain_nll(replace(case, scope=last_layers(case, k)), norm_stats)
        return replace(replace(descend, retain=nll)(inside), scope=case.scope, request=case.request)

    return forget
