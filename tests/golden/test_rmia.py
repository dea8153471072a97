"""RMIA against the authors' code, run beside ours on the arrays below (its counts are written down here).

Source: privacytrustlab/ml_privacy_meter at e384af8f, attacks.py, functions run_rmia and tune_offline_a.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from expunge.audit.rmia import GRID, offline_evidence, online_evidence, scores, tuned

EXAMPLES, POPULATION, MODELS = 40, 25, 8
COUNTS = {
    (
        1,
        0.3,
    ): "13 23 13 17 20 25 11 25 25 22 21 11 25 25 13 7 22 25 19 25 25 20 22 20 25 25 22 25 25 19 25 20 21 25 13 22 "
    "25 12 24 25",
    (
        3,
        0.3,
    ): "13 22 15 20 22 22 10 25 25 21 22 13 25 25 10 7 22 24 21 25 25 18 20 18 24 25 25 25 25 15 24 13 21 25 17 22 "
    "24 12 24 25",
    (
        3,
        0.0,
    ): "13 22 13 22 22 22 10 25 24 22 22 12 25 25 9 7 22 24 22 25 25 17 22 14 24 25 25 25 25 16 24 13 22 24 14 24 "
    "24 12 24 25",
    (
        3,
        1.0,
    ): "17 20 23 17 23 24 10 24 24 18 18 18 23 24 12 11 18 22 24 24 24 18 19 23 24 25 22 24 25 14 23 18 20 25 20 19 "
    "21 14 24 24",
}
"""(pairs of reference models, a) -> for each example, of how many of the 25 population examples its ratio is above 1."""


def uniform(seed: int, *shape: int) -> np.ndarray:
    """A linear congruential generator: the same numbers with every version of numpy."""
    found, state = [], seed
    for _ in range(math.prod(shape)):
        state = (1103515245 * state + 12345) % 2**31
        found.append((state >> 8) / 2**23)
    return np.array(found).reshape(shape)


def memberships(seed: int) -> np.ndarray:
    """[n, models] of which two by two are each other's opposite, as the authors' code takes it."""
    first = uniform(seed, EXAMPLES, MODELS // 2) < 0.5
    return np.stack([first, ~first], 2).reshape(EXAMPLES, MODELS)


def outside(signals: np.ndarray, members: np.ndarray, models: list[int]) -> np.ndarray:
    """[n] mean over the models that did not have the example."""
    return np.array(
        [np.mean([row[m] for m in models if not had[m]]) for row, had in zip(signals, members, strict=True)]
    )


@pytest.mark.parametrize(("pairs", "a"), list(COUNTS))
def test_scores_are_the_authors_counts(pairs: int, a: float) -> None:
    members = memberships(5)
    signals = 0.05 + 0.25 * uniform(6, EXAMPLES, 1) + 0.45 * uniform(7, EXAMPLES, MODELS) + 0.2 * members
    population = 0.05 + 0.25 * uniform(8, POPULATION, 1) + 0.45 * uniform(9, POPULATION, MODELS)
    models = list(range(2, 2 + 2 * pairs))
    largest = -np.sort(-population[:, models], axis=1)[:, :pairs]  # their code keeps the largest where all are OUT
    found = scores(
        signals[:, 0],
        offline_evidence(outside(signals, members, models), a),
        population[:, 0],
        offline_evidence(largest.mean(1), a),
    )
    assert np.array_equal(found, [int(count) / POPULATION for count in COUNTS[pairs, a].split()])


def test_a_is_tuned_as_the_authors_do() -> None:
    """Attacking model 1 with models 2 and 3, they find 0.6, with an area of 0.9545 (0.9432 at 0.4, 0.9242 at 0.7)."""
    members = memberships(50)
    plain = 0.02 + 0.58 * uniform(6, EXAMPLES, 1) + 0.2 * uniform(7, EXAMPLES, MODELS)
    signals = np.where(members, plain + 0.3 * (1 - plain), plain)
    population = 0.02 + 0.58 * uniform(8, POPULATION, 1) + 0.2 * uniform(9, POPULATION, MODELS)
    mean = outside(signals, members, [2, 3])
    assert tuned(signals[:, 1], members[:, 1], mean, population[:, 1], population[:, 2:4].max(1)) == 0.6
    assert 0.6 in GRID


def test_evidence_by_hand() -> None:
    assert offline_evidence([0.5], 0.3) == pytest.approx([0.675])  # (1.3 * 0.5 + 0.7) / 2
    assert offline_evidence([0.2], 1.0) == pytest.approx([0.2])
    assert online_evidence([0.9], [0.5]) == pytest.approx([0.7])
