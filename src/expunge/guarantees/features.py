"""A frozen network before a linear head: its features, row by row, and the two as one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Data, eval_mode
from expunge.guarantees.linear import unit_rows


def frozen_features(model: nn.Module, data: Data, inputs: str = "x", batch: int = 256) -> Tensor:
    """[n, d] float64: what a frozen network says of each example, flattened, each row scaled to length 1.

    A row is scaled by its own length, never by a length taken over the data, which would leak from one row to another.
    The certificate covers the head alone: a network that was trained on the examples keeps what it learnt of them.
    """
    parts = []
    with torch.no_grad(), eval_mode(model):
        for part in data.batches(batch):
            found = model(runtime.to_device(part, runtime.device_of(model))[inputs])
            parts.append(unit_rows(found.flatten(1).double()).cpu())
    return torch.cat(parts)


class OnFeatures(nn.Module):
    """`features`, each row scaled to length 1, and a linear head in float64."""

    def __init__(self, features: nn.Module, head: nn.Linear):
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.features(x)
        return self.head(unit_rows(found.flatten(1).double())).to(found.dtype)
