"""Influence unlearning: a quadratic with its closed form, the sign of the step, and a retrained model."""

from __future__ import annotations

import math

import pytest
import torch
from forgetting import accuracy, digits, small
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Refused
from expunge.registry import methods as registered
from expunge.registry import tasks

torch.set_num_threads(1)


def quadratic() -> tuple[nn.Module, ex.Request, Tensor]:
    """A least-squares model at the optimum of all data, with residuals of -1 or 1 on the retain data.

    There the empirical Fisher matrix of the retain data, mean of r^2 x x^T, IS the Hessian, mean of x x^T. The forget
    example cancels the gradient of the others, so that the weights are the optimum of all of them together. Returned
    beside: the closed form of least squares on the retain data alone.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    theta = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    residual = torch.randint(0, 2, (40, 1), generator=generator).double() * 2 - 1
    forget = -(residual * x).sum(0, keepdim=True)  # with a residual of 1
    inputs, targets = torch.cat([forget, x]), torch.cat([forget @ theta.T - 1, x @ theta.T - residual])
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta)
    request = ex.split((inputs, targets), forget=[0])
    return model, request, torch.linalg.lstsq(x, targets[1:]).solution.T


def weight(model: nn.Module) -> Tensor:
    return next(model.parameters()).detach()


def test_influence_equals_newton_step_on_a_quadratic() -> None:
    model, request, closed = quadratic()
    stage = methods.influence(scale=1.0, damping=1e-6, rise=1.0)  # which leaves an error of the order of 1e-6
    outcome = ex.unlearn(model, request, task=tasks()["regression"](), method=stage)
    assert float((weight(model) - closed).norm()) > 0.05
    torch.testing.assert_close(weight(outcome.model), closed, rtol=3e-6, atol=3e-6)


def test_the_step_is_linear_in_its_scale_and_zero_is_the_identity() -> None:
    model, request, closed = quadratic()
    task = tasks()["regression"]()
    stages = [methods.influence(scale=scale, damping=1e-6, rise=1.0) for scale in (0.5, 0.0)]
    half, none = (ex.unlearn(model, request, task=task, method=stage).model for stage in stages)
    torch.testing.assert_close(weight(half), (weight(model) + closed) / 2, rtol=3e-6, atol=3e-6)
    assert torch.equal(weight(none), weight(model))


def test_damping_shortens_the_step_as_a_ridge_would() -> None:
    model, request, _ = quadratic()
    batch = next(iter(request.retain.batches(40)))
    x, residual = batch["x"], batch["x"] @ weight(model).T - batch["y"]
    hessian = x.T @ x / 40 + 0.7 * torch.eye(3, dtype=torch.float64)
    expected = weight(model) - torch.linalg.solve(hessian, (x * residual).mean(0))
    stage = methods.influence(scale=1.0, damping=0.7, rise=1.0)
    outcome = ex.unlearn(model, request, task=tasks()["regression"](), method=stage)
    torch.testing.assert_close(weight(outcome.model), expected[None].reshape(1, 3), rtol=1e-8, atol=1e-8)


def test_the_released_recursion_steps_along_v_and_the_first_gradient() -> None:
    model, request, _ = quadratic()
    outcome = ex.unlearn(
        model,
        request,
        task=tasks()["regression"](),
        method=methods.influence(scale=1.0, recursion="released", rise=1.0),
    )
    batch = next(iter(request.retain.batches(40)))
    grads = batch["x"] * (batch["x"] @ weight(model).T - batch["y"])
    step, v = (weight(outcome.model) - weight(model))[0], -grads.mean(0)
    taken = v - step
    cosines = torch.nn.functional.cosine_similarity(grads, taken[None])
    assert float(cosines.abs().max()) > 1 - 1e-9  # v less a multiple of ONE example's gradient


def mean_loss(model: nn.Module, data: ex.Data) -> float:
    batch = next(iter(data.batches(len(data))))
    return float(nn.functional.cross_entropy(model(batch["x"]), batch["y"]).detach())


@pytest.mark.parametrize("recursion", ["exact", "released"])
def test_the_forget_loss_rises(recursion: str) -> None:
    model, request = small()
    stage = methods.influence(recursion=recursion, rise=0.5)
    outcome = ex.unlearn(model, request, task=ex.Classification(3), method=stage)
    before, after = (mean_loss(m, request.forget) for m in (model, outcome.model))
    assert after > before + 0.05


def test_a_step_too_long_is_shortened_and_says_so() -> None:
    model, request = small()
    outcome = ex.unlearn(model, request, task=ex.Classification(3), method=methods.influence(scale=50.0, rise=0.02))
    assert any("scale was lowered from 50" in note for note in outcome.notes)
    before, after = (mean_loss(m, request.retain) for m in (model, outcome.model))
    assert after <= before + 0.02 * (math.log(3) - before) + 1e-9


def test_only_the_scope_moves() -> None:
    model, request = small()
    outcome = ex.unlearn(model, request, task=ex.Classification(3), method="influence", scope=["2.bias"])
    moved = [n for n, p in outcome.model.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert moved == ["2.bias"]


@pytest.mark.parametrize("recursion", ["exact", "released"])
@pytest.mark.parametrize("samples", [30, 1000])
def test_rows_are_those_declared(recursion: str, samples: int) -> None:
    model, request = small()
    stage = methods.influence(recursion=recursion, samples=samples)
    cost = ex.unlearn(model, request, task=ex.Classification(3), method=stage).record["cost"]
    declared = registered()["influence"].rows(dict(stage.settings), 20, 80)
    assert {"forward": cost["forward"], "backward": cost["backward"]} == declared


def test_a_bad_setting_is_refused() -> None:
    for bad in ({"scale": -1.0}, {"recursion": "best"}, {"damping": 0.0}, {"samples": 0}):
        with pytest.raises(Refused, match=next(iter(bad))):
            methods.influence(**bad)


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_others_are_kept(label: int) -> None:
    model, request = digits(label)
    outcome = ex.unlearn(model, request, task=ex.Classification(10), method="influence")
    assert accuracy(outcome.model, request.forget) < 0.5
    assert accuracy(outcome.model, request.retain) > accuracy(model, request.retain) - 0.05
