"""EUPMU's implicit forms: the multiplier against its closed form, signs, clamps, clip, and a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from forgetting import accuracy, digits, small
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.compose import Clip
from expunge.core import Batch, Case, Key, Refused
from expunge.implicit import FastImplicitSurgery, ImplicitSurgery
from expunge.objectives import NLL, Ascent
from expunge.oracle import Draws, On, Oracle, differentiable
from expunge.registry import methods as registered
from expunge.scope import Scope

torch.set_num_threads(1)
A, B, START = (2.0, 0.0, 1.0), (-1.0, 0.5, 0.0), (0.3, 0.1, -0.2)


@dataclass(frozen=True)
class Bowl:
    """base + 1/2 |theta - target|^2, the same for every example."""

    target: tuple[float, ...]
    base: float = 0.1

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        theta = next(iter(case.scope.parameters(case.model).values()))
        bowl = 0.5 * (theta - torch.tensor(self.target, dtype=theta.dtype)).square().sum()
        return (self.base + bowl).expand(len(batch["id"]))


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(START, dtype=torch.float64))


class Walk:
    """Steps of gradient descent by hand on the two bowls, with whatever combiner."""

    def __init__(self, combine: Any, lr: float) -> None:
        _, request = small()
        model = Point()
        self.case = Case(model, request, ex.Classification(3), Scope.all(model))
        self.combine, self.lr, self.state, self.step = combine, lr, combine.init(), 0
        self.roles = {"forget": On("forget", Bowl(A)), "retain": On("retain", Bowl(B))}

    @property
    def theta(self) -> Tensor:
        return self.case.model.theta.detach()

    def go(self) -> dict[str, Tensor]:
        draws = Draws(self.case, self.roles, Key(0), self.step, {"forget": 4, "retain": 4}, lambda role, step: step)
        with differentiable(self.case):
            oracle = Oracle(self.case, self.roles, draws, step=self.step, lr=self.lr)
            grads, self.state = self.combine.combine(oracle, self.state)
            with torch.no_grad():
                self.case.model.theta.sub_(self.lr * grads["theta"])
            if hasattr(self.combine, "settle"):
                self.state = self.combine.settle(oracle.again(), self.state)
        self.step += 1
        return grads


def closed_form(tolerance: float) -> float:
    """lambda* = max(0, (-g_r . g_f - tolerance) / |g_r|^2) at the start."""
    theta = torch.tensor(START, dtype=torch.float64)
    g_f, g_r = theta - torch.tensor(A), theta - torch.tensor(B)
    return max(0.0, float((-(g_r @ g_f) - tolerance) / (g_r @ g_r)))


@pytest.mark.parametrize("tolerance", [0.0, 0.5, -0.5, 100.0])
def test_multiplier_converges_to_closed_form(tolerance: float) -> None:
    walk = Walk(ImplicitSurgery("paper", tolerance, dual_lr=0.1, start=3.0), lr=1e-9)  # the weights hardly move
    for _ in range(300):
        walk.go()
    assert walk.state["w"] == pytest.approx(closed_form(tolerance), abs=1e-5)


def test_tolerance_sign_against_the_dual_optimum() -> None:
    assert closed_form(-0.5) > closed_form(0.0) > closed_form(0.5) > 0.0
    for form in ("paper", "log", "raw", "fast"):
        make, settings = (FastImplicitSurgery, {}) if form == "fast" else (ImplicitSurgery, {"form": form})
        demanded, allowed = (
            Walk(make(tolerance=tolerance, dual_lr=0.1, start=1.0, **settings), lr=1e-3) for tolerance in (-0.5, 0.5)
        )
        for _ in range(5):
            demanded.go()
            allowed.go()
        assert demanded.state["w"] > 1.0 > allowed.state["w"]


def test_large_tolerance_is_the_pure_forget_step() -> None:
    walk = Walk(ImplicitSurgery("paper", tolerance=1e9, dual_lr=0.1, start=0.0), lr=0.1)
    for _ in range(50):
        before = walk.theta.clone()
        grads = walk.go()
        torch.testing.assert_close(grads["theta"], before - torch.tensor(A).double(), rtol=1e-12, atol=1e-12)
    assert walk.state["w"] == 0.0
    assert float((walk.theta - torch.tensor(A, dtype=torch.float64)).norm()) < 0.02


def test_multiplier_is_clamped_where_stored() -> None:
    for combine in (
        ImplicitSurgery("paper", 5.0),
        ImplicitSurgery("log", 5.0),
        ImplicitSurgery("raw", 5.0),
        FastImplicitSurgery(5.0),
    ):
        walk = Walk(combine, lr=1e-3)
        for _ in range(20):
            walk.go()
            assert walk.state["w"] >= 0.0
        assert walk.state["w"] == 0.0
    walk = Walk(ImplicitSurgery("paper", 5.0, dual_lr=1.0), lr=1e-3)
    for _ in range(100):
        walk.go()
    walk.combine = replace(walk.combine, tolerance=-1.0)
    walk.go()
    assert walk.state["w"] > 0.5  # nothing to climb back from


def test_the_log_form_takes_the_step_and_the_dual_step_of_the_released_code() -> None:
    """Written out with torch's own Adam on the multiplier and autograd through the logarithms."""
    walk = Walk(ImplicitSurgery("log", tolerance=-0.03, dual_lr=0.5, dual_decay=0.01, start=0.4), lr=0.05)
    theta = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.5, weight_decay=0.01)

    def losses() -> tuple[Tensor, Tensor]:
        return tuple(0.1 + 0.5 * (theta - torch.tensor(t)).square().sum() for t in (A, B))  # type: ignore[return-value]

    for _ in range(6):
        forget, retain = losses()
        joint = torch.log(forget + 1e-8) + max(w.item(), 0.0) * torch.log(retain + 1e-8)
        (grad,) = torch.autograd.grad(joint, theta)
        torch.testing.assert_close(walk.go()["theta"], grad, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            theta.sub_(0.05 * grad)
            after = losses()[1]
            w.grad = torch.log(retain + 1e-8) - torch.log(after + 1e-8) - 0.03
        adam.step()
        assert walk.state["w"] == pytest.approx(float(w), rel=1e-7)
        assert float(w) > 0.0


def test_the_fast_form_weighs_by_w_over_one_plus_w() -> None:
    walk = Walk(FastImplicitSurgery(tolerance=-0.03, dual_lr=0.2, dual_decay=0.01, start=1.0), lr=0.05)
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.2, weight_decay=0.01)
    previous = None
    for _ in range(6):
        theta = walk.theta.clone()
        g_f, g_r = theta - torch.tensor(A), theta - torch.tensor(B)
        retain = 0.1 + 0.5 * float(g_r.square().sum())
        if previous is not None:
            w.grad = torch.tensor(math.log(previous + 1e-8) - math.log(retain + 1e-8) - 0.03, dtype=torch.float64)
            adam.step()
        previous, share = retain, float(w.detach()) / (1 + float(w.detach()))
        torch.testing.assert_close(walk.go()["theta"], (1 - share) * g_f + share * g_r, rtol=1e-9, atol=1e-12)


