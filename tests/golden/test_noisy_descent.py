"""The accountant of noisy descent against exact divergences, and its trainer against exact optima and an attacker."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from expunge.core import Key, Refused
from expunge.guarantees.linear import Problem, unit_rows
from expunge.guarantees.noisy_descent import (
    NoisyDescent,
    descent_to_delete_sigma,
    empirical_epsilon,
    renyi_bound,
    sequential,
    smallest_steps,
    to_epsilon,
)
from expunge.guarantees.promise import gaussian_delta

DELTA = 1e-2


def examples(seed: int, n: int = 40, d: int = 2) -> tuple[Tensor, Tensor]:
    generator = Key(seed).at("examples").generator()
    inputs = unit_rows(torch.randn(n, d, dtype=torch.float64, generator=generator))
    chance = torch.sigmoid(4 * inputs[:, 0])
    return inputs, torch.where(torch.rand(n, dtype=torch.float64, generator=generator) < chance, 1.0, -1.0)


def exact(alpha: np.ndarray, before: int, after: int, m: float, eta: float, push: float, sigma: float) -> np.ndarray:
    """Rényi divergence of two noisy descents on m/2 |w - c|^2, whose mean gradients differ by `push` for `before` steps.

    w <- (1 - eta m) w + eta m c + noise is Gaussian at every step: only the means differ.
    """
    shrink = 1 - eta * m
    shift = push * eta * sum(shrink**i for i in range(before)) * shrink**after
    variance = 2 * eta * sigma**2 * sum(shrink ** (2 * i) for i in range(before + after))
    return alpha * shift**2 / (2 * variance)


@pytest.mark.parametrize("m", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_bound_is_above_the_exact_divergence_of_gaussians(m: float, share: float) -> None:
    """Units and rates: a wrong power of n, M, sigma, m or eta shows in some corner of the grid."""
    alpha, eta = 1 + np.geomspace(1e-3, 1e4, 40), share / (0.25 + m)
    for before in (1, 10, 5000):
        for after in (0, 1, 7, 200):
            for n, removed, clip, sigma in ((100, 1, 1.0, 0.05), (30, 5, 0.2, 1.0)):
                push = 2 * removed * clip / n
                truth = exact(alpha, before, after, m, eta, push, sigma)
                bound = renyi_bound(alpha, after, strong=m, lr=eta, clip=clip, sigma=sigma, n=n, removed=removed)
                assert (truth <= bound).all()


def test_the_bound_is_not_vacuous() -> None:
    """At no step of unlearning, after long training, it is about twice the exact divergence."""
    alpha = np.array([2.0, 16.0])
    truth = exact(alpha, 200_000, 0, 0.01, 0.05, 2 / 100, 0.3)
    bound = renyi_bound(alpha, 0, strong=0.01, lr=0.05, clip=1.0, sigma=0.3, n=100)
    assert np.allclose(bound / truth, 2.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("steps", "removed", "wanted"), [(1, 100, 55.824630450), (301, 100, 5.387252026), (11, 1, 0.312822382)]
)
def test_the_formula_as_the_authors_code_has_it(steps: int, removed: int, wanted: float) -> None:
    """Numbers from the expression and the minimiser of the code released with the paper, in its setting for MNIST."""
    settings = NoisyDescent(penalty=1e-6 * 11982, sigma=0.03)
    assert settings.epsilon(steps, 11982, 1 / 11982, removed) == pytest.approx(wanted, rel=1e-6)


def test_conversion_of_a_gaussian() -> None:
    """Rényi alpha r/2 converts to r/2 + sqrt(2 r ln(1/delta)), and that holds for the Gaussians it is of."""
    for ratio in (0.01, 0.3, 4.0):
        for delta in (1e-2, 1e-6):
            epsilon = to_epsilon(lambda alpha, ratio=ratio: alpha * ratio / 2, delta)
            assert epsilon == pytest.approx(ratio / 2 + math.sqrt(2 * ratio * math.log(1 / delta)), rel=1e-6)
            assert gaussian_delta(math.sqrt(ratio), 1.0, epsilon) <= delta


@pytest.mark.parametrize(("delta", "tighter"), [(1e-2, 2.3823136), (1e-5, 4.1619755)])
def test_conversion_is_on_the_safe_side_of_dp_accounting(delta: float, tighter: float) -> None:
    """Numbers of dp-accounting 0.6.0's `compute_epsilon` on the same curve, by a later and tighter conversion."""
    found = NoisyDescent(penalty=0.1, sigma=0.05).epsilon(0, 200, delta)
    assert tighter <= found <= 1.4 * tighter


