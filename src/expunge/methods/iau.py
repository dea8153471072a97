"""Influence approximation unlearning (Liu et al., 2025): one step that learns the retain data and unlearns the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from expunge import runtime
from expunge.core import Case, Grads, Stage
from expunge.curvature import mean_gradient
from expunge.guarded import guarded_edit
from expunge.objectives import NLL
from expunge.registry import AtLeastOne, NonNegative, Share, method
from expunge.restriction import adam_first_step


@method(
    paper="arXiv:2507.23257",
    status="reproduced",
    needs={"forget", "retain"},
    dose="lr",
    cost={"forward": "n_forget + n_retain", "backward": "n_forget + n_retain"},
    departures={
        "training": "any model is taken; the authors' were trained under a penalty on the gradient's norms, which is "
        "restriction.GradientRestriction here",
        "mode": "eval mode; the authors' code differentiates in train mode, in a network without normalisation or dropout",
        "lr": "2e-2 by default; the published one is that of training, 1e-3",
        "guard": "the step is shortened until the retain loss keeps its bound; the authors have no guard",
    },
)
def iau(*, lr: NonNegative = 2e-2, rise: Share = 0.15, chunk: AtLeastOne = 64) -> Stage:
    """Take one step of a fresh Adam down the retain loss less the forget loss, each a mean over all of its data.

    The first step of Adam moves every weight by lr towards the sign of its gradient, however small that is: lr is the
    dose, not a rate. It is an approximation of removing the influence of the forget data, best where training held the
    gradients small (``GradientRestriction``); it does not promise that influence is gone, nor that one step is enough.

    Formula: theta - lr g / (|g| + 1e-8), g = grad of (mean over D_r of NLL - mean over D_f of NLL) at theta_o.

    Args:
        lr: dose, length of the step in every weight, >= 0; 0 changes nothing.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1].
        chunk: examples differentiated together, >= 1; the result does not depend on it, to rounding (the authors load
            all at once).

    Published setting: a convolutional network of 62,000 weights on CIFAR-10, lr 1e-3, trained with alpha 0.005.
    """
    return _Step(float(lr), float(rise), chunk)


@dataclass(frozen=True)
class _Step:
    lr: float
    rise: float
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.lr == 0:
            return replace(case, rng=rng)
        forget = mean_gradient(case, case.request.data("forget"), NLL(), self.chunk, key.at("forget"))
        retain = mean_gradient(case, case.request.data("retain"), NLL(), self.chunk, key.at("retain"))
        step = adam_first_step(runtime.linear((1.0, retain), (-1.0, forget)), 1.0)
        parameters = case.scope.parameters(case.model)
        weights = {name: parameters[name].detach().clone() for name in step}

        def at(lr: float) -> Grads:
            return {
                name: torch.add(w.to(step[name].dtype), step[name], alpha=lr).to(w.dtype) for name, w in weights.items()
            }

        taken = guarded_edit(case, at, self.lr, key, name="lr", rise=self.rise)
        case.meter.history.append({"lr": taken})
        return replace(case, rng=rng)
