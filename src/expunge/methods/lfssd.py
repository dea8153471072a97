"""Loss-free selective synaptic dampening (Foster et al., ICLR 2024, tiny papers): SSD without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Stage
from expunge.curvature import absolutes
from expunge.dampening import Dampen
from expunge.registry import AtLeastOne, NonNegative, Range, Share, method
from expunge.tasks.causal_lm import IGNORED


@method(
    labels=False,
    paper="arXiv:2402.19308",
    status="reproduced",
    needs={"forget", "retain"},
    dose="exponent",
    cost={"forward": "n_forget + n_retain", "backward": "n_forget + n_retain"},
    departures={
        "importance": "absolute gradients of single examples; the authors take that of a batch mean, in which signs cancel, "
        "so that their thresholds do not carry over",
        "threshold": "by default the share of weights selected is fixed; the authors fix the threshold",
        "strength": "0.1 by default; 1 in the authors' code",
        "guard": "the exponent is lowered until the retain loss keeps its bound, which reads labels; the authors have no "
        "guard, and rise=None none here",
        "tokens": "of a language model the logits that predict answer tokens, per token; the paper is on classifiers",
        "contract:adapter_moves": "it shrinks the weights in scope, and the change that a new adapter makes is 0 already",
    },
)
def lfssd(
    *,
    threshold: Annotated[float | None, Range(0)] = None,
    share: Share = 0.1,
    strength: NonNegative = 0.1,
    exponent: NonNegative = 1.0,
    rise: Annotated[float | None, Range(0, 1)] = 0.05,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Dampen the weights to which the size of the output on the forget data owes far more than on all data. No training.

    Where I_f > threshold * I_D: ``w <- w * min((strength I_D / I_f) ** exponent, 1)``, with I the mean over examples of
    |grad of the squared length of the output|, and D = forget + retain. No label is read, except by the guard. Since D
    contains the forget data, I_f / I_D <= 1 / (forget share): a threshold at or above that selects nothing, which is said.

    What makes an output long need not be what makes it right: it promises no more than SSD, and finds other weights.

    Formula: I(S) = mean over S of |grad_theta sum_j f_theta(x)_j^2|.

    Args:
        threshold: alpha, >= 0; None chooses the one that selects `share` of the weights that any example uses, never
            below 1.
        share: of the weights in scope to select when `threshold` is None, in [0, 1].
        strength: lambda, >= 0: a selected weight keeps the share strength * I_D / I_f of itself.
        exponent: dose, >= 0; 0 changes nothing, 1 is the paper's.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1]; None does not look, and then no
            label is read at all.
        chunk: examples differentiated together, >= 1; the result does not depend on it, to rounding.
    """
    return Dampen(OutputLength(), absolutes, threshold, share, strength, exponent, rise, chunk)


@dataclass(frozen=True)
class OutputLength:
    """Squared length of what the model says, per unit; of logits per token, those that predict an answer."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task
        said = task.outputs(case.model, batch)
        square = (said if said.dtype == torch.float64 else said.float()).square()
        if hasattr(task, "labels") and square.ndim == 3:
            square = square * (task.labels(batch) != IGNORED)[..., None]
        return square.flatten(1).sum(1) / task.units(batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)
