"""What every objective keeps to, on every task that it can be used with: one number per example, no hidden randomness,
indifference to cuts, a true gradient, and its known limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Descend, Refused, Scope, registry, unlearn
from expunge.core import Batch, Case, Key, Objective, map_tensors, rows_of
from expunge.objectives import EWC, L1, NLL, NPO, Ascent, Distill, Margin, Norm, RandomLabel, SimNPO
from expunge.oracle import On, differentiable, example_weights, per_example, prepared
from tests.fixtures import NAMES, tiny

KINDS = registry.parts("objectives")
ROWS = 7


def objectives(case: Case) -> dict[str, Objective]:
    """Every registered objective, with its defaults where it has them."""
    parameters = {name: p.detach() for name, p in case.scope.parameters(case.model).items()}
    generator = torch.Generator().manual_seed(8)
    shaped = {
        "EWC": EWC(
            {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()},
            {n: p + 0.1 for n, p in parameters.items()},
        )
    }
    return {name: shaped[name] if name in shaped else kind() for name, kind in KINDS.items()}


def moved(task: str) -> Case:
    """A tiny model in float64, a little away from its teacher, so that no loss is at a stationary point."""
    found = tiny(task)
    model = precise(found.model.double())
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    data = found.request.forget
    request = replace(found.request, forget=data.select(torch.arange(0, 2 * ROWS, 2)))
    return Case(model, request, found.task, Scope.all(model), {"original": teacher})


def precise(model: nn.Module) -> nn.Module:
    """The same network without the float32 normalisation that Llama has in any precision."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def doubled(batch: Batch) -> Batch:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)


def drawn(case: Case, objective: Objective, key: Key = Key(1)) -> Batch:
    """The forget batch, prepared, and drawn by the objective, in float64."""
    raw = doubled(next(prepared(case, case.request.data("forget"), ROWS, key)))
    draw = getattr(objective, "draw", None)
    return raw if draw is None else doubled(draw(case, raw, key.at("draw")))


ONLY = {
    "AnyLabel": ("classification",),
    "Margin": ("classification",),
    "SmoothedLabel": ("classification",),
    "RunnerUp": ("classification",),
    "SoftMetric": ("classification",),
    "OnPerturbed": ("classification", "regression"),
    **dict.fromkeys(("TargetError", "FollowTeacher"), ("regression",)),
    "CEU": ("causal_lm",),
    **dict.fromkeys(
        ("WGA", "TNPO", "SatImp", "UNDIAL", "LogitSpread", "AnswerProbability", "GeneralisedCrossEntropy"),
        ("classification", "causal_lm"),
    ),
}
CASES = [(task, name) for task in NAMES for name in sorted(KINDS) if task in ONLY.get(name, NAMES)]
REFUSED = [(task, name) for name, tasks in ONLY.items() for task in NAMES if task not in tasks]


@pytest.mark.parametrize(("task", "name"), REFUSED, ids=["-".join(pair) for pair in REFUSED])
def test_an_objective_that_does_not_fit_the_task_is_refused(task: str, name: str) -> None:
    case = moved(task)
    objective = objectives(case)[name]
    with pytest.raises(Refused, match=f"objective {name} .*task '{task}'"):
        objective(case, drawn(case, objective))


@pytest.fixture(params=CASES, ids=lambda pair: "-".join(pair))
def setting(request: pytest.FixtureRequest) -> Iterator[tuple[Case, Objective]]:
    task, name = request.param
    case = moved(task)
    with differentiable(case):
        yield case, objectives(case)[name]


def test_one_number_per_example_twice_the_same_bits(setting: tuple[Case, Objective], global_randomness: Any) -> None:
    case, objective = setting
    batch = drawn(case, objective)
    held = map_tensors(lambda t: t.clone(), batch)
    first, second = objective(case, batch), objective(case, batch)
    expected = (1,) if getattr(objective, "parameters_only", False) else (ROWS,)
    assert first.shape == expected
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)
    assert first.requires_grad
    assert first.dtype == torch.float64
    assert global_randomness.unchanged(), "an objective drew from the global random state"
    flat, kept = [], []
    map_tensors(lambda t: flat.append(t) or t, batch)
    map_tensors(lambda t: kept.append(t) or t, held)
    assert len(flat) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(flat, kept, strict=True)), "an objective changed its batch"


def test_drawing_twice_gives_the_same_batch(setting: tuple[Case, Objective], global_randomness: Any) -> None:
    case, objective = setting
    first, again = [], []
    map_tensors(lambda t: first.append(t) or t, drawn(case, objective))
    map_tensors(lambda t: again.append(t) or t, drawn(case, objective))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert global_randomness.unchanged(), "draw drew from the global random state"


