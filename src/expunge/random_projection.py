"""Random projections of gradients to a few numbers, which keep inner products in expectation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from expunge.core import Grads, Key

KEPT = 1 << 28  # bytes of a projection that is kept; a larger one is drawn again whenever it is used
BLOCK = 1 << 24  # bytes of it that are drawn at once


class Projector:
    """P^T and P, P [parameters, k] with entries +-1/sqrt(k), each tensor's part drawn from its own key.

    Kept where it is small, else drawn again in blocks of rows whenever it is used: memory does not grow with the model.

    Args:
        like: name -> tensor of the parameter's shape. dimensions: k, or None for the identity.
    """

    def __init__(self, like: Mapping[str, Tensor], dimensions: int | None, key: Key):
        self.like, self.dimensions, self.key = dict(like), dimensions, key
        self.width = sum(p.numel() for p in like.values())
        self._kept: dict[tuple[str, int], Tensor] = {}

    def down(self, grads: Grads) -> Tensor:
        """[b, k] of gradients [b, ...]."""
        if self.dimensions is None:
            return torch.cat([grads[name].flatten(1) for name in self.like], 1)
        total = torch.zeros(())
        for name in self.like:
            rows = grads[name].flatten(1)
            for start, block in self._blocks(name):
                total = total + rows[:, start : start + len(block)] @ block.to(rows)
        return total

    def up(self, values: Tensor) -> Grads:
        """name -> tensor of the parameter's shape: P values, of values [k]."""
        if self.dimensions is None:
            parts = values.split([p.numel() for p in self.like.values()])
            return {n: v.reshape(p.shape).to(p.dtype) for (n, p), v in zip(self.like.items(), parts, strict=True)}
        return {
            name: torch.cat([block.to(values) @ values for _, block in self._blocks(name)]).reshape(p.shape).to(p.dtype)
            for name, p in self.like.items()
        }

    def _blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        count = self.like[name].numel()
        k = int(self.dimensions or 0)
        size = max(1, BLOCK // (4 * k))
        return ((start, self._block(name, start, min(size, count - start), k)) for start in range(0, count, size))

    def _block(self, name: str, start: int, rows: int, k: int) -> Tensor:
        if (name, start) in self._kept:
            return self._kept[name, start]
        drawn = torch.randint(0, 2, (rows, k), generator=self.key.at(name, start).generator(), dtype=torch.int8)
        block = (drawn.to(torch.float32) * 2 - 1) / math.sqrt(k)
        if 4 * k * self.width <= KEPT:
            self._kept[name, start] = block.to(self.like[name].device)
            return self._kept[name, start]
        return block
