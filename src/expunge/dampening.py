"""Selective synaptic dampening as a stage: which weights, how far, and what is said where none is selected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from expunge.core import Case, Data, Grads, Key, Objective
from expunge.edits import dampen, selected
from expunge.guarded import guarded_edit
from expunge.runtime import threshold as level_of
from expunge.scope import edit

Sums = Callable[[Case, Data, Objective, int, Key], tuple[Grads, float]]
"""(importances of a data set summed over its examples, the sum of their weights)."""


@dataclass(frozen=True)
class Dampen:
    """Shrink the weights in scope whose importance to the forget data far exceeds that to all data; no descent.

    The stage of SSD (arXiv:2308.07707) and of its kin, which differ in what makes a weight important. See
    ``edits.dampen`` for the formula.

    Args:
        objective: whose gradients tell importance.
        sums: ``curvature.squares`` or ``curvature.absolutes``.
        threshold: alpha, >= 0; None chooses the one that selects `share` of the weights that any example uses.
        share: of the weights in scope, in [0, 1].
        strength: lambda, >= 0. exponent: the dose, >= 0; 0 changes nothing.
        rise: how far the retain loss may rise, as a share of the way to chance; None takes the whole dose, unwatched.
        chunk: examples differentiated together, >= 1.
    """

    objective: Objective
    sums: Sums
    threshold: float | None
    share: float
    strength: float
    exponent: float
    rise: float | None
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

        def at(dose: float) -> Grads:
            return dampen(weights, forget, whole, level, self.strength, dose)

        if self.rise is None:
            edit(case, at(self.exponent))
        else:
            guarded_edit(case, at, self.exponent, key, name="exponent", rise=self.rise)
        return replace(case, rng=rng)

    def _importances(self, case: Case, key: Key) -> tuple[Grads, Grads, float]:
        """(I_f, I_D, forget share), each example of forget and retain differentiated once."""
        forget, n_forget = self.sums(case, case.request.data("forget"), self.objective, self.chunk, key.at("forget"))
        retain, n_retain = self.sums(case, case.request.data("retain"), self.objective, self.chunk, key.at("retain"))
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