def test_slices_make_the_whole(setting: tuple[Case, Objective]) -> None:
    case, objective = setting
    if getattr(objective, "parameters_only", False):
        pytest.skip("reads no data")
    batch = drawn(case, objective)
    whole, weights = objective(case, batch), example_weights(case, objective, batch)
    parts = [map_tensors(lambda t, a=a, b=b: t[a:b], batch) for a, b in ((0, 3), (3, 4), (4, ROWS))]
    torch.testing.assert_close(torch.cat([objective(case, part) for part in parts]), whole, rtol=1e-11, atol=1e-11)
    assert torch.equal(torch.cat([example_weights(case, objective, part) for part in parts]), weights)
    order = torch.tensor([4, 2, 0, 6, 5, 3, 1])
    mixed = objective(case, map_tensors(lambda t: t[order], batch))
    torch.testing.assert_close(mixed, whole[order], rtol=1e-11, atol=1e-11)


def test_gradient_by_differences(setting: tuple[Case, Objective]) -> None:
    """Central differences along two random directions, float64, away from the kink of an absolute value."""
    case, objective = setting
    if getattr(objective, "constants", False):
        pytest.skip("weighs by constants that depend on the model: golden/test_token_objectives.py has the integrals")
    batch = drawn(case, objective)
    parameters = list(case.scope.parameters(case.model).values())
    share = torch.linspace(0.5, 1.5, rows_of(batch), dtype=torch.float64)
    share = share[:1] if getattr(objective, "parameters_only", False) else share

    def loss() -> Tensor:
        return (objective(case, batch) * share).sum()

    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        direction = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) * (p.detach().abs() > 1e-4) for p in parameters
        ]
        expected = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
        values = []
        step = 1e-6
        for sign in (1, -2, 1):
            with torch.no_grad():
                for parameter, d in zip(parameters, direction, strict=True):
                    parameter.add_(sign * step * d)
                values.append(float(loss()))
        found = (values[0] - values[1]) / (2 * step)
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-6)


class Mean:
    """A wrong objective: already reduced."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch).mean()


class Kept(Mean):
    """A wrong objective: reduced, with the dimension kept."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return super().__call__(case, batch).reshape(1)


@pytest.mark.parametrize("wrong", [Mean(), Kept()])
@pytest.mark.parametrize("role", ["forget", "others"])
def test_a_scalar_from_a_role_with_data_is_refused(wrong: Mean, role: str) -> None:
    found = tiny("classification")
    roles: dict[str, Any] = {"forget": wrong} if role == "forget" else {"others": {"more": On("retain", wrong)}}
    with pytest.raises(Refused, match="one loss per example"):
        unlearn(found.model, found.request, task=found.task, method=Descend(**roles, steps=1, batch=8))


