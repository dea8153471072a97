"""95 % intervals hold the truth in 93 to 97 of 100 of 1,000 trials, on synthetic models whose truth is known.

The truth is that of endless examples and endless retrained models: shares by construction, and areas by the law of the
margins, in which a right answer always stands above a wrong one and two answers of one kind are alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audit import distance
from expunge.audit.accuracy import forget_accuracy
from expunge.audit.distance import average_gap
from expunge.audit.intervals import gap_interval, student_errors
from expunge.audit.membership import membership_auc
from expunge.audit.subject import Subject
from expunge.core import Key, Request
from expunge.data.sources import as_data
from expunge.tasks.classification import Classification

TRIALS, NOMINAL = 1000, (0.93, 0.97)
SIZES = {"forget": 120, "retain": 240, "test": 180}
TOTAL = sum(SIZES.values())
ENDS = np.cumsum([0, *SIZES.values()])
IDS = torch.arange(TOTAL)
DATA = as_data((IDS[:, None].float(), torch.zeros(TOTAL, dtype=torch.int64)))
PARTS = [DATA.select(IDS[start:end]) for start, end in itertools.pairwise(ENDS)]


class Known(nn.Module):
    """Two classes, label 0: right with a probability per data set; its confidence drawn alike for all right answers."""

    def __init__(self, rng: np.random.Generator, shares: dict[str, float]):
        super().__init__()
        chance = np.repeat([shares[name] for name in SIZES], list(SIZES.values()))
        margins = np.where(rng.random(TOTAL) < chance, 1, -1) * (1 + rng.exponential(1, TOTAL))
        self.register_buffer("logits", torch.tensor(np.stack([margins, np.zeros(TOTAL)], 1), dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[x[:, 0].long()]


def area(first: float, second: float) -> float:
    """P(margin of one > margin of another) + P(equal)/2, for shares of right answers: see the module."""
    return first * (1 - second) + 0.5 * (first * second + (1 - first) * (1 - second))


def subject(
    rng: np.random.Generator, ours: dict[str, float], theirs: dict[str, float], count: int, trial: int
) -> Subject:
    models = [Known(rng, theirs) for _ in range(count)]
    after = Known(rng, ours)
    request = Request(PARTS[0], PARTS[1])
    return Subject(after, after, request, Classification(2), PARTS[2], tuple(models), draws=300, key=Key(trial))


def coverage(trial: Callable[[np.random.Generator, int], tuple[float, float, float]]) -> float:
    rng, held = np.random.default_rng(0), 0
    for number in range(TRIALS):
        truth, low, high = trial(rng, number)
        held += low <= truth <= high
    return held / TRIALS


def shares(rng: np.random.Generator) -> dict[str, float]:
    return {name: float(rng.uniform(0.55, 0.95)) for name in SIZES}


def test_accuracy() -> None:
    def trial(rng: np.random.Generator, number: int) -> tuple[float, float, float]:
        ours = shares(rng)
        reading = forget_accuracy(subject(rng, ours, ours, 0, number))
        assert reading is not None
        return 100 * ours["forget"], reading.low, reading.high

    assert NOMINAL[0] <= coverage(trial) <= NOMINAL[1]


def test_area_under_the_curve() -> None:
    def trial(rng: np.random.Generator, number: int) -> tuple[float, float, float]:
        ours = shares(rng)
        reading = membership_auc(subject(rng, ours, ours, 0, number))
        assert reading is not None
        return area(ours["forget"], ours["test"]), reading.low, reading.high

    assert NOMINAL[0] <= coverage(trial) <= NOMINAL[1]


@pytest.mark.parametrize("count", [3, 6])
def test_gap(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with gaps of any size, a small one in some metrics and a large one in others."""
    monkeypatch.setattr(distance, "floor", lambda *_: None)  # it is not looked at here, and takes most of the time

    def trial(rng: np.random.Generator, number: int) -> tuple[float, float, float]:
        ours, theirs = shares(rng), shares(rng)
        reading = average_gap(subject(rng, ours, theirs, count, number))
        assert reading is not None
        parts = [ours[name] - theirs[name] for name in SIZES]
        parts.append(area(ours["forget"], ours["test"]) - area(theirs["forget"], theirs["test"]))
        return 100 * float(np.abs(parts).mean()), reading.low, reading.high

    assert NOMINAL[0] <= coverage(trial) <= NOMINAL[1]


@pytest.mark.parametrize(
    "gaps", [(20.0, 4.0, 5.0, 15.0), (3.0, 1.0, 2.0, 4.0), (1.0, 0.5, 0.5, 1.0), (0.0, 0.0, 5.0, 20.0)]
)
@pytest.mark.parametrize("count", [4, 16])
def test_gap_of_normal_metrics_whose_seeds_vary(gaps: tuple[float, ...], count: int) -> None:
    """The hard part is where a metric's true difference is near 0: chance only ever makes it look larger."""
    noise, spread = np.array([2.5, 0.4, 1.2, 2.0]), np.array([1.5, 0.3, 0.6, 1.0])

    def trial(rng: np.random.Generator, number: int) -> tuple[float, float, float]:
        models = rng.normal(0, spread, (count, 4))
        found = np.array(gaps) + rng.normal(0, noise) - models.mean(0)
        errors = rng.normal(0, noise, (400, 4)) - student_errors(models, 400, Key(number))
        return float(np.mean(gaps)), *gap_interval(found, errors)

    assert NOMINAL[0] <= coverage(trial) <= NOMINAL[1]


def test_no_gap_at_all_is_held_by_an_interval_that_begins_at_0() -> None:
    """Where the truth is the end of the range, one side cannot be missed: 97.5 % is the nominal rate there."""

    def trial(rng: np.random.Generator, number: int) -> tuple[float, float, float]:
        models = rng.normal(0, 1, (8, 4))
        errors = rng.normal(0, 2, (400, 4)) - student_errors(models, 400, Key(number))
        return 0.0, *gap_interval(rng.normal(0, 2, 4) - models.mean(0), errors)

    assert 0.955 <= coverage(trial) <= 0.99
