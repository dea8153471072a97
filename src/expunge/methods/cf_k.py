"""Catastrophic forgetting of the last k layers (CF-k, Goel et al. 2022): fine-tune only them on the retain data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.layers import last_layers
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method


@method(
    paper="arXiv:2201.06640",
    needs={"retain"},
    dose="steps",
    reason="its authors' code was not run beside it; held to plain torch",
    cost={"forward": "(steps > 0) + steps * min(batch, n_retain)", "backward": "steps * min(batch, n_retain)"},
    departures={
        "layers": "counted in the order of the calls, a weight shared with an earlier layer is that layer's; authors' code "
        "has a table of blocks for each of its networks",
        "norm_stats": "frozen by default; the published runs train the last layers with live batch statistics and the "
        "others without",
    },
)
def cf_k(
    *,
    k: AtLeastOne = 2,
    lr: Positive = 0.03,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 5e-4,
    steps: Count = 100,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Minimise the loss on the retain data, moving the weights of the last k layers only.

    What the earlier layers hold of the forget data stays, to the bit; in the last ones forgetting is left to chance, as in
    fine-tuning. It does not promise that anything is forgotten.

    Formula: min over the last k layers' theta of the mean over D_r of NLL.

    Args:
        k: number of layers, from the end, >= 1; a layer has a weight of two dimensions or more.
        lr: learning rate of SGD, > 0.
        momentum: of SGD, >= 0.
        weight_decay: of SGD, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, of the whole model.

    Raises:
        Refused: for a model of fewer layers than k.
    """
    descend = Descend(
        retain=NLL(),
        optimizer=SGD(lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )

    def forget(case: Case) -> Case:
        if steps == 0:
            return case
        return replace(descend(replace(case, scope=last_layers(case, k))), scope=case.scope)

    return forget
