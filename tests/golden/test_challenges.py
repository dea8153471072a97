"""Hard cases against brute force, closed forms, other libraries and the authors' code on the same arrays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix as by_sklearn
from torch import nn

from expunge.audit.subject import FORGOTTEN, IN, OUT
from expunge.challenges.confusion import confusion_matrix, interclass_error, targeted_confusion
from expunge.challenges.corrective import trigger
from expunge.challenges.difficulty import confidence, el2n, entanglement, grand, symmetrised_kl
from expunge.challenges.identity import nomus
from expunge.challenges.memorisation import influence, memorisation
from expunge.challenges.worst_case import capped_simplex
from expunge.core import Key
from tests.fixtures import tiny


def bisected(values: np.ndarray, total: float) -> np.ndarray:
    """The same projection, mu by 200 bisections."""
    low, high = values.min() - 1.0, values.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(values - middle, 0, 1).sum() > total else (low, middle)
    return np.clip(values - high, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_projection_equals_bisection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        size = int(rng.integers(1, 12))
        values = rng.normal(size=size) * rng.choice([1e-3, 1.0, 40.0])
        values = np.round(values) if rng.random() < 0.3 else values  # ties
        total = float(rng.integers(0, size + 1)) if rng.random() < 0.5 else float(size * rng.random())
        found = capped_simplex(values, total)
        assert found.sum() == pytest.approx(total, abs=1e-9)
        assert found.min() >= 0
        assert found.max() <= 1
        assert np.abs(found - bisected(values, total)).max() < 1e-9


def test_projection_is_the_nearest_point() -> None:
    """scipy's constrained least squares from the middle of the set."""
    rng = np.random.default_rng(9)
    for _ in range(10):
        values = rng.normal(0.3, 0.8, 7)
        done = minimize(
            lambda w, v=values: np.square(w - v).sum(),
            np.full(7, 3.0 / 7),
            jac=lambda w, v=values: 2 * (w - v),
            bounds=[(0, 1)] * 7,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 3.0},
            options={"ftol": 1e-14},
        )
        assert np.abs(capped_simplex(values, 3.0) - done.x).max() < 1e-6


