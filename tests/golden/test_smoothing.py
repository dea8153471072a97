"""Smoothed gradients: closed forms on a quadratic and a quartic, one step in plain torch, averages of weights, price."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.combine import OneSidedProjection, Weighted
from expunge.compose import SAM
from expunge.core import Batch, Case, Combiner, Key, Refused
from expunge.descend import Descend, _Run
from expunge.objectives import NLL, NPO
from expunge.optim import SGD, Adam, Averaged
from expunge.oracle import Draws, On, Oracle, differentiable
from expunge.registry import methods as registered
from expunge.scope import Scope
from expunge.smooth import Curvature, GradientNorm, RandomNoise, Sharpness, Smoothed, Smoothing
from tests.fixtures import tiny
from tests.golden.by_hand import ALL, two_classes, whole

torch.set_num_threads(1)
D = 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(seed: int) -> Tensor:
    a = normal(seed, D, D)
    return a @ a.T / D


FORGET, RETAIN, THETA = (matrix(1), normal(2, D)), (matrix(3), normal(4, D)), normal(5, D)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """1/2 theta A theta - b theta."""

    a: Tensor
    b: Tensor
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        theta = next(iter(case.scope.parameters(case.model).values()))
        return (0.5 * theta @ self.a @ theta - self.b @ theta).reshape(1)


@dataclass(frozen=True, eq=False)
class Quartic:
    """sum_i theta_i^4 / 12: its gradient is theta^3 / 3, its Hessian diag(theta^2)."""

    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        theta = next(iter(case.scope.parameters(case.model).values()))
        return (theta**4 / 12).sum().reshape(1)


class Point(nn.Module):
    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def update(combiner: Combiner, step: int = 0, forget: Any = None) -> Tensor:
    """The combiner's update at THETA, forget and retain both quadratic."""
    model = Point(THETA)
    request = ex.split((torch.zeros(4, 1), torch.zeros(4).long()), forget=[0])
    case = Case(model, request, ex.Classification(2), Scope.all(model))
    roles = {"forget": On(None, forget or Quadratic(*FORGET)), "retain": On(None, Quadratic(*RETAIN))}
    oracle = Oracle(case, roles, Draws(case, roles, Key(1), step, {}, lambda role, at: at), step=step)
    with differentiable(case):
        grads, _ = combiner.combine(oracle, combiner.init())
    assert torch.equal(model.theta.detach(), THETA), "the weights were not put back to the bit"
    return grads["theta"]


def at(part: tuple[Tensor, Tensor], theta: Tensor) -> Tensor:
    """Gradient of a quadratic."""
    return part[0] @ theta - part[1]


G, R = at(FORGET, THETA), at(RETAIN, THETA)
WEIGHTED = Weighted({"retain": 0.7})


def test_sharpness_on_a_quadratic() -> None:
    found = update(Smoothed(WEIGHTED, Sharpness(0.3), ("forget",)))
    torch.testing.assert_close(found, at(FORGET, THETA + 0.3 * G / G.norm()) + 0.7 * R, rtol=1e-12, atol=1e-12)


def test_sharpness_of_all_roles_climbs_what_the_inner_combiner_asks_for() -> None:
    """Without named roles the weighted sum is one loss; SAM in ``compose`` climbs the plain sum."""
    whole_loss = (FORGET[0] + 0.7 * RETAIN[0], FORGET[1] + 0.7 * RETAIN[1])
    up = at(whole_loss, THETA)
    expected = at(whole_loss, THETA + 0.3 * up / up.norm())
    torch.testing.assert_close(update(Smoothed(WEIGHTED, Sharpness(0.3))), expected, rtol=1e-12, atol=1e-12)
    assert float((update(SAM(WEIGHTED, 0.3)) - expected).norm()) > 1e-3


