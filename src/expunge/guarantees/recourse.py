"""Counterfactual explanations that stay valid when training examples are deleted: linear classifiers.

"Change this much and the answer is yes" is a promise that a later deletion can break: the model is retrained, the point
falls back over the boundary. Here the point is moved far enough for any k deletions.

Paper: Krishna, Ma and Lakkaraju, ICML 2023 (arXiv:2302.04288). Only its abstract was at hand: the problem is theirs, the
form solved here and the proof below are derived. Networks: ``recourse_network``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from expunge.core import Key, Refused
from expunge.guarantees.linear import Problem, check_labels, check_rows, solve

Cost = Literal["l1", "l2"]
Hold = Literal["first_order", "retrained", "proved"]
CUTS = 300  # rounds of cutting planes per explanation; tens are usual
SLACK = 1e-7  # how far beyond the margin a cut asks to be, so that rounding does not leave a point below it


@dataclass(frozen=True, eq=False)
class Explanations:
    """Counterfactual points and what they cost.

    Attributes:
        points: [m, d] float64; a row of NaN where no point keeps the promise (too many deletions, or too few features free).
        desired: [m] of -1 and +1.
        cost: [m] L1 or L2 length of the change. found: [m] bool.
    """

    points: np.ndarray
    desired: np.ndarray
    cost: np.ndarray
    found: np.ndarray


@dataclass(frozen=True, eq=False)
class LinearRecourse:
    """A binary logistic classifier at its exact optimum, and what the deletion of each example does to its weights.

    Build it with ``LinearRecourse.fit``. Removing example i moves the weights by H^-1 grad l_i to first order.

    Attributes:
        problem: sum of losses + ridge / 2 ||w||^2; the ridge does not change when examples go.
        weights: [d], the optimum. hessian: [d, d] there.
        effects: [d, n], H^-1 grad l_i.
    """

    problem: Problem
    weights: Tensor
    hessian: Tensor
    effects: Tensor

    @staticmethod
    def fit(inputs: Tensor, labels: Tensor, ridge: float) -> LinearRecourse:
        """Train on [n, d] finite inputs (a bias is a constant column) and labels -1 and +1, with `ridge` > 0."""
        features, signs = check_rows(inputs, math.inf), check_labels(torch.as_tensor(labels), None)
        if len(features) != len(signs):
            raise Refused(f"{len(signs)} labels were given for {len(features)} examples; give one per example")
        if not (ridge > 0 and math.isfinite(ridge)):
            raise Refused(f"ridge must be a positive number, found {ridge!r}")
        none = torch.zeros(features.shape[1], 1, dtype=torch.float64)
        problem = Problem(features, signs, float(ridge), none)
        weights = problem.optimum()
        hessian = problem.hessian(weights)
        effects = solve(hessian, (features * problem.slopes(weights)).T)
        return LinearRecourse(problem, weights[:, 0], hessian, effects)

    def __len__(self) -> int:
        return len(self.problem.inputs)

    def without(self, rows: Tensor | np.ndarray) -> Tensor:
        """[d] weights retrained exactly without the examples at `rows` (positions)."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[torch.as_tensor(rows, dtype=torch.int64)] = False
        problem, rest = self.problem, self.weights[:, None]
        return Problem(problem.inputs[kept], problem.targets[kept], problem.ridge, problem.noise).optimum(rest)[:, 0]

    def worst(self, points: np.ndarray, desired: np.ndarray, k: int, proved: bool = False) -> np.ndarray:
        """[m] the least score, in the desired direction, after any at most `k` deletions.

        ``s f(x) + sum of the k smallest min(s I_i(x), 0)``, I_i(x) = x H^-1 grad l_i, f = w x, s the desired label: to
        first order, and too high. `proved`: less ``deletion_slack(k)`` times the length of x in the metric of H^-1, which
        is a true bound.
        """
        z, s = np.asarray(points, np.float64), np.asarray(desired, np.float64)
        moved = s[:, None] * (z @ self.effects.numpy())
        lost = np.minimum(np.sort(moved, axis=1)[:, : self.check_count(k)], 0.0).sum(1)
        value = s * (z @ self.weights.numpy()) + lost
        return value - deletion_slack(self, k) * self._lengths(z) if proved else value

    def explain(
        self,
        points: np.ndarray,
        desired: np.ndarray | int = 1,
        *,
        k: int = 0,
        margin: float = 1e-3,
        hold: Hold = "retrained",
        cost: Cost = "l2",
        fixed: tuple[int, ...] = (),
    ) -> Explanations:
        """The nearest points whose score stays at the margin after any `k` deletions; k = 0 is the plain explanation.

        The nearest point is found by cutting planes: the deletions that are worst at the present point give a half-space,
        and the nearest point in all of them is next. What the half-spaces come from is `hold`:

        - "first_order": weights + sum of H^-1 grad l_i. The form that is usually given, and it does NOT keep its word against an
          adversary: retraining moves the weights further than first order says, and the point sits on the boundary.
        - "retrained": the classifier retrained exactly without those examples. Holds against the deletions that are worst
          to first order, and against every other set that was met; other sets are not looked at.
        - "proved": first order less ``deletion_slack``: holds for exact retraining, whichever k examples go; costs most.

        Args:
            points: [m, d], to be changed. desired: [m] or one label, -1 or +1.
            k: deletions to withstand, 0 .. n-1. margin: > 0, of the score.
            hold: see above.
            cost: "l2" or "l1".
            fixed: columns that cannot change (a bias, an age).

        Raises:
            Refused: for a setting out of range, or where "proved" has no proof for so many deletions.
        """
        origin = np.atleast_2d(np.asarray(points, np.float64))
        labels = np.broadcast_to(np.asarray(desired, np.float64), (len(origin),))
        free = self._free(origin, labels, margin, cost, fixed)
        if hold not in ("first_order", "retrained", "proved"):
            raise Refused(f"hold must be 'first_order', 'retrained' or 'proved', found {hold!r}")
        half_space = _HalfSpace(self, self.check_count(k), hold)
        solved = [_nearest(half_space, *pair, margin, cost, free) for pair in zip(origin, labels, strict=True)]
        found = np.array([point is not None for point in solved])
        moved = np.stack([np.full(origin.shape[1], np.nan) if point is None else point for point in solved])
        change = np.abs(moved - origin)
        price = change.sum(1) if cost == "l1" else np.sqrt((change**2).sum(1))
        return Explanations(moved, labels, price, found)

    def adversarial(self, points: np.ndarray, desired: np.ndarray, k: int) -> np.ndarray:
        """[m, k] positions whose deletion hurts each point most, to first order."""
        moved = np.asarray(desired, np.float64)[:, None] * (np.asarray(points, np.float64) @ self.effects.numpy())
        return np.argsort(moved, axis=1, kind="stable")[:, : self.check_count(k)]

    def check_count(self, k: int) -> int:
        """`k`, refused where so many cannot be deleted."""
        if not 0 <= k < len(self):
            raise Refused(f"k must lie in 0 .. {len(self) - 1} (examples less one), found {k!r}")
        return k

    def _lengths(self, z: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum((z * solve(self.hessian, torch.from_numpy(z.T)).numpy().T).sum(1), 0.0))

    def _free(
        self, origin: np.ndarray, labels: np.ndarray, margin: float, cost: str, fixed: tuple[int, ...]
    ) -> np.ndarray:
        """[d] bool, the columns that may change; refuses what cannot be explained."""
        width = len(self.weights)
        if origin.shape[1] != width or not np.isfinite(origin).all():
            raise Refused(f"points have shape {origin.shape}: expected finite numbers of shape [points, {width}]")
        if not np.isin(labels, (-1.0, 1.0)).all():
            raise Refused(f"desired labels must be -1 or +1, found {sorted(set(labels.tolist()))[:5]}")
        if not (margin > 0 and math.isfinite(margin)):
            raise Refused(f"margin must be a positive number, found {margin!r}")
        if cost not in ("l1", "l2"):
            raise Refused(f"cost must be 'l1' or 'l2', found {cost!r}")
        if any(not 0 <= column < width for column in fixed) or len(set(fixed)) == width:
            raise Refused(f"fixed must name some of the columns 0 .. {width - 1} and leave one free, found {fixed!r}")
        free = np.ones(width, dtype=bool)
        free[list(fixed)] = False
        return free