def test_the_fast_form_goes_where_the_released_code_goes() -> None:
    """Numbers of `EU_fast` of anseryuer/EUPMU-... @ 115655a6 in float32 on the two bowls: SGD at 0.05, w_lr 0.2, error 0.03."""
    walk = Walk(FastImplicitSurgery(tolerance=-0.03, dual_lr=0.2, dual_decay=0.01, start=1.0), lr=0.05)
    for weight in (1.0, 1.2, 1.39104, 1.56282, 1.70346, 1.80451):
        walk.go()
        assert walk.state["w"] == pytest.approx(weight, abs=1e-5)
    where = torch.tensor([0.281992644071579, 0.1515677273273468, -0.03822731599211693], dtype=torch.float64)
    torch.testing.assert_close(walk.theta, where, rtol=0, atol=1e-6)


def test_clip_is_after_combination() -> None:
    inner = ImplicitSurgery("raw", start=2.0)
    whole, clipped = Walk(inner, 0.01).go()["theta"], Walk(Clip(inner, 0.5), 0.01).go()["theta"]
    assert float(whole.norm()) > 0.5
    torch.testing.assert_close(clipped, 0.5 * whole / whole.norm(), rtol=1e-6, atol=0)


def test_a_loss_below_zero_is_refused_by_the_logarithm() -> None:
    model, request = small()
    stage = methods.eupmu(variant="implicit", forget=Ascent(NLL()))
    with pytest.raises(ex.RunFailed, match="log form"):
        ex.unlearn(model, request, task=ex.Classification(3), method=stage)