def test_the_published_form_leaves_the_retain_gradient_where_it_is() -> None:
    """compose.SAM(along=forget) moves it too: they differ by A_r times the move."""
    smooth, all_moved = (
        update(combiner)
        for combiner in (Smoothed(Weighted(), Sharpness(0.3), ("forget",)), SAM(Weighted(), 0.3, ("forget",)))
    )
    torch.testing.assert_close(all_moved - smooth, RETAIN[0] @ (0.3 * G / G.norm()), rtol=1e-6, atol=1e-9)


def test_random_noise_is_the_mean_over_its_draws() -> None:
    """On a quadratic the mean gradient is that at the mean place; the noise is found by solving for it."""
    moves = []
    for step in range(400):
        found = update(Smoothed(WEIGHTED, RandomNoise(0.2, 4), ("forget",)), step)
        moves.append(torch.linalg.solve(FORGET[0], found - 0.7 * R - G))
    values = torch.stack(moves)
    assert len({float(move[0]) for move in moves}) == 400, "two steps drew the same noise"
    n = values.numel()
    assert abs(float(values.mean())) < 5 * 0.1 / n**0.5
    assert float(values.std()) == pytest.approx(0.2 / 4**0.5, rel=5 / (2 * n) ** 0.5)
    assert torch.equal(
        update(Smoothed(WEIGHTED, RandomNoise(0.2, 4), ("forget",)), 3),
        update(Smoothed(WEIGHTED, RandomNoise(0.2, 4), ("forget",)), 3),
    )


def test_gradient_norm_on_a_quadratic() -> None:
    found = update(Smoothed(WEIGHTED, GradientNorm(0.3), ("forget",)))
    torch.testing.assert_close(found, G + 0.3 * FORGET[0] @ G / G.norm() + 0.7 * R, rtol=1e-12, atol=1e-12)


