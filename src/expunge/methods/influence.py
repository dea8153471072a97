"""Influence unlearning: one Newton-like step away from the forget data (Koh and Liang 2017; Izzo et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from expunge import runtime
from expunge.core import Case, Data, Grads, Key, Stage
from expunge.curvature import mean_gradient, released, woodfisher_exact
from expunge.guarded import guarded_edit
from expunge.objectives import NLL
from expunge.registry import AtLeastOne, NonNegative, Positive, Share, method

_ROWS = "n_forget + n_retain + min(samples + (recursion == 'released'), n_retain)"


@method(
    paper="arXiv:2304.04934",
    status="reproduced",
    needs={"forget", "retain"},
    dose="scale",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "recursion": "the exact inverse by default; the released one hangs on the first example that is drawn",
        "scale": "2 by default, where the Newton step is 1; the released code's is 0.2, others search up to 100",
        "guard": "the scale is lowered until the retain loss keeps its bound; the authors retune it per model",
        "samples": "with fewer retain examples than asked for, the recursion's n is what there is",
    },
)
def influence(
    *,
    scale: NonNegative = 2.0,
    recursion: Literal["released", "exact"] = "exact",
    samples: AtLeastOne = 1000,
    damping: Positive = 0.1,
    rise: Share = 0.05,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Add ``scale * H^-1 v`` to the weights, where v = (N_f / N) (g_f - g_r) and H is an empirical Fisher matrix.

    g_f and g_r are the mean gradients of the NLL on the forget and the retain data, N_f and N their numbers: at an
    optimum of the whole loss v = -g_r, so that scale 1 is a Newton step on the retain loss. It is a local
    approximation: it promises nothing far from an optimum, or where the empirical Fisher is far from the Hessian.

    Args:
        scale: alpha, dose, >= 0; 0 changes nothing.
        recursion: how H^-1 v is computed from single-example gradients. "exact": the inverse of ``damping I`` + the
            empirical Fisher (memory for `samples` gradients). "released": that of the published code (memory for two
            gradients), which amounts to v less a multiple of one gradient.
        samples: retain examples for H, >= 1; all of them where there are fewer. "released" reads one more.
        damping: of the exact form, > 0, in units of a squared gradient.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1].
        chunk: examples differentiated together, >= 1; the result does not depend on it, to rounding.
    """
    return _Influence(scale, recursion, samples, damping, rise, chunk)


@dataclass(frozen=True)
class _Influence:
    scale: float
    recursion: str
    samples: int
    damping: float
    rise: float
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        step = self._step(case, self._vector(case, key), key)
        weights = {name: p.detach().clone() for name, p in case.scope.parameters(case.model).items()}

        def at(scale: float) -> Grads:
            return {name: torch.add(weight, step[name], alpha=scale) for name, weight in weights.items()}

        taken = guarded_edit(case, at, float(self.scale), key, name="scale", rise=self.rise)
        case.meter.history.append({"scale": taken, "step_norm": taken * math.sqrt(runtime.dot(step, step))})
        return replace(case, rng=rng)

    def _vector(self, case: Case, key: Key) -> Grads:
        """v; a parameter that only one of the two data sets reaches has a gradient of zero on the other."""
        forget, retain = case.request.data("forget"), case.request.data("retain")
        g_f = mean_gradient(case, forget, NLL(), self.chunk, key.at("forget"))
        g_r = mean_gradient(case, retain, NLL(), self.chunk, key.at("retain"))
        share = _weight(forget) / (_weight(forget) + _weight(retain))
        parameters = case.scope.parameters(case.model)
        zero = {name: torch.zeros_like(parameters[name]) for name in parameters}
        return {name: share * (g_f.get(name, zero[name]) - g_r.get(name, zero[name])) for name in parameters}

    def _step(self, case: Case, vector: Grads, key: Key) -> Grads:
        retain = case.request.data("retain")
        count = min(self.samples + (self.recursion == "released"), len(retain))
        chosen = torch.randperm(len(retain), generator=key.at("samples").generator())[:count]
        data = retain.select(chosen)
        if self.recursion == "released":
            return released(case, data, NLL(), vector, self.chunk, key.at("curvature"))
        return woodfisher_exact(case, data, NLL(), vector, self.damping, self.chunk, key.at("curvature"))


def _weight(data: Data) -> float:
    """How much the examples weigh together."""
    return float(data.columns["weight"].double().sum()) if "weight" in data.columns else float(len(data))
