"""Certified removal against exact retraining by another solver, and against what its theorem says."""

from __future__ import annotations

import functools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from expunge.core import Key, Refused
from expunge.data.sources import as_data
from expunge.guarantees import (
    BudgetSpent,
    CertifiedHead,
    Promise,
    empirical_epsilon,
    frozen_features,
    linear,
    train_certified,
    unit_rows,
)
from expunge.guarantees.certified_removal import newton_removal, residual_bound
from expunge.guarantees.linear import Problem, spectral_norm
from expunge.guarantees.promise import gaussian_delta, residual_budget

WIDE = Promise(epsilon=1.0, delta=1e-4, sigma=1.0)


def examples(seed: int, n: int = 120, d: int = 6) -> tuple[Tensor, Tensor]:
    """Unit rows and noisy labels -1 and +1."""
    generator = Key(seed).at("examples").generator()
    inputs = unit_rows(torch.randn(n, d, dtype=torch.float64, generator=generator))
    chance = torch.sigmoid(6 * inputs[:, 0] - 3 * inputs[:, 1])
    return inputs, torch.where(torch.rand(n, dtype=torch.float64, generator=generator) < chance, 1.0, -1.0)


def retrained(inputs: np.ndarray, signs: np.ndarray, noise: np.ndarray, penalty: float) -> np.ndarray:
    """The optimum by another program: MINPACK's hybrid Powell method on the gradient, in numpy."""
    ridge = penalty * len(inputs)

    def gradient(w: np.ndarray) -> np.ndarray:
        return -inputs.T @ (signs * special.expit(-signs * (inputs @ w))) + ridge * w + noise

    def hessian(w: np.ndarray) -> np.ndarray:
        p = special.expit(inputs @ w)
        return (inputs * (p * (1 - p))[:, None]).T @ inputs + ridge * np.eye(len(w))

    found = optimize.root(gradient, np.zeros(inputs.shape[1]), jac=hessian, method="hybr", options={"xtol": 1e-14})
    assert np.linalg.norm(gradient(found.x)) < 1e-9
    return found.x


def distance(head: CertifiedHead, weights: Tensor) -> float:
    """From weights to exact retraining on what the head still holds, over all columns."""
    columns = [
        retrained(head.inputs.numpy(), head.targets[:, c].numpy(), head.noise[:, c].numpy(), head.penalty)
        for c in range(head.targets.shape[1])
    ]
    return float(np.linalg.norm(weights.numpy() - np.stack(columns, 1)))


@functools.cache
def problems() -> list[tuple[float, float, float, float, float]]:
    """(bound, distance after, before, with the wrong sign, residual / spent) in 100 random problems."""
    rows = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(40, 200)), int(rng.integers(2, 12))
        inputs, signs = examples(seed, n, d)
        penalty = float(10 ** rng.uniform(-3, -1))
        promise = Promise(1e6, 1e-2, float(10 ** rng.uniform(-1, 1)))
        head = train_certified(inputs, signs, promise=promise, penalty=penalty, key=Key(seed))
        gone = rng.choice(n, int(rng.integers(1, 4)), replace=False)
        after = head.remove(gone)
        wrong = head.weights - (after.weights - head.weights)
        rows.append(
            (
                after.distance_bound,
                distance(after, after.weights),
                distance(after, head.weights),
                distance(after, wrong),
                after.measured / after.spent,
            )
        )
    return rows


def test_the_distance_to_exact_retraining_is_below_its_bound_in_100_of_100() -> None:
    for bound, after, _before, _wrong, share in problems():
        assert after <= bound
        assert share <= 1


def test_removal_comes_nearer_and_the_wrong_sign_goes_away() -> None:
    for _bound, after, before, wrong, _ in problems():
        assert after < 0.5 * before
        assert wrong > 1.5 * before


def test_the_bound_is_of_use() -> None:
    """Below the worst case over all data, 4 gamma / (lambda^2 n) per removal, nearly always by far."""
    inputs, signs = examples(0, 400, 10)
    head = train_certified(inputs, signs, promise=WIDE, penalty=0.01, key=Key(0))
    assert head.remove([3]).spent < 0.01 * 4 * 0.25 / (0.01**2 * 399)


