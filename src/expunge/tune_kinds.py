"""What kind of request a request is, and others of its kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.audit.subject import classifies
from expunge.core import Data, Key, Refused, Request


def alike(request: Request, pool: Data, task: Any, key: Key, number: int) -> Tensor:
    """Ids of the pool that are to the pool as the forget data are to all: other classes, another range, other records.

    Raises:
        Refused: where there are too few classes to take others from.
    """
    forget, retain = request.data("forget"), request.data("retain")
    own = key.at("proxy", number)
    shares = _shares(task, forget, retain)
    if shares is None:
        many = max(1, round(len(pool) * len(forget) / (len(forget) + len(retain))))
        if a_range(request, task):
            return pool.ids[_range(request, pool, task, own, number, many)]
        order = torch.randperm(len(pool), generator=own.at("records").generator())
        return pool.ids[order[:many]]
    labels = labels_of(task, pool)
    known = labels.unique()
    if len(known) <= len(shares):
        raise Refused(
            f"a proxy of forgetting {len(shares)} of the classes needs other classes and some to keep, and the retain data "
            f"have {len(known)}: use --rule blind"
        )
    others = known[~torch.isin(known, labels_of(task, forget))]
    known = others if len(others) >= len(shares) else known
    order = known[torch.randperm(len(known), generator=key.at("classes").generator())]
    chosen = []
    for place, share in enumerate(shares):
        label = order[(number * len(shares) + place) % len(order)]
        rows = torch.nonzero(labels == label).flatten()
        drawn = torch.randperm(len(rows), generator=own.at("part", place).generator())
        chosen.append(rows[drawn[: max(1, round(share * len(rows)))]])
    return pool.ids[torch.cat(chosen)]


def forgotten_whole(request: Request, task: Any) -> bool:
    """Whether whole classes are forgotten, and nothing else."""
    if not classifies(task):
        return False
    return not bool(torch.isin(labels_of(task, request.data("forget")), labels_of(task, request.data("retain"))).any())


def a_range(request: Request, task: Any) -> bool:
    """Whether all targets between two numbers are forgotten, and nothing else, where there is one target per example."""
    if classifies(task):
        return False
    gone, kept = (_targets(task, request.data(name)) for name in ("forget", "retain"))
    if gone is None or kept is None or len(gone) < 2:
        return False
    return not bool(((kept >= gone.min()) & (kept <= gone.max())).any())


def _range(request: Request, pool: Data, task: Any, key: Key, number: int, many: int) -> Tensor:
    """Positions of so many targets in a row: the ends by turns, where an end is forgotten, or else from a drawn place."""
    gone, kept, values = (_targets(task, data) for data in (request.data("forget"), request.data("retain"), pool))
    if gone is None or kept is None or values is None:
        raise Refused("a range of targets needs data with one target per example")
    order = values.argsort(stable=True)
    top, bottom = bool(gone.max() > kept.max()), bool(gone.min() < kept.min())
    if number < 2 and top != bottom:
        return order[-many:] if top == (number == 0) else order[:many]
    start = int(torch.randint(len(order) - many + 1, (1,), generator=key.at("range").generator()))
    return order[start : start + many]


def _targets(task: Any, data: Data) -> Tensor | None:
    """[n], where every example has one number as its target."""
    column = getattr(task, "target", "y")
    first = data.batch(torch.zeros(1, dtype=torch.int64)).get(column)
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.numel() != 1:
        return None
    return torch.cat([batch[column].flatten() for batch in data.batches(1024)])


def _shares(task: Any, forget: Data, retain: Data) -> list[float] | None:
    """The share of each forgotten class that goes, the largest first; None where most classes lose something."""
    if not classifies(task):
        return None
    gone, kept = labels_of(task, forget), labels_of(task, retain)
    if 2 * len(gone.unique()) > len(torch.cat([gone, kept]).unique()):
        return None
    counts = [(int((gone == label).sum()), int((kept == label).sum())) for label in gone.unique()]
    return sorted((out / (out + left) for out, left in counts), reverse=True)


def labels_of(task: Any, data: Data) -> Tensor:
    return torch.cat([task.labels(batch) for batch in data.batches(1024)])
