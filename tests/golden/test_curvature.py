"""Fisher information, mean gradients, inverse Fisher products: against loops, dense inverses, literal recursions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import curvature
from expunge.core import Case, Data, Refused, Request, RunFailed
from expunge.curvature import fisher, mean_gradient, released, woodfisher_exact
from expunge.data.sources import as_data
from expunge.objectives import NLL
from expunge.scope import Scope
from expunge.tasks.classification import Classification

torch.set_num_threads(1)
ROWS = 23


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(ROWS, 3, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (ROWS,), generator=generator),
    )


def setting(scope: Scope | None = None) -> tuple[Case, Data]:
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
        model[1].running_mean.copy_(torch.tensor([0.1, 0.2, -0.3, 0.0]))
    data = as_data(inputs())
    return Case(model.train(), Request(forget=data), Classification(3), scope or Scope.all(model)), data


def singles(case: Case) -> Tensor:
    """[n, P]: each example differentiated on its own with torch alone, in eval mode."""
    model = case.model
    model.eval()
    rows = []
    for x, y in zip(*inputs(), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    model.train()
    return torch.stack(rows)


def flat(grads: dict[str, Tensor], case: Case) -> Tensor:
    return torch.cat([grads[name].flatten() for name, _ in case.model.named_parameters()])


def random_vector(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in case.model.named_parameters()
    }


def test_fisher_is_the_mean_of_squared_single_example_gradients() -> None:
    case, data = setting()
    found = flat(fisher(case, data, NLL()), case)
    torch.testing.assert_close(found, singles(case).square().mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_importance_does_not_depend_on_batch_size(chunk: int) -> None:
    case, data = setting()
    found = flat(fisher(case, data, NLL(), chunk), case)
    torch.testing.assert_close(found, singles(case).square().mean(0), rtol=1e-12, atol=0)
    of_batches = torch.stack([part.mean(0).square() for part in singles(case).split(8)]).mean(0)
    assert float(of_batches.sum() / found.sum()) < 0.5  # the trap: gradients of batches, squared, are another quantity


def test_memory_limit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case, data = setting()
    whole = flat(fisher(case, data, NLL()), case)
    monkeypatch.setattr(curvature, "MEMORY", 1)
    torch.testing.assert_close(flat(fisher(case, data, NLL()), case), whole, rtol=1e-12, atol=0)


def test_a_weight_column_is_respected() -> None:
    case, data = setting()
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:3] = 0.0
    weighed, share, rows = data.annotate("weight", weight), weight / weight.sum(), singles(case)
    squared, mean = (flat(of(case, weighed, NLL(), 5), case) for of in (fisher, mean_gradient))
    torch.testing.assert_close(squared, share @ rows.square(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(mean, share @ rows, rtol=1e-12, atol=1e-15)
    vector, damping = random_vector(case), 0.05
    dense = damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ (share[:, None] * rows)
    found = flat(woodfisher_exact(case, weighed, NLL(), vector, damping), case)
    torch.testing.assert_close(found, torch.linalg.solve(dense, flat(vector, case)), rtol=1e-9, atol=1e-10)
    with pytest.raises(Refused, match="positive weight"):
        fisher(case, data.annotate("weight", torch.zeros(ROWS)), NLL())


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_mean_gradient_equals_the_gradient_of_the_mean(chunk: int) -> None:
    case, data = setting()
    found = flat(mean_gradient(case, data, NLL(), chunk), case)
    torch.testing.assert_close(found, singles(case).mean(0), rtol=1e-12, atol=1e-15)


def test_out_of_scope_is_zero_or_absent() -> None:
    case, data = setting()
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[1, 2] = True
    case, data = setting(Scope({"0.weight": mask}, case.scope.universe))
    found = fisher(case, data, NLL())
    assert list(found) == ["0.weight"]
    assert float(found["0.weight"][1, 2]) > 0
    assert int((found["0.weight"] != 0).sum()) == 1


def test_the_model_is_left_as_it_was() -> None:
    case, data = setting()
    before = {n: v.clone() for n, v in case.model.state_dict().items()}
    fisher(case, data, NLL())
    mean_gradient(case, data, NLL())
    assert case.model.training
    assert all(torch.equal(v, before[n]) for n, v in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())


def test_rows_are_metered() -> None:
    case, data = setting()
    fisher(case, data, NLL(), 5)
    assert (case.meter.forward, case.meter.backward) == (ROWS, ROWS)
    mean_gradient(case, data, NLL(), 5)
    assert (case.meter.forward, case.meter.backward) == (2 * ROWS, 2 * ROWS)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_woodfisher_exact_equals_dense_inverse(damping: float) -> None:
    case, data = setting()
    vector, rows = random_vector(case), singles(case)
    dense = damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / ROWS
    found = flat(woodfisher_exact(case, data, NLL(), vector, damping, 6), case)
    torch.testing.assert_close(found, torch.linalg.solve(dense, flat(vector, case)), rtol=1e-8, atol=1e-9)


def test_woodfisher_exact_equals_the_sherman_morrison_recursion() -> None:
    case, data = setting()
    vector, rows = random_vector(case), singles(case)
    inverse = torch.eye(rows.shape[1], dtype=torch.float64) / 0.1
    for g in rows:
        turned = inverse @ g
        inverse = inverse - torch.outer(turned, turned) / (ROWS + g @ turned)
    found = flat(woodfisher_exact(case, data, NLL(), vector, 0.1), case)
    torch.testing.assert_close(found, inverse @ flat(vector, case), rtol=1e-9, atol=1e-10)


def test_woodfisher_exact_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    case, data = setting()
    width = sum(p.numel() for p in case.model.parameters()) * 8
    monkeypatch.setattr(curvature, "EXACT_MEMORY", 5 * width)
    with pytest.raises(Refused, match="at most 5 examples"):
        woodfisher_exact(case, data, NLL(), random_vector(case), 0.1)
    with pytest.raises(Refused, match="damping"):
        woodfisher_exact(case, data, NLL(), random_vector(case), 0.0)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_released_equals_the_recursion_written_out(chunk: int) -> None:
    case, data = setting()
    vector, rows = random_vector(case), singles(case)
    n, o, k = ROWS - 1, rows[0], flat(vector, case)
    for g in rows[1:]:
        t = o @ g
        k = k - (k @ g) / (n + t) * o
        o = o - t / (n + t) * o
    torch.testing.assert_close(flat(released(case, data, NLL(), vector, chunk), case), k, rtol=1e-11, atol=1e-13)


def test_released_is_not_the_inverse_that_it_is_named_after() -> None:
    case, data = setting()
    vector, rows = random_vector(case), singles(case)
    found = flat(released(case, data, NLL(), vector), case)
    taken = flat(vector, case) - found
    assert float(F.cosine_similarity(taken, rows[0], dim=0).abs()) > 1 - 1e-12  # all of it along the first gradient
    dense = torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / ROWS
    exact = torch.linalg.solve(dense, flat(vector, case))
    assert float((found - exact).norm() / exact.norm()) > 0.1


class Routed(nn.Module):
    """Each example takes one of two doors, by its own value: cannot be batched, and reaches one door only."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(self.high if float(row[0]) > 0 else self.low)(row) for row in x])


