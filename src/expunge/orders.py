"""Orders of slices for S3T (arXiv:2406.16257), and what a deletion leaves of them in service.

Written from the paper's rules; the authors' code was run beside it, for orders of known risks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment

from expunge.core import Key, Refused

SURVIVED = 100
"""Requests that an order's score looks ahead, as published."""


def rotations(slices: int, budget: int) -> list[list[int]]:
    """The first `budget` cyclic orders of the slices: each begins with another one, which is best for uniform deletion."""
    if not 1 <= budget <= slices:
        raise Refused(f"the budget of orders must lie in [1, {slices}], the number of slices, found {budget}")
    return [[(start + step) % slices for step in range(slices)] for start in range(budget)]


def matched(risks: Sequence[float], budget: int) -> list[list[int]]:
    """Orders of the slices for known probabilities of deletion: by bipartite matching, place by place (BMS).

    From one prefix per slice, each place extends all prefixes at once by the assignment of distinct slices that has the
    largest sum of scores, score(prefix) = sum over n of n (1 - sum of its first n risks)^100. Of the orders so built,
    those of the `budget` largest scores, the best first.

    Args:
        risks: per slice, >= 0, with a sum of at most 1. budget: 1 to the number of slices.

    Raises:
        Refused: for other numbers.
    """
    slices = len(risks)
    rotations(slices, budget)
    if min(risks) < 0 or sum(risks) > 1 + 1e-9:
        raise Refused(f"risks of slices must be at least 0 with a sum of at most 1, found {tuple(risks)}")
    orders = [[number] for number in range(slices)]
    for _ in range(slices - 1):
        gain = [[-math.inf if k in order else _score(risks, [*order, k]) for k in range(slices)] for order in orders]
        for row, column in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
            orders[row].append(int(column))
    return sorted(orders, key=lambda order: _score(risks, order), reverse=True)[:budget]


def _score(risks: Sequence[float], order: Sequence[int]) -> float:
    """Length of the prefixes that survive 100 requests, weighed by how likely they do."""
    gone = itertools.accumulate(risks[k] for k in order)
    return sum(n * max(0.0, 1 - share) ** SURVIVED for n, share in enumerate(gone, 1))


class Sequences:
    """Which stages of which orders are in service, shard by shard; what a deletion switches off.

    Args:
        alive: how many leading stages are in service, per shard and order; changed in place.
        slices: stages of each order.
        orders: of the slices; None for the cyclic ones.
    """

    def __init__(self, alive: list[list[int]], slices: int, orders: list[list[int]] | None = None):
        self.alive = alive
        orders = rotations(slices, len(alive[0])) if orders is None else orders
        self._place = [[order.index(number) for order in orders] for number in range(slices)]

    @staticmethod
    def whole(shards: int, slices: int, budget: int, orders: list[list[int]] | None = None) -> Sequences:
        """All in service."""
        return Sequences([[slices] * budget for _ in range(shards)], slices, orders)

    def delete(self, shard: int, number: int) -> None:
        """Switch off whatever saw slice `number` of the shard; nothing comes back to service."""
        self.alive[shard] = [min(both) for both in zip(self.alive[shard], self._place[number], strict=True)]

    def serving(self) -> list[tuple[int, int, int]]:
        """(shard, order, stage) of the longest prefix that each shard has left, the first such order; no dead shards."""
        return [(shard, row.index(max(row)), max(row) - 1) for shard, row in enumerate(self.alive) if any(row)]

    @property
    def in_service(self) -> bool:
        """Whether any shard can still answer."""
        return any(map(any, self.alive))


def deletion_capacity(shards: int, slices: int, budget: int, key: Key) -> int:
    """How many requests, each for a slice drawn uniformly over all with repetition, until no shard can answer.

    Its mean is shards x slices x H(shards x budget), H the harmonic number, for every order must lose its first slice.
    A SISA that never trains again, where any request ends its shard, is the case of one slice and one order.
    """
    sequences, count = Sequences.whole(shards, slices, budget), 0
    drawn = _uniform(shards * slices, key.generator())
    while sequences.in_service:
        sequences.delete(*divmod(next(drawn), slices))
        count += 1
    return count


def _uniform(below: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randint(below, (256,), generator=generator).tolist()
