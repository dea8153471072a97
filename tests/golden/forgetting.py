"""Small trained models and what to forget of them, shared by the golden tests of methods."""

from __future__ import annotations

import functools

import torch
from torch import nn

import expunge as ex


@functools.cache
def small(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ex.Request]:
    """100 examples of 3 overlapping clusters in 5 inputs, the last always 0; 20 of cluster 0 are to be forgotten."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(100) % 3
    x = torch.randn(100, 5, generator=generator) + 1.5 * torch.eye(5)[y]
    x[:, -1] = 0.0
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return (
        fitted(model, x, y, 150, 3e-2, generator).to(dtype),
        ex.split((x.to(dtype), y), forget=torch.nonzero(y == 0).flatten()[:20]),
    )


@functools.cache
def digits(label: int) -> tuple[nn.Module, ex.Request]:
    """A network on 700 handwritten digits of 8 x 8, and the request to forget one class."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images / 16, dtype=torch.float32).flatten(1)[:700], torch.tensor(found.target)[:700]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = fitted(model, x, y, 200, 3e-3, torch.Generator().manual_seed(label))
    return model, ex.split((x, y), forget=f"label == {label}")


def fitted(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float, generator: torch.Generator
) -> nn.Module:
    """The model trained with Adam on batches of 64, from weights drawn from `generator`."""
    with torch.no_grad():
        for p in model.parameters():
            fan = p.shape[-1] if p.ndim > 1 else 64
            p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / fan**0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def accuracy(model: nn.Module, data: ex.Data) -> float:
    """Share of the examples that the model gets right."""
    batch = next(iter(data.batches(len(data))))
    with torch.no_grad():
        return float((model(batch["x"]).argmax(1) == batch["y"]).float().mean())
