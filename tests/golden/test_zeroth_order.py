"""Zeroth-order gradients (arXiv:2310.02025) beside autograd, feature reuse beside none, batched looks beside single ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import expunge as ex
from expunge import methods
from expunge.combine import OneSidedProjection, Weighted
from expunge.compose import ZerothOrder
from expunge.core import Case, Grads, Key
from expunge.objectives import NLL, SimNPO
from expunge.oracle import Draws, On, Oracle
from expunge.reuse import Reuse
from expunge.zeroth import Coordinates, drawn, grasp, shared_out
from tests.fixtures import odd, tiny
from tests.golden.forgetting import small

torch.set_num_threads(1)
TASK = ex.Classification(3)
ROLES = {"forget": On("forget", SimNPO()), "retain": On("retain", NLL())}


def of(found: Any = None, roles: dict[str, On] = ROLES, step: int = 0) -> Oracle:
    """What a combiner would ask, of a small network in float64 or of a tiny one."""
    model, request, task = (*small(), TASK) if found is None else (found.model, found.request, found.task)
    case = Case(model.eval(), request, task, ex.Scope.all(model))
    return Oracle(case, roles, Draws(case, roles, Key(1), step, dict.fromkeys(roles, 20), lambda _, n: n), step=step)


def exact(oracle: Oracle) -> Grads:
    """The gradient of the sum of the losses by torch."""
    case = oracle.case
    total = sum(on.objective(case, oracle.draws.batch(role)).mean() for role, on in oracle.roles.items())
    names = list(oracle.parameters)
    return dict(zip(names, torch.autograd.grad(total, list(oracle.parameters.values())), strict=True))


def flat(grads: Grads) -> Tensor:
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def estimate(oracle: Oracle, **settings: Any) -> Grads:
    plan = Coordinates(**{"count": 10_000, **settings})
    return plan.combine(oracle, plan.init())[0]


def test_the_error_by_coordinates_is_of_the_order_of_the_step() -> None:
    truth = flat(exact(of()))
    errors = [float((flat(estimate(of(), mu=mu)) - truth).norm()) for mu in (1e-2, 1e-3, 1e-4)]
    assert errors[0] > 1e-6
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10.0, rel=0.1)


def test_random_directions_are_unbiased() -> None:
    """With Gaussian directions E g = grad + O(mu), and each entry's variance is about |grad|^2 / directions."""
    oracle, directions = of(), 3000
    truth = exact(oracle)
    grads, _ = ZerothOrder(Weighted(), 1e-7, directions).combine(oracle, {})
    spread = ((flat(truth).square() + flat(truth).square().sum()) / directions).sqrt()
    away = (flat(grads) - flat(truth)) / spread
    assert float(away.abs().max()) < 4.5
    assert float(away.square().mean()) == pytest.approx(1.0, abs=0.5)


class Functional(nn.Module):
    """A convolution, functions between layers, a layer used twice, and one that writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bend, self.last = nn.ReLU(inplace=True), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = hidden + self.second(torch.tanh(self.second(hidden)))
        return self.last(self.bend(hidden).flatten(1))


class Lent(nn.Module):
    """An adapter as our own are: the layer is called with another weight, which it does not own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base, self.low = nn.Linear(64, 8), nn.Linear(8, 5), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        changed = {"weight": self.base.weight + self.low.weight}
        return torch.func.functional_call(self.base, changed, (torch.tanh(self.first(x.flatten(1))),))


def built(model: nn.Module) -> Any:
    found = tiny("classification")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return replace(found, model=model)


MODELS: dict[str, Any] = {
    "plain": lambda: tiny("classification"),
    "odd": odd,
    "functional": lambda: built(Functional()),
    "lent": lambda: built(Lent()),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_feature_reuse_gives_the_same_bits(make: Any) -> None:
    found = make()
    settings = {"count": 60, "queries": 0, "mu": 1e-2}
    plain, kept = (estimate(of(found), reuse=reuse, **settings) for reuse in (False, True))
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    assert float(flat(plain).norm()) > 0
    assert all("forward" not in module.__dict__ for module in found.model.modules())


def test_feature_reuse_spares_work_where_the_last_layer_moves() -> None:
    """As many rows enter the model; the floating-point operations of its convolutions are done once."""

    def work(reuse: bool) -> tuple[int, int]:
        oracle = of(tiny("classification"))
        oracle.case = replace(oracle.case, scope=ex.Scope({"7.weight": True}, tuple(oracle.parameters)))
        oracle = Oracle(oracle.case, oracle.roles, oracle.draws)
        with oracle.case.meter.watch(oracle.case.model), FlopCounterMode(display=False) as counter:
            estimate(oracle, count=20, queries=0, reuse=reuse)
        return oracle.case.meter.forward, counter.get_total_flops()

    (rows, plain), (again, spared) = work(False), work(True)
    assert rows == again == 2 * 21 * 20
    assert spared < 0.1 * plain


def test_what_is_kept_is_not_used_where_it_would_be_wrong() -> None:
    """A changed input, a changed parameter, train mode, and a tensor that was written to since."""
    layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).eval()
    model = nn.Sequential(layer, nn.Linear(3, 2)).eval()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    kept = Reuse(model)
    with torch.no_grad():
        with kept.recording():
            model(x)
        with kept.replaying(model[1].weight):
            model(x)
        assert kept.spared == 1
        with kept.replaying(model[1].weight):
            assert torch.equal(model(x + 1), model[1](layer(x + 1)))
        with kept.replaying(*layer.parameters()):
            layer[0].weight.add_(1.0)
            assert torch.equal(model(x), model[1](layer[1](layer[0](x))))
        before = kept.spared
        layer.train()
        with kept.replaying(model[1].weight):
            model[0](x)
        layer.eval()
        x.add_(1.0)
        with kept.replaying(model[1].weight):
            model(x)
        assert kept.spared == before


