"""Gradient saliency: which coordinates an unlearning run may move (SalUn, arXiv:2310.12508)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from expunge import runtime
from expunge.core import Batch, Case, Data, Grads, Key, Objective, Refused
from expunge.objectives import NLL
from expunge.oracle import differentiable, example_weights, per_example, prepared, sum_gradient
from expunge.scope import Scope


@dataclass(frozen=True)
class Saliency:
    """Narrow the Case's scope to the share `keep` of its coordinates with the largest saliency; no weight changes.

    Saliency is the absolute value of the SUM of the forget loss's gradients over the whole of the forget data, at the
    weights as they stand: signs cancel across examples, and the batch size does not matter (to rounding). It is not a
    sum of absolute values, which gives another mask. Entries are ranked over all tensors at once, among those already
    in scope. A coordinate on which the loss does not depend is never kept, so that fewer than `keep` may be.

    It does not promise that the coordinates kept are the ones that store the forget data.

    Formula: scope & 1[|sum_i grad l(theta; x_i)| >= tau], tau the (1 - keep) quantile.

    Args:
        keep: share of the coordinates in scope, in [0, 1]; 1 leaves the scope as it is and costs nothing.
        objective: the loss that is differentiated; its sign does not matter.
        batch: examples per pass; for memory only.

    Raises:
        Refused: for a share outside [0, 1], or a request without forget data.
    """

    keep: float = 0.5
    objective: Objective = NLL()
    batch: int = 64

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise Refused(f"Saliency: keep must lie in [0, 1], found {self.keep!r}")

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.keep == 1.0:
            return replace(case, rng=rng)
        total = summed_gradient(case, case.request.data("forget"), self.objective, self.batch, key)
        salient = top(case, {name: grad.abs() for name, grad in total.items()}, self.keep)
        return replace(case, scope=case.scope & salient, rng=rng)


def summed_gradient(case: Case, data: Data, objective: Objective, size: int, key: Key) -> Grads:
    """Gradient, in scope, of the objective's weighted SUM over all of `data`; eval mode, `size` examples at a time."""
    total: Grads | None = None
    with differentiable(case), case.meter.watch(case.model):
        for batch in prepared(case, data, size, key, objective):
            part = sum_gradient(case, _Weighed(objective), batch)
            total = part if total is None else runtime.linear((1.0, total), (1.0, part))
    return total or {}


def top(case: Case, scores: Grads, keep: float) -> Scope:
    """The share `keep` of the coordinates in scope with the largest scores (>= 0); those that score 0 are left out."""
    masks = {name: case.scope.mask(name, score) for name, score in scores.items()}
    ranked = {
        name: runtime.whole(score).flatten()
        if (mask := masks[name]) is None
        else runtime.whole(score)[runtime.whole(mask)]
        for name, score in scores.items()
    }
    level = runtime.threshold(ranked, keep)
    return Scope({name: (score >= level) & (score > 0) for name, score in scores.items()}, case.scope.universe)


@dataclass(frozen=True)
class _Weighed:
    """An objective's values times its weights: their plain sum is then the weighted sum."""

    of: Objective

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        values = per_example(case, self.of, batch)
        return values * example_weights(case, self.of, batch).to(values.dtype)
