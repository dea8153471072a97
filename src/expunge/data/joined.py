"""Several data sets as one, to be shuffled together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Data, Refused, map_tensors


class Joined:
    """The rows of several data sets one after the other, with the columns that all of them have.

    Args:
        parts: at least one; columns known per example (labels, weights) included.
    """

    def __init__(self, *parts: Data):
        self.parts = parts
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        each = [part.batch(torch.arange(1)) for part in parts]
        self.names = [name for name in each[0] if name != "id" and all(name in batch for batch in each)]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fetch(self, rows: Tensor) -> Batch:
        """The rows as a batch, in the order asked for."""
        owner = torch.searchsorted(self.starts, rows, right=True) - 1
        order = torch.argsort(owner, stable=True)
        found = [
            part.batch(rows[order][owner[order] == number] - self.starts[number])
            for number, part in enumerate(self.parts)
            if bool((owner == number).any())
        ]
        back = torch.argsort(order)
        return {name: map_tensors(lambda t: t[back], _stacked([batch[name] for batch in found])) for name in self.names}


def joined(*parts: Data) -> Data:
    """One Data of several, each example with its own id.

    Raises:
        Refused: where an id is in two of them.
    """
    ids = torch.cat([part.ids for part in parts])
    if len(torch.unique(ids)) != len(ids):
        raise Refused("data sets to be joined share ids: expected every example in one of them only")
    return Data(Joined(*parts), torch.arange(len(ids)), ids)


def _stacked(parts: list[Any]) -> Any:
    """The same column of several batches, one under the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}
