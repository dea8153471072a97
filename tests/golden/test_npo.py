"""NPO and its cached reference against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import expunge as ex
from expunge.core import Case
from expunge.methods.npo import npo
from expunge.objectives import NPO
from expunge.reference import CacheReference
from tests.fixtures import tiny
from tests.golden.by_hand import ALL, descended, furthest, gradients, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_npo_first_step_is_two_over_beta_log_two(beta: float) -> None:
    model, request = small()
    for method in (npo(beta=beta, steps=1), ex.chain(CacheReference(), npo(beta=beta, steps=1))):
        first = ex.unlearn(model, request, task=TASK, method=method).record["history"][0]
        assert first["loss/forget"] == pytest.approx(2 / beta * math.log(2), rel=1e-12)


def test_npo_tends_to_gradient_ascent_as_beta_tends_to_zero() -> None:
    """Away from the reference, the error of the gradient is of the order of beta: a tenth of it at a tenth of beta."""
    model, request = small()
    batch = request.forget.batch(torch.arange(20))
    reference = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none").detach() - 1.5
    case = Case(model, request, TASK, ex.Scope.all(model))
    ascent = gradients(model, -F.cross_entropy(model(batch["x"]), batch["y"]))
    errors = []
    for beta in (1e-2, 1e-3, 1e-4):
        found = gradients(model, NPO(beta)(case, {**batch, "reference": reference}).mean())
        errors.append(max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in ascent.items()))
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.05)


@pytest.mark.parametrize(("beta", "weight"), [(0.1, 1.0), (1.0, 5.0)])
def test_golden_steps(beta: float, weight: float) -> None:
    """-(2 / beta) log sigmoid(beta log(p_ref / p)), written with probabilities."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    with torch.no_grad():
        before = F.softmax(model(xf), 1).gather(1, yf[:, None])

    def loss(net: torch.nn.Module) -> Tensor:
        ratio = F.softmax(net(xf), 1).gather(1, yf[:, None]) / before
        return (2 / beta * torch.log1p(ratio**beta)).mean() + weight * F.cross_entropy(net(xr), yr)

    expected = descended(model, [loss] * 6, 1e-3)
    method = npo(beta=beta, retain_weight=weight, lr=1e-3, steps=6, batch=ALL)
    for stage in (method, ex.chain(CacheReference(), method)):
        done = ex.unlearn(model, request, task=TASK, method=stage)
        assert furthest(done.model, expected) < 1e-11


def test_reference_is_the_summed_loss_of_each_example_not_the_mean_over_tokens() -> None:
    found = tiny("causal_lm")
    case = Case(found.model, found.request, found.task, ex.Scope.all(found.model))
    column = CacheReference(batch=7)(case).request.forget.columns["reference"]
    batch = found.request.forget.batch(torch.arange(20))
    with torch.no_grad():
        logits = found.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p, target = F.log_softmax(logits, -1)[:, :-1], batch["labels"][:, 1:]
    each = -log_p.gather(2, target.clamp_min(0)[:, :, None]).squeeze(2) * (target >= 0)
    torch.testing.assert_close(column, each.sum(1), rtol=1e-4, atol=1e-5)
    assert len(set((target >= 0).sum(1).tolist())) > 1, "answers are all as long: a sum could not be told from a mean"


def test_reference_travels_with_its_example() -> None:
    model, request = small()
    data = CacheReference(batch=6)(Case(model, request, TASK, ex.Scope.all(model))).request.forget
    chosen = data.select([5, 3, 11]).batch(torch.tensor([2, 0]))
    with torch.no_grad():
        expected = F.cross_entropy(model(chosen["x"]), chosen["y"], reduction="none")
    torch.testing.assert_close(chosen["reference"], expected)


def test_a_cached_reference_needs_no_second_model() -> None:
    """With copy=False there is no teacher: npo alone is refused before any work, after CacheReference it runs."""
    model, request = small()
    start = {name: p.clone() for name, p in model.named_parameters()}
    twin = torch.nn.Sequential(*[torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)]).double()
    twin.load_state_dict(model.state_dict())
    rows: list[int] = []
    handle = twin.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    for stage in (npo(), ex.chain(npo(), CacheReference())):
        rows.clear()
        with pytest.raises(ex.Refused, match=r"teacher.*cache the column 'reference'"):
            ex.unlearn(twin, request, task=TASK, method=stage, copy=False)
        assert sum(rows) <= 2  # the look whether the model can be called at all
    assert all(torch.equal(p, start[name]) for name, p in twin.named_parameters())
    handle.remove()
    cached = ex.chain(CacheReference(), npo(steps=7))
    expected = ex.unlearn(model, request, task=TASK, method=cached)
    done = ex.unlearn(twin, request, task=TASK, method=cached, copy=False)
    assert done.model is twin
    assert furthest(done.model, expected.model) == 0.0


def test_a_cached_reference_saves_a_forward_pass_of_the_forget_data_in_every_step() -> None:
    model, request = small()
    method = npo(steps=10, batch=16)
    stages = (method, ex.chain(CacheReference(), method))
    plain, cached = (ex.unlearn(model, request, task=TASK, method=stage).record["cost"] for stage in stages)
    assert plain["forward"] == 10 * 3 * 16
    assert cached["forward"] == 20 + 10 * 2 * 16
    assert cached["backward"] == plain["backward"] == 10 * 2 * 16


def test_data_that_bring_the_column_meet_the_need() -> None:
    model, request = small()
    request = replace(request, forget=request.forget.annotate("reference", torch.zeros(20, dtype=torch.float64)))
    twin = torch.nn.Sequential(*[torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)]).double()
    twin.load_state_dict(model.state_dict())
    ex.unlearn(twin, request, task=TASK, method=npo(steps=1), copy=False)


def test_a_reference_is_refused_where_batches_are_drawn_with_noise() -> None:
    @dataclass(frozen=True)
    class Noisy(ex.Classification):
        stochastic: bool = True

    model, request = small()
    with pytest.raises(ex.Refused, match="noise"):
        ex.unlearn(model, request, task=Noisy(3), method=ex.chain(CacheReference(), npo()))


def test_npo_slows_down_where_ascent_goes_on() -> None:
    """The weight of an example is 2 p^b / (p^b + p_ref^b): the gradient vanishes as its answer becomes unlikely."""
    model, request = small()
    batch = request.forget.batch(torch.arange(20))
    case = Case(model, request, TASK, ex.Scope.all(model))
    now = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none").detach()
    ascent = gradients(model, -F.cross_entropy(model(batch["x"]), batch["y"]))
    for fall in (0.0, 2.0, 10.0):
        found = gradients(model, NPO(1.0)(case, {**batch, "reference": now - fall}).mean())
        weight = 2 * math.exp(-fall) / (math.exp(-fall) + 1)
        for name, grad in ascent.items():
            torch.testing.assert_close(found[name], weight * grad, rtol=1e-9, atol=1e-12)