def test_the_step_is_newtons_by_differentiation() -> None:
    """H and Delta from torch.func, on the objective as it is written."""
    inputs, signs = examples(1)
    head = train_certified(inputs, signs, promise=WIDE, penalty=0.02, key=Key(0))
    gone = torch.zeros(len(inputs), dtype=torch.bool)
    gone[[4, 9]] = True

    def objective(w: Tensor, rows: Tensor) -> Tensor:
        losses = torch.log1p(torch.exp(-signs[rows] * (inputs[rows] @ w)))
        return losses.sum() + 0.02 / 2 * int(rows.sum()) * w.square().sum()

    w = head.weights[:, 0]
    delta = torch.func.grad(objective)(w, gone)
    hessian = torch.func.hessian(objective)(w, ~gone)
    assert torch.allclose(newton_removal(head, gone)[:, 0], torch.linalg.solve(hessian, delta), rtol=1e-10)
    noisy = torch.func.grad(objective)(w, torch.ones_like(gone)) + head.noise[:, 0]
    assert float(noisy.norm()) < 1e-10


def test_without_noise_it_is_logistic_regression() -> None:
    inputs, signs = examples(2)
    head = train_certified(inputs, signs, promise=Promise(1, 1e-4, 1e-8), penalty=0.01, key=Key(0))
    other = LogisticRegression(C=1 / (0.01 * len(inputs)), fit_intercept=False, tol=1e-12, max_iter=10_000)
    assert np.allclose(head.weights[:, 0], other.fit(inputs, signs).coef_[0], atol=1e-6)


def test_residuals_add_up_over_many_removals() -> None:
    inputs, signs = examples(3, 200, 5)
    head = train_certified(inputs, signs, promise=Promise(100.0, 1e-2, 1.0), penalty=0.05, key=Key(0))
    spent = [head.spent]
    for number in range(30):
        head = head.remove([number])
        assert head.measured <= head.spent
        spent.append(head.spent)
    assert spent == sorted(spent)
    assert distance(head, head.weights) <= head.distance_bound
    assert len(head) == 170
    assert head.removed.tolist() == list(range(30))
    assert not torch.isin(head.ids, head.removed).any()
    assert len(head.inputs) == 170  # the rows themselves are gone


def test_one_against_all_adds_over_classes() -> None:
    inputs, _ = examples(4, 150, 5)
    labels = inputs[:, :3].argmax(1)
    head = train_certified(inputs, labels, classes=3, promise=Promise(100.0, 1e-2, 0.5), penalty=0.02, key=Key(7))
    after = head.remove([1, 2, 3])
    gone = torch.isin(head.ids, torch.tensor([1, 2, 3]))
    step = newton_removal(head, gone)
    each = [residual_bound(step[:, [c]], after.inputs, "logistic") for c in range(3)]
    assert after.spent == pytest.approx(head.spent + sum(each))
    assert distance(after, after.weights) <= after.distance_bound
    for c in range(3):
        sign = torch.where(labels == c, 1.0, -1.0)
        alone = Problem(inputs, sign[:, None].double(), 0.02 * 150, head.noise[:, [c]]).optimum()
        assert torch.allclose(head.weights[:, [c]], alone, atol=1e-10)


def test_the_squared_loss_is_removed_exactly() -> None:
    inputs, _ = examples(5, 80, 4)
    inputs = 30 * inputs  # rows of any length: there is nothing to bound
    target = inputs @ torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    head = train_certified(inputs, target, loss="squared", promise=Promise(1, 1e-4, 1e-6), penalty=0.1, key=Key(0))
    after = head.remove(range(20)).remove([40, 41])
    kept = after.ids
    other = Ridge(alpha=0.1 * len(kept), fit_intercept=False).fit(inputs[kept], target[kept])
    assert np.allclose(after.weights.T, other.coef_, atol=1e-5)
    again = Problem(after.inputs, after.targets, 0.1 * len(after), after.noise, "squared").optimum()
    assert float((after.weights - again).norm()) < 1e-11
    assert after.spent < 1e-9


def test_the_budget_by_hand_and_by_integration() -> None:
    assert residual_budget(10.0, 1.0, 1e-4) == pytest.approx(10 / math.sqrt(2 * math.log(15000)))
    for shift, epsilon in ((0.3, 0.5), (1.0, 1.0), (2.0, 6.0)):

        def excess(x: float, shift: float = shift, epsilon: float = epsilon) -> float:
            return max(0.0, stats.norm.pdf(x, shift) - math.exp(epsilon) * stats.norm.pdf(x))

        cut = epsilon / shift + shift / 2
        assert gaussian_delta(shift, 1.0, epsilon) == pytest.approx(integrate.quad(excess, cut, cut + 15)[0], rel=1e-6)
    for epsilon in (0.1, 1.0, 10.0, 40.0):
        for delta in (1e-2, 1e-5, 1e-9):
            assert gaussian_delta(residual_budget(3.0, epsilon, delta), 3.0, epsilon) <= delta * (1 + 1e-6)


