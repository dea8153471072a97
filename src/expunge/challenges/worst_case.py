"""Worst-case forget sets: the examples whose influence an unlearning method fails to erase, by bi-level selection.

    upper   min over w in [0, 1]^n, sum w = m, of  sum_i w_i l_i(theta(w)) + gamma |w|^2
    lower   theta(w): unlearning with the examples weighted by w, from the trained model

The chosen examples are those whose loss stays LOWEST after unlearning: easy ones, on which a retrained model is right
as well. They are the opposite of highly memorised sets; report both, and both beside random sets.

Paper: Fan et al., "Challenging Forgets" (ECCV 2024, arXiv:2403.07362); facts from the authors' released code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.combine import Weighted
from expunge.core import Case, Data, Grads, Key, Refused, Request, Stage, Task, eval_mode, lent_stream
from expunge.data.sources import as_data
from expunge.data.split import split
from expunge.descend import Descend
from expunge.meter import Meter
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.oracle import Oracle, per_example, prepared
from expunge.scope import Scope

_EDGE = 1e-12  # below it a weight is rounding of 0: the example is not in that part


@dataclass(frozen=True)
class WorstCase:
    """A selected forget set.

    Attributes:
        request: forget the selected examples, retain the rest.
        ids: int64 [m], of the selected examples; classes: the selected classes where whole classes were selected.
        weights: [n] (or [classes]) float64, the last w, before it was cut to 0 and 1.
        history: one mapping per round: ``objective``, sum w l + gamma |w|^2 at the w that the losses belong to;
            ``chosen_loss``, the mean loss after unlearning of the new top m; ``kept``, the share of the last top m
            that stayed.
    """

    request: Request
    ids: Tensor
    weights: np.ndarray
    history: tuple[Mapping[str, float], ...]
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Signed:
    """The sign of another combiner's gradient: with SGD without momentum, a sign-SGD step.

    Since the sign does not change under small changes of w, theta(w) does not either: the implicit gradient of the
    lower level is 0 almost everywhere, and the upper gradient is that with theta held fixed. This is why the paper
    descends by signs.
    """

    of: Weighted = field(default_factory=Weighted)

    def init(self) -> dict[str, Any]:
        return self.of.init()

    def combine(self, oracle: Oracle, state: dict[str, Any]) -> tuple[Grads, dict[str, Any]]:
        grads, state = self.of.combine(oracle, state)
        return {name: grad.sign() for name, grad in grads.items()}, state


def fine_tuning(*, lr: float = 1e-3, epochs: float = 2, batch: int = 64) -> Stage:
    """The published lower level: sign-SGD on the loss of all examples, each weighted by 1 - w.

    Args:
        lr: how far every coordinate moves in each step, > 0; published: 0.001 in the example (0.01 by default).
        epochs: passes over the data, >= 0; published: 2.
        batch: examples per step, >= 1.
    """
    return Descend(retain=NLL(), combine=Signed(), optimizer=SGD(lr, momentum=0.0), epochs=epochs, batch=batch)


def worst_case(
    model: nn.Module,
    train: Any,
    task: Task,
    size: int,
    *,
    by: Literal["example", "class"] = "example",
    lower: Stage = fine_tuning(),
    rounds: int = 5,
    lr: float = 1.0,
    gamma: float = 0.0,
    start: Literal["even", "random"] = "even",
    reverse: bool = False,
    batch: int = 256,
    key: Key = Key(0),
    meter: Meter | None = None,
) -> WorstCase:
    """Select the forget set that is hardest to erase.

    Each round unlearns from the trained model with the weights w, and then moves w against the loss that is left:
    ``w <- project(w - lr (l + 2 gamma w))``. At the end the m largest are taken. The model given is not changed. It does
    not promise the global worst case, nor that a set found with one model or method is the worst for another.

    Departures from the released data-wise code: l is taken in eval mode, there in train mode; w starts even, at m / n
    (``start="random"`` is theirs: a random set of m); the upper rate is 1, not 0.01. With theirs and R rounds, two
    examples can change places only if their losses differ by more than 1 / (R lr) in all rounds together: 50 nats in
    their example, so that the random start is returned. Class-wise (derived form): l of a class is the mean over its
    examples, where theirs sums means over batches.

    Args:
        model: the trained model.
        train: its training set, in any form that ``as_data`` takes. A ``weight`` column multiplies.
        task: the modality.
        size: m, examples (or classes) to forget, 1 .. n - 1.
        by: "example", or "class" for whole classes (tasks with labels).
        lower: the unlearning of the lower level. It sees forget and retain data with the weights w and 1 - w as column
            ``weight`` (an example of fractional w is in both), which every ``Descend`` obeys.
        rounds: R, upper steps, >= 1. lr: of the upper level, per unit of loss, > 0.
        gamma: >= 0; towards even weights.
        start: "even" or "random". reverse: select the examples of HIGHEST loss instead (the release's reverse mode).
        batch: examples per forward pass. key: of every draw.
        meter: of the rows that this costs; None counts them nowhere.

    Raises:
        Refused: for a size, rate or number of rounds out of range, or classes where the task has none.
    """
    data = as_data(train)
    group = _groups(data, task, by)
    count = int(group.max()) + 1
    _check(size, count, rounds, lr, gamma, by, start)
    w = np.full(count, size / count)
    if start == "random":
        rng = np.random.Generator(np.random.PCG64(key.at("start").seed))
        w = np.zeros(count)
        w[rng.choice(count, size, replace=False)] = 1.0
    examples = np.bincount(group, minlength=count)
    history: list[dict[str, float]] = []
    before = top(w, size)
    for number in range(rounds):
        losses = _after(model, data, task, w[group], lower, batch, key.at("round", number), meter or Meter())
        loss = np.bincount(group, losses, count) / examples
        objective = float(w @ loss + gamma * (w @ w))
        w = capped_simplex(w - (-lr if reverse else lr) * (loss + 2 * gamma * w), size)
        chosen = top(w, size)
        history.append(
            {
                "objective": objective,
                "chosen_loss": float(loss[chosen].mean()),
                "kept": len(np.intersect1d(chosen, before)) / size,
            }
        )
        before = chosen
    ids = data.ids[torch.from_numpy(np.flatnonzero(np.isin(group, before)))]
    classes = tuple(int(c) for c in np.sort(before)) if by == "class" else ()
    return WorstCase(split(data, ids), ids, w, tuple(history), classes)


def random_sets(train: Any, size: int, count: int = 10, key: Key = Key(0)) -> tuple[Request, ...]:
    """Requests for `size` examples drawn at random, `count` of them: what a selected set is reported beside.

    Args:
        train: in any form that ``as_data`` takes. size: 1 .. n - 1. count: >= 1; ten or more for an interval.
    """
    data = as_data(train)
    if not 1 <= size < len(data) or count < 1:
        raise Refused(f"expected a size in 1 to {len(data) - 1} and at least one set, found size={size}, count={count}")
    orders = (torch.randperm(len(data), generator=key.at("random", k).generator()) for k in range(count))
    return tuple(split(data, data.ids[order[:size]]) for order in orders)


def capped_simplex(values: np.ndarray, total: float) -> np.ndarray:
    """The nearest point of {0 <= w <= 1, sum w = total}, exactly, by sorting: w = clip(values - mu, 0, 1).

    The sum of clip(values - mu, 0, 1) falls in mu and is linear between the 2 n points values and values - 1; mu is
    found on the piece that holds `total`. (The released code bisects mu to 1e-5.)

    Args:
        values: [n] finite. total: in [0, n].
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not np.isfinite(v).all() or not 0 <= total <= len(v):
        raise Refused(f"expected a vector of finite numbers and a total in 0 to {v.size}, found {v.shape}, {total!r}")
    both = np.concatenate([v, v - 1])
    order = np.argsort(-both, kind="stable")  # from the largest down: v lets an entry rise, v - 1 is where it is full
    knots = both[order]
    slope = np.cumsum(np.where(order < len(v), 1.0, -1.0))
    sums = np.concatenate([[0.0], np.cumsum(slope[:-1] * -np.diff(knots))])
    piece = min(int(np.searchsorted(sums, total, "left")), len(sums) - 1)
    if piece == 0:
        return np.zeros(len(v))
    mu = knots[piece - 1] - (total - sums[piece - 1]) / slope[piece - 1]
    return np.clip(v - mu, 0.0, 1.0)


def top(w: np.ndarray, size: int) -> np.ndarray:
    """[size] positions of the largest weights, equal ones in order of position."""
    return np.sort(np.argsort(-w, kind="stable")[:size])


def _groups(data: Data, task: Task, by: str) -> np.ndarray:
    """[n] the number of the unit that each example belongs to: itself, or its class."""
    if by == "example":
        return np.arange(len(data))
    if by != "class":
        raise Refused(f"by must be 'example' or 'class', found {by!r}")
    labels: Any = getattr(task, "labels", None)
    if labels is None or not hasattr(task, "classes"):
        raise Refused(f"by='class' needs a task with classes: {task.name!r} has none; use by='example'")
    found = torch.cat([labels(batch) for batch in data.batches(4096)]).numpy()
    empty = np.setdiff1d(np.arange(found.max() + 1), found)
    if len(empty):
        raise Refused(f"class {int(empty[0])} has no training example: number the classes without gaps")
    return found


def _check(size: int, count: int, rounds: int, lr: float, gamma: float, by: str, start: str) -> None:
    unit = "classes" if by == "class" else "examples"
    if not 1 <= size < count:
        raise Refused(f"size must lie in 1 to {count - 1}, some of the {count} {unit} but not all, found {size!r}")
    if rounds < 1 or not lr > 0 or not gamma >= 0:
        raise Refused(f"expected rounds >= 1, lr > 0 and gamma >= 0, found {rounds!r}, {lr!r} and {gamma!r}")
    if start not in ("even", "random"):
        raise Refused(f"start must be 'even' or 'random', found {start!r}")


def _after(
    model: nn.Module, data: Data, task: Task, w: np.ndarray, lower: Stage, size: int, key: Key, meter: Meter
) -> np.ndarray:
    """[n] loss per unit of every example after the lower level."""
    work = copy.deepcopy(model)
    own = data.columns.get("weight", torch.ones(len(data), dtype=torch.float64)).double()
    weight = torch.from_numpy(w)
    request = Request(_weighted(data, weight, own), _weighted(data, 1 - weight, own))
    own_meter = Meter()  # the steps of a lower level are no steps of the run
    case = Case(work, request, task, Scope.all(work), {"original": model}, key, own_meter)
    with lent_stream(key), own_meter.watch(work):
        done = lower(case)
    with torch.no_grad(), eval_mode(done.model), lent_stream(key), own_meter.watch(done.model):
        parts = [per_example(done, NLL(), batch).double().cpu() for batch in prepared(done, data, size, key.at("loss"))]
    meter.forward += own_meter.forward
    meter.backward += own_meter.backward
    losses = torch.cat(parts).numpy()
    if not np.isfinite(losses).all():
        raise Refused("the lower level left a model with losses that are not finite: lower its learning rate")
    return losses


def _weighted(data: Data, weight: Tensor, own: Tensor) -> Data:
    inside = torch.nonzero(weight > _EDGE).flatten()
    return data.select(inside).annotate("weight", (weight * own)[inside])
