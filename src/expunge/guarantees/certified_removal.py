"""Certified removal from linear heads: a noisy objective, a Newton step per request, and a budget that is kept.

Paper: Guo, Goldstein, Hannun and van der Maaten, "Certified Data Removal from Machine Learning Models", ICML 2020
(arXiv:1911.03030). Written from the formulas; the authors' code was not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core import Key, Refused
from expunge.guarantees.features import OnFeatures
from expunge.guarantees.linear import Loss, Problem, check_labels, check_rows, solve, spectral_norm
from expunge.guarantees.promise import Promise
from expunge.journal import load_tree, save_tree

LIPSCHITZ = {"logistic": 0.25, "squared": 0.0}  # of the loss's second derivative: the paper's 1/4 is above 1/(6 sqrt 3)
_NAMES = ("weights", "noise", "inputs", "targets", "ids", "removed", "settings")


class BudgetSpent(Refused):
    """A removal that the certificate no longer covers: nothing was changed, and the head must be retrained."""


@dataclass(frozen=True, eq=False)
class CertifiedHead:
    """A linear head from which examples can be removed with a certificate, and what it needs for that.

    Certified: for any set of at most the budget's removals, chosen without looking at the published weights, the law of
    the weights is within (epsilon, delta) of the law of weights retrained without those examples. It does NOT hold

    - for features that were themselves trained on the removed examples (unless that training was private);
    - for requests that depend on weights published before, nor jointly for several published versions;
    - where ``noise`` or this state becomes known: publish ``weights`` only (``module()``, ``classifier()``).

    The theorem treats the residual as a shift of the noise. The residual depends on the noise too, so that the exact
    ratio of densities has one more factor, a determinant near 1, which the theorem as we know it does not carry.

    Attributes:
        weights, noise: [d, C] float64; C = 1 for labels -1 and +1, and one column per class or target otherwise.
        inputs: [n, d] float64, the examples that are left. targets: [n, C]. ids: [n] int64.
        removed: [k] int64, ids that are gone.
        loss: "logistic" or "squared". penalty: lambda > 0, per example.
        promise: what is certified.
        spent: bound on the gradient residual so far, summed over the columns. measured: the residual itself.
    """

    weights: Tensor
    noise: Tensor
    inputs: Tensor
    targets: Tensor
    ids: Tensor
    removed: Tensor
    loss: Loss
    penalty: float
    promise: Promise
    spent: float
    measured: float

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"CertifiedHead({len(self)} examples, {len(self.removed)} removed, {self.spent:.3g} of {self.promise.budget:.3g} spent)"

    @property
    def problem(self) -> Problem:
        """The noisy objective on the examples that are left."""
        return Problem(self.inputs, self.targets, self.penalty * len(self), self.noise, self.loss)

    @property
    def remaining(self) -> float:
        """What is left of the budget, in gradient norm."""
        return self.promise.budget - self.spent

    @property
    def distance_bound(self) -> float:
        """Frobenius distance to exact retraining with the same noise, at most: residual / (lambda n)."""
        return self.spent / (self.penalty * len(self))

    def remove(self, ids: Sequence[int] | Tensor) -> CertifiedHead:
        """The head without these examples, by one Newton step ``w + H^-1 Delta`` on what is left.

        ``Delta = sum over the removed of (lambda w + gradient)``, H the Hessian on the examples that are left. Adds
        ``L ||X||_2 ||H^-1 Delta|| ||X H^-1 Delta||`` per column to what is spent, L the Lipschitz constant of the
        second derivative of the loss: 0 for the squared loss, whose removal is exact to rounding. What is spent is
        never less than the residual that is measured. Cost: O(n d^2 + d^3) per column, once for the whole batch.

        Args:
            ids: int64, unique, among ``ids``; fewer than all of them.

        Raises:
            Refused: for ids that are unknown, repeated or removed already.
            BudgetSpent: where the certificate would be broken; this head is as it was. Call ``retrain``.
        """
        gone = self._chosen(ids)
        left = replace(self, inputs=self.inputs[~gone], targets=self.targets[~gone], ids=self.ids[~gone])
        problem, step = left.problem, newton_removal(self, gone)
        weights = self.weights + step
        measured = residual(problem, weights)
        spent = max(self.spent + residual_bound(step, left.inputs, self.loss), measured)
        if not spent <= self.promise.budget:
            raise BudgetSpent(
                f"removing {int(gone.sum())} more examples would leave a residual of up to {spent:.3g}, and noise of "
                f"sigma {self.promise.sigma:g} hides {self.promise.budget:.3g}: the certificate is used up; retrain without "
                f"them (retrain), or ask for a larger epsilon, sigma or penalty from the start"
            )
        removed = torch.cat([self.removed, self.ids[gone]])
        return replace(left, weights=weights, removed=removed, spent=spent, measured=measured)

    def retrain(self, ids: Sequence[int] | Tensor = (), *, key: Key) -> CertifiedHead:
        """A head trained anew without these examples, with fresh noise and the whole budget.

        Args:
            ids: to leave out besides those that are gone already; none by default.
            key: of the noise; secret, and never used before.
        """
        gone = self._chosen(ids) if len(ids) else torch.zeros(len(self), dtype=torch.bool)
        fresh = replace(
            self,
            noise=_noise(self.weights.shape, self.promise.sigma, key),
            inputs=self.inputs[~gone],
            targets=self.targets[~gone],
            ids=self.ids[~gone],
            removed=torch.cat([self.removed, self.ids[gone]]),
        )
        return _trained(fresh)

    def module(self) -> nn.Linear:
        """The weights as ``nn.Linear`` without bias, float64; two outputs -w/2, w/2 for labels -1 and +1."""
        rows = self.weights.T
        if self.loss == "logistic" and len(rows) == 1:
            rows = torch.cat([-rows / 2, rows / 2])
        head = nn.Linear(rows.shape[1], len(rows), bias=False, dtype=torch.float64, device="meta")  # draws nothing
        head.weight = nn.Parameter(rows.clone())
        return head

    def classifier(self, features: nn.Module) -> nn.Module:
        """`features`, each row scaled to length 1, and this head: one model, to be audited like any other."""
        return OnFeatures(features, self.module()).eval()

    def save(self, path: str | Path) -> None:
        """Write the whole state, noise and examples included (keep it private), as one safetensors file."""
        settings = {"loss": self.loss, "penalty": self.penalty, "spent": self.spent, "measured": self.measured}
        tree = {name: getattr(self, name) for name in _NAMES[:-1]}
        save_tree(Path(path), {**tree, "settings": settings, "promise": vars(self.promise)})

    @staticmethod
    def load(path: str | Path) -> CertifiedHead:
        """Read what ``save`` wrote. No code of the file is run.

        Raises:
            Refused: for a file that is missing, damaged or of something else.
        """
        if not Path(path).is_file():
            raise Refused(f"there is no certified head at {path}")
        tree = load_tree(Path(path))
        if not isinstance(tree, dict) or not {*_NAMES, "promise"} <= tree.keys():
            raise Refused(f"{path} holds no certified head: expected a file written by CertifiedHead.save")
        settings, promise = tree.pop("settings"), Promise(**tree.pop("promise"))
        return CertifiedHead(**tree, **settings, promise=promise)

    def _chosen(self, ids: Sequence[int] | Tensor) -> Tensor:
        """[n] bool, the examples of these ids."""
        wanted = torch.as_tensor(ids, dtype=torch.int64).flatten()
        if len(wanted) == 0:
            raise Refused("no ids to remove were given: expected at least one")
        if len(torch.unique(wanted)) != len(wanted):
            raise Refused(f"ids to remove repeat: {len(wanted)} were given, {len(torch.unique(wanted))} are different")
        for known, what in ((self.removed, "was removed already"), (self.ids, "")):
            found = torch.isin(wanted, known)
            if what and bool(found.any()):
                raise Refused(f"id {int(wanted[found][0])} {what}: give ids that this head still holds")
            if not what and not bool(found.all()):
                raise Refused(f"id {int(wanted[~found][0])} is none of the {len(self)} examples that this head holds")
        if len(wanted) == len(self):
            raise Refused(f"all {len(self)} examples would be removed: at least one must stay, or train on other data")
        return torch.isin(self.ids, wanted)


def train_certified(
    inputs: Tensor,
    targets: Tensor,
    *,
    promise: Promise,
    penalty: float,
    key: Key,
    loss: Loss = "logistic",
    classes: int | None = None,
    ids: Tensor | None = None,
) -> CertifiedHead:
    """Train a linear head whose examples can be removed: the optimum of a noisy, regularised objective.

    ``sum_i loss(w x_i, y_i) + lambda n / 2 ||w||^2 + b w``, ``b ~ N(0, sigma^2 I)``; Newton's method in float64 down to
    a gradient norm of 1e-10, which counts as spent. It does not promise accuracy: compare with ``sigma`` next to 0.

    Args:
        inputs: [n, d], finite; for the logistic loss each row of length at most 1 (``frozen_features`` scales them). A
            bias is a constant column, added before scaling.
        targets: [n], -1 or +1; or 0 .. classes-1 with `classes`; or [n] or [n, t] numbers for the squared loss.
        promise: what is to be certified.
        penalty: lambda > 0 per example.
        key: of the noise: secret and used once, ``Key(secrets.randbits(62))`` in earnest. Whoever can guess it sees
            through the noise. The generator and its floats are not hardened against an attack on their last bits.
        loss: "logistic"; "squared" is (w x - y)^2 / 2.
        classes: number of classes >= 2 of one-vs-all logistic heads; None for labels -1 and +1, and for "squared".
        ids: int64 [n], unique; 0 .. n-1 by default.

    Raises:
        Refused: for labels, rows, ids or settings out of range.
        RunFailed: where Newton's method does not reach the optimum.
    """
    features, columns = _checked(inputs, targets, loss, classes, penalty)
    numbers = torch.arange(len(features)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if numbers.shape != (len(features),) or len(torch.unique(numbers)) != len(numbers):
        raise Refused(f"ids must be one different whole number for each of the {len(features)} examples")
    shape = (features.shape[1], columns.shape[1])
    weights, none = torch.zeros(shape, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    noise = _noise(shape, promise.sigma, key)
    return _trained(
        CertifiedHead(weights, noise, features, columns, numbers, none, loss, float(penalty), promise, 0.0, 0.0)
    )


def newton_removal(head: CertifiedHead, gone: Tensor) -> Tensor:
    """[d, C] the step ``H^-1 Delta`` that takes examples `gone` ([n] bool) out of a head; added, not taken away."""
    rest = Problem(head.inputs[~gone], head.targets[~gone], head.penalty * int((~gone).sum()), head.noise, head.loss)
    pull = head.problem.gradient(head.weights) - rest.gradient(head.weights)
    columns = range(pull.shape[1])
    return torch.cat([solve(rest.hessian(head.weights, c), pull[:, c : c + 1]) for c in columns], dim=1)


def residual_bound(step: Tensor, inputs: Tensor, loss: Loss) -> float:
    """Bound on the gradient left by a Newton step, summed over columns: ``L ||X||_2 ||s|| ||X s||`` for rows <= 1.

    Args:
        step: [d, C]. inputs: [n, d], the examples that are left.
    """
    if LIPSCHITZ[loss] == 0.0:
        return 0.0
    each = step.norm(dim=0) * (inputs @ step).norm(dim=0)
    return LIPSCHITZ[loss] * spectral_norm(inputs) * float(each.sum())


def residual(problem: Problem, weights: Tensor) -> float:
    """The norm of the gradient, summed over columns: 0 at the optimum."""
    return float(problem.gradient(weights).norm(dim=0).sum())


def _noise(shape: Sequence[int], sigma: float, key: Key) -> Tensor:
    return sigma * torch.randn(tuple(shape), dtype=torch.float64, generator=key.at("objective").generator())


def _trained(head: CertifiedHead) -> CertifiedHead:
    """The head at the optimum of its own objective, with nothing spent but the gradient norm that is left."""
    problem = head.problem
    weights = problem.optimum()
    left = residual(problem, weights)
    if left > head.promise.budget:
        raise Refused(f"the budget {head.promise.budget:.3g} is below what training leaves ({left:.3g}): raise sigma")
    return replace(head, weights=weights, spent=left, measured=left)


def _checked(inputs: Tensor, targets: Tensor, loss: str, classes: int | None, penalty: float) -> tuple[Tensor, Tensor]:
    """Inputs [n, d] and targets [n, C] in float64, refused where they cannot be used."""
    if loss not in LIPSCHITZ:
        raise Refused(f"loss must be one of {', '.join(LIPSCHITZ)}, found {loss!r}")
    if not (penalty > 0 and math.isfinite(penalty)):
        raise Refused(f"penalty must be a positive number (the objective must be strongly convex), found {penalty!r}")
    features = check_rows(inputs, math.inf if loss == "squared" else 1.0)
    values = torch.as_tensor(targets).detach().cpu()
    if len(values) != len(features):
        raise Refused(f"{len(values)} targets were given for {len(features)} examples; give one per example")
    if loss == "squared":
        if classes is not None:
            raise Refused("classes is for the logistic loss: give the squared loss a column of numbers per target")
        columns = values.double().reshape(len(values), -1)
        if not bool(torch.isfinite(columns).all()):
            raise Refused("targets hold NaN or infinity: expected finite numbers")
        return features, columns
    return features, check_labels(values, classes)