@pytest.mark.parametrize("reuse", [False, True])
def test_batched_looks_equal_single_ones(reuse: bool) -> None:
    """To the rounding of a loss, which the division by mu enlarges; and they cost as many rows."""
    rows, found = [], []
    for parallel in (1, 7):
        oracle = of()
        with oracle.case.meter.watch(oracle.case.model):
            found.append(flat(estimate(oracle, mu=1e-3, reuse=reuse, parallel=parallel)))
        rows.append(oracle.case.meter.forward)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-11)
    assert rows[0] == rows[1]


class Branching(nn.Module):
    """Its control flow depends on its numbers."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out if float(out.sum()) > 0 else 2 * out


@pytest.mark.parametrize("name", ["odd", "branching"])
def test_batched_looks_of_strange_models(name: str) -> None:
    """Shared and tied layers, each swapped once and put back; or one by one, where torch cannot batch, and a note."""
    found = odd() if name == "odd" else tiny("classification")
    found = replace(found, model=found.model if name == "odd" else Branching(found.model))
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    rows, grads = [], []
    for parallel in (1, 5):
        oracle = of(found)
        with oracle.case.meter.watch(found.model):
            grads.append(flat(estimate(oracle, count=40, queries=0, mu=1e-2, parallel=parallel)))
        rows.append(oracle.case.meter.forward)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)
    assert rows[0] == rows[1]
    assert bool(oracle.case.meter.notes) == (name == "branching")
    assert all(torch.equal(p, before[n]) for n, p in found.model.named_parameters())


def test_zo_grasp_scores_are_those_of_the_hessian() -> None:
    """|theta H g| by differentiating twice; along many directions the estimate ranks as it does."""
    oracle = of(roles={"retain": ROLES["retain"]})
    case, names = oracle.case, list(oracle.parameters)
    loss = NLL()(case, oracle.draws.batch("retain")).mean()
    first = torch.autograd.grad(loss, list(oracle.parameters.values()), create_graph=True)
    inner = sum((g * g.detach()).sum() for g in first)
    second = torch.autograd.grad(inner, list(oracle.parameters.values()))
    truth = flat({n: (p * h).abs().detach() for n, p, h in zip(names, oracle.parameters.values(), second, strict=True)})
    with torch.no_grad():
        found = flat(grasp(oracle, 1e-4, 1500))
    assert float(torch.corrcoef(torch.stack([found, truth]))[0, 1]) > 0.9


def test_draws_keep_to_quota_and_scope_and_change_every_few_steps() -> None:
    model, _ = small()
    names = tuple(name for name, _ in model.named_parameters())
    mask = torch.arange(model[0].weight.numel()).reshape(model[0].weight.shape) % 2 == 0
    scope = ex.Scope({names[0]: mask, names[1]: True}, names)
    parameters = scope.parameters(model)
    first, again, other = (drawn(scope, parameters, {names[0]: 5, names[1]: 2}, Key(k)) for k in (1, 1, 2))
    assert [len(first[name]) for name in names[:2]] == [5, 2]
    assert bool((first[names[0]] % 2 == 0).all())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[names[0]], other[names[0]])
    assert shared_out({"a": 3.0, "b": 1.0}, {"a": 9, "b": 9}, 5) == {"a": 4, "b": 1}
    walked = [flat(estimate(of(step=step), count=9, queries=0, redraw=2)) != 0 for step in (0, 1, 2)]
    assert torch.equal(walked[0], walked[1])
    assert not torch.equal(walked[0], walked[2])


class NoBackward(torch.autograd.Function):
    """The identity, which cannot be differentiated."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        raise AssertionError("the model was differentiated")


class Closed(nn.Module):
    """A model without a backward pass: one by an error, one by ``no_grad`` inside."""

    def __init__(self, inner: nn.Module, silent: bool):
        super().__init__()
        self.inner, self.silent = inner, silent

    def forward(self, x: Tensor) -> Tensor:
        if not self.silent:
            return NoBackward.apply(self.inner(x))
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("combine", [Weighted(), OneSidedProjection()], ids=["weighted", "surgery"])
def test_a_model_without_backward_forgets(silent: bool, combine: Any) -> None:
    found = tiny("classification")
    model = Closed(found.model, silent).eval()
    method = methods.zeroth_order(combine=combine, coordinates=40, queries=2, steps=15)
    done = ex.unlearn(model, found.request, task=found.task, method=method)
    batch = found.request.forget.batch(torch.arange(20))
    with torch.no_grad():
        before, after = (float(found.task.nll(m, batch).mean()) for m in (model, done.model))
    assert after > before + 0.05
    assert done.record["cost"]["backward"] == 0
