"""SafeGrad: the projection, the pull, both inner products, both divergences, and which data are learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.constrained import SafeGrad
from expunge.core import Batch, Case, Grads, Key, Refused, Request
from expunge.objectives import NLL, Distill, RandomLabel
from expunge.optim import Adam
from expunge.oracle import Draws, On, Oracle, differentiable
from expunge.scope import Scope
from tests.fixtures import tiny

torch.set_num_threads(1)


@dataclass(frozen=True, eq=False)
class Plane:
    """A loss with this gradient."""

    slopes: dict[str, Tensor]
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        named = case.scope.parameters(case.model)
        return sum((named[n] * slope).sum() for n, slope in self.slopes.items()).reshape(1)  # type: ignore[union-attr]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))


def update(combiner: SafeGrad, user: dict[str, Tensor], align: dict[str, Tensor]) -> tuple[Grads, Oracle]:
    model = Two()
    request = ex.split((torch.zeros(4, 1), torch.zeros(4).long()), forget=[0])
    case = Case(model, request, ex.Classification(2), Scope.all(model))
    roles = {"task": On(None, Plane(user)), "retain": On(None, Plane(align))}
    oracle = Oracle(case, roles, Draws(case, roles, Key(1), 0, {}, lambda role, step: step))
    with differentiable(case):
        return combiner.combine(oracle, {})[0], oracle


def drawn(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    values = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return {"a": values[0], "b": values[1]}, {"a": values[2], "b": values[3]}


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts["a"], parts["b"]])


def test_projected_gradient_is_orthogonal_in_conflict_and_unchanged_otherwise() -> None:
    conflicts = 0
    for seed in range(40):
        user, align = drawn(seed)
        found = flat(update(SafeGrad(rho=0.0), user, align)[0])
        u, a = flat(user), flat(align)
        if float(u @ a) < 0:
            conflicts += 1
            assert abs(float(found @ a)) < 1e-12 * float(u.norm() * a.norm())
            torch.testing.assert_close(found, u - (u @ a) / (a @ a) * a, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(found, u)
    assert 10 < conflicts < 30


@pytest.mark.parametrize("seed", range(6))
def test_rho_adds_the_alignment_gradient(seed: int) -> None:
    user, align = drawn(seed)
    bare, pulled = (flat(update(SafeGrad(rho=rho), user, align)[0]) for rho in (0.0, 0.7))
    torch.testing.assert_close(pulled, bare + 0.7 * flat(align), rtol=1e-12, atol=1e-12)


def test_per_tensor_projects_each_tensor_by_itself() -> None:
    different = 0
    for seed in range(20):
        user, align = drawn(seed)
        grads, oracle = update(SafeGrad(rho=0.5, per_tensor=True), user, align)
        for name in ("a", "b"):
            u, a = user[name], align[name]
            expected = (u - min(0.0, float(u @ a)) / float(a @ a) * a) + 0.5 * a
            torch.testing.assert_close(grads[name], expected, rtol=1e-12, atol=1e-12)
        different += not torch.allclose(flat(grads), flat(update(SafeGrad(rho=0.5), user, align)[0]))
        assert oracle.report["retain_slope"] == pytest.approx(float(flat(grads) @ flat(align)))
    assert different > 5


def test_tensors_that_only_one_loss_reaches() -> None:
    user, align = drawn(3)
    for per_tensor in (False, True):
        grads, _ = update(SafeGrad(rho=2.0, per_tensor=per_tensor), {"a": user["a"]}, {"b": align["b"]})
        assert torch.equal(grads["a"], user["a"])
        assert torch.equal(grads["b"], 2.0 * align["b"])
    with pytest.raises(Refused, match="rho"):
        SafeGrad(rho=-1.0)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_divergence_goes_either_way(task: str) -> None:
    """Both by the definition of KL over the answers; at the teacher both are 0."""
    found = tiny(task)
    other = found.make(3).eval()
    case = Case(found.model, found.request, found.task, Scope.all(found.model), {"original": other})
    batch = found.request.retain.batch(torch.arange(5))
    with torch.no_grad():
        p, q = (found.task.outputs(m, batch).double().softmax(-1) for m in (other, found.model))
        labels = found.task.labels(batch)
        counts = (labels != -100).double() if labels.ndim == 2 else torch.ones(5, dtype=torch.float64)
        for reverse, (first, second) in ((False, (p, q)), (True, (q, p))):
            each = (first * (first.log() - second.log())).sum(-1) * counts
            expected = each.sum(1) / counts.sum(1) if labels.ndim == 2 else each
            objective = Distill(reverse=reverse)
            values = objective(case, objective.draw(case, batch, Key(0)))
            torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
            same = replace(case, teachers={"original": found.model})
            assert float(objective(same, objective.draw(same, batch, Key(0))).abs().max()) < 1e-6


def loss(model: nn.Module, found: object, data: ex.Data) -> float:
    with torch.no_grad():
        batch = data.batch(torch.arange(len(data)))
        task = found.task  # type: ignore[attr-defined]
        return float(task.nll(model, batch).sum() / task.units(batch).sum())


def test_learns_the_task_data_and_keeps_the_alignment_better_than_fine_tuning() -> None:
    """The user's data oppose the alignment set: random labels on its own kind of inputs. No forget data are needed."""
    found = tiny("classification")
    generator = torch.Generator().manual_seed(4)
    x = found.request.valid.batch(torch.arange(30))["x"]
    wrong = ex.as_data((x, torch.randint(0, 5, (30,), generator=generator)), ids=range(900, 930))
    request = Request(retain=found.request.retain, extra={"task": wrong})
    kept = {}
    for name, stage in {
        "safe": methods.safe_grad(steps=40, rho=1.0),
        "plain": ex.Descend(others={"task": NLL()}, optimizer=Adam(5e-4), steps=40, batch=32),
    }.items():
        done = ex.unlearn(found.model, request, task=found.task, method=stage)
        assert loss(done.model, found, wrong) < loss(found.model, found, wrong) - 0.05
        kept[name] = loss(done.model, found, request.retain)
    assert kept["safe"] < kept["plain"]