def test_curvature_on_a_quadratic_is_nothing_and_on_a_quartic_its_closed_form() -> None:
    found = update(Smoothed(WEIGHTED, Curvature(0.3, 0.1), ("forget",)))
    torch.testing.assert_close(found, G + 0.7 * R, rtol=1e-10, atol=1e-10)
    g = THETA**3 / 3
    near = THETA + 0.1 * g / g.norm()
    h = near**3 / 3 - g
    expected = g + 0.3 * (near**2 - THETA**2) * h / h.norm() + 0.7 * R
    found = update(Smoothed(WEIGHTED, Curvature(0.3, 0.1), ("forget",)), forget=Quartic())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_surgery_projects_the_smoothed_gradient() -> None:
    smooth = at(FORGET, THETA + 0.3 * G / G.norm())
    expected = smooth - min(0.0, float(smooth @ R)) / float(R @ R) * R
    found = update(Smoothed(OneSidedProjection(), Sharpness(0.3), ("forget",)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_role_that_is_not_there_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(Refused, match="names role 'forgett'"):
        update(Smoothed(WEIGHTED, Sharpness(), ("forgett",)))
    for make in (
        lambda: Sharpness(0.0),
        lambda: RandomNoise(0.1, 0),
        lambda: GradientNorm(-1.0),
        lambda: Curvature(0.0),
    ):
        with pytest.raises(Refused, match="must be"):
            make()
    with pytest.raises(Refused, match="share of the steps"):
        methods.npo_sam(smoothing="averaging", amount=1.5)


def losses(
    model: nn.Module, request: ex.Request, reference: nn.Module
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """NPO at beta 0.5 on the forget data and mean NLL on the retain data, functions of the weights, in plain torch."""
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    with torch.no_grad():
        before = F.cross_entropy(reference(xf), yf, reduction="none")

    def forget(values: dict[str, Tensor]) -> Tensor:
        summed = F.cross_entropy(torch.func.functional_call(model, values, (xf,)), yf, reduction="none")
        return (-2 / 0.5 * F.logsigmoid(0.5 * (summed - before))).mean()

    def retain(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (xr,)), yr)

    return forget, retain


def by_hand(kind: str, amount: float, forget: Callable[..., Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The smoothed forget gradient."""
    names = list(values)

    def grad(at: dict[str, Tensor], graph: bool = False) -> list[Tensor]:
        return list(torch.autograd.grad(forget(at), list(at.values()), create_graph=graph))

    def norm(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts]).norm()

    g = grad(values)

    def moved(length: float) -> dict[str, Tensor]:
        return {n: v + length * part / norm(g) for (n, v), part in zip(values.items(), g, strict=True)}

    if kind == "sam":
        found = grad({n: v.detach().requires_grad_() for n, v in moved(amount).items()})
    elif kind == "gradient_norm":
        total = forget(values) + amount * norm(grad(values, True))
        found = list(torch.autograd.grad(total, list(values.values())))
    else:
        near = torch.autograd.grad(forget(moved(0.01)), list(values.values()), create_graph=True)
        change = [a - b for a, b in zip(near, grad(values, True), strict=True)]
        found = list(torch.autograd.grad(forget(values) + amount * norm(change), list(values.values())))
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(("kind", "amount"), [("sam", 0.05), ("gradient_norm", 0.5), ("curvature", 3.0)])
def test_two_steps_of_the_method_in_plain_torch(kind: str, amount: float) -> None:
    model, request = two_classes()
    work = copy.deepcopy(model)
    forget, retain = losses(work, request, model)
    optimizer = torch.optim.Adam(work.parameters(), 1e-2)
    for _ in range(2):
        values = dict(work.named_parameters())
        smooth = by_hand(kind, amount, forget, values)
        plain = torch.autograd.grad(retain(values), list(values.values()))
        for (name, parameter), grad in zip(values.items(), plain, strict=True):
            parameter.grad = smooth[name] + 2.0 * grad
        optimizer.step()
    stage = methods.npo_sam(smoothing=kind, amount=amount, beta=0.5, retain_weight=2.0, lr=1e-2, steps=2, batch=ALL)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=replace_guard(stage))
    for name, parameter in work.named_parameters():
        torch.testing.assert_close(done.model.get_parameter(name), parameter, rtol=1e-8, atol=1e-10)
    untouched = ex.unlearn(
        model,
        request,
        task=ex.Classification(2),
        method=replace_guard(methods.npo(beta=0.5, retain_weight=2.0, lr=1e-2, steps=2, batch=ALL)),
    )
    far = max(
        float((p - untouched.model.get_parameter(n)).detach().abs().max()) for n, p in done.model.named_parameters()
    )
    assert far > 1e-6, "the smoothing did nothing"


def replace_guard(stage: Any) -> Any:
    """The method's Descend without its guard, whose stop is no part of the formula."""
    return replace(stage.stage, guard=None)


def test_averaging_is_the_mean_of_the_last_weights() -> None:
    """Runs of 3, 4 and 5 plain steps give the weights that are averaged: a step is a function of its number."""
    found = tiny("classification")

    def after(steps: int, optimizer: Any) -> dict[str, Tensor]:
        stage = Descend(forget=NPO(), retain=NLL(), optimizer=optimizer, steps=steps, batch=8)
        return dict(ex.unlearn(found.model, found.request, task=found.task, method=stage).model.named_parameters())

    plain = [after(steps, Adam(1e-3)) for steps in (3, 4, 5)]
    averaged = after(5, Averaged(Adam(1e-3), 5, 3))
    for name, value in averaged.items():
        mean = torch.stack([weights[name].double() for weights in plain]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
    last = after(5, Averaged(Adam(1e-3), 5, 1))
    assert all(torch.equal(value, plain[2][name]) for name, value in last.items())
    with pytest.raises(Refused, match="count"):
        Averaged(SGD(), 3, 4)


class Killed(BaseException):
    """Ends a run as a kill does."""


@pytest.mark.parametrize("kind", ["random", "gradient_norm", "curvature", "averaging"])
def test_every_smoothing_pays_what_it_says_and_resumes_to_the_bit(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, spec = tiny("classification"), registered()["npo_sam"]
    settings = {"smoothing": kind, "steps": 4, "batch": 8, **({"amount": 0.5} if kind == "averaging" else {})}
    stage, count, step = methods.npo_sam(**settings), 0, _Run._step

    def once(folder: str) -> ex.Outcome:
        return ex.unlearn(
            found.model, found.request, task=found.task, method=stage, out=tmp_path / folder, every=0.0, seed=2
        )

    whole_run = once("whole")
    defaults = {name: p.default for name, p in spec.settings().items()}
    rows = spec.rows({**defaults, **settings}, len(found.request.forget), len(found.request.retain))
    assert {name: whole_run.record["cost"][name] for name in rows} == rows

    def stepping(run: _Run) -> None:
        nonlocal count
        step(run)
        count += 1
        if count == 3:
            raise Killed

    monkeypatch.setattr(_Run, "_step", stepping)
    with pytest.raises(Killed):
        once("killed")
    resumed = once("killed")
    assert resumed.record["result"] == whole_run.record["result"]
    assert resumed.record["history"] == whole_run.record["history"]


@pytest.mark.parametrize("by", [Sharpness(0.05), RandomNoise(0.01), GradientNorm(0.1), Curvature(0.1)])
def test_smoothing_works_on_a_language_model(by: Smoothing) -> None:
    """Differentiating attention twice included; the recorded forget loss is finite and the weights move."""
    found = tiny("causal_lm")
    stage = Descend(
        forget=NPO(), retain=NLL(), combine=Smoothed(Weighted(), by, ("forget",)), optimizer=SGD(0.01), steps=2, batch=4
    )
    done = ex.unlearn(found.model, found.request, task=found.task, method=stage)
    assert all(bool(torch.isfinite(p).all()) for p in done.model.parameters())
    assert "loss/forget" in done.record["history"][-1]


@pytest.mark.parametrize("by", [Sharpness(0.3), GradientNorm(0.3), Curvature(0.3, 0.1)])
def test_a_role_of_another_weight_is_another_loss(by: Smoothing) -> None:
    """Twice the loss is the loss that is smoothed: its penalty is that of the doubled gradient."""

    @dataclass(frozen=True, eq=False)
    class Twice:
        parameters_only: bool = field(default=True, init=False)

        def __call__(self, case: Case, batch: Batch) -> Tensor:
            return 2 * Quartic()(case, batch)

    weighted = update(Smoothed(Weighted({"forget": 2.0}), by, ("forget",)), forget=Quartic())
    torch.testing.assert_close(weighted, update(Smoothed(Weighted(), by, ("forget",)), forget=Twice()))


def test_noise_is_in_the_coordinates_in_scope_only() -> None:
    """The quadratic is of all of theta; noise elsewhere would show in the gradient of the first two."""
    model, mask = Point(THETA), torch.arange(D) < 2
    request = ex.split((torch.zeros(4, 1), torch.zeros(4).long()), forget=[0])
    case = Case(model, request, ex.Classification(2), Scope({"theta": mask}, ("theta",)))
    roles = {"forget": On(None, Quadratic(*FORGET))}
    oracle = Oracle(case, roles, Draws(case, roles, Key(1), 0, {}, lambda role, at: at))
    with differentiable(case):
        grads, _ = Smoothed(Weighted(), RandomNoise(0.2, 1)).combine(oracle, {})
    moved = torch.linalg.solve(FORGET[0][:2, :2], (grads["theta"] - G)[:2])
    drawn = torch.randn(D, generator=Key(1).at("smoothing", 0, 0).generator(), dtype=torch.float64)
    torch.testing.assert_close(moved, 0.2 * drawn[:2], rtol=1e-9, atol=1e-12)
    assert not bool(grads["theta"][2:].any())


def test_the_share_that_is_averaged_is_a_number_of_steps() -> None:
    for amount, count in ((None, 2), (0.5, 4), (1.0, 7), (1e-9, 1)):
        stage: Any = methods.npo_sam(smoothing="averaging", amount=amount, steps=7)
        assert stage.stage.optimizer.count == count