def deletion_slack(model: LinearRecourse, k: int) -> float:
    """c with |x (w_S - w) - x H^-1 g_S| <= c ||x||_{H^-1} for every deletion S of at most k examples, w_S retrained.

    With Hbar the Hessian of what is left, averaged between w and w_S, Hbar (w_S - w) = g_S, the removed gradients. The
    third derivative of the logistic loss is no larger than the second, so a second derivative changes by a factor of at most e^u where no score changes by
    more than u: (1 - tau) (1 - e^-u) / u H <= Hbar <= (e^u - 1) / u H, tau the sum of the k largest leverages. With G the
    sum of the k largest ||grad l_i||_{H^-1} this gives c = r(u) G, r(u) = max(u / ((1 - tau) (1 - e^-u)) - 1,
    1 - u / (e^u - 1)). And u <= max_i |x_i H^-1 g_S| + r(u) q G, q = max ||x_i||_{H^-1}: along the path on which the
    removed gradients enter step by step u grows from 0 continuously, so it stays below any u that F(u) < u bars.

    Raises:
        Refused: where no u bars: nothing is proved for so many deletions.
    """
    if model.check_count(k) == 0:
        return 0.0
    inputs, weights = model.problem.inputs, model.weights[:, None]
    lengths = (inputs * solve(model.hessian, inputs.T).T).sum(1).clamp_min(0.0).sqrt()
    leverage = model.problem.curvature(weights) * lengths.square()
    pull = float((model.problem.slopes(weights)[:, 0].abs() * lengths).topk(k).values.sum())
    tau = float(leverage.topk(k).values.sum())

    def rate(u: float) -> float:
        return max(u / ((1 - tau) * -math.expm1(-u)) - 1, 1 - u / math.expm1(u))

    moved, u = _largest_move(model, k), 1e-6
    for _ in range(1000 if tau < 1 else 0):
        needed = moved + rate(u) * float(lengths.max()) * pull
        if needed < u:
            return rate(u) * pull
        u = needed * (1 + 1e-4)
        if u > 50:
            break
    raise Refused(
        f"nothing is proved for {k} deletions of {len(model)} examples (they may change a score by {moved:.2g} or more, and "
        f"take {tau:.0%} of the curvature): ask for fewer, raise the ridge, or use hold='retrained', which is checked, not "
        f"proved"
    )