def test_beyond_epsilon_ten_the_papers_budget_would_be_too_large() -> None:
    paper = 10 / math.sqrt(2 * math.log(1.5e5))
    assert gaussian_delta(paper, 1.0, 10.0) > 1e-5
    assert residual_budget(1.0, 10.0, 1e-5) < paper


def test_the_spectral_norm_is_never_below(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, shape in enumerate([(50, 7), (7, 50), (30, 30), (20, 1)]):
        matrix = torch.randn(shape, dtype=torch.float64, generator=Key(seed).generator())
        true = float(torch.linalg.svdvals(matrix)[0])
        assert true <= spectral_norm(matrix) <= true * (1 + 1e-8)
        monkeypatch.setattr(linear, "EXACT", 0)
        assert true <= spectral_norm(matrix) <= 3 * true
        monkeypatch.undo()


def test_a_spent_budget_refuses_and_changes_nothing() -> None:
    inputs, signs = examples(6, 60)
    head = train_certified(inputs, signs, promise=Promise(0.1, 1e-5, 0.5), penalty=1e-3, key=Key(0))
    before = head.weights.clone()
    with pytest.raises(BudgetSpent, match="retrain"):
        head.remove(range(20))
    assert torch.equal(head.weights, before)
    assert len(head) == 60
    assert head.remaining > 0
    fresh = head.retrain(range(20), key=Key(9))
    assert fresh.spent < 1e-9
    assert fresh.ids.tolist() == list(range(20, 60))
    assert not torch.equal(fresh.noise, head.noise)
    assert distance(fresh, fresh.weights) < 1e-8


def test_the_certificate_holds_up_against_an_attacker() -> None:
    """Over draws of the noise: the law after removal, against the law of retraining with other draws."""
    inputs, signs = examples(7, 60, 2)
    promise = Promise(1.0, 0.01, 0.3)
    heads = [train_certified(inputs, signs, promise=promise, penalty=0.05, key=Key(seed)) for seed in range(300)]
    removed = torch.stack([head.remove([0]).weights[:, 0] for head in heads])
    others = torch.stack([head.retrain([0], key=Key(1000 + i)).weights[:, 0] for i, head in enumerate(heads)])
    towards = (torch.stack([head.weights[:, 0] for head in heads]).mean(0) - others.mean(0)).numpy()
    after = empirical_epsilon(removed.numpy() @ towards, others.numpy() @ towards, 0.01)
    assert after <= promise.epsilon
    heavy = Promise(1.0, 0.01, 1e-4)  # so little noise that doing nothing is seen at once
    kept = [train_certified(inputs, signs, promise=heavy, penalty=0.05, key=Key(s)).weights[:, 0] for s in range(100)]
    gone = [
        train_certified(inputs[1:], signs[1:], promise=heavy, penalty=0.05, key=Key(1000 + s)).weights[:, 0]
        for s in range(100)
    ]
    nothing = empirical_epsilon(torch.stack(kept).numpy() @ towards, torch.stack(gone).numpy() @ towards, 0.01)
    assert nothing > 1.0


def test_the_factor_that_the_theorem_does_not_carry_is_near_one() -> None:
    """b -> the noise for which the result is an exact optimum: its determinant, by finite differences."""
    inputs, signs = examples(8, 100, 3)
    promise, penalty = Promise(1.0, 1e-4, 1.0), 0.02
    head = train_certified(inputs, signs, promise=promise, penalty=penalty, key=Key(0))
    gone = torch.zeros(100, dtype=torch.bool)
    gone[:2] = True
    rest = Problem(inputs[~gone], signs[~gone, None].double(), penalty * 98, torch.zeros(3, 1, dtype=torch.float64))

    def back(noise: Tensor) -> Tensor:
        whole = Problem(inputs, signs[:, None].double(), penalty * 100, noise)
        held = CertifiedHead(
            whole.optimum(head.weights),
            noise,
            inputs,
            whole.targets,
            head.ids,
            head.removed,
            "logistic",
            penalty,
            promise,
            0,
            0,
        )
        return -rest.gradient(held.weights + newton_removal(held, gone))[:, 0]

    step = 1e-4
    columns = [
        (back(head.noise + step * e[:, None]) - back(head.noise - step * e[:, None])) / (2 * step)
        for e in torch.eye(3, dtype=torch.float64)
    ]
    volume = float(torch.linalg.slogdet(torch.stack(columns, 1))[1])
    assert abs(volume) < 0.01 * promise.epsilon
    assert volume != 0.0


def test_save_and_load(tmp_path: Path) -> None:
    inputs, signs = examples(9, 50, 4)
    head = train_certified(inputs, signs, promise=WIDE, penalty=0.1, ids=torch.arange(100, 150), key=Key(0)).remove(
        [103]
    )
    head.save(tmp_path / "head.safetensors")
    again = CertifiedHead.load(tmp_path / "head.safetensors")
    assert torch.equal(again.remove([110]).weights, head.remove([110]).weights)
    assert (again.spent, again.promise, again.loss) == (head.spent, head.promise, head.loss)
    with pytest.raises(Refused, match="removed already"):
        again.remove([103])
    (tmp_path / "half").write_bytes((tmp_path / "head.safetensors").read_bytes()[:200])
    with pytest.raises(Refused, match="whole"):
        CertifiedHead.load(tmp_path / "half")
    with pytest.raises(Refused, match="no certified head"):
        CertifiedHead.load(tmp_path / "nothing")


def test_a_head_on_a_frozen_network() -> None:
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh())
    inputs, _ = examples(10, 90, 12)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    data = as_data((inputs.reshape(-1, 3, 4).float(), labels))
    features = frozen_features(network, data, batch=32)
    assert torch.allclose(features.norm(dim=1), torch.ones(90, dtype=torch.float64))
    head = train_certified(features, labels, classes=3, promise=WIDE, penalty=0.01, ids=data.ids, key=Key(0))
    model = head.classifier(network)
    assert torch.allclose(model(data.batch(torch.arange(90))["x"]), (features @ head.weights).float(), atol=1e-5)
    binary = train_certified(features, labels.clamp_max(1) * 2 - 1, promise=WIDE, penalty=0.01, key=Key(0))
    scores = binary.module()(features)
    assert torch.allclose(scores[:, 1] - scores[:, 0], (features @ binary.weights)[:, 0])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_key_gives_the_same_bits() -> None:
    inputs, signs = examples(11)
    first, second, other = (
        train_certified(inputs, signs, promise=WIDE, penalty=0.1, key=Key(seed)).weights for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


GOOD = {"promise": WIDE, "penalty": 0.1, "key": Key(0)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"targets": torch.tensor([0.0, 1.0, 1.0, 0.0])}, "labels must be -1 or [+]1"),
        ({"targets": torch.tensor([0, 1, 2, 5]), "classes": 3}, "outside the 3 classes"),
        ({"targets": torch.ones(4), "classes": 1}, "classes must be at least 2"),
        ({"targets": torch.ones(3)}, "3 targets were given for 4 examples"),
        ({"inputs": 2 * torch.eye(4)}, "length 2.*at most 1"),
        ({"inputs": torch.full((4, 2), math.nan)}, "NaN"),
        ({"inputs": torch.ones(4)}, "expected .examples, features."),
        ({"penalty": 0.0}, "penalty must be a positive number"),
        ({"penalty": -1.0}, "penalty must be a positive number"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"ids": torch.zeros(4)}, "one different whole number"),
        ({"loss": "squared", "classes": 2}, "classes is for the logistic loss"),
        ({"loss": "squared", "targets": torch.full((4,), math.inf)}, "targets hold NaN or infinity"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], sentence: str) -> None:
    settings = {"inputs": torch.eye(4), "targets": torch.ones(4), **GOOD, **change}
    with pytest.raises(Refused, match=sentence):
        train_certified(settings.pop("inputs"), settings.pop("targets"), **settings)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([99], "id 99 is none of"),
        ([0, 0], "repeat"),
        ([], "at least one"),
        ([5], "removed already"),
        ([i for i in range(40) if i != 5], "at least one must stay"),
    ],
)
def test_bad_removals_are_refused(ids: list[int], sentence: str) -> None:
    inputs, signs = examples(12, 40, 3)
    head = train_certified(inputs, signs, **GOOD).remove([5])
    with pytest.raises(Refused, match=sentence):
        head.remove(ids)


@pytest.mark.parametrize("bad", [{"epsilon": 0.0}, {"delta": 1.0}, {"sigma": -1.0}, {"epsilon": math.inf}])
def test_bad_promises_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Promise(**{"epsilon": 1.0, "delta": 0.1, "sigma": 1.0, **bad})


def test_the_example_removes_digits_and_stays_within_its_bound() -> None:
    path = Path(__file__).parents[2] / "examples/certified_head.py"
    found = runpy.run_path(str(path))["main"]()
    assert found["removed"] >= 10
    assert found["distance"] <= found["bound"]
    assert found["distance"] < 0.1 * found["distance without removal"]
    assert abs(found["accuracy"] - found["accuracy of retraining"]) < 0.05
    assert found["accuracy"] > 0.9
