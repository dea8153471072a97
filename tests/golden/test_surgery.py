"""Explicit one-sided surgery: its constraint, its sign, its clip, and what it does to a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from forgetting import accuracy, digits, small
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.combine import OneSidedProjection, Weighted
from expunge.compose import Clip
from expunge.core import Batch, Case, Key, Refused
from expunge.objectives import NLL, RandomLabel
from expunge.optim import SGD
from expunge.oracle import Draws, On, Oracle, differentiable
from expunge.registry import methods as registered
from expunge.scope import Scope

torch.set_num_threads(1)
TASK = ex.Classification(3)


@dataclass(frozen=True)
class Bowl:
    """1/2 |theta - target|^2, the same for every example."""

    target: tuple[float, ...]

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        theta = next(iter(case.scope.parameters(case.model).values()))
        return 0.5 * (theta - torch.tensor(self.target, dtype=theta.dtype)).square().sum().expand(len(batch["id"]))


class Point(nn.Module):
    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def toy(theta: Tensor) -> Case:
    _, request = small()
    model = Point(theta)
    return Case(model, request, ex.Classification(3), Scope.all(model))


def oracle(case: Case, forget: tuple[float, ...], retain: tuple[float, ...]) -> Oracle:
    roles = {"forget": On("forget", Bowl(forget)), "retain": On("retain", Bowl(retain))}
    return Oracle(case, roles, Draws(case, roles, Key(0), 0, {"forget": 4, "retain": 4}, lambda role, step: step))


def direction(combine: object, theta: Tensor, a: tuple[float, ...], b: tuple[float, ...]) -> Tensor:
    case = toy(theta)
    with differentiable(case):
        return combine.combine(oracle(case, a, b), combine.init())[0]["theta"]


@pytest.mark.parametrize("tolerance", [0.0, 0.3, -0.3])
def test_eupmu_explicit_satisfies_constraint(tolerance: float) -> None:
    generator = torch.Generator().manual_seed(5)
    conflicts = 0
    for _ in range(100):
        theta, a, b, other = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        theta = 0.2 * theta  # about as often in conflict as not
        rule = OneSidedProjection(tolerance, max_multiplier=math.inf)
        d = direction(rule, theta, tuple(a.tolist()), tuple(b.tolist()))
        forget, retain = theta - a, theta - b
        assert float(d @ retain) >= -tolerance - 1e-9
        if float(forget @ retain) >= -tolerance:
            torch.testing.assert_close(d, forget, rtol=1e-12, atol=1e-12)  # no conflict: no retain gradient
        else:
            conflicts += 1
            assert float(d @ retain) == pytest.approx(-tolerance, abs=1e-9)
        short = max(0.0, -tolerance - float(other @ retain)) / float(retain @ retain)
        feasible = other + short * retain
        assert float((forget - d) @ (feasible - d)) <= 1e-9  # d is the Euclidean projection on the half-space
    assert 20 < conflicts < 80


def test_tolerance_sign_allows_a_rise_when_positive() -> None:
    theta, a, b = torch.zeros(2, dtype=torch.float64), (1.0, 0.0), (-1.0, 0.5)
    retain = theta - torch.tensor(b)
    slopes = [-float(direction(OneSidedProjection(t), theta, a, b) @ retain) for t in (-0.4, 0.0, 0.4)]
    assert slopes == pytest.approx([-0.4, 0.0, 0.4])  # rise of the retain loss per unit step


def test_large_tolerance_is_the_pure_forget_step() -> None:
    model, request = small()
    settings = {"steps": 3, "batch": 16, "optimizer": SGD(0.1, 0.0)}
    plain = ex.Descend(forget=RandomLabel(), combine=Weighted(), **settings)
    cut = ex.Descend(forget=RandomLabel(), retain=NLL(), combine=OneSidedProjection(1e6), **settings)
    first, second = (ex.unlearn(model, request, task=TASK, method=stage).model for stage in (plain, cut))
    assert all(torch.equal(p, second.get_parameter(n)) for n, p in first.named_parameters())


def test_clip_is_after_combination() -> None:
    theta, a, b = torch.zeros(2, dtype=torch.float64), (3.0, 0.0), (-1.0, 0.5)
    whole = direction(OneSidedProjection(0.0), theta, a, b)
    clipped = direction(Clip(OneSidedProjection(0.0), 0.25), theta, a, b)
    torch.testing.assert_close(clipped, whole / whole.norm() * 0.25, rtol=1e-6, atol=0)
    assert float(clipped @ (theta - torch.tensor(b, dtype=torch.float64))) == pytest.approx(0.0, abs=1e-9)


def test_first_order_promise_holds_on_the_batch_it_was_made_on() -> None:
    model, request = small()  # at the optimum of all data, the gradients of its parts are opposed
    stage = ex.Descend(
        forget=NLL(),
        retain=NLL(),
        combine=Clip(OneSidedProjection(0.0), 1.0),
        optimizer=SGD(1e-4, 0.0),
        steps=30,
        batch=80,
        watch=1,
    )
    rows = ex.unlearn(model, request, task=TASK, method=stage).record["history"]
    active = [row for row in rows if row["multiplier"] > 0]
    assert active, "no step was in conflict: the test would show nothing"
    for row in active:
        assert abs(row["retain_realised"]) < 1e-6  # of second order in the step of 1e-4
        assert row["retain_predicted"] == pytest.approx(0.0, abs=1e-12)


def test_zero_steps_are_the_identity_and_only_the_scope_moves() -> None:
    model, request = small()
    none = ex.unlearn(model, request, task=TASK, method=methods.surgery(steps=0)).model
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in none.named_parameters())
    some = ex.unlearn(model, request, task=TASK, method=methods.surgery(steps=3), scope=["2.*"]).model
    moved = {n for n, p in some.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert moved == {"2.bias", "2.weight"}


def test_rows_are_those_declared() -> None:
    model, request = small()
    stage = methods.surgery()
    cost = ex.unlearn(model, request, task=TASK, method=stage).record["cost"]
    declared = registered()["surgery"].rows(dict(stage.settings), 20, 80)
    assert {"forward": cost["forward"], "backward": cost["backward"]} == declared


def test_a_bad_setting_is_refused() -> None:
    for bad in ({"tolerance": math.inf}, {"tolerance": math.nan}, {"max_norm": 0.0}, {"steps": -1}):
        with pytest.raises(Refused, match=next(iter(bad))):
            methods.surgery(**bad)


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_others_are_kept(label: int) -> None:
    model, request = digits(label)
    outcome = ex.unlearn(model, request, task=ex.Classification(10), method="surgery")
    assert accuracy(outcome.model, request.forget) < 0.2
    assert accuracy(outcome.model, request.retain) > accuracy(model, request.retain) - 0.08
