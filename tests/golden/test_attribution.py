"""Data attribution by influence and by TRAK, DMM and DM-Direct: closed forms, retrained models, loops by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.attribution import (
    TRAK,
    Influence,
    MatchOutputs,
    conjugate_gradients,
    gauss_newton,
    predicted,
    sampled,
)
from expunge.core import Case, Key, Refused, RunFailed
from expunge.linearised import LinearisedModel, load_linearised
from expunge.oracle import along
from expunge.random_projection import Projector
from tests.fixtures import odd, tiny
from tests.golden.by_hand import whole
from tests.golden.forgetting import small

torch.set_num_threads(1)
RIDGE = 0.3


def case_of(model: nn.Module, request: ex.Request, task: Any, seed: int = 0, **changes: Any) -> Case:
    return Case(model, request, task, ex.Scope.all(model), rng=Key(seed), **changes)


def ridge(keep: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """30 examples of two targets, and the ridge regression on those kept: sum of |W x - y|^2 / 2 + RIDGE |W|^2 / 2."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 2, generator=generator, dtype=torch.float64) + torch.randn(
        30, 2, generator=generator, dtype=torch.float64
    )
    a, b = x[keep], y[keep]
    return x, y, torch.linalg.solve(a.T @ a + RIDGE * torch.eye(4, dtype=torch.float64), a.T @ b).T


def linear(weight: Tensor) -> nn.Module:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_influence_predicts_the_ridge_regression_without_the_forget_data_exactly(scale: float) -> None:
    """Whatever the noise's assumed scale, if the ridge is given in its units."""
    x, y, full = ridge(slice(None))
    _, _, without = ridge(slice(6, None))
    model, request = linear(full), ex.split((x, y), forget=list(range(6)))
    case = case_of(model, request, ex.registry.tasks()["regression"](scale=scale))
    how = Influence(damping=RIDGE / scale**2 / 24, iterations=30)
    step = how.step(case, 7, Key(0))
    torch.testing.assert_close(model.weight + step["weight"], without, rtol=1e-9, atol=1e-9)
    said = predicted(case, request.data("retain"), step, 1.0, 5, Key(0))
    torch.testing.assert_close(said, x[6:] @ without.T, rtol=1e-9, atol=1e-9)
    assert float((said - x[6:] @ full.T).abs().max()) > 0.05


def test_dm_direct_answers_as_the_retrained_ridge_regression_does_on_data_it_never_saw() -> None:
    x, y, full = ridge(slice(None))
    _, _, without = ridge(slice(6, None))
    model, request = linear(full), ex.split((x, y), forget=list(range(6)))
    stage = methods.dm_direct(damping=RIDGE / 24, iterations=30)
    done = ex.unlearn(model, request, task=ex.registry.tasks()["regression"](), method=stage)
    new = torch.randn(9, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(done.model(new), new @ without.T, rtol=1e-9, atol=1e-9)
    assert torch.equal(done.model.model.weight, model.weight), "weights stay untouched"


def test_dmm_reaches_the_retrained_ridge_regression() -> None:
    x, y, full = ridge(slice(None))
    _, _, without = ridge(slice(6, None))
    model, request = linear(full), ex.split((x, y), forget=list(range(6)))
    stage = methods.dmm(damping=RIDGE / 24, iterations=30, lr=3e-3, steps=300, batch=100)
    done = ex.unlearn(model, request, task=ex.registry.tasks()["regression"](), method=stage)
    assert float((full - without).abs().max()) > 0.05
    torch.testing.assert_close(done.model.weight.detach(), without, rtol=1e-4, atol=1e-4)


def logistic(x: Tensor, y: Tensor, weight: Tensor, classes: int) -> nn.Module:
    """Softmax regression at the optimum of sum of weight NLL + RIDGE |W|^2 / 2: Newton's method to the last digit."""
    theta = torch.zeros(classes * x.shape[1], dtype=torch.float64)

    def objective(flat: Tensor) -> Tensor:
        losses = F.cross_entropy(x @ flat.reshape(classes, -1).T, y, reduction="none")
        return (weight * losses).sum() + RIDGE / 2 * flat.square().sum()

    for _ in range(30):
        slope = torch.func.grad(objective)(theta)
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), slope)
    assert float(slope.abs().max()) < 1e-12
    return linear(theta.reshape(classes, -1)).eval()