def test_which_data_are_learnt() -> None:
    """The task data where there are any, whatever is in the forget slot; else the forget slot; else a refusal."""
    found = tiny("classification")
    settings = {"steps": 2, "batch": 100}

    def after(request: Request) -> ex.Outcome:
        return ex.unlearn(found.model, request, task=found.task, method=methods.safe_grad(**settings))

    request = found.request
    as_task = after(Request(forget=request.valid, retain=request.retain, extra={"task": request.forget}))
    as_forget = after(Request(forget=request.forget, retain=request.retain))
    other = after(Request(forget=request.valid, retain=request.retain))
    for name, p in as_forget.model.named_parameters():
        torch.testing.assert_close(as_task.model.get_parameter(name), p, rtol=1e-3, atol=1e-5)
    assert as_forget.record["result"] != other.record["result"]
    with pytest.raises(Refused, match="no data called 'forget'"):
        after(Request(retain=request.retain, concepts=("nothing",)))
    with pytest.raises(Refused, match="needs retain data"):
        after(Request(extra={"task": request.forget}))
    with pytest.raises(Refused, match="nothing to forget"):
        after(Request(retain=request.retain))


def test_it_forgets_with_a_forgetting_objective() -> None:
    found = tiny("classification")
    done = ex.unlearn(
        found.model, found.request, task=found.task, method=methods.safe_grad(learn=RandomLabel(), steps=60)
    )
    assert loss(done.model, found, found.request.forget) > loss(found.model, found, found.request.forget) + 0.3
    assert math.isfinite(loss(done.model, found, found.request.retain))


def test_a_pull_of_rounding_points_nowhere_and_a_weak_one_counts() -> None:
    """At the first step the divergence from oneself is 0 but for rounding, whose direction means nothing."""
    user, _ = drawn(0)
    for size, projected in ((1e-8, False), (1e-3, True)):
        align = {"a": -size * user["a"], "b": torch.zeros(3, dtype=torch.float64)}
        for per_tensor in (False, True):
            grads, _ = update(SafeGrad(rho=0.0, per_tensor=per_tensor), user, align)
            assert (float(grads["a"].norm()) < 1e-9) == projected
            assert torch.equal(grads["b"], user["b"])


@pytest.mark.parametrize("option", [{"direction": "reverse"}, {"inner_product": "per_tensor"}])
def test_the_options_of_the_method_reach_its_parts(option: dict[str, str]) -> None:
    found = tiny("classification")
    plain, other = (
        ex.unlearn(found.model, found.request, task=found.task, method=methods.safe_grad(steps=6, **settings)).model
        for settings in ({}, option)
    )
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), other.parameters(), strict=True))
