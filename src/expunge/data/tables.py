"""Examples from a CSV or Parquet table, read the same way wherever and whenever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.core import Data, Refused
from expunge.data.sources import as_data
from expunge.registry import did_you_mean, need_extra

TABLES = (".csv", ".parquet")
Target = Literal["class", "number"]
Categories = Literal["onehot", "integer"]


@dataclass(frozen=True)
class Loaded:
    """Examples from a file, and what was learned of their columns.

    Attributes:
        data: columns ``x`` and ``y``.
        classes: name of each class, in the order of its number; empty where labels are numbers in the file.
        features: name of each input feature of a table; empty elsewhere.
        columns: name -> [n], every column of a table, left out or not, for conditions: numbers as they stand in the file,
            text as its place among the values in `texts`.
        texts: text column of a table -> its values, sorted.
        categories: categorical column of a table -> its values, in the order of their numbers.
    """

    data: Data
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)


def read_table(
    path: str | Path,
    *,
    label: str,
    target: Target = "class",
    categories: Categories = "onehot",
    ids: str | None = None,
    drop: Sequence[str] = (),
    like: Loaded | None = None,
) -> Loaded:
    """A CSV or Parquet table: one example per line, the label in one column, every other column an input.

    Text columns are categories, numbered in sorted order. Numbers are taken as they stand: scale them in the file or in
    the model.

    Args:
        path: ``.csv`` with a header line, or ``.parquet``.
        label: name of the label's column.
        target: "class": whole numbers as they stand, or text, numbered in sorted order; "number": regression.
        categories: text columns as one 0/1 input per value, or as one whole number.
        ids: a column of whole numbers that name the examples; line numbers from 0 otherwise.
        drop: columns that are no inputs (a name, say); a condition may still use them.
        like: what was read of the training data: the same features, categories and classes are used.

    Raises:
        Refused: for a column that is missing, a missing or infinite value, a value that `like` does not know.
        MissingExtra: without pandas and pyarrow.
    """
    path = Path(path)
    frame = _frame(path)
    for name in (label, *([ids] if ids else []), *drop):
        if name not in frame.columns:
            raise Refused(
                f"{path} has no column {name!r}{did_you_mean(name, frame.columns)}: it has {few(frame.columns)}"
            )
    inputs = [name for name in frame.columns if name not in {label, ids, *drop}]
    if not inputs:
        raise Refused(f"{path} has no input columns beside {label!r}: expected at least one")
    for name in (*inputs, label, *([ids] if ids else [])):
        _complete(frame[name], name, path)
    x, features, values = _inputs(frame, inputs, categories, path, like)
    y, classes = _target(frame[label], target, path, like)
    numbers = torch.arange(len(frame)) if ids is None else _whole(frame[ids], ids, path)
    columns, texts = _for_conditions(frame, path)
    return Loaded(as_data({"x": x, "y": y}, ids=numbers), classes, features, columns, texts, values)


def _for_conditions(frame: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Every column as numbers, and the values of those that hold text."""
    columns, texts = {}, {}
    for name in frame.columns:
        if _numeric(frame[name]):
            columns[name] = torch.tensor(frame[name].to_numpy(np.float64))
        else:
            numbers, texts[name] = _numbered(frame[name], path, None)
            columns[name] = torch.from_numpy(numbers)
    return columns, texts


def _frame(path: Path) -> Any:
    if path.suffix.lower() not in TABLES:
        raise Refused(f"{path} is not a table: expected {' or '.join(TABLES)}")
    if not path.is_file():
        raise Refused(f"there is no table {path}")
    pandas = need_extra("pandas", "files", "reading tables")
    need_extra("pyarrow", "files", "reading tables")
    try:
        frame = (
            pandas.read_csv(path, skipinitialspace=True) if path.suffix.lower() == ".csv" else pandas.read_parquet(path)
        )
    except (
        ValueError,
        OSError,
        UnicodeDecodeError,
    ) as error:  # pandas' and pyarrow's own errors are ValueErrors and OSErrors
        raise Refused(f"{path} cannot be read as a table: {first_line(error)}") from error
    if len(frame) == 0:
        raise Refused(f"{path} has no rows: expected at least one below the header")
    frame.columns = [str(name) for name in frame.columns]
    return frame.reset_index(drop=True)


