"""Split a training set into what to forget and what to keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core import Batch, Data, Refused, Request
from expunge.data.sources import as_data

_CONDITION = re.compile(r"^\s*(\S.*?)\s*(==|!=|<=|>=|<|>|\bin\b(?=\s*[\[({\d]))\s*(.+?)\s*$")


def split(
    train: Any,
    forget: Any,
    *,
    retain: Any = None,
    valid: Any = None,
    names: Sequence[str] = ("x", "y"),
    ids: Sequence[int] | Tensor | None = None,
) -> Request:
    """A Request: the chosen examples to forget, the rest to keep.

    Args:
        train: the training set, in any form that ``as_data`` takes.
        forget: ids; a predicate ``example -> bool`` over one-example batches; or a condition on a column such as
            ``"label == 3"``, ``"y in [1, 7]"``, ``"age > 80"`` (``label`` means the column ``y`` where there is no
            column of that name).
        retain: what to keep; all that is not forgotten by default.
        valid: examples in neither, to watch utility on.
        names: names of the parts of tuple examples. ids: int64 [n], unique; 0 .. n-1 by default.

    Raises:
        Refused: for ids that do not exist or repeat, an empty forget or retain set, or an overlap of the two.
    """
    data = as_data(train, names=names, ids=ids)
    chosen = _chosen(data, forget)
    if not bool(chosen.any()):
        raise Refused(f"the forget set is empty: nothing matches {forget!r} among {len(data)} examples")
    if bool(chosen.all()) and retain is None:
        raise Refused(f"the retain set is empty: {forget!r} selects all {len(data)} examples; nothing would be kept")
    everything = torch.arange(len(data))
    kept = data.select(everything[~chosen]) if retain is None else _others(data, retain, names)
    request = Request(
        forget=data.select(everything[chosen]),
        retain=kept,
        valid=None if valid is None else as_data(valid, names=names),
    )
    disjoint(request)
    return request


def disjoint(request: Request) -> None:
    """Refuse a request whose forget and retain data share an id of one source, or are empty."""
    for name in ("forget", "retain", "valid"):
        data = getattr(request, name)
        if data is not None and len(data) == 0:
            raise Refused(f"the {name} set is empty: expected at least one example")
    if request.forget is None or request.retain is None:
        return
    if request.forget.source is request.retain.source:
        shared = request.forget.ids[torch.isin(request.forget.ids, request.retain.ids)]
        if len(shared):
            raise Refused(
                f"retain overlaps forget: {len(shared)} ids are in both, the first is {int(shared[0])}; remove them "
                f"from one of the two"
            )


def _others(data: Data, retain: Any, names: Sequence[str]) -> Data:
    if isinstance(retain, (list, tuple, Tensor, np.ndarray, range)) and all(
        isinstance(i, int | np.integer) for i in np.ravel(np.asarray(retain))
    ):
        return data.select(torch.nonzero(_by_ids(data, retain, "retain")).flatten())
    return as_data(retain, names=names)


def _chosen(data: Data, forget: Any) -> Tensor:
    """[n] bool: which examples to forget."""
    if isinstance(forget, str):
        return _by_condition(data, forget)
    if callable(forget):
        return _by_predicate(data, forget)
    return _by_ids(data, forget, "forget")


def _by_ids(data: Data, ids: Any, name: str) -> Tensor:
    numbers = torch.as_tensor(np.asarray(list(ids) if not isinstance(ids, Tensor) else ids.cpu()))
    if numbers.numel() and numbers.is_floating_point():
        raise Refused(f"{name} ids are {numbers.dtype}: expected whole numbers")
    numbers = numbers.to(torch.int64).flatten()
    if numbers.numel() == 0:
        raise Refused(f"the {name} set is empty: give at least one id")
    unique, counts = torch.unique(numbers, return_counts=True)
    if bool((counts > 1).any()):
        raise Refused(f"{name} id {int(unique[counts > 1][0])} repeats: give each id once")
    missing = numbers[~torch.isin(numbers, data.ids)]
    if len(missing):
        low, high = int(data.ids.min()), int(data.ids.max())
        raise Refused(
            f"{name} id {int(missing[0])} does not exist: ids of the training set go from {low} to {high} "
            f"({len(missing)} of {len(numbers)} ids are unknown)"
        )
    return torch.isin(data.ids, numbers)


def _by_predicate(data: Data, predicate: Callable[[Batch], Any]) -> Tensor:
    return torch.tensor([bool(predicate(data.batch(torch.tensor([i])))) for i in range(len(data))])


def _by_condition(data: Data, condition: str) -> Tensor:
    match = _CONDITION.match(condition)
    if match is None:
        raise Refused(
            f"cannot read the condition {condition!r}: expected 'COLUMN == VALUE' (or !=, <, <=, >, >=, in [..])"
        )
    column, operator, text = match.groups()
    values = torch.cat([_column(batch, column) for batch in data.batches(1024)])
    try:
        wanted = [float(part) for part in text.strip("[](){} ").split(",") if part.strip()]
    except ValueError as error:
        raise Refused(f"cannot read the value {text!r} of the condition {condition!r}: expected numbers") from error
    if operator == "in":
        return torch.isin(values.double(), torch.tensor(wanted, dtype=torch.float64))
    if len(wanted) != 1:
        raise Refused(f"the condition {condition!r} compares with {len(wanted)} values: expected one, or use 'in [..]'")
    compare = {"==": torch.eq, "!=": torch.ne, "<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}[operator]
    return compare(values.double(), wanted[0])


def _column(batch: Batch, column: str) -> Tensor:
    name = "y" if column == "label" and "label" not in batch else column
    found = batch.get(name)
    if not isinstance(found, Tensor) or found.ndim != 1:
        have = ", ".join(n for n, v in batch.items() if isinstance(v, Tensor) and v.ndim == 1)
        raise Refused(f"no column {column!r} with one number per example: there is {have}")
    return found
