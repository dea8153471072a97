"""Unlearning by noisy gradient descent: what it certifies, the trainer that earns it, and an audit of the claim.

``w <- P(w - eta (mean_i clip_M(grad l_i) + lambda w) + sqrt(2 eta sigma^2) xi)``; to forget, go on for K steps on the
data that are left. Papers: Chien, Wang, Chen and Li, "Langevin Unlearning", NeurIPS 2024 (arXiv:2401.10371); the
baseline is Neel, Roth and Sharifi-Malvajerdi, "Descent-to-Delete", ALT 2021 (arXiv:2007.02923).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from expunge.audit.intervals import clopper_pearson
from expunge.core import Key, Refused
from expunge.guarantees.linear import check_labels, check_rows

Renyi = Callable[[np.ndarray], np.ndarray]
"""Orders alpha > 1 -> Rényi divergence bounds."""

ORDERS = 1 + np.geomspace(1e-4, 1e6, 400)
MOST = 10**9  # steps that a search for enough of them tries


@dataclass(frozen=True)
class NoisyDescent:
    """Noisy descent on the regularised logistic loss of a linear head: the settings that the certificate depends on.

    Rows of length at most 1 and labels -1 and +1 make the mean loss (lambda)-strongly convex and (1/4 + lambda)-smooth;
    clipping a logistic gradient to M keeps it the gradient of a convex function. The retrained model that the
    certificate speaks of is noisy as well: same settings, same start, as many steps. Nothing is certified for networks.

    Args:
        penalty: lambda = m > 0, per example. sigma: > 0, of the noise. clip: M > 0, gradient norm per example.
        lr: eta in (0, 1 / (1/4 + lambda)]; None for that bound.
        radius: of the ball that weights are projected on; None for all of space.
    """

    penalty: float
    sigma: float
    clip: float = 1.0
    lr: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("penalty", self.penalty), ("sigma", self.sigma), ("clip", self.clip)):
            if not (value > 0 and math.isfinite(value)):
                raise Refused(f"noisy descent: {name} must be a positive number, found {value!r}")
        if self.lr is not None and not 0 < self.lr <= 1 / self.smooth:
            raise Refused(
                f"noisy descent: lr must lie in (0, {1 / self.smooth:.4g}] = 1 / smoothness, found {self.lr!r}"
            )
        if self.radius is not None and not self.radius > 0:
            raise Refused(f"noisy descent: radius must be a positive number or None, found {self.radius!r}")

    @property
    def smooth(self) -> float:
        """L = 1/4 + lambda."""
        return 0.25 + self.penalty

    @property
    def eta(self) -> float:
        """The step size."""
        return 1 / self.smooth if self.lr is None else self.lr

    def train(
        self, inputs: Tensor, labels: Tensor, steps: int, key: Key, start: Tensor | None = None, runs: int = 1
    ) -> Tensor:
        """[runs, d] float64: weights after `steps` steps; independent runs differ by their noise alone.

        ``unlearn`` is this with the examples that are left and `start` the weights as they are.

        Args:
            inputs: [n, d], rows of length at most 1. labels: [n] of -1 and +1.
            steps: >= 0.
            key: of the noise: secret, and another one for every call.
            start: [d] or [runs, d]; zeros by default.
            runs: how many, with `start` not per run.
        """
        features, signs = check_rows(inputs), check_labels(torch.as_tensor(labels), None)
        if len(signs) != len(features):
            raise Refused(f"{len(signs)} labels were given for {len(features)} examples; give one per example")
        if steps < 0:
            raise Refused(f"steps must be a whole number of at least 0, found {steps!r}")
        origin = torch.zeros(features.shape[1], dtype=torch.float64) if start is None else start.double()
        weights = origin.expand(runs, -1).clone() if origin.ndim == 1 else origin.clone()
        if weights.shape[1] != features.shape[1]:
            raise Refused(f"start has {weights.shape[1]} weights for {features.shape[1]} features")
        pulled, lengths = features * signs, features.norm(dim=1).clamp_min(1e-300)
        for step in range(steps):
            slopes = torch.sigmoid(-weights @ pulled.T).minimum(self.clip / lengths)  # clips the whole gradient
            noise = torch.randn(weights.shape, dtype=torch.float64, generator=key.at("step", step).generator())
            drift = slopes @ pulled / len(features) - self.penalty * weights
            weights = weights + self.eta * drift + math.sqrt(2 * self.eta) * self.sigma * noise
            if self.radius is not None:
                weights = weights * (self.radius / weights.norm(dim=1, keepdim=True).clamp_min(self.radius))
        return weights

    def unlearn(self, weights: Tensor, inputs: Tensor, labels: Tensor, steps: int, key: Key) -> Tensor:
        """[runs, d]: `steps` more steps from `weights` on the examples that are left."""
        return self.train(inputs, labels, steps, key, start=weights)

    def renyi(self, steps: int, n: int, removed: int = 1) -> Renyi:
        """The accountant of one request, as ``renyi_bound``."""
        _count(n, removed, steps)
        return lambda orders: renyi_bound(
            orders, steps, strong=self.penalty, lr=self.eta, clip=self.clip, sigma=self.sigma, n=n, removed=removed
        )

    def epsilon(self, steps: int, n: int, delta: float, removed: int = 1) -> float:
        """The epsilon certified at `delta` after `steps` steps of unlearning `removed` of `n` examples."""
        return to_epsilon(self.renyi(steps, n, removed), delta)

    def steps_needed(self, epsilon: float, delta: float, n: int, removed: int = 1) -> int:
        """The smallest K that certifies (epsilon, delta) for one request."""
        return smallest_steps(lambda steps: self.epsilon(steps, n, delta, removed), epsilon)

    def sequence(self, requests: Sequence[tuple[int, int]], n: int) -> Renyi:
        """The accountant after several requests, each (examples removed, steps then taken); `n` before the first."""
        return sequential(
            requests,
            n,
            lambda orders, left, removed: self.renyi(0, left, removed)(orders),
            lambda orders, steps: np.exp(-steps * self.penalty * self.eta / orders),
        )


def renyi_bound(
    orders: np.ndarray, steps: int, *, strong: float, lr: float, clip: float, sigma: float, n: int, removed: int = 1
) -> np.ndarray:
    """``exp(-K m eta / alpha) 4 alpha S^2 M^2 / (m sigma^2 n^2)``: Rényi divergence to retraining after K more steps.

    For an m-strongly convex smooth loss, eta <= 1/smoothness, both runs from one start (or from a law no wider than
    2 sigma^2 / m). Two mean gradients that differ in S of n examples are at most 2 S M / n apart, whether the S are
    removed or replaced.

    Args:
        orders: alpha > 1. steps: K >= 0. strong: m > 0. lr: eta > 0. clip: M > 0. sigma: > 0.
        n: examples before the removal. removed: S, in 1 .. n-1.
    """
    alpha = np.asarray(orders, np.float64)
    if np.any(alpha <= 1):
        raise Refused(f"orders of the Rényi divergence must be above 1, found {float(alpha.min())!r}")
    start = 4 * alpha * (removed * clip) ** 2 / (strong * sigma**2 * n**2)
    return np.exp(-steps * strong * lr / alpha) * start


def to_epsilon(renyi: Renyi, delta: float) -> float:
    """``min over alpha > 1 of renyi(alpha) + ln(1/delta) / (alpha - 1)`` (Mironov 2017, proposition 3).

    Every order gives a valid bound: one that the search misses costs tightness, never truth.
    """
    if not 0 < delta < 1:
        raise Refused(f"delta must lie in (0, 1), found {delta!r}")

    def at(alpha: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return renyi(alpha) + math.log(1 / delta) / (alpha - 1)

    values = at(ORDERS)
    best = int(values.argmin())
    low, high = np.log(ORDERS[[max(best - 1, 0), min(best + 1, len(ORDERS) - 1)]] - 1)
    found = optimize.minimize_scalar(
        lambda t: float(at(np.array([1 + math.exp(t)]))[0]), bounds=(low, high), method="bounded"
    )
    return float(min(values[best], found.fun))


def smallest_steps(epsilon_after: Callable[[int], float], epsilon: float) -> int:
    """The smallest whole K with ``epsilon_after(K) <= epsilon``, for a function that falls.

    Raises:
        Refused: where a billion steps are not enough.
    """
    if not epsilon > 0:
        raise Refused(f"epsilon must be a positive number, found {epsilon!r}")
    if epsilon_after(0) <= epsilon:
        return 0
    high = 1
    while epsilon_after(high) > epsilon:
        high *= 2
        if high > MOST:
            raise Refused(f"no {MOST:,} steps certify epsilon {epsilon:g}: raise sigma, the penalty or epsilon")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if epsilon_after(middle) <= epsilon else (middle, high)
    return high


def sequential(
    requests: Sequence[tuple[int, int]],
    n: int,
    start: Callable[[np.ndarray, int, int], np.ndarray],
    decay: Callable[[np.ndarray, int], np.ndarray],
) -> Renyi:
    """``e_s(a) = decay(a, k_s) (a - 1/2) / (a - 1) (start(2a) + e_(s-1)(2a))``, from the weak triangle inequality.

    The first request has nothing before it: ``e_1(a) = decay(a, k_1) start(a)``.

    Args:
        requests: (examples removed, steps then taken), oldest first. n: examples before the first.
        start: (orders, examples left before the request, removed) -> divergence of the two laws of retraining.
        decay: (orders, steps) -> factor.
    """
    if not requests:
        raise Refused("no requests were given: expected at least one (removed, steps)")
    left = [n]
    for removed, steps in requests:
        _count(left[-1], removed, steps)
        left.append(left[-1] - removed)

    def at(orders: np.ndarray, last: int) -> np.ndarray:
        removed, steps = requests[last]
        if last == 0:
            return decay(orders, steps) * start(orders, n, removed)
        before = start(2 * orders, left[last], removed) + at(2 * orders, last - 1)
        return decay(orders, steps) * (orders - 0.5) / (orders - 1) * before

    return lambda orders: at(np.asarray(orders, np.float64), len(requests) - 1)


def descent_to_delete_sigma(
    iterations: int, *, strong: float, smooth: float, clip: float, n: int, epsilon: float, delta: float
) -> float:
    """Noise that Descent-to-Delete adds to what it publishes, after `iterations` noiseless steps per single deletion.

    ``4 sqrt(2) M g^I / (m n (1 - g^I) (sqrt(ln(1/delta) + epsilon) - sqrt(ln(1/delta))))``, g = (L - m) / (L + m), with
    steps of 2 / (L + m): the baseline that noisy descent is compared with. Its internal weights must stay secret.
    """
    if not (0 < strong < smooth and iterations >= 1 and 0 < delta < 1 and epsilon > 0):
        raise Refused(
            f"expected 0 < strong < smooth, iterations >= 1, delta in (0, 1) and epsilon > 0, found strong={strong!r}, "
            f"smooth={smooth!r}, iterations={iterations!r}, delta={delta!r}, epsilon={epsilon!r}"
        )
    shrink = ((smooth - strong) / (smooth + strong)) ** iterations
    room = math.sqrt(math.log(1 / delta) + epsilon) - math.sqrt(math.log(1 / delta))
    return 4 * math.sqrt(2) * clip * shrink / (strong * n * (1 - shrink) * room)


def empirical_epsilon(unlearned: np.ndarray, retrained: np.ndarray, delta: float, level: float = 0.95) -> float:
    """A lower bound of the epsilon at which two samples of scores can come from indistinguishable mechanisms.

    An attacker picks one threshold and one side on the first half of each sample. On the second half, with
    Clopper-Pearson bounds at (1 + level) / 2 each, ``epsilon >= ln((hit rate - delta) / false alarms)``, and never below
    0. A certificate below this bound is wrong (at `level`); one above it is not thereby proved.

    Args:
        unlearned, retrained: [runs] scores of independent runs, >= 20 each.
        delta: of the certificate. level: in (0, 1).
    """
    samples = [np.asarray(values, np.float64) for values in (unlearned, retrained)]
    if min(len(values) for values in samples) < 20:
        raise Refused(f"too few runs to audit: found {[len(v) for v in samples]}, expected at least 20 of each")
    first = [values[: len(values) // 2] for values in samples]
    second = [values[len(values) // 2 :] for values in samples]
    edges = np.unique(np.concatenate(first))
    learnt = _bounds(first, edges, delta, level)
    rule = np.unravel_index(int(learnt.argmax()), learnt.shape)
    return max(0.0, float(_bounds(second, edges[rule[1] : rule[1] + 1], delta, level)[rule[0], 0]))


def _bounds(samples: list[np.ndarray], edges: np.ndarray, delta: float, level: float) -> np.ndarray:
    """[4, edges]: what each rule proves; it calls scores of at least the edge, or below it, one sample or the other."""
    above = [len(values) - np.searchsorted(np.sort(values), edges, "left") for values in samples]
    found = []
    for hit, alarm in ((0, 1), (1, 0)):
        for up in (True, False):
            caught, alarms = (above[w] if up else len(samples[w]) - above[w] for w in (hit, alarm))
            low = clopper_pearson(caught, np.full(len(edges), len(samples[hit])), level)[0] - delta
            high = clopper_pearson(alarms, np.full(len(edges), len(samples[alarm])), level)[1]
            found.append(np.where(low > 0, np.log(np.maximum(low, 1e-300) / high), -np.inf))
    return np.stack(found)


def _count(n: int, removed: int, steps: int) -> None:
    if not 1 <= removed < n:
        raise Refused(f"removed must lie in 1 .. {n - 1} (examples less one), found {removed!r}")
    if steps < 0:
        raise Refused(f"steps must be a whole number of at least 0, found {steps!r}")
