"""Forget vectors (arXiv:2412.16780) beside numbers of the authors' loops, and what comes back of a run.

``VECTOR`` and ``COEFFICIENTS`` were computed by the loop bodies of main_delta_2loss.py and main_delta_2loss_transfer2.py
of Changchangsun/Forget-Vector @ 8be664c on the network and the one batch of ``images``, in float64: three epochs of one
step, lr 0.2, momentum 0.9, decay 5e-4, a factor of 0.9 per epoch, tau 1, alpha 1, beta 5, lambda 1, from 0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Case, Refused
from expunge.forget_vectors import bank
from expunge.objectives import NLL, Margin
from expunge.wrap import InputVector
from tests.fixtures import tiny
from tests.golden.by_hand import ALL, whole

torch.set_num_threads(1)
TASK = ex.Classification(3)
MARGINS = [-1.0, 0.8187361517583243, 0.03971518976815647, -1.0, 3.6929275403016417]
LOSSES = [
    0.557287053905564,
    0.4873586807578706,
    1.2019936553744457,
    0.21292901594462046,
    0.6987625558035232,
    0.8074604912003659,
    0.08136223544598702,
]
VECTOR = [
    -0.627533328161795,
    0.9725017502265269,
    -1.9789685697086268,
    0.3507244314331913,
    0.02476086888628658,
    0.25968213280040586,
    0.17982118766317123,
    -0.2557922564824596,
]
COEFFICIENTS = [1.840832658153508, -0.08452470133385172]
SETTINGS: dict[str, Any] = {"steps": 3, "end": 0.9**3, "batch": ALL}


def images() -> tuple[nn.Module, ex.Request, Tensor]:
    """A small network in float64, twelve inputs of which the class 0 goes, and two vectors."""
    generator = torch.Generator().manual_seed(23)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(normal(*p.shape))
    x = normal(12, 2, 2, 2)
    y = net(x).argmax(1)
    y[::4] = (y[::4] + 1) % 3
    return net.eval(), ex.split((x, y), forget=torch.nonzero(y == 0).flatten().tolist()), 0.3 * normal(2, 2, 2, 2)


def test_losses_per_example_are_those_of_the_authors() -> None:
    net, request, _ = images()
    case = Case(net, request, TASK, ex.Scope.all(net))
    forget, retain = (request.data(name).batch(torch.arange(len(request.data(name)))) for name in ("forget", "retain"))
    assert Margin(1.0)(case, forget).tolist() == pytest.approx(MARGINS, rel=1e-12)
    assert NLL()(case, retain).tolist() == pytest.approx(LOSSES, rel=1e-12)


def test_three_steps_on_a_vector_are_those_of_the_authors() -> None:
    net, request, _ = images()
    done = ex.unlearn(net, request, task=TASK, method=methods.forget_vector(**SETTINGS))
    assert done.model.vector.flatten().tolist() == pytest.approx(VECTOR, rel=1e-10)
    for name, value in net.state_dict().items():
        assert torch.equal(done.model.model.state_dict()[name], value)


def test_three_steps_on_coefficients_are_those_of_the_authors() -> None:
    net, request, vectors = images()
    given = replace(request, extra={"vectors": ex.as_data((vectors, torch.tensor([1, 2])))})
    done = ex.unlearn(net, given, task=TASK, method=methods.forget_vector_arithmetic(**SETTINGS))
    expected = torch.tensordot(torch.tensor(COEFFICIENTS, dtype=torch.float64), vectors, 1)
    torch.testing.assert_close(done.model.vector.detach(), expected, rtol=1e-10, atol=1e-12)
    rows = 3 * len(whole(request.forget)[0]) + 3 * len(whole(request.retain)[0])
    assert [done.record["cost"][kind] for kind in ("forward", "backward")] == [rows, rows]
    assert any("coefficients" in note for note in done.notes)


def test_vectors_of_other_classes_forget_an_unseen_one(tmp_path: Path) -> None:
    """Learnt one by one, handed over as data, or learnt on the way: class 3 was in none of them."""
    found = tiny("classification")
    x, y = whole(found.request.retain)
    made = []
    for kind in (0, 1):
        rows = torch.nonzero(y == kind).flatten().tolist()
        request = ex.split((x, y), forget=rows)
        method = methods.forget_vector(steps=40, batch=16)
        made.append(ex.unlearn(found.model, request, task=found.task, method=method).model)
    request = replace(found.request, extra={"vectors": bank(made, [0, 1], found.task)})
    method = methods.forget_vector_arithmetic(steps=40)
    done = ex.unlearn(found.model, request, task=found.task, method=method, out=tmp_path / "run")
    again = ex.unlearn(found.model, request, task=found.task, method=method, out=tmp_path / "run")
    assert again.case is None
    assert torch.equal(again.model.vector, done.model.vector)
    spanned = torch.stack([model.vector.detach().flatten() for model in made])
    flat = done.model.vector.detach().flatten()
    found_again = spanned.T @ torch.linalg.lstsq(spanned.T, flat[:, None]).solution
    torch.testing.assert_close(found_again.flatten(), flat, rtol=1e-4, atol=1e-5)
    forget, label = whole(found.request.forget)
    before, after = (F.cross_entropy(m(forget), label).item() for m in (found.model, done.model))
    assert after > before + 0.1


def test_the_declared_price_and_the_dose() -> None:
    """Which the contract on the kind of weights keeps the contract on cost from seeing."""
    found = tiny("classification")
    for name in ("forget_vector", "forget_vector_arithmetic"):
        spec = ex.registry.methods()[name]
        settings = {key: parameter.default for key, parameter in spec.settings().items()} | {"steps": 2}
        done = ex.unlearn(found.model, found.request, task=found.task, method=spec.build(**settings))
        declared = spec.rows(settings, len(found.request.forget), len(found.request.retain))
        assert {kind: done.record["cost"][kind] for kind in declared} == declared
        assert isinstance(done.model, InputVector)


def test_what_cannot_be_combined_is_refused() -> None:
    net, request, _ = images()
    with pytest.raises(Refused, match="input vector"):
        bank([net], [0], TASK)
    x, y = whole(request.retain)
    one = ex.split((torch.cat([x, x]), torch.cat([y * 0, y * 0 + 1])), forget=list(range(len(x))))
    with pytest.raises(Refused, match="two"):
        ex.unlearn(net, one, task=TASK, method=methods.forget_vector_arithmetic(**SETTINGS))