def test_examples_that_reach_different_parameters() -> None:
    data = as_data(inputs())
    case = Case(Routed(), Request(forget=data), Classification(3), Scope.all(Routed()))
    found = fisher(case, data, NLL())
    x, y = inputs()
    for name, p in case.model.named_parameters():
        loss = [F.cross_entropy(case.model(a[None]), b[None]) for a, b in zip(x, y, strict=True)]
        grads = [torch.autograd.grad(value, p, allow_unused=True)[0] for value in loss]
        expected = sum((g.square() for g in grads if g is not None), start=torch.zeros_like(p)) / ROWS
        torch.testing.assert_close(found[name], expected)


def test_parts_of_an_example_that_are_no_tensors_are_no_obstacle() -> None:
    """A file name beside the picture, as many data sets yield it; still one batched pass."""
    x, y = inputs()
    data = as_data([{"x": a, "y": b, "file": f"{i}.png"} for i, (a, b) in enumerate(zip(x, y, strict=True))])
    case, plain = setting()
    torch.testing.assert_close(fisher(case, data, NLL()), fisher(case, plain, NLL()))
    assert not case.meter.notes


def test_a_scope_that_the_loss_does_not_reach_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    data = as_data(inputs())
    case = Case(Idle(), Request(forget=data), Classification(3), Scope.match(Idle(), "idle.*"))
    with pytest.raises(RunFailed, match="depends on none of the 2 parameters in scope"):
        mean_gradient(case, data, NLL())
