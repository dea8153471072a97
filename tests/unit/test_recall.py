"""Recall: 0 for retrained models, 1 for originals, whatever the scale; and it sees what averages do not."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from expunge.audit import intervals
from expunge.audit.margin_shift import margin_shift
from expunge.audit.recall import recall, recalled
from expunge.core import Refused
from tests.unit.test_audit_measures import answers, retrained_models, subject


def value(*arrays: np.ndarray) -> float:
    weights, parts = recalled(*arrays)
    return float(parts.sum() / weights.sum())


def test_it_is_0_at_the_retrained_mean_and_1_at_the_originals() -> None:
    rng = np.random.default_rng(0)
    retrained, originals = rng.normal(0, 1, (8, 50)), rng.normal(1, 1, (6, 50))
    assert value(retrained.mean(0), retrained, originals) == pytest.approx(0, abs=1e-12)
    assert value(originals.mean(0), retrained, originals) == pytest.approx(1)
    middle = 0.3 * originals.mean(0) + 0.7 * retrained.mean(0)
    assert value(middle, retrained, originals) == pytest.approx(0.3)
    assert value(7 * middle + 2, 7 * retrained + 2, 7 * originals + 2) == pytest.approx(0.3)


def test_a_few_memorised_examples_are_seen_that_an_average_misses() -> None:
    """Five of 200 examples are memorised. In a hundred draws: the area between an original and a retrained model."""
    rng = np.random.default_rng(1)
    scale, moved = np.full(200, 1.0), np.zeros(200)
    moved[:5] = 5.0
    ours: tuple[list[float], list[float]] = ([], [])
    averages: tuple[list[float], list[float]] = ([], [])
    for _ in range(100):
        retrained, originals = rng.normal(0, scale, (9, 200)), rng.normal(moved, scale, (9, 200))
        for place, model in enumerate((originals[0], retrained[0])):
            ours[place].append(value(model, retrained[1:], originals[1:]))
            averages[place].append(margin_shift(model, retrained[1:]).mean())
    assert intervals.auc(*ours) > 0.97
    assert intervals.auc(*averages) < 0.9


def test_on_a_subject_it_needs_originals_and_leaves_the_judged_one_out() -> None:
    originals = tuple(answers(300 + seed, forget=1.0) for seed in range(4))
    references = retrained_models(5)
    assert recall(subject(originals[0], originals[0], references)) is None
    for model, wanted in ((originals[0], 1.0), (answers(77, forget=0.6), 0.0)):
        made = subject(model, originals[0], references, originals=originals)
        reading = recall(made)
        assert reading is not None
        assert reading.low < wanted < reading.high or abs(reading.value - wanted) < 0.35
        assert reading.detail["originals"] == 3, "the model that the judged one was made from is no original here"
    assert recall(subject(copy.deepcopy(originals[0]), originals[1], references, originals=originals)) is None
    assert recall(subject(originals[0], originals[0], references, originals=originals[:3])) is None


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(Refused, match="same examples"):
        recalled(np.zeros(3), np.zeros((4, 5)), np.zeros((4, 3)))
    with pytest.raises(Refused, match="K >= 2"):
        recalled(np.zeros(3), np.zeros((1, 3)), np.zeros((4, 3)))