@pytest.mark.parametrize(("how", "classes"), [("influence", 2), ("influence", 3), ("trak", 2)])
def test_the_effect_of_a_little_of_some_examples_on_a_logistic_regression_is_that_of_retraining(
    how: str, classes: int
) -> None:
    """A thousandth of the weight of three examples is forgotten: both are then the derivative, to the order of that.

    Of two classes the log-odds' features give the Hessian, in the weighted form; of more they are another matrix."""
    _, request = small()
    x, y = (torch.cat(parts) for parts in zip(*(whole(request.data(n)) for n in ("forget", "retain")), strict=True))
    x, y = x[::2, :4], y[::2].clamp(max=classes - 1)  # the last input is always 0
    part, little = torch.zeros(50, dtype=torch.float64), torch.tensor([0, 9, 33])
    part[little] = 1e-3
    model, without = logistic(x, y, torch.ones_like(part), classes), logistic(x, y, 1 - part, classes)
    forget = ex.as_data((x[little], y[little])).annotate("weight", part[little])
    retain = ex.as_data((x, y)).annotate("weight", 1 - part)
    case = case_of(model, ex.Request(forget, retain), ex.Classification(classes))
    ridge = RIDGE / float((1 - part).sum())
    step = (Influence(ridge, iterations=60) if how == "influence" else TRAK(None, RIDGE / 50)).step(case, 16, Key(0))
    true = (without(x) - model(x)).detach()
    found = predicted(case, retain, step, 1.0, 16, Key(0)) - model(x).detach()
    assert float((found - true).norm() / true.norm()) < 2e-3


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[b, outputs, parameters], one backward pass at a time."""
    values = model(x).flatten()
    grads = (torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in values)
    rows = [torch.cat([g.flatten() for g in row]) for row in grads]
    return torch.stack(rows).reshape(len(x), -1, rows[0].numel())


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


def test_gauss_newton_by_whole_jacobians_and_the_step_by_its_inverse() -> None:
    model, request = small()
    model = copy.deepcopy(model)
    x, _ = whole(request.data("retain"))
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    request = replace(request, retain=request.data("retain").annotate("weight", weight))
    case = case_of(model, request, ex.Classification(3))
    jac, p = jacobian(model, x), model(x).detach().softmax(1)
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("n,nip,nij,njq->pq", weight / weight.sum(), jac, curved, jac)
    vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sizes = [q.numel() for q in model.parameters()]
    parts = zip(model.named_parameters(), vector.split(sizes), strict=True)
    named = {name: v.reshape(q.shape) for (name, q), v in parts}
    found = gauss_newton(case, request.data("retain"), named, 7, Key(0))
    torch.testing.assert_close(flat(found), matrix @ vector, rtol=1e-10, atol=1e-12)
    forget_x, forget_y = whole(request.data("forget"))
    loss = F.cross_entropy(model(forget_x), forget_y, reduction="sum")
    goal = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) / weight.sum()
    step = Influence(0.05, iterations=200).step(case, 64, Key(0))
    closed = torch.linalg.solve(matrix + 0.05 * torch.eye(len(matrix), dtype=torch.float64), goal)
    torch.testing.assert_close(flat(step), closed, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dimensions", [None, 6])
def test_trak_by_its_published_formula(weighted: bool, dimensions: int | None) -> None:
    """-phi(x)^T (Phi^T R Phi + ridge)^-1 Phi_f^T Q summed over the forget data, phi(x) of each logit; P by hand."""
    model, request = small()
    model = copy.deepcopy(model)
    case = case_of(model, request, ex.Classification(3))
    how = TRAK(dimensions, 0.02, weighted=weighted)
    step = how.step(case, 9, Key(3))
    projector = Projector(dict(model.named_parameters()), dimensions, Key(3).at("projector"))
    width = sum(p.numel() for p in model.parameters())
    units = torch.eye(width, dtype=torch.float64).split([p.numel() for p in model.parameters()], 1)
    named = zip(model.named_parameters(), units, strict=True)
    p_matrix = projector.down({n: u.reshape(width, *q.shape) for (n, q), u in named})
    assert p_matrix.shape == (width, dimensions or width)
    sources = [whole(request.data(name)) for name in ("forget", "retain")]
    x, y = (torch.cat(part) for part in zip(*sources, strict=True))
    said = model(x)
    true = said.softmax(1).gather(1, y[:, None])[:, 0]
    odds = torch.log(true / (1 - true))
    rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in odds]
    phi = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]) @ p_matrix
    true = true.detach()
    r = true * (1 - true) if weighted else torch.ones_like(true)
    kernel = phi.T @ (r[:, None] * phi) + 100 * 0.02 * torch.eye(p_matrix.shape[1], dtype=torch.float64)
    effects = torch.linalg.solve(kernel, (phi * (1 - true)[:, None])[:20].T)  # [k, forget]
    logits = jacobian(model, x[20:]) @ p_matrix
    expected = said[20:].detach() - (logits @ effects).sum(2)  # f - sum over i of w_i
    found = predicted(case, request.data("retain"), step, 1.0, 32, Key(0))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert float((found - said[20:].detach()).abs().max()) > 1e-3


def test_trak_of_a_least_squares_model_is_its_newton_step() -> None:
    """Unit scale: Phi^T Phi is then the Hessian of all data, and the step closed."""
    x, y, full = ridge(slice(None))
    model, request = linear(full), ex.split((x, y), forget=list(range(6)))
    step = TRAK(None, RIDGE / 30).step(case_of(model, request, ex.registry.tasks()["regression"]()), 8, Key(0))
    gradient = (x[:6] @ full.T - y[:6]).T @ x[:6]
    hessian = x.T @ x + RIDGE * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(step["weight"], torch.linalg.solve(hessian, gradient.T).T, rtol=1e-9, atol=1e-10)


def test_the_projection_keeps_inner_products_in_expectation_and_is_the_same_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    made = [Projector({"w": a[0]}, 50, Key(seed)) for seed in range(200)]
    found = torch.stack([(p.down({"w": a}) * p.down({"w": b})).sum() for p in made])
    assert abs(float(found.mean() - (a * b).sum())) < 4 * float(found.std()) / 200**0.5
    values = torch.randn(50, generator=generator, dtype=torch.float64)
    down = made[0].down({"w": a})[0]
    assert float(down @ values) == pytest.approx(float((made[0].up(values)["w"] * a[0]).sum()), rel=1e-10)
    monkeypatch.setattr("expunge.random_projection.KEPT", 0)
    drawn_again = Projector({"w": a[0]}, 50, Key(0))
    assert torch.equal(drawn_again.down({"w": a})[0], down)
    assert torch.equal(drawn_again.up(values)["w"], made[0].up(values)["w"])


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_eigenvalues() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64))
    goal = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)}
    calls: list[int] = []

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        return {"w": matrix @ v["w"]}

    found = conjugate_gradients(product, goal, 50)
    torch.testing.assert_close(found["w"], goal["w"] / matrix.diagonal())
    assert len(calls) == 3
    zero = conjugate_gradients(product, {"w": torch.zeros(5, dtype=torch.float64)}, 50)
    assert not bool(zero["w"].any())


def test_along_is_the_finite_difference_and_leaves_the_model_as_it_was() -> None:
    """The odd model: two inputs, a dict output, a frozen bias, a tied weight, a layer that is called twice."""
    found = odd()
    model = found.model.double()
    inputs = {n: v.double() for n, v in found.request.data("retain").batch(torch.arange(6))["x"].items()}
    owned = {id(p) for module in model.modules() for p in module._parameters.values() if p is not None}
    generator = torch.Generator().manual_seed(0)
    step = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    said, change = along(model, step, lambda net: net(**inputs))
    assert {id(p) for m in model.modules() for p in m._parameters.values() if p is not None} == owned
    assert torch.equal(said["logits"], model(**inputs)["logits"])
    sides = []
    for sign in (1e-5, -1e-5):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in step.items():
                moved.get_parameter(name).add_(sign * value)
        sides.append(moved(**inputs)["logits"])
    torch.testing.assert_close(change["logits"], (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-7)


class Stubborn(torch.autograd.Function):
    """An operation that has no forward derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class OfStubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, bias=False).double()
        with torch.no_grad():
            self.layer.weight.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return Stubborn.apply(self.layer(x))