def gradient(case: Case, objective: Objective) -> Tensor:
    """Flat gradient of the sum over the forget batch."""
    with differentiable(case):
        parameters = list(case.scope.parameters(case.model).values())
        found = torch.autograd.grad(objective(case, drawn(case, objective)).sum(), parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_npo_tends_to_gradient_ascent(task: str) -> None:
    """2 sigmoid(-beta (S - S_ref)) times the gradient of -S: the distance shrinks in proportion to beta."""
    case = moved(task)
    ascent = gradient(case, Ascent(Summed()))
    near, nearer = (float((gradient(case, NPO(beta)) - ascent).norm() / ascent.norm()) for beta in (1e-3, 1e-4))
    assert nearer < 1e-3
    assert nearer == pytest.approx(near / 10, rel=0.02)


class Summed:
    """NLL summed over the units of an example."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch)


@pytest.mark.parametrize("task", NAMES)
def test_npo_at_its_reference(task: str) -> None:
    """At the first step it is (2 / beta) log 2, and its gradient that of ascent."""
    case = moved(task)
    case = replace(case, teachers={"original": case.model})
    values = NPO(0.3)(case, drawn(case, NPO(0.3)))
    torch.testing.assert_close(
        values, torch.full((ROWS,), 2 / 0.3 * math.log(2), dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(gradient(case, NPO(0.3)), gradient(case, Ascent(Summed())), rtol=1e-9, atol=1e-9)


def test_npo_with_a_cached_reference_equals_npo_with_its_teacher() -> None:
    case = moved("causal_lm")
    with torch.no_grad(), case.teacher("original") as teacher:
        losses = torch.cat(
            [case.task.nll(teacher, batch) for batch in prepared(case, case.request.data("forget"), ROWS, Key(1))]
        )
    cached = replace(
        case,
        request=replace(case.request, forget=case.request.data("forget").annotate("reference", losses)),
        teachers={},
    )
    assert torch.equal(gradient(cached, NPO()), gradient(case, NPO()))


def test_npo_refuses_a_cached_reference_of_a_task_with_noise() -> None:
    case = moved("diffusion")
    data = case.request.data("forget").annotate("reference", torch.zeros(ROWS))
    with pytest.raises(Refused, match="cached reference"):
        drawn(replace(case, request=replace(case.request, forget=data)), NPO())


def test_simnpo_at_its_margin_and_far_from_it() -> None:
    case = moved("causal_lm")
    batch = drawn(case, SimNPO())
    per_unit = (case.task.nll(case.model, batch) / case.task.units(batch)).detach()
    at = [
        float(SimNPO(2.0, float(m))(case, map_tensors(lambda t, i=i: t[i : i + 1], batch)).detach())
        for i, m in enumerate(per_unit)
    ]
    assert at == pytest.approx([math.log(2)] * ROWS, rel=1e-9)
    steep = SimNPO(1e4, 100.0)(case, batch)  # far below the margin the sigmoid is a line
    torch.testing.assert_close(steep, 2 * (100.0 - per_unit), rtol=1e-9, atol=1e-9)


def test_token_means_weigh_tokens() -> None:
    """The batch mean of NLL is the sum over all tokens by their number, not the mean of means."""
    case = moved("causal_lm")
    batch = drawn(case, NLL())
    units = case.task.units(batch)
    assert len(units.unique()) > 1, "answers of one length are no test"
    weight, values = example_weights(case, NLL(), batch), per_example(case, NLL(), batch)
    mean = float((weight * values).sum().detach() / weight.sum())
    assert mean == pytest.approx(float(case.task.nll(case.model, batch).sum().detach() / units.sum()), rel=1e-12)
    assert abs(mean - float(values.detach().mean())) > 1e-4


def test_distill_is_nothing_at_its_teacher() -> None:
    for task in NAMES:
        case = moved(task)
        case = replace(case, teachers={"original": case.model})
        for temperature in (1.0, 3.0):
            objective = Distill(temperature=temperature)
            assert float(objective(case, drawn(case, objective)).detach().abs().max()) < 1e-12
            assert float(gradient(case, objective).abs().max()) < 1e-9


@pytest.mark.parametrize("task", ["classification", "causal_lm", "regression"])
def test_random_label_is_redrawn_and_never_the_truth(task: str) -> None:
    case = moved(task)
    true = case.task.nll(case.model, drawn(case, NLL()))
    seen = [RandomLabel()(case, drawn(case, RandomLabel(), Key(seed))) for seed in range(12)]
    assert len({float(values.sum()) for values in seen}) > 1, "every draw gave the same answers"
    if task == "classification":
        label = case.task.labels(drawn(case, NLL()))
        assert all(
            not bool((case.task.labels(drawn(case, RandomLabel(), Key(seed))) == label).any()) for seed in range(12)
        )
    assert all(not torch.equal(values, true) for values in seen)


def test_margin_is_bounded_by_its_slack() -> None:
    case = moved("classification")
    batch = drawn(case, Margin())
    logits = case.task.logits(case.model, batch)
    expected = [
        float(row[y] - max(v for k, v in enumerate(row.tolist()) if k != y))
        for row, y in zip(logits, case.task.labels(batch), strict=True)
    ]
    assert Margin(1e9)(case, batch).tolist() == pytest.approx(expected)
    wrong = {**batch, "y": logits.argmin(1)}
    assert bool((Margin(0.01)(case, wrong) == -0.01).all())


def test_penalties_are_their_formulas() -> None:
    case = moved("regression")
    flat = torch.cat([p.detach().flatten() for p in case.scope.parameters(case.model).values()])
    assert float(L1()(case, {})) == pytest.approx(float(flat.abs().sum()), rel=1e-12)
    assert float(Norm()(case, {})) == pytest.approx(math.sqrt(float((flat * flat).sum())), rel=1e-12)
    named = {name: p.detach().clone() for name, p in case.scope.parameters(case.model).items()}
    importance = {name: torch.full_like(p, 3.0) for name, p in named.items()}
    shifted = {name: p - 0.5 for name, p in named.items()}
    assert float(EWC(importance, named)(case, {})) == 0.0
    assert float(EWC(importance, shifted)(case, {})) == pytest.approx(0.5 * 3.0 * 0.25 * len(flat), rel=1e-12)
    with torch.no_grad():
        for parameter in case.scope.parameters(case.model).values():
            parameter.zero_()
    with differentiable(case):
        Norm()(case, {}).sum().backward()
    assert all(float(p.grad.abs().max()) == 0 for p in case.scope.parameters(case.model).values() if p.grad is not None)