def _largest_move(model: LinearRecourse, k: int) -> float:
    """max over i of the sum of the k largest |x_i H^-1 grad l_j|, j != i, some rows of [n, n] at a time."""
    found = 0.0
    for rows in torch.arange(len(model)).split(1024):
        moves = (model.problem.inputs[rows] @ model.effects).abs()
        moves[torch.arange(len(rows)), rows] = 0.0
        found = max(found, float(moves.topk(k, dim=1).values.sum(1).max()))
    return found


def valid_after(points: np.ndarray, desired: np.ndarray, weights: np.ndarray | Tensor) -> np.ndarray:
    """[m] bool: whether a linear classifier [d] gives each point its desired label; never a point that was not found."""
    found = np.asarray(points, np.float64) @ np.asarray(weights, np.float64)
    return np.asarray(desired, np.float64) * found > 0


def validity(model: LinearRecourse, made: Explanations, k: int, draws: int, key: Key) -> dict[str, np.ndarray]:
    """Whether explanations stay valid when `k` examples go and the classifier is retrained exactly.

    Returns:
        ``random`` [draws, m] bool, under deletions drawn at random; ``adversarial`` [m] bool, each point under the
        deletions that are worst for it to first order. Cost: draws + m retrainings.
    """
    rng = np.random.Generator(np.random.PCG64(key.seed))
    random = [
        valid_after(made.points, made.desired, model.without(rng.choice(len(model), k, replace=False)))
        for _ in range(draws)
    ]
    worst = model.adversarial(np.nan_to_num(made.points), made.desired, k)
    against = [valid_after(made.points[[i]], made.desired[[i]], model.without(rows))[0] for i, rows in enumerate(worst)]
    return {"random": np.array(random), "adversarial": np.array(against, dtype=bool)}


