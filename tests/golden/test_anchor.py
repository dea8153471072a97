"""Elastic weight consolidation and a teacher on made-up inputs: values by hand, and what they keep without retain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.anchor import Anchored
from expunge.core import Case, Key
from expunge.curvature import fisher
from expunge.objectives import NLL, Ascent, Distill
from expunge.optim import SGD
from expunge.oracle import On
from expunge.perturbed import OnPerturbed
from expunge.scope import Scope
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK, TEN = ex.Classification(3), ex.Classification(10)


def after(stage: Any, model: nn.Module, request: ex.Request, task: ex.Classification = TASK) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in ex.unlearn(model, request, task=task, method=stage).model.named_parameters()}


@pytest.mark.parametrize("given", ["retain", "importance", "file", "ones"])
def test_two_steps_by_hand(given: str, tmp_path: Path) -> None:
    """SGD without momentum: theta_1 = theta_0 - lr g(theta_0); theta_2 = theta_1 - lr (g(theta_1) + s F (theta_1 - theta_0))."""
    model, request = small()
    forget, retain = (next(request.data(part).batches(999)) for part in ("forget", "retain"))
    parameters = dict(model.named_parameters())
    start = {n: p.detach().clone() for n, p in parameters.items()}
    importance = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for x, y in zip(retain["x"], retain["y"], strict=True):  # one example at a time
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        for n, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            importance[n] += g.square() / len(retain["x"])
    if given == "ones":
        importance = {n: torch.ones_like(p) for n, p in parameters.items()}
    at = dict(start)
    for _ in range(2):
        leaves = {n: p.clone().requires_grad_(True) for n, p in at.items()}
        loss = -nn.functional.cross_entropy(torch.func.functional_call(model, leaves, (forget["x"],)), forget["y"])
        for n, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            at[n] = at[n] - 0.1 * (g + 7.0 * importance[n] * (at[n] - start[n]))
    inner = ex.Descend(forget=Ascent(), optimizer=SGD(0.1, 0.0), steps=2, batch=64)
    settings: dict[str, Any] = {}
    if given == "ones":
        settings = {"source": None}
    elif given == "importance":
        settings = {"importance": importance}
    elif given == "file":
        save_file(importance, tmp_path / "fisher.safetensors")
        settings = {"importance": tmp_path / "fisher.safetensors"}
    kept = request if given == "retain" else ex.Request(request.forget)
    found = after(Anchored(inner, 7.0, **settings), model, kept)
    for n, value in at.items():
        torch.testing.assert_close(found[n], value, rtol=1e-9, atol=1e-12)


def test_strength_zero_is_the_inner_stage() -> None:
    model, request = small()
    plain, zero = (
        after(stage, model, request) for stage in (methods.gradient_ascent(), Anchored(methods.gradient_ascent(), 0.0))
    )
    assert all(torch.equal(plain[n], zero[n]) for n in plain)


def test_gradient_ascent_keeps_more_in_as_many_steps() -> None:
    """Without retain data at unlearning time, the importance found before. The class is gone both ways; ascent, which
    nothing stops, takes the other classes with it, and the penalty bounds how far it runs."""
    model, request = digits(8)
    importance = fisher(Case(model, request, TEN, Scope.all(model)), request.data("retain"), NLL())
    left = []
    for strength in (0.0, 1e3):
        inner = ex.Descend(forget=Ascent(), optimizer=SGD(2e-3, 0.0), steps=100, batch=70)
        stage = Anchored(inner, strength, importance)
        done = ex.unlearn(model, ex.Request(request.forget), task=TEN, method=stage).model
        assert accuracy(done, request.forget) < 0.02
        left.append(accuracy(done, request.retain))
    assert left[0] < 0.4
    assert left[1] > 0.75


def test_bad_importance_and_other_stages_are_refused() -> None:
    model, request = small()
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    inner = ex.Descend(forget=Ascent(), steps=1)
    for wrong in ({**ones, "0.bias": torch.ones(2)}, {**ones, "0.bias": -ones["0.bias"]}, {"0.bias": ones["0.bias"]}):
        with pytest.raises(ex.Refused, match="importance of '0"):
            ex.unlearn(model, request, task=TASK, method=Anchored(inner, importance=wrong))
    with pytest.raises(ex.Refused, match="one gradient loop"):
        Anchored(methods.ssd())
    with pytest.raises(ex.Refused, match="strength"):
        Anchored(inner, -1.0)
    with pytest.raises(ex.Refused, match="retain"):
        ex.unlearn(model, ex.Request(request.forget), task=TASK, method=Anchored(inner))


def test_made_up_inputs_by_hand() -> None:
    model, request = small()
    case = Case(model, request, TASK, Scope.all(model), {"original": model})
    batch = request.data("forget").batch(torch.arange(6))
    objective = OnPerturbed(Distill(), spread=0.5, keep=0.25)
    drawn = objective.draw(case, batch, Key(4))
    noise = torch.randn(batch["x"].shape, generator=Key(4).at("noise", 1).generator(), dtype=torch.float64)
    torch.testing.assert_close(drawn["x"], 0.25 * batch["x"] + 0.5 * noise)
    torch.testing.assert_close(drawn["teacher"], model(drawn["x"]).detach())
    assert torch.equal(OnPerturbed(spread=0.0).draw(case, batch, Key(4))["x"], batch["x"])
    for wrong in ({"spread": -1.0}, {"keep": 2.0}):
        with pytest.raises(ex.Refused, match="OnPerturbed"):
            OnPerturbed(**wrong)


def test_a_teacher_around_the_forget_data_keeps_more_without_labels_or_retain_data() -> None:
    """In as many steps of ascent; the class is gone both ways."""
    model, request = digits(8)
    left = []
    for others in ({}, {"near": On("forget", OnPerturbed(Distill(), spread=0.3))}):
        inner = ex.Descend(forget=Ascent(), others=others, optimizer=SGD(2e-3, 0.0), steps=150, batch=70)
        done = ex.unlearn(model, ex.Request(request.forget), task=TEN, method=inner).model
        assert accuracy(done, request.forget) < 0.02
        left.append(accuracy(done, request.retain))
    assert left[0] < 0.2
    assert left[1] > 0.9
