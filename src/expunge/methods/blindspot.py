"""Blindspot unlearning of a regressor (Tarun et al., ICML 2023): follow a network that never saw the forget data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from expunge.afresh import trained_afresh
from expunge.combine import Weighted
from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.deviation import FollowTeacher, TargetError
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method

_FORGET = "(1 if share is None else share > 0) * min(batch, n_forget)"
_RETAIN = "(1 if share is None else share < 1) * min(batch, n_retain)"
_PROXY = "(steps > 0) * proxy_steps * min(batch, n_retain)"


@method(
    paper="arXiv:2210.08196",
    status="reproduced",
    tasks=("regression",),
    needs={"forget", "retain"},
    dose="steps",
    cost={
        "forward": f"{_PROXY} + steps * (2 * {_FORGET} + {_RETAIN})",
        "backward": f"{_PROXY} + steps * ({_FORGET} + {_RETAIN})",
    },
    departures={
        "batches": "one forget and one retain batch of their own in every step, weighed by the forget data's share of all; "
        "the authors shuffle both and weigh each batch by the share in it, which is the same on average",
        "layers": "by default the outputs of convolutions and recurrent layers, as they are; the authors take those of blocks, "
        "after normalisation and activation: name the blocks in `layers`",
        "selection": "the last step is the result, of the proxy too; the authors' STS-B notebook keeps the epochs of the best "
        "validation loss",
        "steps": "numbers of steps, so that the cost does not grow with the retain set; published runs count epochs",
        "guard": "stops where the retain loss leaves its bound; the authors have none",
        "norm_stats": "frozen by default; the published runs train with live batch statistics. The proxy, which starts without "
        "any, is trained with live ones in either case, and followed with frozen ones",
        "contract:processes": "the proxy trains with live normalisation and dropout, which several processes cannot share",
    },
)
def blindspot(
    *,
    distance: Literal["absolute", "squared"] = "absolute",
    attention: NonNegative = 50.0,
    layers: str | None = None,
    share: Share | None = None,
    proxy_lr: Positive = 0.01,
    proxy_steps: Count = 50,
    lr: Positive = 1e-3,
    steps: Count = 100,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Train a fresh network briefly on the retain data, then follow it on the forget data and the targets on the rest.

    The proxy ("blindspot") knows no forget example, but only as much of the rest as a short training gives: what the
    model is drawn to is a rough guess of a retrained one, and it does not promise more than that. The targets of the
    forget data are not read.

    Formula: b = argmin over fresh weights of mean over D_r of d(b, y), cut short; then min_theta
    share mean over D_f of [d(f, b) + attention sum over layers of mean (m(a_f) - m(a_b))^2] + (1 - share) mean over D_r of
    d(f, y); d = |.| / scale or its square, m the attention map of a layer (``deviation.FollowTeacher``).

    Args:
        distance: "absolute" or "squared".
        attention: weight of the attention maps (kappa in the paper), >= 0, in units of `distance`. Layers that give one
            vector per example have no map, and a model of such layers alone has no such term.
        layers: names or shell-style patterns of modules, between commas; None takes convolutions and recurrent layers.
        share: weight of the forget term, in [0, 1]; None takes n_forget / (n_forget + n_retain), as published.
        proxy_lr: learning rate of Adam for the proxy, > 0.
        proxy_steps: of the proxy, >= 0; 0 follows an untrained network.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout of the model.
        make: builds the proxy, untrained; None resets every module of a copy by its own ``reset_parameters``.

    Raises:
        Refused: without `make`, when a module's parameters cannot be drawn anew; for a pattern that matches no module.

    Published settings: attention 50, batch 256, proxy_lr 0.01, lr 1e-3, Adam, live statistics; absolute, 2 epochs for the
    proxy and 1 (AgeDB, a convolutional network of 32 pixels); squared, 10 and 5 epochs (STS-B, an LSTM).
    """
    patterns = () if layers is None else tuple(part.strip() for part in layers.split(","))
    proxy = Descend(
        retain=TargetError(distance), optimizer=Adam(proxy_lr), steps=proxy_steps, batch=batch, norm_stats="live"
    )
    follow = Descend(
        forget=FollowTeacher("blindspot", distance, attention, patterns),
        retain=TargetError(distance),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
    return _Blindspot(proxy, follow, share, make)


@dataclass(frozen=True)
class _Blindspot:
    """Train the proxy, follow it; the Case's own teachers come back."""

    proxy: Descend
    follow: Descend
    share: float | None
    make: Callable[[], nn.Module] | None = field(repr=False)

    def __call__(self, case: Case) -> Case:
        if not self.follow.steps:
            return case
        key, rng = case.rng.take()
        proxy = trained_afresh(case, self.proxy, key.at("blindspot"), self.make)
        forget, retain = (len(case.request.data(name)) for name in ("forget", "retain"))
        share = forget / (forget + retain) if self.share is None else self.share
        follow = replace(self.follow, combine=Weighted({"forget": share, "retain": 1.0 - share}))
        teachers = {**case.teachers, "blindspot": proxy}
        return replace(follow(replace(case, rng=rng, teachers=teachers)), teachers=case.teachers)