def test_the_smallest_number_of_steps() -> None:
    settings = NoisyDescent(penalty=0.1, sigma=0.1)
    steps = settings.steps_needed(0.5, 1e-5, n=200, removed=3)
    assert settings.epsilon(steps, 200, 1e-5, 3) <= 0.5 < settings.epsilon(steps - 1, 200, 1e-5, 3)
    assert settings.steps_needed(1e6, 1e-5, n=200) == 0
    epsilons = [settings.epsilon(steps, 200, 1e-5) for steps in (0, 10, 100, 1000)]
    assert epsilons == sorted(epsilons, reverse=True)
    with pytest.raises(Refused, match="no 1,000,000,000 steps"):
        smallest_steps(lambda steps: 2.0, 1.0)


def test_a_sequence_is_bounded_from_above() -> None:
    """Three requests on quadratics, each shift as large as can be and in one direction: means again are exact."""
    settings, n = NoisyDescent(penalty=0.5, sigma=0.3, lr=0.4), 50
    requests = [(1, 3), (2, 5), (1, 4)]
    alpha, shrink = 1 + np.geomspace(1e-2, 100, 30), 1 - 0.4 * 0.5
    shift = 0.0
    left = n
    for removed, steps in requests:
        shift = (shift + 2 * removed / left / 0.5) * shrink**steps
        left -= removed
    variance = 0.3**2 / (0.5 * (1 - 0.4 * 0.5 / 2))
    truth = alpha * shift**2 / (2 * variance)
    bound = settings.sequence(requests, n)(alpha)
    assert (truth <= bound).all()
    assert np.allclose(settings.sequence(requests[:1], n)(alpha), settings.renyi(3, n, 1)(alpha))
    assert (settings.sequence(requests[:1], n)(alpha) < settings.sequence([(1, 3), (1, 3)], n)(alpha)).all()


def test_the_recursion_by_hand() -> None:
    found = sequential(
        [(1, 2), (3, 4)], 10, lambda a, left, removed: a * removed / left, lambda a, steps: np.exp(-steps / a)
    )
    a = 3.0
    first = math.exp(-2 / 6) * 6 * 1 / 10
    wanted = math.exp(-4 / 3) * (3 - 0.5) / (3 - 1) * (6 * 3 / 9 + first)
    assert found(np.array([a]))[0] == pytest.approx(wanted)


def test_the_trainer_is_the_formula() -> None:
    """Against a plain loop over examples: gradients by differentiation, clipped one by one."""
    inputs, labels = examples(0, 12, 3)
    settings = NoisyDescent(penalty=0.2, sigma=0.1, clip=0.3, radius=0.4)
    w, key = torch.zeros(3, dtype=torch.float64), Key(5)
    for step in range(20):
        total = torch.zeros(3, dtype=torch.float64)
        for x, y in zip(inputs, labels, strict=True):
            grad = torch.func.grad(lambda v, x=x, y=y: torch.log1p(torch.exp(-y * (x @ v))))(w)
            total += grad * min(1.0, 0.3 / float(grad.norm()))
        noise = torch.randn(1, 3, dtype=torch.float64, generator=key.at("step", step).generator())[0]
        w = w - settings.eta * (total / 12 + 0.2 * w) + math.sqrt(2 * settings.eta * 0.01) * noise
        w = w * min(1.0, 0.4 / float(w.norm()))
    assert torch.allclose(settings.train(inputs, labels, 20, key)[0], w, atol=1e-12)
    assert float(settings.train(inputs, labels, 20, key, runs=50).norm(dim=1).max()) <= 0.4 * (1 + 1e-12)