def _numeric(column: Any) -> bool:
    return column.dtype.kind in "iufb"


def _line(path: Path, row: int) -> str:
    """What a person finds the row by: the line of a CSV (the header is line 1), the row of a Parquet file."""
    return f"line {row + 2}" if path.suffix.lower() == ".csv" else f"row {row}"


def _complete(column: Any, name: str, path: Path) -> None:
    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        where = _line(path, int(missing[0]))
        raise Refused(
            f"{path} has no value in column {name!r} at {where} ({len(missing)} are missing): fill them, or drop "
            f"the lines or the column"
        )
    if _numeric(column):
        infinite = np.flatnonzero(~np.isfinite(column.to_numpy(np.float64)))
        if len(infinite):
            where = _line(path, int(infinite[0]))
            raise Refused(f"{path} has an infinite value in column {name!r} at {where}: expected numbers")


def _whole(column: Any, name: str, path: Path) -> Tensor:
    if column.dtype.kind not in "iu":
        raise Refused(f"{path}: column {name!r} holds {column.dtype} values, expected whole numbers as ids")
    return torch.tensor(column.to_numpy(np.int64))


def _inputs(
    frame: Any, names: Sequence[str], categories: Categories, path: Path, like: Loaded | None
) -> tuple[np.ndarray, tuple[str, ...], dict[str, tuple[str, ...]]]:
    """[n, features] float32, the features' names and the values of each categorical column."""
    blocks, features, known = [], [], {}
    for name in names:
        column = frame[name]
        if _numeric(column) and (like is None or name not in like.categories):
            blocks.append(column.to_numpy(np.float32)[:, None])
            features.append(name)
            continue
        numbers, values = _numbered(column, path, None if like is None else like.categories.get(name))
        known[name] = values
        if categories == "onehot":
            blocks.append(np.eye(len(values), dtype=np.float32)[numbers])
            features += [f"{name}={value}" for value in values]
        else:
            blocks.append(numbers.astype(np.float32)[:, None])
            features.append(name)
    if like is not None and tuple(features) != like.features:
        odd = next(iter(set(features) ^ set(like.features)), None)
        raise Refused(
            f"{path} has other input columns than the training data"
            + (f": {odd!r} is in only one of them" if odd else ": the same ones in another order")
        )
    return np.concatenate(blocks, 1), tuple(features), known


def _numbered(column: Any, path: Path, known: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Each value's place among the sorted values."""
    text = column.astype(str).to_numpy(object)
    values = tuple(sorted(set(text))) if known is None else known
    places = {value: place for place, value in enumerate(values)}
    for row, value in enumerate(text):
        if value not in places:
            raise Refused(
                f"{path}: column {column.name!r} has the value {value!r} at {_line(path, row)}, which the training "
                f"data does not have{did_you_mean(value, values)}"
            )
    return np.array([places[value] for value in text], dtype=np.int64), values


def _target(column: Any, target: str, path: Path, like: Loaded | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if target == "number":
        if not _numeric(column):
            raise Refused(f"{path}: the label column {column.name!r} holds text, expected numbers for regression")
        return column.to_numpy(np.float32, copy=True), ()
    if not _numeric(column):
        return _numbered(column, path, None if like is None else like.classes)
    parts = np.flatnonzero(np.mod(column.to_numpy(np.float64), 1))
    if len(parts):
        row = int(parts[0])
        raise Refused(
            f"{path}: the label column {column.name!r} holds {column[row]} at {_line(path, row)}, expected whole "
            f'numbers as classes; for regression give task = "regression"'
        )
    return column.to_numpy(np.int64, copy=True), ()


def few(names: Any) -> str:
    """The first names of many, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def first_line(error: Exception) -> str:
    """What another library says of a failure, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
