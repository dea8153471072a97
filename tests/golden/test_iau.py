"""IAU beside the authors' code, its training penalty too, and the known mistakes of other code.

The numbers were computed by the authors' own lines (Lolo1222/IAU: the step of ``IAU_unlearn.py``, lr 0.01, and ``train``
of ``train_model.py``, three batches of all data, Adam at 0.01, alpha 0.3) on the arrays of ``setting``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Case
from expunge.descend import Descend
from expunge.methods.iau import iau
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import methods as registered
from expunge.restriction import GradientRestriction, adam_first_step
from expunge.scope import Scope
from tests.golden.by_hand import ALL, descended, furthest, gradients, normalised, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(3)
STEPPED = {
    "0.weight": 4.694844565251036,
    "0.bias": 2.3758178040575832,
    "2.weight": 4.284923466154218,
    "2.bias": 0.7808568220689082,
}
"""Norm of each tensor after the authors' unlearning step."""
TRAINED = {
    "0.weight": 4.6749348928080625,
    "0.bias": 2.4253371531963324,
    "2.weight": 4.224957447041462,
    "2.bias": 0.7411567716572615,
}
"""Norm of each tensor after the authors' training."""


def setting() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net, x, torch.arange(12) % 3


def norms(model: nn.Module) -> dict[str, float]:
    return {name: float(p.detach().norm()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_step_is_that_of_the_authors_code(chunk: int) -> None:
    """Means over each of the two sets, whatever the batch: the authors load each as one batch."""
    net, x, y = setting()
    done = ex.unlearn(net, ex.split((x, y), forget=[0, 1, 2, 3]), task=TASK, method=iau(rise=1.0, lr=1e-2, chunk=chunk))
    assert norms(done.model) == pytest.approx(STEPPED, rel=1e-11)


def test_the_step_is_that_of_torch() -> None:
    """Not only its length: every coordinate, by torch's Adam on the difference of the two means."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    net = descended(model, [lambda m: F.cross_entropy(m(xr), yr) - F.cross_entropy(m(xf), yf)], 3e-3)
    done = ex.unlearn(model, request, task=TASK, method=iau(lr=3e-3, rise=1.0, chunk=7))
    assert furthest(done.model, net) < 1e-12


def test_training_under_the_penalty_is_that_of_the_authors_code() -> None:
    net, x, y = setting()
    case = Case(net, ex.Request(retain=ex.as_data((x, y))), TASK, Scope.all(net))
    Descend(retain=NLL(), combine=GradientRestriction(0.3), optimizer=Adam(1e-2), steps=3, batch=ALL)(case)
    assert norms(net) == pytest.approx(TRAINED, rel=1e-10)


def test_the_penalty_is_a_sum_of_norms_of_tensors() -> None:
    """The trap: not the norm of the whole gradient. By differentiating twice, on normalisation and two roles."""
    model, request = normalised()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    loss = F.cross_entropy(model(xf), yf) + F.cross_entropy(model(xr), yr)
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    wanted = gradients(model, loss + 0.2 * torch.stack([g.norm() for g in first]).sum())
    case = Case(model, request, TASK, Scope.all(model))
    seen: dict[str, Tensor] = {}

    class Heard(GradientRestriction):
        def combine(self, oracle, state):  # type: ignore[no-untyped-def]
            found = super().combine(oracle, state)
            seen.update({name: grad.clone() for name, grad in found[0].items()})
            return found

    Descend(forget=NLL(), retain=NLL(), combine=Heard(0.2), steps=1, batch=ALL, optimizer=Adam(0.0))(case)
    for name, value in wanted.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-9, atol=1e-12)
    assert case.meter.history[0]["gradient_norms"] == pytest.approx(sum(float(g.detach().norm()) for g in first))


def test_the_rate_is_the_dose_and_the_size_of_the_gradient_is_none() -> None:
    """A fresh Adam's first step: lr in every coordinate with a gradient, 0 where there is none."""
    gradient = {"w": torch.tensor([3.0, -1e-3, 0.0, 1e-8])}
    torch.testing.assert_close(
        adam_first_step(gradient, 0.5)["w"], torch.tensor([-0.5, 0.5, 0.0, -0.25]), atol=1e-4, rtol=0
    )
    assert adam_first_step({"w": gradient["w"].half()}, 0.5)["w"].dtype == torch.float32
    model, request = small()
    done = ex.unlearn(model, request, task=TASK, method=iau(lr=0.02, rise=1.0))
    moved = torch.cat(
        [(p - q).detach().abs().flatten() for p, q in zip(done.model.parameters(), model.parameters(), strict=True)]
    )
    live = moved[moved > 0]
    assert float(live.min()) > 0.0199
    assert float(live.max()) < 0.020001
    assert torch.equal(done.model[0].weight[:, -1], model[0].weight[:, -1])  # an input that is always 0


def test_the_guard_shortens_the_step() -> None:
    model, request = digits(8)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=iau(lr=1.0))
    assert done.record["history"][0]["lr"] < 1.0
    assert any("lr was lowered" in note for note in done.notes)
    with pytest.raises(ex.Refused, match="alpha"):
        GradientRestriction(-1.0)


def test_a_class_is_forgotten_and_the_others_are_kept() -> None:
    model, request = digits(8)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="iau")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.5
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
    assert registered()["iau"].dose == "lr"