def test_without_noise_it_finds_the_optimum() -> None:
    inputs, labels = examples(1, 60, 4)
    settings = NoisyDescent(penalty=0.05, sigma=1e-12)
    other = LogisticRegression(C=1 / (0.05 * 60), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(inputs, labels)
    assert np.allclose(settings.train(inputs, labels, 2000, Key(0))[0], other.coef_[0], atol=1e-6)


def test_the_stationary_spread_is_that_of_the_linear_process() -> None:
    """With little noise the law is Gaussian around the optimum: its covariance solves S = A S A + 2 eta sigma^2."""
    inputs, labels = examples(2, 50, 2)
    settings = NoisyDescent(penalty=0.2, sigma=0.01)
    optimum = Problem(inputs, labels[:, None].double(), 0.2 * 50, torch.zeros(2, 1, dtype=torch.float64)).optimum()
    problem = Problem(inputs, labels[:, None].double(), 0.2 * 50, torch.zeros(2, 1, dtype=torch.float64))
    drift = np.eye(2) - settings.eta * problem.hessian(optimum).numpy() / 50
    wanted = linalg.solve_discrete_lyapunov(drift, 2 * settings.eta * 1e-4 * np.eye(2))
    made = settings.train(inputs, labels, 60, Key(1), start=optimum[:, 0], runs=20_000)
    assert np.allclose(np.cov(made.numpy().T), wanted, rtol=0.05, atol=2e-7)
    assert np.allclose(made.mean(0), optimum[:, 0], atol=1e-3)


def test_unlearning_comes_near_to_retraining() -> None:
    """The means over runs: as far apart as the optima at first, and together after the certified steps."""
    inputs, labels = examples(3)
    settings = NoisyDescent(penalty=0.1, sigma=0.05)
    kept = slice(4, None)
    full = settings.train(inputs, labels, 300, Key(1), runs=4000)
    again = settings.train(inputs[kept], labels[kept], 300, Key(2), runs=4000)
    steps = settings.steps_needed(1.0, DELTA, 40, removed=4)
    after = settings.unlearn(full, inputs[kept], labels[kept], steps, Key(3))
    assert 10 < steps < 300
    noise = float(again.std(0).norm()) / math.sqrt(4000)
    assert float((full.mean(0) - again.mean(0)).norm()) > 20 * noise
    assert float((after.mean(0) - again.mean(0)).norm()) < 5 * noise


@pytest.mark.parametrize("steps", [0, 2, 5, 15])
def test_an_attacker_stays_below_the_certificate(steps: int) -> None:
    """Four copies of one odd example go; each run is scored along the direction in which the optima differ."""
    inputs, labels = examples(4)
    inputs[:4], labels[:4] = torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0
    settings = NoisyDescent(penalty=0.1, sigma=0.04)
    full = settings.train(inputs, labels, 100, Key(1), runs=500)
    after = settings.unlearn(full, inputs[4:], labels[4:], steps, Key(2))
    again = settings.train(inputs[4:], labels[4:], 100 + steps, Key(3), runs=500)
    towards = (full.mean(0) - again.mean(0)).numpy()
    seen = empirical_epsilon(after.numpy() @ towards, again.numpy() @ towards, DELTA)
    assert seen <= settings.epsilon(steps, 40, DELTA, removed=4)
    if steps == 0:
        assert seen > 1.0  # the attacker is able: had nothing been done, it would have seen that


def test_the_attacker_finds_a_false_certificate() -> None:
    """An accountant that took n^2 twice would certify what an attacker refutes."""
    inputs, labels = examples(4)
    inputs[:4], labels[:4] = torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0
    settings = NoisyDescent(penalty=0.1, sigma=0.04)
    full = settings.train(inputs, labels, 100, Key(1), runs=500).numpy()
    again = settings.train(inputs[4:], labels[4:], 100, Key(3), runs=500).numpy()
    towards = full.mean(0) - again.mean(0)
    false = to_epsilon(lambda alpha: settings.renyi(0, 40, 4)(alpha) / 40**2, DELTA)
    assert empirical_epsilon(full @ towards, again @ towards, DELTA) > false


def test_the_empirical_bound_on_known_gaussians() -> None:
    """Below the true epsilon in at least 95 % of trials, and not far below it with many runs."""
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0, 2.0):
        if shift == 0.0:
            true = 0.0
        else:
            grid = np.linspace(0, 10, 20_001)
            true = float(grid[np.argmax([gaussian_delta(shift, 1.0, e) <= DELTA for e in grid])])
        found = np.array(
            [empirical_epsilon(rng.normal(shift, 1, 300), rng.normal(0, 1, 300), DELTA) for _ in range(60)]
        )
        assert (found <= true).mean() >= stats.binom.ppf(0.01, 60, 0.95) / 60
    many = empirical_epsilon(rng.normal(2, 1, 4000), rng.normal(0, 1, 4000), DELTA)
    assert 0.4 * true < many <= true


