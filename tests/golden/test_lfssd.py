"""LFSSD (arXiv:2402.19308) beside the authors' code, and without labels.

The numbers were computed by ``ParameterPerturber`` of if-loops/selective-synaptic-dampening, its loss and its square
replaced as its README says for LFSSD, one example per batch, selection weighting 1.1 and dampening constant 0.8.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.tasks.causal_lm import IGNORED
from tests.fixtures import tiny
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(3)
DAMPENED = {
    "0.weight": (37.76693230871049, 3.8651590439812606, 7),
    "0.bias": (15.87427257969731, 2.7917126258595943, 4),
    "2.weight": (67.43939009429683, 3.703452878956669, 4),
    "2.bias": (15.423492790395368, 1.3116352321920082, 1),
}
"""Sum of the importances to the forget data, norm of the weights afterwards, and how many changed."""


def setting() -> tuple[nn.Module, ex.Request]:
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net, ex.split((x, torch.arange(12) % 3), forget=[0, 1, 2, 3])


@pytest.mark.parametrize("chunk", [1, 5])
def test_weights_are_dampened_as_by_the_authors_code(chunk: int) -> None:
    net, request = setting()
    stage = methods.lfssd(threshold=1.1, strength=0.8, rise=None, chunk=chunk)
    done = ex.unlearn(net, request, task=TASK, method=stage)
    for (name, new), old in zip(done.model.named_parameters(), net.parameters(), strict=True):
        assert float(new.detach().norm()) == pytest.approx(DAMPENED[name][1], rel=1e-10)
        assert int((new != old).sum()) == DAMPENED[name][2]
    assert done.record["history"][0]["selected"] == 16


def test_importances_are_those_of_the_authors_code() -> None:
    net, request = setting()
    x = request.data("forget").batch(torch.arange(4))["x"]
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in x:
        for name, grad in zip(total, torch.autograd.grad(net(row).square().sum(), list(net.parameters())), strict=True):
            total[name] += grad.abs() / 4
    assert {name: float(value.sum()) for name, value in total.items()} == pytest.approx(
        {name: value[0] for name, value in DAMPENED.items()}, rel=1e-10
    )


def test_without_a_guard_no_label_is_read() -> None:
    """The same bits whatever the labels are; with the guard they decide how far it goes."""
    model, request = digits(8)
    x, y = (torch.cat([batch[c] for batch in request.data("retain").batches(999)]) for c in ("x", "y"))
    forget = next(request.data("forget").batches(999))["x"]
    found: list[Tensor] = []
    for labels in (y, torch.zeros_like(y)):
        data = (torch.cat([forget, x]), torch.cat([torch.full((len(forget),), 8), labels]))
        split = ex.split(data, forget=list(range(len(forget))))
        done = ex.unlearn(model, split, task=ex.Classification(10), method=methods.lfssd(rise=None))
        found.append(torch.nn.utils.parameters_to_vector(done.model.parameters()).detach())
    assert torch.equal(*found)


def test_of_a_language_model_only_the_logits_of_answers_count() -> None:
    import importlib

    length = importlib.import_module("expunge.methods.lfssd").OutputLength()
    lm = tiny("causal_lm")
    case = ex.core.Case(lm.model, lm.request, lm.task, ex.Scope.all(lm.model))
    batch = lm.request.data("forget").batch(torch.arange(6))
    logits, labels = lm.task.logits(lm.model, batch), lm.task.labels(batch)
    for row, value in enumerate(length(case, batch).tolist()):
        places = [t for t in range(labels.shape[1]) if int(labels[row, t]) != IGNORED]
        expected = sum(float(logits[row, t].detach().square().sum()) for t in places) / len(places)
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_threshold_that_selects_nothing_says_so() -> None:
    model, request = small()
    done = ex.unlearn(model, request, task=TASK, method=methods.lfssd(threshold=5.0))
    assert any("no weight was selected" in note for note in done.notes)
    assert all(torch.equal(p, q) for p, q in zip(done.model.parameters(), model.parameters(), strict=True))


def test_a_class_is_forgotten_and_the_others_are_kept() -> None:
    model, request = digits(8)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="lfssd")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
