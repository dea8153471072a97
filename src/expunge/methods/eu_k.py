"""Exact unlearning of the last k layers (EU-k, Goel et al. 2022): train them afresh on the retain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from torch import nn

from expunge.core import Case, Stage
from expunge.descend import Descend
from expunge.edits import reinitialise
from expunge.layers import last_layers, retain_nll
from expunge.optim import Restarts, by_name
from expunge.registry import AtLeastOne, NonNegative, Positive, Range, Share, method
from expunge.scope import edit

_ROWS = "ceil(epochs * ceil(n_retain / min(batch, n_retain))) * min(batch, n_retain)"


@method(
    status="reproduced",
    paper="arXiv:2201.06640",
    needs={"retain"},
    dose=None,
    cost={"forward": f"1 + {_ROWS}", "backward": _ROWS},
    departures={
        "dose": "there is none: the last layers start afresh, so that zero epochs leave them untrained",
        "layers": "counted in the order of the calls, any weight of two dimensions or more; a weight shared with an earlier "
        "layer is that layer's. The authors count Conv2d and Linear modules in the order of their definition",
        "anew": "normalisation in the last layers starts afresh too; the authors draw linear and convolution layers anew, by "
        "Kaiming's normal law with zero biases (make), and go on from the trained normalisation. Running statistics stay",
        "once": "the layers are drawn anew once, as the authors do; another group's release does it at every epoch",
        "optimizer": "Adam with a constant learning rate by default; the authors run SGD (optimizer) and restart a cosine "
        "(cycles, lr_floor)",
        "clip": "gradients are not clipped; the authors clip their norm at 10, which their runs beside ours never reached",
        "norm_stats": "frozen by default; the authors train with live batch statistics, of the frozen layers too",
        "contract:adapter:causal_lm": "layers are made anew from a model made anew, and layers with an adapter cannot be",
    },
)
def eu_k(
    *,
    k: AtLeastOne = 2,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: Positive = 3e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    cycles: AtLeastOne = 1,
    lr_floor: Share = 0.05,
    epochs: Annotated[float, Range(0)] = 40.0,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Draw the weights of the last k layers anew and train them on the retain data; the others do not move.

    The weights of the last layers are a function of the retain data, of the seed, and of what the earlier layers give:
    these have seen the forget data and stay as they are, to the bit. Despite its name it promises exactness for no model
    whose earlier layers were trained. Where the model is a plain ``nn.Sequential``, what they compute is
    computed once per example.

    Formula: theta_last fresh, then min over theta_last of the mean over D_r of NLL.

    Args:
        k: number of layers, from the end, >= 1; a layer has a weight of two dimensions or more.
        optimizer: "adam" or "sgd".
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        weight_decay: >= 0.
        cycles: of the learning rate over the run, each a fall along half a cosine, each twice as long as the one before, from 1
            to 30; 1 is a constant rate, n are the authors' schedule of 2^n - 1 epochs.
        lr_floor: share of lr that several cycles fall towards, in [0, 1].
        epochs: passes over the retain data, >= 0.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, of the whole model.
        make: builds the model untrained; None resets every module of a copy by its own ``reset_parameters``.

    A released run (CIFAR-10, ResNet-110): k 10 or 50, optimizer="sgd", lr 0.1, weight decay 5e-5, lr_floor 0.05, batch 64,
    62 epochs, live statistics.

    Raises:
        Refused: for a model of fewer layers than k, or, without `make`, one that cannot be drawn anew.
    """
    train = Descend(
        optimizer=by_name(optimizer, lr, momentum, weight_decay),
        schedule=Restarts(cycles, lr_floor),
        epochs=float(epochs),
        batch=batch,
        norm_stats=norm_stats,
    )

    def anew(case: Case) -> Case:
        key, rng = case.rng.take()
        inside = replace(case, scope=last_layers(case, k), rng=rng)
        fresh = reinitialise(case.model, key.at("weights"), make)
        edit(inside, {name: p.detach() for name, p in fresh.named_parameters() if name in inside.scope})
        inside, nll = retain_nll(inside, norm_stats)
        return replace(replace(train, retain=nll)(inside), scope=case.scope, request=case.request)

    return anew
