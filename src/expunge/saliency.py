"""Gradient saliency: which coordinates an unlearning run may move (SalUn, arXiv:2310.12508; WAGLE, arXiv:2410.17509)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expunge import runtime
from expunge.core import Batch, Case, Data, Grads, Key, Objective, Refused, require
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


@dataclass(frozen=True)
class Attribution:
    """Narrow the Case's scope to the share `keep` of its coordinates that matter to forgetting and least to the rest.

    The score of a weight is the influence of setting it to 0 on the forget loss, corrected for how the retain loss would
    pull the weight (WAGLE, arXiv:2410.17509); both gradients are MEANS (of the objectives' own weights: over
    tokens for NLL) over all of their data at the weights as they stand. The authors' code sums gradients of mini-batch
    means, so that there the size of the data, and of a batch, decides how much the weight itself counts beside the
    retain gradient. At the published `hessian` of 1e-6 it hardly counts: the ranking is that of |g_r g_f|.

    Entries are ranked over all tensors at once, among those already in scope. A coordinate that scores 0 is never kept,
    so that fewer than `keep` may be. It does not promise that the coordinates kept are the ones that store the forget
    data.

    Formula: scope & 1[s >= tau], s = |(theta - g_r / hessian) g_f|, tau the (1 - keep) quantile of s.

    Args:
        keep: share of the coordinates in scope, in [0, 1]; 1 leaves the scope as it is and costs nothing.
        hessian: the one number that stands for the diagonal of the retain loss's Hessian, > 0 (gamma in the paper).
        objective: the loss whose gradient over the forget data is g_f; its sign does not matter.
        batch: examples per pass; for memory only.

    Raises:
        Refused: for a number out of its range, or a request without forget or retain data.
    """

    keep: float = 0.95
    hessian: float = 1e-6
    objective: Objective = NLL()
    batch: int = 64

    def __post_init__(self) -> None:
        require(0.0 <= self.keep <= 1.0, self, "keep", "in [0, 1]")
        require(self.hessian > 0, self, "hessian", "above 0")

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.keep == 1.0:
            return replace(case, rng=rng)
        request = case.request
        forget = mean_gradient(case, request.data("forget"), self.objective, self.batch, key.at("forget"))
        retain = mean_gradient(case, request.data("retain"), NLL(), self.batch, key.at("retain"))
        scores = attribution(case.scope.parameters(case.model), forget, retain, self.hessian)
        return replace(case, scope=case.scope & top(case, scores, self.keep), rng=rng)


def attribution(weights: Mapping[str, Tensor], forget: Grads, retain: Grads, hessian: float) -> Grads:
    """|(weight - retain / hessian) forget|, in float32 at least; where the retain loss has no gradient, it counts as 0.

    Args:
        weights: name -> Tensor.
        forget, retain: name -> gradient. A name that `forget` lacks scores nothing and is left out.
        hessian: > 0.
    """
    scores: Grads = {}
    for name, grad in forget.items():
        wide = torch.promote_types(weights[name].dtype, torch.float32)
        pulled = weights[name].detach().to(wide)
        if name in retain:
            pulled = pulled - retain[name].to(wide) / hessian
        scores[name] = (pulled * grad.to(wide)).abs()
    return scores


def summed_gradient(case: Case, data: Data, objective: Objective, size: int, key: Key) -> Grads:
    """Gradient, in scope, of the objective's weighted SUM over all of `data`; eval mode, `size` examples at a time."""
    return _summed(case, data, objective, size, key)[0]


def mean_gradient(case: Case, data: Data, objective: Objective, size: int, key: Key) -> Grads:
    """Gradient, in scope, of the objective's weighted MEAN over all of `data`; eval mode, `size` examples at a time."""
    total, weight = _summed(case, data, objective, size, key)
    if total and weight <= 0:
        raise Refused(f"the weights of {len(data)} examples sum to {weight:g}: expected at least one positive weight")
    return {name: grad / weight for name, grad in total.items()}


def _summed(case: Case, data: Data, objective: Objective, size: int, key: Key) -> tuple[Grads, float]:
    """The gradient of the weighted sum, and the sum of the weights."""
    total: Grads | None = None
    weight = 0.0
    with differentiable(case), case.meter.watch(case.model):
        for batch in prepared(case, data, size, key, objective):
            weight += float(example_weights(case, objective, batch).sum())
            part = sum_gradient(case, _Weighed(objective), batch)
            total = part if total is None else runtime.linear((1.0, total), (1.0, part))
    return total or {}, weight


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
