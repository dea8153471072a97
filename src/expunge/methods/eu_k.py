"""Exact unlearning of the last k layers (EU-k, Goel et al. 2022): train them afresh on the retain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from torch import nn

from expunge.core import Case, Stage
from expunge.descend import Descend
from expunge.edits import reinitialise
from expunge.layers import last_layers
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import AtLeastOne, NonNegative, Positive, Range, method
from expunge.scope import edit

_ROWS = "ceil(epochs * ceil(n_retain / min(batch, n_retain))) * min(batch, n_retain)"


@method(
    paper="arXiv:2201.06640",
    needs={"retain"},
    dose=None,
    reason="its authors' code was not run beside it; held to plain torch",
    cost={"forward": f"1 + {_ROWS}", "backward": _ROWS},
    departures={
        "dose": "there is none: the last layers start afresh, so that zero epochs leave them untrained",
        "layers": "counted in the order of the calls, a weight shared with an earlier layer is that layer's; authors' code "
        "has a table of blocks for each of its networks",
        "once": "the layers are drawn anew once; one released version does it at every epoch, with a new optimizer",
        "norm_stats": "frozen by default, so that running statistics are those of all of the data; the published runs train "
        "the last layers with live batch statistics and the others without",
        "contract:adapter:causal_lm": "layers are made anew from a model made anew, and layers with an adapter cannot be",
    },
)
def eu_k(
    *,
    k: AtLeastOne = 2,
    lr: Positive = 3e-3,
    weight_decay: NonNegative = 0.0,
    epochs: Annotated[float, Range(0)] = 40.0,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Draw the weights of the last k layers anew and train them on the retain data; the others do not move.

    The weights of the last layers are a function of the retain data, of the seed, and of what the earlier layers give:
    these have seen the forget data and stay as they are, to the bit. Despite its name it promises exactness for no model
    whose earlier layers were trained.

    Formula: theta_last fresh, then min over theta_last of the mean over D_r of NLL.

    Args:
        k: number of layers, from the end, >= 1; a layer has a weight of two dimensions or more.
        lr: learning rate of Adam, > 0.
        weight_decay: of Adam, >= 0.
        epochs: passes over the retain data, >= 0.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, of the whole model.
        make: builds the model untrained; None resets every module of a copy by its own ``reset_parameters``.

    Raises:
        Refused: for a model of fewer layers than k, or, without `make`, one that cannot be drawn anew.
    """
    train = Descend(
        retain=NLL(),
        optimizer=Adam(lr, weight_decay=weight_decay),
        epochs=float(epochs),
        batch=batch,
        norm_stats=norm_stats,
    )

    def anew(case: Case) -> Case:
        key, rng = case.rng.take()
        inside = replace(case, scope=last_layers(case, k), rng=rng)
        fresh = reinitialise(case.model, key.at("weights"), make)
        edit(inside, {name: p.detach() for name, p in fresh.named_parameters() if name in inside.scope})
        return replace(train(inside), scope=case.scope)

    return anew