def test_projection_equals_the_released_one() -> None:
    """`bisection` of OPTML-Group/Unlearn-WorstCase (commit fc727ce), which stops at 1e-5, on this vector with 4."""
    values = np.array([-0.181, -0.495, 0.151, 0.552, 0.982, 0.366, -0.032, -0.171, 0.749, 1.281, 0.464, -0.44])
    theirs = [0.0, 0.0, 0.107, 0.508, 0.938, 0.322, 0.0, 0.0, 0.705, 1.0, 0.42, 0.0]
    assert np.abs(capped_simplex(values, 4) - theirs).max() < 1e-4


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Membership, correctness on the same examples, correctness on three others; 20 models, 5 examples."""
    rng = np.random.default_rng(7)
    inside = rng.random((20, 5)) < 0.7
    correct = rng.random((20, 5)) < np.where(inside, 0.9, 0.4)
    return inside, correct, rng.random((20, 3)) < 0.6


def test_memorisation_and_influence_equal_loops() -> None:
    inside, correct, others = drawn()
    found, on_others = memorisation(correct, inside), influence(others, inside)
    for i in range(5):
        members = [m for m in range(20) if inside[m, i]]
        rest = [m for m in range(20) if not inside[m, i]]
        assert (found.n_in[i], found.n_out[i]) == (len(members), len(rest))
        with_it = sum(correct[m, i] for m in members) / len(members)
        assert found.value[i] == pytest.approx(with_it - sum(correct[m, i] for m in rest) / len(rest))
        p = (sum(correct[m, i] for m in members) + 1) / (len(members) + 2)
        q = (sum(correct[m, i] for m in rest) + 1) / (len(rest) + 2)
        variance = p * (1 - p) / (len(members) + 2) + q * (1 - q) / (len(rest) + 2)
        assert found.error[i] == pytest.approx(math.sqrt(variance))
        for j in range(3):
            there = sum(others[m, j] for m in members) / len(members) - sum(others[m, j] for m in rest) / len(rest)
            assert on_others.value[i, j] == pytest.approx(there)


def test_memorisation_and_influence_equal_the_released_code() -> None:
    """kairanzhao/RUM (commit f593c9d), its masked mean and masked product, on the arrays of ``drawn``."""
    inside, correct, others = drawn()
    theirs = [0.5, 0.62637, 0.66667, 0.26667, 0.88235]
    assert np.allclose(memorisation(correct, inside).value, theirs, atol=2e-5)
    products = [  # theirs has a row per other example
        [0.0625, 0.18681, -0.40476, 0.2, 0.2549],
        [-0.1875, -0.3956, 0.14286, -0.53333, -0.07843],
        [0.0, -0.10989, 0.0, -0.13333, -0.19608],
    ]
    assert np.allclose(influence(others, inside).value, np.transpose(products), atol=2e-5)


def test_forgotten_examples_are_on_neither_side() -> None:
    inside, correct, _ = drawn()
    states = np.where(inside, IN, OUT)
    states[:3] = FORGOTTEN
    wanted = memorisation(correct[3:], inside[3:])
    found = memorisation(correct, states)
    assert np.allclose(found.value, wanted.value)
    assert np.array_equal(found.n_in, wanted.n_in)


@pytest.mark.parametrize(("p", "q", "models"), [(0.95, 0.3, 30), (1.0, 0.9, 20), (0.7, 0.7, 100)])
def test_intervals_of_memorisation_cover(p: float, q: float, models: int) -> None:
    """2,000 examples of one true value: 95 % intervals, at least 93 % and (Agresti-Caffo errs wide) at most 99.7 %."""
    rng = np.random.default_rng(11)
    inside = rng.random((models, 2000)) < 0.7
    correct = rng.random(inside.shape) < np.where(inside, p, q)
    low, high = memorisation(correct, inside).interval
    assert 0.93 <= float(np.mean((low <= p - q) & (p - q <= high))) <= 0.997


def test_entanglement_by_loops() -> None:
    rng = np.random.default_rng(3)
    forget, retain = rng.normal(0, 1, (7, 3)), rng.normal(1, 2, (11, 3))
    mean_f, mean_r = ([sum(x) / len(x) for x in zip(*rows, strict=True)] for rows in (forget, retain))
    mean = [(a + b) / 2 for a, b in zip(mean_f, mean_r, strict=True)]

    def square(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    within = sum(square(row, mean_r) for row in retain) / 11 + sum(square(row, mean_f) for row in forget) / 7
    between = (square(mean_r, mean) + square(mean_f, mean)) / 2
    assert entanglement(forget, retain) == pytest.approx(within / between)
    assert entanglement(forget, retain + 50) < entanglement(forget, retain)
    assert entanglement(forget, forget) == math.inf


def test_symmetrised_kl_equals_the_released_code_and_scipy() -> None:
    """`calculate_kl` of kairanzhao/RUM (commit f593c9d), on these rows."""
    p = np.array([[0.02, 0.803, 0.129, 0.047], [0.091, 0.016, 0.33, 0.563], [0.095, 0.492, 0.282, 0.131]])
    q = np.array([[0.235, 0.453, 0.113, 0.198], [0.034, 0.056, 0.759, 0.152], [0.129, 0.492, 0.021, 0.358]])
    assert np.allclose(symmetrised_kl(p, q), [0.474683, 0.500854, 0.458265], atol=1e-6)
    p, q = (part / part.sum(1, keepdims=True) for part in (p, q))
    wanted = [(entropy(a, b) + entropy(b, a)) / 2 for a, b in zip(p, q, strict=True)]
    assert np.allclose(symmetrised_kl(p, q), wanted)


def test_el2n_and_confidence_by_hand() -> None:
    probabilities = np.array([[[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], [[0.2, 0.2, 0.6], [0.0, 1.0, 0.0]]])
    labels = np.array([2, 0])
    first = (math.sqrt(0.25 + 0.09 + 0.64) + math.sqrt(0.04 + 0.04 + 0.16)) / 2
    assert np.allclose(el2n(probabilities, labels), [first, math.sqrt(2) / 2])
    assert np.allclose(confidence(probabilities, labels), [0.4, 0.5])
    assert el2n(probabilities[0], labels)[1] == 0


def test_grand_equals_one_gradient_at_a_time() -> None:
    found = tiny("classification")
    data = found.request.forget.select(torch.arange(6))
    models = [found.make(0), found.make(1)]
    wanted = np.zeros(6)
    for model in models:
        for i in range(6):
            batch = data.batch(torch.tensor([i]))
            loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            wanted[i] += math.sqrt(sum(float(g.double().square().sum()) for g in grads)) / 2
    assert np.allclose(grand(models, data, found.task, chunk=4, key=Key(0)), wanted, rtol=1e-5)
    last = grand(models, data, found.task, scope=["7.*"])
    assert (last < wanted).all()
    assert (last > 0).all()


def test_interclass_confusion_by_hand() -> None:
    """Rows true, columns predicted; classes 0 and 2."""
    matrix = np.array([[5, 1, 2], [0, 9, 1], [3, 0, 4]])
    assert interclass_error(matrix, 0, 2) == pytest.approx((1 + 2 + 3 + 0) / (8 + 7))
    assert targeted_confusion(matrix, 0, 2) == 2 + 3
    assert math.isnan(interclass_error(np.zeros((3, 3), int), 0, 1))


def test_the_confusion_matrix_equals_sklearn() -> None:
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    assert np.array_equal(confusion_matrix(labels, predicted, 7), by_sklearn(labels, predicted, labels=range(7)))


def test_nomus_gives_the_published_numbers() -> None:
    """MUFAC's original model: utility 0.5951 and forgetting score 0.2136 are printed beside NoMUS 0.5839."""
    assert nomus(0.5951, 0.5 + 0.2136) == pytest.approx(0.5839, abs=1e-4)
    assert nomus(0.5951, 0.5 - 0.2136) == pytest.approx(0.5839, abs=1e-4)
    assert (nomus(1, 0.5), nomus(0, 1), nomus(0.8, 1, weight=1)) == (1, 0, 0.8)


@pytest.mark.parametrize("patch", [1, 3])
def test_the_trigger_touches_the_corner_only(patch: int) -> None:
    images = torch.arange(2 * 2 * 5 * 6).reshape(2, 2, 5, 6).float()
    found = trigger(images, patch, -1.0)
    for n, c, row, column in itertools.product(range(2), range(2), range(5), range(6)):
        corner = row >= 5 - patch and column >= 6 - patch
        assert float(found[n, c, row, column]) == (-1.0 if corner else float(images[n, c, row, column]))