@pytest.mark.parametrize("variant", ["implicit", "fast", "paper"])
def test_rows_are_those_declared(variant: str) -> None:
    model, request = small()
    stage = methods.eupmu(variant=variant)
    cost = ex.unlearn(model, request, task=ex.Classification(3), method=stage).record["cost"]
    declared = registered()["eupmu"].rows(dict(stage.settings), 20, 80)
    assert cost["forward"] == declared["forward"]
    if variant == "fast":
        assert cost["backward"] == declared["backward"]
    assert 40 * 20 <= cost["backward"] <= declared["backward"]


@pytest.mark.parametrize("variant", ["implicit", "fast", "paper"])
def test_zero_steps_are_the_identity_and_only_the_scope_moves(variant: str) -> None:
    model, request = small()
    none, some = (
        ex.unlearn(
            model,
            request,
            task=ex.Classification(3),
            scope=["2.bias"],
            method=methods.eupmu(variant=variant, steps=steps),
        ).model
        for steps in (0, 3)
    )
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in none.named_parameters())
    assert [n for n, p in some.named_parameters() if not torch.equal(p, model.get_parameter(n))] == ["2.bias"]


def test_a_bad_setting_is_refused() -> None:
    for bad in ({"variant": "slow"}, {"tolerance": math.nan}, {"dual_lr": 0.0}, {"batch": 0}):
        with pytest.raises(Refused, match=next(iter(bad))):
            methods.eupmu(**bad)


@pytest.mark.parametrize("variant", ["implicit", "fast", "paper"])
def test_a_class_is_forgotten_and_the_others_are_kept(variant: str) -> None:
    model, request = digits(3)
    outcome = ex.unlearn(model, request, task=ex.Classification(10), method=methods.eupmu(variant=variant))
    assert accuracy(outcome.model, request.forget) < 0.2
    assert accuracy(outcome.model, request.retain) > accuracy(model, request.retain) - 0.1


@pytest.mark.parametrize("variant", ["implicit", "fast", "paper"])
@pytest.mark.parametrize(
    "other", [{"tolerance": 0.5}, {"dual_lr": 0.1}, {"start": 3.0}, {"max_multiplier": 0.5}, {"dual_decay": 0.9}]
)
def test_no_option_of_a_variant_is_ignored(variant: str, other: dict[str, float]) -> None:
    """The released code drops the step size and the tolerance of its fast form."""
    if variant == "paper" and "dual_decay" in other:
        return  # declared: of "implicit" and "fast" only
    model, request = small()
    good = {"variant": variant, "steps": 6, "batch": 16, "tolerance": 0.0}
    plain, changed = (
        [
            row["multiplier"]
            for row in ex.unlearn(
                model, request, task=ex.Classification(3), method=methods.eupmu(**{**good, **extra})
            ).record["history"]
        ]
        for extra in ({}, other)
    )
    assert plain != changed


@pytest.mark.parametrize("variant", ["implicit", "fast", "paper"])
def test_gradients_do_not_accumulate_over_steps(variant: str) -> None:
    """The released classification code does not clear gradients between steps: three small steps would then add up to
    1 + 2 + 3 first steps instead of 3."""
    model, request = small()
    forget = NLL() if variant == "implicit" else Ascent()  # the logarithm wants a positive loss
    settings = {"variant": variant, "forget": forget, "dual_lr": 1e-9, "lr": 1e-6, "batch": 1000, "max_norm": 1e6}
    moved = {}
    for steps in (1, 3):
        method = methods.eupmu(**settings, steps=steps)
        done = ex.unlearn(model, request, task=ex.Classification(3), method=method)
        pairs = zip(done.model.parameters(), model.parameters(), strict=True)
        moved[steps] = math.sqrt(sum(float((after - before).detach().square().sum()) for after, before in pairs))
    assert moved[3] == pytest.approx(3 * moved[1], rel=1e-3)
