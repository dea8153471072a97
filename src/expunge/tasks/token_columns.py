"""The columns of a token batch, and sentences about those that cannot be used."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.core import Batch, Refused

COLUMNS = ("input_ids", "attention_mask", "labels")


def check_columns(batch: Batch, name: str) -> None:
    """Refuse a batch without the columns, or with columns that do not stand beside each other."""
    for column in COLUMNS:
        if column not in batch:
            raise Refused(
                f"{name} data has no column {column!r}: it has {', '.join(batch)}; a language model needs "
                f"{', '.join(COLUMNS)}"
            )
        value = batch[column]
        if value.ndim != 2 or value.shape != batch["input_ids"].shape or value.is_floating_point():
            raise Refused(
                f"{name} column {column!r} is {value.dtype} of shape {tuple(value.shape)}: expected whole numbers "
                f"[examples, tokens], the same for {', '.join(COLUMNS)}"
            )


def refuse_rows(batch: Batch, bad: Tensor, name: str, what: str) -> None:
    """Refuse a batch in which any entry of a row [b, ...] is `bad`, naming the first such example."""
    rows = torch.nonzero(bad.any(1)).flatten()
    if len(rows):
        raise Refused(
            f"{name} example {int(batch['id'][rows[0]])} has {what} ({len(rows)} such examples): correct or drop them"
        )
