"""Regularised linear models in float64: loss, gradient, Hessian and optimum; and the checks of what goes in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.core import Refused, RunFailed

Loss = Literal["logistic", "squared"]
TOLERANCE = 1e-10  # gradient norm per column that an optimum must reach
EXACT = 3000  # the smaller side of a matrix whose largest singular value is computed rather than bounded


@dataclass(frozen=True, eq=False)
class Problem:
    """``sum_i loss(w x_i, y_i) + ridge / 2 ||w||^2 + noise w``, one column of weights per column of targets.

    Args:
        inputs: [n, d] float64. targets: [n, C]: -1 and +1 for the logistic loss log(1 + exp(-y w x)), any numbers for
            the squared one, (w x - y)^2 / 2.
        ridge: > 0, of the whole sum. noise: [d, C], a linear term.
        loss: "logistic" or "squared".
    """

    inputs: Tensor
    targets: Tensor
    ridge: float
    noise: Tensor
    loss: Loss = "logistic"

    def value(self, weights: Tensor) -> float:
        """The objective, summed over columns."""
        scores = self.inputs @ weights
        losses = (scores - self.targets).square() / 2 if self.loss == "squared" else F.softplus(-self.targets * scores)
        return float(losses.sum() + self.ridge / 2 * weights.square().sum() + (self.noise * weights).sum())

    def gradient(self, weights: Tensor) -> Tensor:
        """[d, C]."""
        return self.inputs.T @ self.slopes(weights) + self.ridge * weights + self.noise

    def slopes(self, weights: Tensor) -> Tensor:
        """[n, C] derivative of each loss by its score."""
        scores = self.inputs @ weights
        return (
            scores - self.targets if self.loss == "squared" else -self.targets * torch.sigmoid(-self.targets * scores)
        )

    def hessian(self, weights: Tensor, column: int = 0) -> Tensor:
        """[d, d] of one column."""
        ridge = self.ridge * torch.eye(self.inputs.shape[1], dtype=torch.float64)
        return self.inputs.T @ (self.inputs * self.curvature(weights, column)[:, None]) + ridge

    def curvature(self, weights: Tensor, column: int = 0) -> Tensor:
        """[n] second derivative of each loss by its score, in one column."""
        if self.loss == "squared":
            return torch.ones(len(self.inputs), dtype=torch.float64)
        chance = torch.sigmoid(self.inputs @ weights[:, column])
        return chance * (1 - chance)

    def optimum(self, start: Tensor | None = None) -> Tensor:
        """[d, C] by Newton's method, to a gradient norm of 1e-10 per column.

        Raises:
            RunFailed: where rounding does not let it come that near.
        """
        begin = torch.zeros_like(self.noise) if start is None else start
        columns = range(self.noise.shape[1])
        weights = torch.cat([self._column(c)._newton(begin[:, c : c + 1]) for c in columns], dim=1)
        left = float(self.gradient(weights).norm(dim=0).max())
        if not left <= TOLERANCE:
            raise RunFailed(
                f"the optimum was missed: a gradient norm of {left:.3g} is left, expected at most {TOLERANCE:g}; raise the "
                f"penalty, or scale the inputs"
            )
        return weights

    def _column(self, column: int) -> Problem:
        part = slice(column, column + 1)
        return Problem(self.inputs, self.targets[:, part], self.ridge, self.noise[:, part], self.loss)

    def _newton(self, weights: Tensor, steps: int = 100) -> Tensor:
        """[d, 1]; a step that lowers neither the objective nor the gradient is halved until it does."""
        value, slope = self.value(weights), self.gradient(weights)
        for _ in range(steps):
            if float(slope.norm()) <= TOLERANCE / 10:
                break
            step = -solve(self.hessian(weights), slope)
            for halvings in range(30):
                tried = weights + step / 2**halvings
                new, gradient = self.value(tried), self.gradient(tried)
                if new < value or float(gradient.norm()) < float(slope.norm()):
                    break
            else:  # nothing is lower: at rounding
                break
            weights, value, slope = tried, new, gradient
        return weights


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """[d, k] solution for a symmetric positive definite matrix, by Cholesky."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def unit_rows(values: Tensor) -> Tensor:
    """Each row divided by its length; rows of zeros stay."""
    return F.normalize(values, dim=1, eps=torch.finfo(values.dtype).tiny)


def spectral_norm(matrix: Tensor) -> float:
    """An upper bound of the largest singular value: exact to rounding up to 3,000 columns or rows.

    Beyond that the smaller of the Frobenius norm and ``sqrt(||A||_1 ||A||_inf)``. Never power iteration, which comes
    from below and would certify too much.
    """
    if min(matrix.shape) <= EXACT:
        small = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(small.T @ small)[-1])) * (1 + 1e-9))
    absolute = matrix.abs()
    bound = min(float(matrix.norm()), math.sqrt(float(absolute.sum(0).max()) * float(absolute.sum(1).max())))
    return bound * (1 + 1e-9)


def check_rows(inputs: Tensor, longest: float = 1.0) -> Tensor:
    """[n, d] float64 on the CPU; refused where a row is not finite, or longer than `longest`."""
    features = torch.as_tensor(inputs).detach().cpu().double()
    if features.ndim != 2 or 0 in features.shape:
        raise Refused(f"inputs have shape {tuple(features.shape)}: expected [examples, features], neither of them 0")
    if not bool(torch.isfinite(features).all()):
        raise Refused("inputs hold NaN or infinity: expected finite numbers")
    found = float(features.norm(dim=1).max())
    if found > longest * (1 + 1e-9):
        raise Refused(
            f"the longest row of the inputs has length {found:.4g}, and the bounds hold for rows of length at most "
            f"{longest:g}: scale each row by its own length (unit_rows), or all by a constant that is not taken from the data"
        )
    return features


def check_labels(labels: Tensor, classes: int | None) -> Tensor:
    """[n, C] float64 of -1 and +1: one column for labels -1 and +1, one-vs-all columns for classes."""
    values = labels.double().flatten()
    if classes is None:
        if not bool(torch.isin(values, torch.tensor([-1.0, 1.0], dtype=torch.float64)).all()):
            found = sorted(set(values.tolist()))[:5]
            raise Refused(f"labels must be -1 or +1, found {found}; for labels 0 .. C-1 say classes=C")
        return values[:, None]
    if classes < 2:
        raise Refused(f"classes must be at least 2, found {classes!r}")
    if not bool(torch.isin(values, torch.arange(classes, dtype=torch.float64)).all()):
        found = sorted(set(values.tolist()) - set(range(classes)))[:5]
        raise Refused(f"labels {found} are outside the {classes} classes: expected 0 to {classes - 1}")
    return 2 * F.one_hot(values.long(), classes).double() - 1
