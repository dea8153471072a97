"""Counterfactual explanations that allow for deletions: classifiers with a network before a linear head.

First order, through the head alone: nothing is promised, the share that stays valid is to be measured (retrain and
ask). Explanations made for k deletions withstand k at random far oftener than the k worst: make them for more than you
expect. For linear classifiers, held to exact retraining or with a proof: ``recourse``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core import Refused, eval_mode
from expunge.guarantees.linear import solve
from expunge.guarantees.recourse import Explanations

LARGEST = 4000  # weights of the head, whose Hessian is solved densely
ROUNDS = 4  # of a stiffer penalty
BISECTIONS = 20


@dataclass(frozen=True, eq=False)
class HeadInfluence:
    """What the deletion of each training example does to the scores of a network, through its last linear layer.

    The features are taken as they are; the head as if at the optimum of cross-entropy + ridge / 2 ||W||^2 on them. Then
    deleting example i moves the head by H^-1 grad l_i to first order. Build it with ``HeadInfluence.of``.

    Attributes:
        features: inputs [b, ...] -> [b, d], differentiable. weights: [C, d + 1], the bias last.
        effects: [n, C, d + 1], float64.
    """

    features: nn.Module = field(repr=False)
    weights: Tensor
    effects: Tensor

    @staticmethod
    def of(features: nn.Module, head: nn.Linear, inputs: Tensor, labels: Tensor, ridge: float) -> HeadInfluence:
        """Influences of the training examples.

        Args:
            features, head: the two parts of the classifier ``head(features(x))``.
            inputs: [n, ...]. labels: [n] int64, 0 .. C-1.
            ridge: > 0, of the sum of losses: the weight decay of training, or a damping where there was none.

        Raises:
            Refused: for labels outside the classes, a ridge that is not positive, or a head of over 4,000 weights.
        """
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
        weights = torch.cat([head.weight.detach().double(), bias.double()[:, None]], dim=1)
        classes = len(weights)
        if not (ridge > 0 and math.isfinite(ridge)):
            raise Refused(f"ridge must be a positive number, found {ridge!r}")
        if weights.numel() > LARGEST:
            raise Refused(f"the head has {weights.numel()} weights: its Hessian is solved densely up to {LARGEST}")
        if len(labels) != len(inputs) or not bool(((labels >= 0) & (labels < classes)).all()):
            raise Refused(f"labels must be one of 0 .. {classes - 1} for each of the {len(inputs)} examples")
        with torch.no_grad(), eval_mode(features):
            found = _with_one(features(inputs).flatten(1).double())
        chances = (found @ weights.T).softmax(1)
        slopes = chances - torch.nn.functional.one_hot(labels.long(), classes)
        spread = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
        hessian = torch.einsum("ncj,nd,ne->cdje", spread, found, found).reshape(weights.numel(), weights.numel())
        hessian = hessian + ridge * torch.eye(weights.numel(), dtype=torch.float64)
        gradients = (slopes[:, :, None] * found[:, None, :]).flatten(1)
        effects = solve(hessian, gradients.T).T.reshape(len(found), *weights.shape)
        return HeadInfluence(features, weights, effects)

    def worst(self, points: Tensor, desired: Tensor, k: int) -> Tensor:
        """[m] the least lead of the desired class over any rival after at most `k` deletions, to first order.

        ``min over rivals j of (f_y - f_j)(x) + sum of the k smallest min(I_i(x), 0)``; differentiable in the points.
        """
        lead, moved = self._leads(points, desired, k)
        if k:
            lead = lead + moved.clamp_max(0.0).topk(k, dim=1, largest=False).values.sum(1)
        return lead.masked_fill(torch.nn.functional.one_hot(desired, len(self.weights)).bool(), math.inf).amin(1)

    def adversarial(self, points: Tensor, desired: Tensor, k: int) -> np.ndarray:
        """[m, k] positions whose deletion hurts each point most, against the rival that then comes nearest."""
        with torch.no_grad(), eval_mode(self.features):
            lead, moved = self._leads(points, desired, k)
            least, rows = moved.topk(k, dim=1, largest=False)
            after = lead + least.clamp_max(0.0).sum(1)
            rival = after.scatter(1, desired[:, None], math.inf).argmin(1)
        return rows[torch.arange(len(points)), :, rival].numpy()

    def _leads(self, points: Tensor, desired: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[m, C] the lead over each class, and [m, n, C] what deleting each example adds to it."""
        if not 0 <= k < len(self.effects):
            raise Refused(f"k must lie in 0 .. {len(self.effects) - 1} (examples less one), found {k!r}")
        found, row = _with_one(self.features(points).flatten(1).double()), torch.arange(len(points))
        scores = found @ self.weights.T
        moved = torch.einsum("md,ncd->mnc", found, self.effects)
        return scores[row, desired][:, None] - scores, moved[row, :, desired][:, :, None] - moved

    def explain(
        self,
        points: Tensor,
        desired: Tensor | int,
        *,
        k: int = 0,
        margin: float = 1e-3,
        steps: int = 300,
        lr: float = 0.05,
    ) -> Explanations:
        """Points near `points` whose desired class leads by the margin after any `k` deletions, to first order.

        Adam on ``||x' - x||^2`` + a growing penalty for missing the margin; then the nearest point on the line back. A
        local search: the cost is an upper bound of the least cost, and nothing is promised of retrained networks.

        Args:
            points: [m, ...] inputs, to be changed. desired: [m] or one class.
            k: deletions to allow for. margin: > 0, of the lead in logits.
            steps: gradient steps in each of four rounds, >= 1. lr: of Adam, > 0, in units of the input.
        """
        if not (margin > 0 and steps >= 1 and lr > 0):
            raise Refused(f"margin, lr must be > 0 and steps >= 1, found {margin!r}, {lr!r}, {steps!r}")
        wanted = torch.as_tensor(desired).long().expand(len(points))
        if not bool(((wanted >= 0) & (wanted < len(self.weights))).all()):
            raise Refused(f"desired classes must lie in 0 .. {len(self.weights) - 1}, found {desired!r}")
        with eval_mode(self.features):
            best = self._searched(points, wanted, k, margin, steps, lr)
            best = self._back(points, best, wanted, k, margin)
        moved = best.flatten(1).double().numpy()
        cost = np.linalg.norm(moved - points.flatten(1).double().numpy(), axis=1)
        return Explanations(moved, wanted.numpy(), cost, np.isfinite(moved).all(1))

    def _searched(self, start: Tensor, wanted: Tensor, k: int, margin: float, steps: int, lr: float) -> Tensor:
        """The cheapest point met that holds; NaN where none was."""
        best = torch.full_like(start, math.nan)
        price = torch.full((len(start),), math.inf, dtype=torch.float64)
        at, first, second, count = start.clone(), torch.zeros_like(start), torch.zeros_like(start), 0
        for weight in (10.0**power for power in range(ROUNDS)):
            for _ in range(steps):
                count += 1
                point = at.detach().requires_grad_(True)
                lead = self.worst(point, wanted, k)
                length = (point - start).flatten(1).double().square().sum(1)
                with torch.no_grad():
                    better = (lead >= margin) & (length < price)
                    price = torch.where(better, length, price)
                    best[better] = point[better]
                missing = (1.1 * margin + 1e-3 - lead).clamp_min(0.0)
                (slope,) = torch.autograd.grad((length + weight * missing).sum(), point)
                first = 0.9 * first + 0.1 * slope
                second = 0.999 * second + 0.001 * slope.square()
                at = at - lr * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        return best

    def _back(self, start: Tensor, found: Tensor, wanted: Tensor, k: int, margin: float) -> Tensor:
        """The point nearest to `start` on the line to `found` that bisection finds to hold."""
        shape = (-1, *[1] * (start.ndim - 1))
        low, high = torch.zeros(len(start)), torch.ones(len(start))
        with torch.no_grad():
            good = self.worst(start, wanted, k) >= margin
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                holds = self.worst(start + middle.view(shape).to(start) * (found - start), wanted, k) >= margin
                high, low = torch.where(holds, middle, high), torch.where(holds, low, middle)
            moved = start + high.view(shape).to(start) * (found - start)
            held = self.worst(moved, wanted, k) >= margin  # of the very point that is given, after rounding
            moved = torch.where(held.view(shape), moved, found)
        return torch.where(good.view(shape), start, moved)


def _with_one(features: Tensor) -> Tensor:
    """A constant column for the bias."""
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
