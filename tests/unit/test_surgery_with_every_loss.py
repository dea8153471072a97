"""Surgery, explicit and implicit, with every forgetting loss there is, on the tiny Llama: what the projection does, where
a logarithm cannot be taken, and the methods as the command line builds them. A new objective is tested without an edit.
FLAT is no loss per example but a rule on two means, a combiner; its part, the probability of an answer, is here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge import registry, unlearn
from expunge.combine import OneSidedProjection, Weighted
from expunge.constrained import SafeGrad
from expunge.core import Case, Combiner, Grads, Key, Objective, RunFailed
from expunge.descend import Descend
from expunge.implicit import FastImplicitSurgery, ImplicitSurgery
from expunge.objectives import NLL, Ascent, Distill
from expunge.optim import SGD
from expunge.oracle import Draws, On, Oracle, differentiable, example_weights
from expunge.scope import Scope
from expunge.smooth import Sharpness, Smoothed
from expunge.spec import MethodSection
from expunge.steer import HoldStates, Misdirect
from tests.contract.test_objectives import precise
from tests.fixtures import tiny

torch.set_num_threads(1)
LAYER = "model.layers.0"
ELSEWHERE = {
    "FollowTeacher",
    "TargetError",
    "Margin",
    "SmoothedLabel",
    "AnyLabel",
    "RunnerUp",
    "SoftMetric",
    "OnPerturbed",
    "EWC",
    "GroupLasso",
    "L1",
    "Norm",
}  # one row of class logits; floating inputs; and penalties, which read no data
NAMED = {name: kind for name, kind in registry.parts("objectives").items() if name not in ELSEWHERE}
OBJECTIVES: dict[str, Objective] = {
    **{name: kind() for name, kind in NAMED.items()},
    "Misdirect": Misdirect(LAYER),
    "Distill away": Distill(reverse=True),
}
NEGATIVE = {"Ascent", "WGA", "TNPO", "SatImp"}  # below 0, so that they have no logarithm
OPPOSED = {*NEGATIVE, "AnswerProbability", "CEU", "DPO", "LogitSpread", "NPO", "SimNPO"}  # to the truth, on this batch


def case_of() -> Case:
    """The tiny Llama, a little away from its teacher, in float64."""
    found = tiny("causal_lm")
    model = precise(found.model.double())
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return Case(model, found.request, found.task, Scope.all(model), {"original": teacher})


def oracle_of(case: Case, roles: Mapping[str, On]) -> Oracle:
    return Oracle(
        case, dict(roles), Draws(case, roles, Key(2), 0, dict.fromkeys(roles, 6), lambda role, step: step), lr=0.1
    )


def plain(case: Case, oracle: Oracle, role: str) -> tuple[float, Tensor]:
    """Loss and flat gradient of a role's batch, by autograd."""
    objective, batch = oracle.roles[role].objective, oracle.draws.batch(role)
    weight = example_weights(case, objective, batch)
    loss = (objective(case, batch) * weight).sum() / weight.sum()
    parameters = list(case.scope.parameters(case.model).values())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return float(loss.detach()), torch.cat([part.flatten() for part in parts])


def flat(case: Case, grads: Grads) -> Tensor:
    named = case.scope.parameters(case.model)
    return torch.cat([grads[n].flatten() if n in grads else torch.zeros(p.numel()).double() for n, p in named.items()])


every = pytest.mark.parametrize("name", sorted(OBJECTIVES))


@every
def test_one_sided_projection_is_its_formula(name: str) -> None:
    """Held against NLL of the very data to forget, against itself (never in conflict), and against its own ascent."""
    case, objective = case_of(), OBJECTIVES[name]
    inner = {}
    with differentiable(case):
        for label, protected in (("truth", NLL()), ("itself", objective), ("ascent", Ascent(objective))):
            oracle = oracle_of(case, {"forget": On("forget", objective), "retain": On("forget", protected)})
            found = flat(case, OneSidedProjection(max_multiplier=math.inf).combine(oracle, {})[0])
            (_, forget), (_, retain) = plain(case, oracle, "forget"), plain(case, oracle, "retain")
            inner[label] = float(forget @ retain)
            expected = forget - min(0.0, inner[label]) / float(retain @ retain) * retain
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(forget.norm()))
            if inner[label] < 0:
                assert abs(float(found @ retain)) < 1e-7 * float(forget.norm() * retain.norm())
            else:
                assert float((found - forget).norm()) < 1e-13 * float(forget.norm()), "touched without conflict"
    assert inner["itself"] > 0 > inner["ascent"]
    if name in OPPOSED:
        assert inner["truth"] < 0


@pytest.mark.parametrize("combiner", [SafeGrad(0.5), Smoothed(OneSidedProjection(), Sharpness(), ("forget",))])
@every
def test_other_surgery_runs(name: str, combiner: Combiner) -> None:
    case, objective = case_of(), OBJECTIVES[name]
    with differentiable(case):
        oracle = oracle_of(case, {"forget": On("forget", objective), "retain": On("retain", Distill())})
        grads, _ = combiner.combine(oracle, combiner.init())
    assert bool(torch.isfinite(flat(case, grads)).all())
    assert float(flat(case, grads).norm()) > 0


