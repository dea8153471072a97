"""Weights for combining the gradients of several objectives, computed from their dot products alone.

Every rule is a pure function from the Gramian G (float64 CPU tensor [n, n], ``G[i, j] = g_i . g_j``, every
loss minimised) to weights w (float64 tensor [n]). The caller steps ``parameters -= rate * sum_i w_i g_i``, so
that to first order loss i changes by ``-rate * (G w)_i``. No rule sees a parameter, draws from the global
random state or keeps state.

The sign of ``tolerance`` is fixed here, once: ``tolerance >= 0`` is the allowed first-order rate of INCREASE
of the protected loss per unit of rate (update . g_r >= -tolerance); ``tolerance < 0`` demands that it
DECREASES at least at rate |tolerance|. (The implicit form of EUPMU writes the same number with the other
sign.)

A promise about first-order change holds for the raw step. Momentum, Adam and weight decay void it, as do
large rates. Objectives with a zero gradient are never divided by: each rule says what it does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls
from torch import Tensor

from expunge.core import Refused

Array = NDArray[np.float64]
Rule = Callable[[Tensor], Tensor]
Order = torch.Generator | Sequence[int] | Sequence[Sequence[int]] | None
Preference = Sequence[float] | Tensor | None

RIDGE = 1e-12  # least eigenvalue of a cosine matrix: quadratics are strictly convex, solutions unique
FLOOR = 1e-280  # squared norms below this have lost their digits and count as zero


def one_sided(
    gramian: Tensor,
    tolerance: float = 0.0,
    max_multiplier: float = 100.0,
    protected: int | Sequence[int] = 1,
) -> Tensor:
    """Follow the free objectives, removing only what would harm the protected ones.

    ``min_d 1/2 |d - sum_free g_i|^2  subject to  d . g_k >= -tolerance`` for each protected k. With index 0 =
    forget (free), 1 = retain (protected): ``w_f = 1, w_r = max(0, (-b - tolerance) / c)``, b = g_f.g_r, c =
    |g_r|^2. With several protected objectives, the dual quadratic programme of GEM over the protected
    gradients alone.

    Not promised: that the free losses decrease; that the bound holds where `max_multiplier` is reached (a
    vanishing retain gradient is noise, and so is its multiplier) or where it cannot be met (two opposed
    gradients that must both decrease). A protected objective with a zero gradient gets weight 0.

    Args:
        tolerance: see the head of this file; in units of the squared gradient norm. Not scale-free.
        max_multiplier: upper bound of the weight of each protected gradient, > 0; infinity for none.
        protected: index, or indices, of the protected objectives.

    Papers: "EUPMU", arXiv:2510.22124 (explicit form; its code divides by c + 1e-8 where this one clamps);
    A-GEM and SafeGrad (arXiv:2508.07172) are tolerance 0; several: "Gradient Episodic Memory for Continual
    Learning", NeurIPS 2017.
    """
    g = _checked(gramian)
    if not np.isfinite(tolerance):
        raise Refused(f"tolerance is {tolerance}; expected a finite number")
    if not max_multiplier > 0:
        raise Refused(f"max_multiplier is {max_multiplier}; expected a number in (0, inf]")
    shielded = sorted({protected} if isinstance(protected, int) else set(protected))
    if not shielded or shielded[0] < 0 or shielded[-1] >= len(g):
        raise Refused(f"protected is {protected}; expected one or more indices in 0..{len(g) - 1}")
    weights = np.ones(len(g))
    weights[shielded] = 0.0
    shielded = [k for k in shielded if g[k, k] > 0]
    shortfall = (g @ weights)[shielded] + tolerance
    if len(shielded) == 1:
        with np.errstate(over="ignore"):  # a quotient past the largest float is clamped like any other
            weights[shielded] = np.clip(-shortfall / g[shielded, shielded], 0.0, max_multiplier)
    elif shielded:
        weights[shielded] = _multipliers(g[np.ix_(shielded, shielded)], shortfall, max_multiplier)
    return torch.from_numpy(weights)


def pcgrad(gramian: Tensor, order: Order = None) -> Tensor:
    """Project each gradient off every other one that it conflicts with, and sum the results.

    For each i, over the others j in turn: if ``v.g_j < 0`` then ``v -= (v.g_j / |g_j|^2) g_j``, starting at v
    = g_i and always against the ORIGINAL g_j; the weights are the coefficients of ``sum_i v_i``. The paper
    sums; implementations that average differ by the factor n.

    Not promised, for n > 2: that the sum conflicts with no objective, nor that the order does not matter.

    Args:
        order: who is visited, in turn: one permutation of 0..n-1 for all, n permutations (one per objective),
            or a CPU generator that draws n as the paper does. None is 0..n-1: enough for n = 2.

    Paper: "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782, Algorithm 1.
    """
    g = _checked(gramian)
    total = np.zeros(len(g))
    for i, visits in enumerate(_visiting_order(order, len(g))):
        coefficients = np.zeros(len(g))
        coefficients[i] = 1.0
        for j in visits:
            along = g[j] @ coefficients
            if j != i and along < 0 and g[j, j] > 0:
                coefficients[j] -= along / g[j, j]
        total += coefficients
    return torch.from_numpy(total)


def upgrad(gramian: Tensor, preference: Preference = None) -> Tensor:
    """Project each gradient on the cone of directions that harm no objective, then average.

    ``w = sum_i argmin_{v >= p_i e_i} v^T G v``. Harms no objective to first order: G w >= 0. No floor on
    the trace: the weights are the same however small G is. For n = 2 it is half of `pcgrad`.

    Not promised: progress at a Pareto-stationary point, where the update is zero.

    Args:
        preference: weights p >= 0 of the objectives, [n]; by default 1/n each.

    Paper: "Jacobian Descent For Multi-Objective Optimization", arXiv:2406.16232, section 3.
    """
    g = _checked(gramian)
    starts = np.diag(_preference(preference, len(g)))
    return torch.from_numpy(np.sum([_on_dual_cone(g, start) for start in starts], axis=0))


def dual_proj(gramian: Tensor, preference: Preference = None) -> Tensor:
    """Average the gradients, then project the average on the cone of directions that harm no objective.

    ``w = argmin_{v >= p} v^T G v``, p = 1/n by default. Harms no objective to first order. Not promised: that
    a small gradient keeps any influence, for the average is taken first.

    Paper: "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, equation 11, applied to the mean
    gradient.
    """
    g = _checked(gramian)
    return torch.from_numpy(_on_dual_cone(g, _preference(preference, len(g))))


def mgda(gramian: Tensor) -> Tensor:
    """The shortest convex combination: ``argmin_w w^T G w`` over ``w >= 0, sum w = 1``.

    For n = 2, ``w_0 = clip((c - b) / (a + c - 2b), 0, 1)``. Every loss decreases by the same or a larger
    amount than |update|^2. Not promised: progress. It follows the SMALLEST gradient, so a zero gradient (a
    retain loss at its optimum, where unlearning starts) gives a zero update. Among equal gradients the split
    of the weight is arbitrary.

    Papers: "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012; "Multi-Task
    Learning as Multi-Objective Optimization", NeurIPS 2018 (Frank-Wolfe there; a non-negative least-squares
    problem here).
    """
    return torch.from_numpy(_shortest(_checked(gramian)))


def cagrad(gramian: Tensor, c: float = 0.4) -> Tensor:
    """The direction near the mean gradient m that improves the worst-off objective most.

    ``max_d min_i g_i.d  subject to  |d - m| <= c |m|``; so ``d = m + c |m| g_w / |g_w|`` where w on the
    simplex minimises ``g_w.m + c |m| |g_w|``. For a given length t = |g_w| that w is the shortest combination
    of ``g_i + t / (c |m|) m``, which leaves one monotone equation in t. If zero is a convex combination and
    the ball reaches the cone of harmless directions, every point of both is optimal, and the nearest to m is
    returned (`dual_proj`; the library returns zero).

    Not promised: harmlessness (only for c large enough); convergence to the minimum of the mean loss when c
    >= 1. The official code also divides by 1 + c^2 and multiplies by n; not here.

    Paper: "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv:2110.14048, Algorithm 1.
    """
    g = _checked(gramian)
    if not 0 <= c < np.inf:
        raise Refused(f"c is {c}; expected a finite number >= 0 (the paper's theory needs c < 1)")
    mean = np.full(len(g), 1.0 / len(g))
    g = g / (float(g.diagonal().max()) or 1.0)
    radius = c * _length(g, mean)
    if radius <= 1e-7 * c:  # the mean gradient vanishes to rounding, or c is zero
        return torch.from_numpy(mean)

    def combination(length: float) -> Array:
        shift = length / radius * (g @ mean)
        return _shortest(g + shift[:, None] + shift[None, :] + length / radius * (shift @ mean))

    def excess(length: float) -> float:
        return length - _length(g, combination(length))

    if excess(1e-7) >= 0:  # a combination this short, beside the longest gradient, is rounding
        return torch.from_numpy(_on_dual_cone(g, mean))
    w = combination(brentq(excess, 1e-7, 2.0, xtol=1e-15, rtol=1e-14, maxiter=500))
    return torch.from_numpy(mean + radius / _length(g, w) * w)


def imtl_g(gramian: Tensor) -> Tensor:
    """The combination with weights summing to one whose projections on all unit gradients are equal.

    ``w_i proportional to (K^+ 1)_i / |g_i|``, K the matrix of cosines; for n = 2, the bisector: ``w_0 = |g_1|
    / (|g_0| + |g_1|)``. A zero gradient takes all the weight, the limit of a small one: the update is zero.

    Not promised, for n > 2: non-negative or bounded weights, or descent. If the sum before normalising is
    negative the paper's formula increases EVERY loss; if it vanishes no such direction exists and the weights
    are zero.

    Paper: "Towards Impartial Multi-task Learning", ICLR 2021, generalised to dependent gradients
    (arXiv:2406.16232).
    """
    g = _checked(gramian)
    norms = np.sqrt(g.diagonal())
    if not norms.all():
        return torch.from_numpy((norms == 0) / np.sum(norms == 0))
    relative = norms.min() / norms
    if len(g) == 2:
        return torch.from_numpy(relative / relative.sum())
    weights = np.linalg.pinv(g / np.outer(norms, norms), rcond=RIDGE, hermitian=True).sum(1) * relative
    total = weights.sum()
    vanishes = abs(total) <= RIDGE * np.abs(weights).sum()
    return torch.from_numpy(np.zeros(len(g)) if vanishes else weights / total)


def nash(gramian: Tensor) -> Tensor:
    """The bargaining solution, ``(G w)_i = 1 / w_i``, w > 0: the largest product of the losses' decreases.

    With x_i = w_i |g_i| and K the cosines: ``K x = 1 / x``, the minimum of ``1/2 x^T K x - sum log x``, found
    by Newton's method. For n = 2, ``w_i = 1 / (|g_i| sqrt(1 + cosine))``: the direction of `imtl_g`. The
    update has norm sqrt(n) WHATEVER the gradients' size, so the rate alone sets the step (the official code
    clips it to norm 1).

    Not promised: anything at a Pareto-stationary point, where no bargain exists: weights are then large and
    finite (cosines are regularised by 1e-12) and the update is rounding. A zero gradient has nothing to
    bargain: weight 0.

    Paper: "Multi-Task Learning as a Bargaining Game", arXiv:2202.01017 (a sequence of convex problems there).
    """
    g = _checked(gramian)
    alive = np.flatnonzero(g.diagonal() > 0)
    weights = np.zeros(len(g))
    if len(alive):
        factor = _factor(g[np.ix_(alive, alive)])
        weights[alive] = _bargain(factor.T @ factor) / np.sqrt(g.diagonal()[alive])
    return torch.from_numpy(weights)


def aligned(
    gramian: Tensor,
    preference: Preference = None,
    scale: Literal["min", "median", "rmse"] = "min",
) -> Tensor:
    """Make the gradients orthogonal and equally long, as near as possible to where they were, then average.

    ``G = V L V^T`` over the eigenvalues above ``n eps max L``; ``w = sqrt(l) V L^(-1/2) V^T p``, l the
    smallest of them ("min"), their lower median, or their mean ("rmse").

    Not promised: that every loss decreases; continuity. As gradients become dependent "min" sends the update
    to zero, then, once exactly dependent, jumps to the next eigenvalue; a Gramian summed in float32 never is
    exactly so. All zero: w = p.

    Paper: "Independent Component Alignment for Multi-Task Learning", CVPR 2023, Algorithm 1.
    """
    g = _checked(gramian)
    p = _preference(preference, len(g))
    if scale not in ("min", "median", "rmse"):
        raise Refused(f"scale is {scale!r}; expected one of 'min', 'median', 'rmse'")
    values, vectors = np.linalg.eigh(g)
    kept = values > values[-1] * len(g) * np.finfo(np.float64).eps
    if not kept.any():
        return torch.from_numpy(p)
    values, vectors = values[kept], vectors[:, kept]
    chosen = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[scale]
    return torch.from_numpy(vectors @ (np.sqrt(chosen / values) * (vectors.T @ p)))


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (one_sided, pcgrad, upgrad, dual_proj, mgda, cagrad, imtl_g, nash, aligned)
}
"""The rules by name, each usable with its defaults."""


def _checked(gramian: Tensor) -> Array:
    """The Gramian as an array, exactly symmetric; refused unless it can be one."""
    if not isinstance(gramian, Tensor) or gramian.dtype != torch.float64 or gramian.device.type != "cpu":
        found = f"{gramian.dtype} on {gramian.device}" if isinstance(gramian, Tensor) else repr(type(gramian))
        raise Refused(f"gramian is {found}; expected a float64 CPU tensor: pass gramian.double().cpu()")
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.shape[0]:
        raise Refused(f"gramian has shape {list(gramian.shape)}; expected [n, n] with n >= 1")
    g = gramian.detach().numpy()
    if not np.isfinite(g).all():
        raise Refused("gramian holds values that are not finite; expected finite ones: a gradient overflowed")
    lengths = np.sqrt(np.maximum(g.diagonal(), 0.0))
    bound = np.outer(lengths, lengths)
    slack = 1e-4 * bound + FLOOR  # float32 sums over many terms pass
    if (g.diagonal() < 0).any() or (abs(g - g.T) > slack).any() or (abs(g) > bound + slack).any():
        raise Refused(f"gramian is {g.tolist()}; expected dot products: symmetric, |G_ij|^2 <= G_ii G_jj")
    alive = g.diagonal() > FLOOR
    return np.where(np.outer(alive, alive), (g + g.T) / 2, 0.0)


def _preference(preference: Preference, n: int) -> Array:
    if preference is None:
        return np.full(n, 1.0 / n)
    p = torch.as_tensor(preference, dtype=torch.float64).cpu().numpy().copy()
    if p.shape != (n,) or not np.isfinite(p).all() or (p < 0).any():
        raise Refused(f"preference is {p.tolist()}; expected {n} finite weights >= 0, one per objective")
    return p


def _visiting_order(order: Order, n: int) -> list[list[int]]:
    if isinstance(order, torch.Generator):
        return [torch.randperm(n, generator=order).tolist() for _ in range(n)]
    rows: list[Any] = list(range(n)) if order is None else list(order)
    table = rows if any(isinstance(row, Sequence) for row in rows) else [rows] * n
    if len(table) != n or any(sorted(row) != list(range(n)) for row in table):
        raise Refused(f"order is {order}; expected one or {n} permutations of 0..{n - 1}, or a generator")
    return [list(row) for row in table]


def _factor(g: Array) -> Array:
    """A with ``A^T A`` = the cosines of g (no zero gradient), its eigenvalues raised to the ridge."""
    norms = np.sqrt(g.diagonal())
    values, vectors = np.linalg.eigh(g / np.outer(norms, norms))
    factor: Array = np.sqrt(np.maximum(values, RIDGE))[:, None] * vectors.T
    return factor


def _multipliers(g: Array, linear: Array, most: float) -> Array:
    """``argmin_v 1/2 v^T G v + linear.v`` over ``0 <= v <= most``, for unit gradients.

    Each round descends along every coordinate, which finds what is at a bound, then solves for the rest.
    """
    norms = np.sqrt(g.diagonal())
    factor = _factor(g)
    kernel = factor.T @ factor
    top = most * norms
    # A slope steeper than all multipliers together can turn keeps its sign: cut, it has the same solution.
    slope = np.clip(linear / norms, -top.sum(), top.sum())
    x = np.zeros(len(g))
    for _ in range(200):
        for k in range(len(g)):
            x[k] = np.clip(x[k] - (kernel[k] @ x + slope[k]) / kernel[k, k], 0.0, top[k])
        free = np.flatnonzero((x > 0) & (x < top))
        if len(free):
            move = np.linalg.solve(kernel[np.ix_(free, free)], -(kernel @ x + slope)[free])
            room = np.where(move > 0, top[free] - x[free], x[free]) / np.maximum(np.abs(move), 1e-300)
            x[free] = np.clip(x[free] + min(1.0, room.min()) * move, 0.0, top[free])
        if np.abs(x - np.clip(x - kernel @ x - slope, 0.0, top)).max() <= 1e-14 * np.abs(slope).max():
            break
    return np.asarray(x / norms)


def _length(g: Array, w: Array) -> float:
    return float(np.sqrt(np.maximum(w @ g @ w, 0.0)))


def _on_dual_cone(g: Array, start: Array) -> Array:
    """``argmin_{v >= start} v^T G v``: ``sum start_i g_i`` projected on what harms no objective.

    The cone does not depend on the gradients' lengths, so the problem is solved for unit gradients, by an
    active-set method that is exact whatever their scales. A zero gradient keeps its starting weight.
    """
    weights = start.copy()
    alive = np.flatnonzero(g.diagonal() > 0)
    if len(alive):
        norms = np.sqrt(g.diagonal()[alive])
        factor = _factor(g[np.ix_(alive, alive)])
        longest = norms.max()
        weights[alive] += nnls(factor, -factor @ (start[alive] * norms / longest))[0] * longest / norms
    return weights


def _shortest(g: Array) -> Array:
    """``argmin_w w^T G w`` on the simplex, as ``min_{x >= 0} |A x|^2 + (sum x - 1)^2`` and ``w = x / sum x``.

    Exact, because the best value over the total of x grows with the length of the combination w.
    """
    smallest = g.diagonal().min()
    if smallest <= 0:
        return (g.diagonal() <= 0) / np.sum(g.diagonal() <= 0)
    if len(g) == 2:
        spread = g[0, 0] + g[1, 1] - 2 * g[0, 1]
        first = np.clip((g[1, 1] - g[0, 1]) / spread, 0.0, 1.0) if spread > 0 else 0.5
        return np.array([first, 1.0 - first])
    norms = np.sqrt(g.diagonal())
    stretched = _factor(g) * (norms / np.sqrt(smallest))
    x: Array = nnls(np.vstack([stretched, np.ones(len(g))]), np.append(np.zeros(len(g)), 1.0))[0]
    return np.asarray(x / x.sum())


def _bargain(kernel: Array) -> Array:
    """``kernel x = 1 / x``, x > 0. Self-concordant, so damped Newton steps converge from anywhere."""
    if len(kernel) == 2:
        return np.full(2, 1.0 / np.sqrt(kernel[0, 0] + kernel[0, 1]))
    x = np.full(len(kernel), 1.0 / np.sqrt(len(kernel)))
    for _ in range(500):
        slope = kernel @ x - 1 / x
        step = np.linalg.solve(kernel + np.diag(x**-2), slope)
        decrement = np.sqrt(max(slope @ step, 0.0))
        x = x - step / (1 + decrement) if decrement > 0.25 else x - step
        if decrement < 1e-9:  # quadratic convergence: the step just taken left an error of its square
            break
    return x