def test_a_model_without_a_forward_derivative_is_refused_in_a_sentence() -> None:
    _, request = small()
    with torch.random.fork_rng([]):
        model = OfStubborn()
    with pytest.raises(RunFailed, match="without a forward derivative"):
        ex.unlearn(model, request, task=ex.Classification(3), method=methods.dm_direct())


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_dm_direct_is_saved_loaded_copied_and_leaves_the_weights(name: str, tmp_path: Any) -> None:
    found = odd() if name == "odd" else tiny("classification")
    done = ex.unlearn(found.model, found.request, task=found.task, method=methods.dm_direct(), out=tmp_path / "run")
    assert isinstance(done.model, LinearisedModel)
    for key, value in found.model.state_dict().items():
        assert torch.equal(done.model.model.state_dict()[key], value)
    batch = found.test.batch(torch.arange(12))
    with torch.no_grad():
        told = found.task.outputs(done.model, batch)
        assert float((told - found.task.outputs(found.model, batch)).abs().max()) > 0.1
        ex.save_weights(done.model, tmp_path / "weights.safetensors")
        again = load_linearised(found.make(3).eval(), tmp_path / "weights.safetensors")
        assert torch.equal(found.task.outputs(again, batch), told)
        assert torch.equal(found.task.outputs(copy.deepcopy(done.model), batch), told)
        finished = ex.unlearn(
            found.model, found.request, task=found.task, method=methods.dm_direct(), out=tmp_path / "run"
        )
        assert torch.equal(found.task.outputs(finished.model, batch), told)
    ex.save_weights(found.model, tmp_path / "plain.safetensors")
    with pytest.raises(Refused, match="no linearised model"):
        load_linearised(found.make(3), tmp_path / "plain.safetensors")