@every
def test_implicit_surgery_is_its_formula(name: str) -> None:
    """log F + w log R has the gradient g_f / F + w g_r / R; the other forms have g_f + w g_r, whatever the sign of F."""
    case, objective = case_of(), OBJECTIVES[name]
    roles = {"forget": On("forget", objective), "retain": On("retain", NLL())}
    with differentiable(case):
        (loss, forget), (kept, retain) = (plain(case, oracle_of(case, roles), role) for role in roles)
        for form in ("raw", "paper"):
            rule = ImplicitSurgery(form=form, start=0.7)
            grads, state = rule.combine(oracle_of(case, roles), rule.init())
            torch.testing.assert_close(flat(case, grads), forget + 0.7 * retain, rtol=1e-7, atol=1e-9)
            assert state["before"] == pytest.approx(kept)
        rule = ImplicitSurgery(form="log", start=0.7)
        if loss <= 0:
            assert name in NEGATIVE
            with pytest.raises(RunFailed, match="log form needs the loss of role 'forget' above its floor 0, found -"):
                rule.combine(oracle_of(case, roles), rule.init())
            floor = 2 * loss
            rule, loss = ImplicitSurgery(form="log", start=0.7, floor=floor), loss - floor
        grads, _ = rule.combine(oracle_of(case, roles), rule.init())
        expected = forget / (loss + 1e-8) + 0.7 * retain / (kept + 1e-8)
        torch.testing.assert_close(flat(case, grads), expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))


@every
def test_fast_implicit_surgery_is_its_formula(name: str) -> None:
    case, objective = case_of(), OBJECTIVES[name]
    roles = {"forget": On("forget", objective), "retain": On("retain", NLL())}
    with differentiable(case):
        (_, forget), (_, retain) = (plain(case, oracle_of(case, roles), role) for role in roles)
        rule = FastImplicitSurgery(start=0.7)
        grads, _ = rule.combine(oracle_of(case, roles), rule.init())
    expected = (forget + 0.7 * retain) / 1.7
    torch.testing.assert_close(flat(case, grads), expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))


FROM_A_FILE = {**{name: {"name": name} for name in NAMED}, "NPO of beta": {"name": "NPO", "beta": 0.3}}


@pytest.mark.parametrize("method", ["surgery", "eupmu"])
@pytest.mark.parametrize("name", sorted(FROM_A_FILE))
def test_the_methods_take_any_loss_from_a_run_file(name: str, method: str) -> None:
    found = tiny("causal_lm")
    stage = MethodSection(name=method, forget=FROM_A_FILE[name], steps=2, batch=6).stage()
    done = unlearn(found.model, found.request, task=found.task, method=stage)
    moved = [n for n, p in done.model.named_parameters() if not torch.equal(p, found.model.get_parameter(n))]
    assert all(bool(torch.isfinite(p).all()) for p in done.model.parameters())
    assert moved, "two steps moved nothing"
    assert {"loss/forget", "loss/retain"} <= set(done.record["history"][-1])


def test_the_logarithm_of_eupmu_says_what_it_cannot_take_and_takes_a_floor() -> None:
    found = tiny("causal_lm")

    def run(**settings: Any) -> Any:
        stage = MethodSection(name="eupmu", variant="implicit", steps=2, batch=6, **settings).stage()
        return unlearn(found.model, found.request, task=found.task, method=stage)

    for name in ("Ascent", "WGA"):
        with pytest.raises(RunFailed, match="above its floor 0") as raised:
            run(forget={"name": name})
        assert "\n" not in str(raised.value)
    assert len(run(forget={"name": "WGA"}, floor=-1 / math.e).record["history"]) == 2


@pytest.mark.parametrize(
    "combiner",
    [OneSidedProjection(), ImplicitSurgery(), FastImplicitSurgery(), SafeGrad()],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("retain", [Distill(), HoldStates(LAYER)], ids=["kl", "states"])
def test_retain_losses_that_start_at_zero(retain: Objective, combiner: Combiner) -> None:
    """At the first step they are 0 and have no gradient: nothing is divided by it, and the run goes on."""
    found = tiny("causal_lm")
    stage = Descend(
        forget=OBJECTIVES["NPO"], retain=retain, combine=combiner, optimizer=SGD(1e-3, 0.0), steps=4, batch=6
    )
    done = unlearn(found.model, found.request, task=found.task, method=stage)
    alone = Descend(forget=OBJECTIVES["NPO"], combine=Weighted(), optimizer=SGD(1e-3, 0.0), steps=1, batch=6)
    assert all(bool(torch.isfinite(p).all()) for p in done.model.parameters())
    assert len(done.record["history"]) == 4
    assert unlearn(found.model, found.request, task=found.task, method=alone).record["history"][0][
        "loss/forget"
    ] == pytest.approx(done.record["history"][0]["loss/forget"])
