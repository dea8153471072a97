"""Selective synaptic dampening (Foster et al., AAAI 2024): shrink the weights that matter to the forget data alone."""

from __future__ import annotations

from typing import Annotated

from expunge.core import Stage
from expunge.curvature import squares
from expunge.dampening import Dampen
from expunge.objectives import NLL
from expunge.registry import AtLeastOne, NonNegative, Range, Share, method


@method(
    paper="arXiv:2308.07707",
    needs={"forget", "retain"},
    dose="exponent",
    status="reproduced",
    cost={"forward": "n_forget + n_retain", "backward": "n_forget + n_retain"},
    departures={
        "importance": "squared gradients of single examples; the authors square the gradient of a batch mean, "
        "which depends on the batch size, so their thresholds (10 and more) do not carry over",
        "threshold": "by default the share of weights selected is fixed; the authors fix the threshold",
        "strength": "0.3 by default; 1 in the authors' code",
        "guard": "the exponent is lowered until the retain loss keeps its bound; the authors have no guard",
        "contract:adapter_moves": "it shrinks the weights in scope, and the change that a new adapter makes is 0 already",
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
    return Dampen(NLL(), squares, threshold, share, strength, exponent, rise, chunk)
