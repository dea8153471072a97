"""Suites on the census table Adult, from a user's own copy in the folder that EXPUNGE_DATA names."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from expunge.core import Refused
from expunge.data.formats import data_file, data_folder
from expunge.data.recipe import Recipe, Suite, held_out, split_by_hash
from expunge.data.sources import as_data
from expunge.tasks.classification import Classification
from expunge.tasks.regression import Regression

ADULT = "UCI's data set Adult (the file adult.data)"
NAMES = (
    *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship"),
    *("race", "sex", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income"),
)
NUMBERS = ("age", "education_num", "capital_gain", "capital_loss", "hours_per_week")
LEFT_OUT = ("fnlwgt", "education")
"""The weight of a person in the survey, and the name of what `education_num` counts: no inputs."""


def adult() -> Suite:
    """32,561 people of a census (Adult), whether each earns above 50,000 dollars; numbers standardised, a small network.

    A fifth of the rows, drawn by a hash of the row's number, is the test set.
    """
    columns = _columns()
    income = _income(columns)
    everything = as_data({"x": _inputs("adult", columns, without=("income",)), "y": income, "years": _years(columns)})
    width = everything.batch(everything.rows[:1])["x"].shape[1]
    task, recipe = Classification(2), Recipe(epochs=10, lr=0.02, batch=128)
    return Suite("adult", *split_by_hash("adult", everything), task, partial(_dense, width, 64, 2), recipe)


def adult_age() -> Suite:
    """The age of 32,561 people of a census (Adult) from all else that is known of them; column ``years`` is the age.

    The target is standardised over the training rows; ``years <= 30`` chooses a range of it. No input holds the age.
    """
    columns = _columns()
    years = _years(columns)
    target = _standard("adult_age", years)
    everything = as_data({"x": _inputs("adult_age", columns, without=("age",)), "y": target, "years": years})
    width = everything.batch(everything.rows[:1])["x"].shape[1]
    recipe = Recipe(epochs=10, lr=0.01, batch=128)
    return Suite(
        "adult_age", *split_by_hash("adult_age", everything), Regression(), partial(_dense, width, 64, 1), recipe
    )


def read_adult(path: str | Path) -> dict[str, list[str]]:
    """Adult's columns by name, as text; a missing value is the value ``?``.

    Args:
        path: the file, with or without a header line.

    Raises:
        Refused: for a line of another number of values, with its number, or for a file of none.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read as a table ({error}): get {ADULT}") from error
    header = bool(lines) and bool(lines[0]) and lines[0][0] == "age"
    rows = [(number, line) for number, line in enumerate(lines, 1) if line and not (header and number == 1)]
    for number, line in rows:
        if len(line) != len(NAMES):
            raise Refused(f"{path} has {len(line)} values at line {number}, expected {len(NAMES)}: get {ADULT}")
    if not rows:
        raise Refused(f"{path} has no rows: get {ADULT}")
    return {name: [line[place] for _, line in rows] for place, name in enumerate(NAMES)}


def _columns() -> dict[str, list[str]]:
    return read_adult(data_file(data_folder("tabular", ADULT), ["adult.data"], ADULT))


def _numbers(columns: dict[str, list[str]], name: str) -> np.ndarray:
    try:
        return np.array(columns[name], np.float64)
    except ValueError as error:
        raise Refused(f"adult.data has no number in column {name} ({error}): get {ADULT}") from error


def _years(columns: dict[str, list[str]]) -> np.ndarray:
    return _numbers(columns, "age").astype(np.int64)


def _income(columns: dict[str, list[str]]) -> np.ndarray:
    names = [value.rstrip(".") for value in columns["income"]]
    odd = next((name for name in names if name not in ("<=50K", ">50K")), None)
    if odd is not None:
        raise Refused(f"adult.data has the income {odd!r}, expected <=50K or >50K: get {ADULT}")
    return np.array([name == ">50K" for name in names], np.int64)


def _inputs(name: str, columns: dict[str, list[str]], without: tuple[str, ...]) -> np.ndarray:
    """[n, inputs] float32: numbers standardised over the training rows, text as one 0/1 input per value."""
    blocks = []
    for column in NAMES:
        if column in (*without, *LEFT_OUT):
            continue
        if column in NUMBERS:
            blocks.append(_standard(name, _numbers(columns, column))[:, None])
        else:
            values, places = np.unique(columns[column], return_inverse=True)
            blocks.append(np.eye(len(values), dtype=np.float32)[places])
    return np.concatenate(blocks, 1).astype(np.float32)


def _standard(name: str, values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over the training rows of the suite."""
    known = values[~held_out(name, len(values))]
    return ((values - known.mean()) / max(float(known.std()), 1e-12)).astype(np.float32)


def _dense(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


REAL_TABLES: dict[str, Callable[[], Suite]] = {"adult": adult, "adult_age": adult_age}
