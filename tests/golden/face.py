"""A network of six feed-forward blocks, fixed adapters for it and data, as numbers from seeds: shared by GS-LoRA's tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS, WIDTH, HIDDEN, CLASSES, RANK = 6, 5, 7, 3, 2


def normal(shape: tuple[int, ...], seed: int, scale: float = 0.5) -> Tensor:
    """Fixed numbers."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Face(nn.Module):
    """Residual feed-forward blocks and a linear head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()
        with torch.no_grad():
            for seed, p in enumerate(self.parameters()):
                p.copy_(normal(tuple(p.shape), 100 + seed))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def factors(block: int, layer: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the adapter of layer 0 or 2 of a block."""
    wide, out = (WIDTH, HIDDEN) if layer == 0 else (HIDDEN, WIDTH)
    seed = 200 + 4 * block + layer
    return normal((RANK, wide), seed), normal((out, RANK), seed + 1, 0.2)


def examples() -> tuple[Tensor, Tensor]:
    """12 inputs and their labels; the first four, of class 0, are to be forgotten."""
    return normal((12, WIDTH), 300, 1.0), torch.tensor([0] * 4 + [1, 2] * 4)