def test_descent_to_delete_hides_what_is_left() -> None:
    """Noiseless descent after a deletion ends nearer to the optimum than half the distance that the noise is for."""
    inputs, labels = examples(6, 50, 3)
    m, smooth, steps = 0.1, 0.35, 5
    problem = partial(Problem, ridge=m, noise=torch.zeros(3, 1, dtype=torch.float64))

    def mean_optimum(rows: slice) -> Tensor:
        return problem(inputs[rows], labels[rows, None].double(), ridge=m * len(inputs[rows])).optimum()

    w, target = mean_optimum(slice(None)), mean_optimum(slice(1, None))
    left = problem(inputs[1:], labels[1:, None].double(), ridge=m * 49)
    for _ in range(steps):
        w = w - 2 / (smooth + m) * left.gradient(w) / 49
    sigma = descent_to_delete_sigma(steps, strong=m, smooth=smooth, clip=1.0, n=50, epsilon=1.0, delta=1e-3)
    room = math.sqrt(math.log(1e3) + 1) - math.sqrt(math.log(1e3))
    assert float((w - target).norm()) <= sigma * math.sqrt(2) * room / 2
    further = descent_to_delete_sigma(2 * steps, strong=m, smooth=smooth, clip=1.0, n=50, epsilon=1.0, delta=1e-3)
    assert further < sigma


def test_the_same_key_gives_the_same_bits() -> None:
    inputs, labels = examples(7)
    settings, state = NoisyDescent(penalty=0.1, sigma=0.1), torch.get_rng_state()
    first, second, other = (settings.train(inputs, labels, 5, Key(seed), runs=3) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert settings.train(inputs, labels, 0, Key(0), start=first[0]).tolist() == [first[0].tolist()]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"penalty": 0.0}, "penalty must be a positive"),
        ({"sigma": -1.0}, "sigma must be a positive"),
        ({"clip": math.nan}, "clip must be a positive"),
        ({"lr": 4.0}, "lr must lie in"),
        ({"radius": 0.0}, "radius must be"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        NoisyDescent(**{"penalty": 0.1, "sigma": 0.1, **change})


def test_bad_input_is_refused() -> None:
    settings, (inputs, labels) = NoisyDescent(penalty=0.1, sigma=0.1), examples(8)
    for call, sentence in (
        (lambda: settings.train(inputs * 3, labels, 1, Key(0)), "at most 1"),
        (lambda: settings.train(inputs, (labels + 1) / 2, 1, Key(0)), "-1 or [+]1"),
        (lambda: settings.train(inputs, labels[:-1], 1, Key(0)), "39 labels"),
        (lambda: settings.train(inputs, labels, -1, Key(0)), "steps"),
        (lambda: settings.train(inputs, labels, 1, Key(0), start=torch.zeros(5)), "start has 5 weights"),
        (lambda: settings.epsilon(1, 40, 1e-2, removed=40), "removed must lie in 1 .. 39"),
        (lambda: settings.epsilon(1, 40, 0.0), "delta"),
        (lambda: settings.steps_needed(-1.0, 1e-2, 40), "epsilon must be a positive"),
        (lambda: settings.sequence([], 40), "no requests"),
        (lambda: settings.sequence([(20, 1), (20, 1)], 40), "removed must lie in 1 .. 19"),
        (lambda: settings.renyi(1, 40)(np.array([0.5])), "above 1"),
        (lambda: empirical_epsilon(np.zeros(10), np.zeros(30), 0.1), "too few runs"),
        (
            lambda: descent_to_delete_sigma(1, strong=1, smooth=0.5, clip=1, n=9, epsilon=1, delta=0.1),
            "strong < smooth",
        ),
    ):
        with pytest.raises(Refused, match=sentence):
            call()
