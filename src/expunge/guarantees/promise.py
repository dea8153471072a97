"""What a certificate of removal promises, and how much of a residual the noise in the objective hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import optimize, special

from expunge.core import Refused


@dataclass(frozen=True)
class Promise:
    """The (epsilon, delta) of a certificate, and the noise that pays for it.

    Args:
        epsilon: > 0. delta: in (0, 1).
        sigma: > 0, standard deviation of each coordinate of the noise in the objective.
    """

    epsilon: float
    delta: float
    sigma: float

    def __post_init__(self) -> None:
        for name, value, good in (
            ("epsilon", self.epsilon, self.epsilon > 0),
            ("delta", self.delta, 0 < self.delta < 1),
            ("sigma", self.sigma, self.sigma > 0),
        ):
            if not (good and math.isfinite(value)):
                wanted = "a number in (0, 1)" if name == "delta" else "a positive number"
                raise Refused(f"certified removal: {name} must be {wanted}, found {value!r}")

    @property
    def budget(self) -> float:
        """The largest gradient residual that the noise hides: see ``residual_budget``."""
        return residual_budget(self.sigma, self.epsilon, self.delta)


def residual_budget(sigma: float, epsilon: float, delta: float) -> float:
    """The largest gradient residual beta that noise N(0, sigma^2 I) in the objective hides to (epsilon, delta).

    The smaller of the paper's ``sigma epsilon / sqrt(2 ln(1.5 / delta))`` (its theorem on (epsilon, delta)-removal, known
    to us at second hand) and the exact one of two Gaussians a distance beta apart, ``gaussian_delta(beta) = delta``,
    which is derived and smaller only for an epsilon well above 1, where the paper's tail bound does not hold.
    """
    paper = sigma * epsilon / math.sqrt(2 * math.log(1.5 / delta))
    if gaussian_delta(paper, sigma, epsilon) <= delta:
        return paper
    return float(optimize.brentq(lambda shift: gaussian_delta(shift, sigma, epsilon) - delta, 1e-12 * paper, paper))


def gaussian_delta(shift: float, sigma: float, epsilon: float) -> float:
    """The smallest delta for which N(0, sigma^2) and N(shift, sigma^2) are (epsilon, delta)-indistinguishable.

    ``Phi(s/2 - epsilon/s) - e^epsilon Phi(-s/2 - epsilon/s)``, s = shift / sigma > 0 (Balle and Wang 2018, theorem 8).
    """
    s = shift / sigma
    return float(special.ndtr(s / 2 - epsilon / s) - math.exp(epsilon + special.log_ndtr(-s / 2 - epsilon / s)))
