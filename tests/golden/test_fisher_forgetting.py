"""Fisher forgetting: variances beside a released code, the expectation by hand, its noise, and the traps of that code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as ex
from expunge import methods
from expunge.core import Case, Refused
from expunge.curvature import expected_fisher
from expunge.overwriting import Spread
from expunge.scope import Scope
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
RELEASED = {
    "0.weight": (0.5437061865809525, 55.761146150747244),
    "0.bias": (0.4449403093339568, 89.94288414126537),
    "3.weight": (1.7369707716078029, 6565.587172247553),
    "3.bias": (0.49787401829832517, 10448.466809970669),
    "5.weight": (1.2437003382985405, 247.91560798767517),
    "5.bias": (0.4322730705457354, 233.43408981466658),
}
"""Sums of the Fisher information and of the variances at alpha 1 over each tensor, by the functions ``hessian`` and
``get_mean_var`` in forget_random_strategies.py of if-loops/selective-synaptic-dampening, which take examples one by one;
no tensor was treated as a last layer."""


def setting() -> tuple[nn.Module, ex.Data]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)[:, None]
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net, ex.as_data((x, torch.arange(9) % 3))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_information_and_variances_are_those_of_a_released_code(chunk: int) -> None:
    net, data = setting()
    case = Case(net, ex.Request(retain=data), ex.Classification(3), Scope.all(net))
    fisher = expected_fisher(case, data, chunk)
    for name, (information, spread) in RELEASED.items():
        assert float(fisher[name].sum()) == pytest.approx(information, rel=1e-9)
        found = Spread(1e3, True, 10.0)(fisher[name])
        assert found.shape == fisher[name].shape
        assert float(found.sum()) == pytest.approx(spread, rel=1e-9)


def test_the_information_of_a_regression_is_that_of_its_gaussian() -> None:
    """Linear: d f_k / d W_kj = x_j, so F = mean of x_j^2 / scale^2 in every row, and 1 / scale^2 for the bias."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 2, generator=generator)
    net = nn.Linear(4, 2)
    data = ex.as_data((x, y))
    case = Case(net, ex.Request(retain=data), ex.Regression(scale=0.5), Scope.all(net))
    fisher = expected_fisher(case, data)
    torch.testing.assert_close(fisher["weight"], (x.square().mean(0) / 0.25).expand(2, 4))
    torch.testing.assert_close(fisher["bias"], torch.full((2,), 4.0))


def test_the_noise_is_standard_normal_in_units_of_its_deviation() -> None:
    """Without reset, whole and over many weights: mean 0, variance 1, and another one for another seed."""
    generator = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 3))
    request = ex.split((torch.randn(40, 20, generator=generator), torch.arange(40) % 3), forget=list(range(10)))
    case = Case(net, request, ex.Classification(3), Scope.all(net))
    fisher = expected_fisher(case, request.data("retain"))
    stage = methods.fisher_forgetting(alpha=1e-9, reset=False, rows=False, rise=1.0)
    first, second = (ex.unlearn(net, request, task=ex.Classification(3), method=stage, seed=s).model for s in (0, 1))
    spread = (1e-9 * Spread(1e3, False, 10.0)(fisher["0.weight"])).sqrt()
    draws = [(m[0].weight - net[0].weight).detach() / spread for m in (first, second)]
    for draw in draws:
        assert abs(float(draw.mean())) < 4 / 6000**0.5
        assert float(draw.var()) == pytest.approx(1.0, abs=4 * (2 / 6000) ** 0.5)
    assert abs(float((draws[0] * draws[1]).mean())) < 4 / 6000**0.5


def test_only_the_row_of_a_wholly_forgotten_class_is_drawn_anew() -> None:
    model, request = digits(8)
    stage = methods.fisher_forgetting(alpha=1e-30, rise=1.0)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
    moved = (done.model[2].weight - model[2].weight).detach().abs().amax(1)
    assert torch.nonzero(moved > 1e-9).flatten().tolist() == [8]
    assert float(done.model[2].weight[8].detach().std()) == pytest.approx(1e-2, rel=0.3)
    model, request = small()  # 20 of a class that is kept otherwise
    done = ex.unlearn(model, request, task=ex.Classification(3), method=stage)
    assert float((done.model[2].weight - model[2].weight).detach().abs().max()) < 1e-9


def test_the_last_layer_may_be_treated_as_in_the_released_code() -> None:
    """v at most 100 there, times 10, biases too, and the new rows' variance times 10; the same draws otherwise."""
    model, request = digits(8)
    fisher = expected_fisher(Case(model, request, ex.Classification(10), Scope.all(model)), request.data("retain"))
    done = []
    for changes in ({}, {"head": 10.0, "head_cap": 100.0}):
        stage = methods.fisher_forgetting(alpha=1e-6, rise=1.0, **changes)
        done.append(ex.unlearn(model, request, task=ex.Classification(10), method=stage).model.state_dict())
    start, kept = model.state_dict(), torch.arange(10) != 8
    torch.testing.assert_close(done[0]["0.weight"], done[1]["0.weight"], rtol=0, atol=0)
    for name, plain in (("2.weight", 1.0), ("2.bias", 10.0)):
        was = Spread(1e3, True, 1.0)(fisher[name]) * plain
        now = (1.0 / (fisher[name] + 1e-8)).clamp(max=1e3).clamp(max=1e2) * 10
        now = now.mean(1, keepdim=True).expand_as(now) if now.ndim > 1 else now
        moved = [one[name] - start[name] for one in done]
        torch.testing.assert_close(moved[1][kept], (moved[0] * (now / was).sqrt())[kept], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(done[1][name][8], done[0][name][8] * 10**0.5, rtol=1e-5, atol=1e-7)


def test_a_model_without_rows_of_classes_is_told_so_and_can_do_without() -> None:
    model, request = digits(8)
    net = nn.Sequential(*model, nn.LogSoftmax(1))
    with pytest.raises(Refused, match="last layer is linear"):
        ex.unlearn(net, request, task=ex.Classification(10), method="fisher_forgetting")
    stage = methods.fisher_forgetting(reset=False)
    ex.unlearn(net, request, task=ex.Classification(10), method=stage)


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_others_are_kept(label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="fisher_forgetting")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.5
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