def test_a_prediction_of_a_prediction_is_refused() -> None:
    found = tiny("classification")
    once = ex.unlearn(found.model, found.request, task=found.task, method=methods.dm_direct()).model
    with pytest.raises(Refused, match="already a prediction"):
        ex.unlearn(once, found.request, task=found.task, method=methods.dm_direct())


def test_matching_by_hand_one_step_and_the_request_comes_back() -> None:
    """Both data whole in one batch: Adam's first step on 0.3 and 0.7 of the two means."""
    model, request = small()
    how, task = Influence(0.2, iterations=8), ex.Classification(3)
    stage = methods.dmm(damping=0.2, iterations=8, share=0.3, multiple=2, lr=0.01, steps=1, batch=1000, scale=0.5)
    start = Case(copy.deepcopy(model), request, task, ex.Scope.all(model), rng=Key(4))
    done = stage(start)
    assert done.request is request
    key, _ = Key(4).take()
    case = case_of(copy.deepcopy(model), request, task)
    step = how.step(case, 64, key)
    kept = sampled(request.data("retain"), 40, key.at("kept"))
    assert len(kept) == 40
    net = copy.deepcopy(model)
    loss = torch.zeros((), dtype=torch.float64)
    for data, share in ((request.data("forget"), 0.3), (kept, 0.7)):
        wanted = predicted(case, data, step, 0.5, 64, key)
        loss = loss + share * (net(whole(data)[0]) - wanted).square().mean()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    loss.backward()
    optimizer.step()
    for (name, p), q in zip(done.model.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=name)


def test_bad_parts_and_data_are_refused() -> None:
    for bad in (
        lambda: Influence(damping=0.0),
        lambda: Influence(iterations=0),
        lambda: TRAK(dimensions=0),
        lambda: TRAK(samples=0),
    ):
        with pytest.raises(Refused, match="must be"):
            bad()
    model, request = small()
    case = case_of(model, request, ex.Classification(3))
    batch = request.data("retain").batch(torch.arange(4))
    with pytest.raises(Refused, match="column 'predicted'"):
        MatchOutputs()(case, batch)
    with pytest.raises(Refused, match="shape"):
        MatchOutputs()(case, {**batch, "predicted": torch.zeros(4)})
    language = tiny("causal_lm")
    for how in (Influence(), TRAK(8)):
        with pytest.raises(Refused, match="classification or regression"):
            how.step(case_of(language.model, language.request, language.task), 8, Key(0))
