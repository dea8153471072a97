"""Prune first, then unlearn (Jia et al., NeurIPS 2023): any method on a model of few weights."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import nn

from expunge.core import Refused, Stage, chain
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import by_name
from expunge.prune import Prune
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, Share, method
from expunge.rewind import OnAll, Rewind

_STEPS = "rounds * steps * min(batch, n_retain + (on == 'all') * n_forget)"
_FLOW = "(share > 0) * rounds * cuts * (by == 'synflow')"


@method(
    paper="arXiv:2304.04934",
    tasks=("classification", "regression"),
    needs={"retain"},
    dose=None,
    status="reproduced",
    cost={"forward": f"{_FLOW} + {_STEPS}", "backward": f"{_FLOW} + {_STEPS}"},
    departures={
        "dose": "unlearning is fine-tuning and the inner method, which have doses of their own; without them, share 0 changes nothing",
        "training": "by default what is left is fine-tuned from its own values on the retain data; the paper prunes while it trains, "
        "on all data: on='all', with rewind= for the early weights, which only the caller has",
        "optimizer": "Adam without weight decay by default; the paper trains by SGD with momentum and weight decay, which is "
        "optimizer='sgd'",
        "rate": "the learning rate is one number; the authors rewind its schedule with the weights",
        "guard": "without rewind=, training stops when the retain loss leaves its bound; the authors have no guard, which is rise=None",
        "layers": "linear layers are pruned too, the last one included; the authors prune convolutions alone",
        "share": "half of the weights by default, not 95 %, which small networks do not survive",
        "contract:adapter_moves": "it would prune the adapter: prune first, and run a method in an adapter as inner",
    },
)
def prune_first(
    *,
    inner: Stage | None = None,
    share: Share = 0.5,
    by: Literal["magnitude", "synflow"] = "magnitude",
    rounds: AtLeastOne = 1,
    rewind: nn.Module | str | None = None,
    on: Literal["retain", "all"] = "retain",
    dimensions: AtLeastOne = 2,
    cuts: AtLeastOne = 100,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 3e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    steps: Count = 75,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    rise: Annotated[float | None, Range(0, 1)] = 0.25,
) -> Stage:
    """Set the least of the weights to 0, train the others again, and run another method on them.

    Pruned weights are out of scope from then on: 0 to the bit in the model that comes back, whatever the inner method.
    It does not promise that pruning alone forgets: small weights may hold nothing of the forget data.

    Formula: m = 1[score >= tau], tau the `share` quantile; theta <- m theta, or m theta_early; Adam or SGD on the mean
    of NLL within m; inner on m theta. OMP: rounds 1; IMP: rounds n; both with rewind=, the weights of an early epoch. SynFlow
    scores the weights that training begins from: with rewind= it rewinds before it cuts, and else scores those given.

    Args:
        inner: what to run on the pruned model, such as ``methods.ssd()`` or a Descend; None runs nothing after the
            training. What it needs and costs comes on top of what is declared here. In a run file:
            ``inner = {name = "ssd"}``.
        share: of the weights, pruned in the end, in [0, 1]; the inner method alone at 0 and steps 0.
        by: "magnitude", or "synflow" (floating inputs); see ``Prune``.
        rounds: prune and train so often, the same share of what is left each time, >= 1.
        rewind: the model, or a weights file of it, that weights go back to in every round (``Rewind``); None: they stay.
        on: what to train on after a cut: the "retain" data, or "all", as before any request, which needs forget data.
        dimensions: of the tensors that are pruned, at least, >= 1; 3 prunes convolutions only.
        cuts: that synflow takes one share in, its scores anew after each, >= 1; the authors cut once.
        optimizer: of the training after a cut, "adam" or "sgd".
        lr: its learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        steps: of training after each cut, >= 0.
        batch: examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, while training.
        rise: how far the retain loss may rise in that training, as a share of the way to chance, in [0, 1]; None, or with
            rewind=: no guard looks.

    Raises:
        Refused: for an inner method that is no stage, or a checkpoint of another model.

    Published setting: share 0.95 in one cut, or a fifth of what is left in each round (IMP), rewound to epoch 8 of 182,
    on="all", dimensions 3, cuts 1; optimizer="sgd", lr 0.1, momentum 0.9, weight decay 5e-4, batch 256.
    """
    if inner is not None and not callable(inner):
        raise Refused(f"prune_first: inner must be a stage, such as methods.ssd(), found {inner!r}")
    cut = Prune(1.0 - (1.0 - share) ** (1.0 / rounds), by, dimensions, cuts)
    # early weights are bad ones, and a guard would keep them
    guard = None if rise is None or rewind is not None else Guard(rise)
    rule = by_name(optimizer, lr, momentum, weight_decay)
    train = Descend(retain=NLL(), steps=steps, batch=batch, optimizer=rule, norm_stats=norm_stats, guard=guard)
    recover = OnAll(train) if on == "all" else train
    back = () if rewind is None else (Rewind(rewind),)
    one = (*back, cut, recover) if by == "synflow" else (cut, *back, recover)
    return chain(*one * rounds, *(() if inner is None else (inner,)))
