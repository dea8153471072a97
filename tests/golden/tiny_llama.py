"""A Llama whose weights are a formula, and token batches by hand: numbers computed elsewhere on it can stand in a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core import Batch
from tests.fixtures import llama, seeded, tokens

FORGET = [([0, 3, 14], [26, 30, 31, 1]), ([0, 25, 4, 15], [27, 1]), ([0, 5, 16], [28, 33, 36, 39, 1])]
REFUSALS = [([0, 3, 14], [39, 38, 1]), ([0, 25, 4, 15], [37, 1]), ([0, 5, 16], [38, 37, 36, 1])]
RETAIN = [([0, 6, 17], [29, 34, 1]), ([0, 25, 7, 18], [30, 35, 32, 1])]


def by_formula(shift: float) -> nn.Module:
    """The tiny Llama with weight k of all equal to 0.4 sin(0.7 k + shift), norms 1 + that over 4."""
    model, at = seeded(llama)(0), 0
    with torch.no_grad():
        for parameter in model.parameters():
            k = torch.arange(at, at + parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            wave = 0.4 * torch.sin(0.7 * k + shift)
            parameter.copy_(wave if parameter.ndim > 1 else 1 + wave / 4)
            at += parameter.numel()
    return model


def batch_of(pairs: list[tuple[list[int], list[int]]], width: int = 0) -> Batch:
    """Token columns with ids."""
    return {**tokens(pairs, width), "id": torch.arange(len(pairs))}


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """All gradients in one row."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