class _HalfSpace:
    """point, desired label -> the weights [d] that are worst there; classifiers that were retrained are kept."""

    def __init__(self, model: LinearRecourse, k: int, hold: str):
        self.model, self.k, self.hold = model, k, hold
        self.factor = deletion_slack(model, k) if hold == "proved" else 0.0
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, point: np.ndarray, sign: float) -> np.ndarray:
        effects = self.model.effects.numpy()
        moved = sign * (point @ effects)
        worst = np.argsort(moved, kind="stable")[: self.k]
        worst = worst[moved[worst] < 0]
        if self.hold == "retrained" and len(worst):
            return sign * self._retrained(worst)
        slope = sign * (self.model.weights.numpy() + effects[:, worst].sum(1))
        if self.factor:
            along = solve(self.model.hessian, torch.from_numpy(point)[:, None])[:, 0].numpy()
            slope = slope - self.factor * along / max(math.sqrt(float(point @ along)), 1e-300)
        return slope

    def _retrained(self, rows: np.ndarray) -> np.ndarray:
        name = tuple(sorted(rows.tolist()))
        if name not in self.known:
            self.known[name] = self.model.without(rows).numpy()
        return self.known[name]


def _nearest(
    half_space: _HalfSpace, start: np.ndarray, sign: float, margin: float, cost: str, free: np.ndarray
) -> np.ndarray | None:
    """The nearest point that lies in every half-space met on the way; None where there is none."""
    point, cuts = start, np.empty((0, len(start)))
    for _ in range(CUTS):
        slope = half_space(point, sign)
        if slope @ point >= margin:
            return point
        cuts = np.vstack([cuts, slope])
        needed = margin + SLACK * (1 + margin) - cuts @ start
        change = (_least_l1 if cost == "l1" else _least_l2)(cuts[:, free], needed)
        if change is None:
            return None
        point = start.copy()
        point[free] += change
    return None


def _least_l2(cuts: np.ndarray, needed: np.ndarray) -> np.ndarray | None:
    """The shortest y with ``cuts y >= needed`` (Lawson and Hanson, least distance by nonnegative least squares)."""
    size = np.linalg.norm(cuts, axis=1)
    if (size == 0).any():
        return None if (needed[size == 0] > 0).any() else _least_l2(cuts[size > 0], needed[size > 0])
    scale = max(float(np.abs(needed / size).max()), 1e-300)
    rows, right = cuts / size[:, None], needed / size / scale
    system = np.vstack([rows.T, right])
    target = np.zeros(len(system))
    target[-1] = 1.0
    rest = system @ optimize.nnls(system, target)[0] - target
    if abs(rest[-1]) < 1e-9:  # the system is reached: no y meets all cuts
        return None
    return -rest[:-1] / rest[-1] * scale


def _least_l1(cuts: np.ndarray, needed: np.ndarray) -> np.ndarray | None:
    """The same in the sum of absolute values: a linear programme."""
    both = np.hstack([cuts, -cuts])
    solved = optimize.linprog(np.ones(both.shape[1]), A_ub=-both, b_ub=-needed, bounds=(0, None), method="highs")
    if not solved.success:
        return None
    raised, lowered = np.split(np.asarray(solved.x), 2)
    return raised - lowered
