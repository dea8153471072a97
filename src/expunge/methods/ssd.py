"""Selective synaptic dampening (Foster et al., AAAI 2024): shrink the weights that matter to the forget data alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from expunge.core import Case, Grads, Key, Stage
from expunge.curvature import squares
from expunge.edits import dampen, selected
from expunge.guarded import guarded_edit
from expunge.objectives import NLL
from expunge.registry import AtLeastOne, NonNegative, Range, Share, method
from expunge.runtime import threshold as level_of


@method(
    paper="arXiv:2308.07707",
    needs={"forget", "retain"},
    dose="exponent",
    cost={"forward": "n_forget + n_retain", "backward": "n_forget + n_retain"},
    departures={
        "importance": "squared gradients of single examples; the authors square the gradient of a batch mean, "
        "which depends on the batch size, so their thresholds (10 and more) do not carry over",
        "threshold": "by default the share of weights selected is fixed; the authors fix the threshold",
        "strength": "0.3 by default; 1 in the authors' code",
        "guard": "the exponent is lowered until the retain loss keeps its bound; the authors have no guard",
    },
)
def ssd(
    *,
    threshold: Annotated[float | None, Range(0)] = None,
    share: Share = 0.03,
    strength: NonNegative = 0.3,
    exponent: NonNegative = 1.0,
    rise: Share = 0.05,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Dampen the weights whose importance to the forget data far exceeds that to all data. No training.

    Where I_f > threshold * I_D: ``w <- w * min((strength I_D / I_f) ** exponent, 1)``, with I the diagonal empirical
    Fisher information, a mean over EXAMPLES, and D = forget + retain. Since D contains the forget data,
    I_f / I_D <= 1 / (forget share): a threshold at or above that selects nothing, and the run then says so.

    It does not promise that retain performance is kept beyond the guard's bound, nor that what the selected weights
    knew is stored nowhere else. Normalisation weights are dampened as any other; buffers are not touched.

    Args:
        threshold: alpha, >= 0; None chooses the one that selects `share` of the weights that any example uses, never
            below 1, hence always below 1 / (forget share) where any weight can be selected.
        share: of the weights in scope to select when `threshold` is None, in [0, 1].
        strength: lambda, >= 0: a selected weight keeps the share strength * I_D / I_f of itself.
        exponent: dose, >= 0; 0 changes nothing, 1 is the paper's.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1].
        chunk: examples differentiated together, >= 1; the result does not depend on it, to rounding.
    """
    return _Dampen(threshold, share, strength, exponent, rise, chunk)


@dataclass(frozen=True)
class _Dampen:
    threshold: float | None
    share: float
    strength: float
    exponent: float
    rise: float
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        forget, whole, part = self._importances(case, key)
        level = _threshold(forget, whole, self.share) if self.threshold is None else float(self.threshold)
        count = selected(forget, whole, level)
        case.meter.history.append({"threshold": level, "selected": float(count), "forget_share": part})
        if count == 0:
            case.meter.note(_nothing(level, part, forget, whole))
            return replace(case, rng=rng)
        weights = {name: p.detach().clone() for name, p in case.scope.parameters(case.model).items()}
        guarded_edit(
            case,
            lambda dose: dampen(weights, forget, whole, level, self.strength, dose),
            self.exponent,
            key,
            name="exponent",
            rise=self.rise,
        )
        return replace(case, rng=rng)

    def _importances(self, case: Case, key: Key) -> tuple[Grads, Grads, float]:
        """(I_f, I_D, forget share), each example of forget and retain differentiated once."""
        forget, n_forget = squares(case, case.request.data("forget"), NLL(), self.chunk, key.at("forget"))
        retain, n_retain = squares(case, case.request.data("retain"), NLL(), self.chunk, key.at("retain"))
        total = n_forget + n_retain
        whole = {name: (forget[name] + retain[name]) / total for name in forget}
        return {name: value / n_forget for name, value in forget.items()}, whole, n_forget / total


def _ratios(forget: Grads, whole: Grads) -> Grads:
    """I_f / I_D of the weights that any example uses, flat."""
    return {name: (forget[name] / whole[name])[whole[name] > 0] for name in forget}


def _threshold(forget: Grads, whole: Grads, share: float) -> float:
    ratios = _ratios(forget, whole)
    count = sum(ratio.numel() for ratio in ratios.values())
    if count == 0 or share == 0:
        return float("inf")
    return max(1.0, level_of(ratios, max(share, 1.0 / count)) * (1 - 1e-6))  # just below: the inequality is strict


def _nothing(level: float, part: float, forget: Grads, whole: Grads) -> str:
    if not any(bool((value > 0).any()) for value in whole.values()):
        return "no weight was selected, nothing changed: the loss of no example depends on a weight in scope; widen the scope"
    if level == float("inf"):
        return "no weight was selected, nothing changed: share is 0; give a larger share, or a threshold"
    if level >= 1.0 / part:
        return (
            f"no weight was selected, nothing changed: the threshold is {level:g}, and since the forget data is "
            f"{part:.3g} of all data no importance ratio can exceed 1 / {part:.3g} = {1 / part:.4g}; give a lower "
            f"threshold, or None"
        )
    ratios = torch.cat([ratio.flatten() for ratio in _ratios(forget, whole).values()])
    largest = float(ratios.max()) if ratios.numel() else 0.0
    return (
        f"no weight was selected, nothing changed: the threshold is {level:g} and the largest importance ratio of "
        f"any weight is {largest:.4g}; give a lower threshold, or None"
    )
