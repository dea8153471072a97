"""GDR-GMA (ACM MM 2024) beside the authors' code (RUIYUN-ML/GDR-GMA), and what its two projections leave.

The numbers were computed by ``rectify_graident``, ``MemoryBank`` and ``unlearn_model`` of that code in float64; of
``MemoryBank.mean_grads`` the first gradient was copied before others are added to it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import RunFailed
from expunge.rectify import Rectified
from tests.golden.by_hand import ALL
from tests.golden.forgetting import accuracy, digits

torch.set_num_threads(1)
SHAPES = {"a": (3, 4), "b": (5,), "c": (3,)}
UPDATES = [
    (4.158370092938218, 4.245222750438038),
    (5.014601208641771, -0.17993250556512974),
    (4.165837167872747, 1.543772838027695),
    (3.08718834443345, 1.3012471773294276),
    (3.764348844990817, 0.025532315800028238),
    (2.479940547252911, 1.6389535736904257),
    (2.8511210896417882, -1.716979998204037),
    (3.6808375909844178, 2.8046715577581924),
    (4.112785969457129, 1.6276108329289696),
]
"""Length of the whole update, and sum of the last tensor's, in nine steps of drawn gradients with a bank of three."""
TRAINED = [3.73133929045871, 1.923789414277084, 5.548079801830491, 1.8852091820655732]
"""Norms of the weights after five epochs."""


class Given:
    """An oracle that answers with given gradients and one given loss."""

    def __init__(self, retain: dict[str, Tensor], forget: dict[str, Tensor], loss: float):
        self.given, self.losses, self.report = {"retain": retain, "forget": forget}, {"retain": loss}, {}
        self.roles = {"forget": None, "retain": None}

    def grad(self, weights: dict[str, float]) -> dict[str, Tensor]:
        (role,) = weights
        return {name: value.clone() for name, value in self.given[role].items()}


def drawn(generator: torch.Generator) -> dict[str, Tensor]:
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def updates(combiner: Rectified) -> list[tuple[dict[str, Tensor], Given]]:
    generator, state, found = torch.Generator().manual_seed(21), combiner.init(), []
    for _ in range(9):
        retain, forget = drawn(generator), drawn(generator)
        loss = float(0.02 + 0.02 * torch.randn((), generator=generator, dtype=torch.float64))
        oracle: Any = Given(retain, forget, loss)
        grads, state = combiner.combine(oracle, state)
        assert len(state["stored"]) <= max(1, combiner.bank)
        found.append((grads, oracle))
    return found


def test_updates_are_those_of_the_authors_code() -> None:
    found = updates(Rectified(bank=3, projection="released"))
    for (grads, _), (length, last) in zip(found, UPDATES, strict=True):
        flat = torch.cat([grads[name].flatten() for name in SHAPES])
        assert float(flat.norm()) == pytest.approx(length, rel=1e-10)
        assert float(grads["c"].sum()) == pytest.approx(last, rel=1e-10)


def test_without_the_bank_the_last_tensor_differs_from_the_second_pass_on() -> None:
    kept, without = (updates(Rectified(bank=size, projection="released")) for size in (3, 0))
    same = [torch.equal(a["c"], b["c"]) for (a, _), (b, _) in zip(kept, without, strict=True)]
    assert all(same[:3])
    assert same.count(False) == 4
    assert all(torch.equal(a["a"], b["a"]) for (a, _), (b, _) in zip(kept, without, strict=True))


def test_projections_of_the_originals_harm_neither_tensor() -> None:
    """Whatever the weight, the update of each tensor has no negative part along either of its gradients."""
    for gamma, epsilon in ((0.0, 0.0), (1e9, 1e9), (1e9, -1e9)):
        for grads, oracle in updates(Rectified(gamma, epsilon)):
            for name in SHAPES:
                for role in ("retain", "forget"):
                    if float((oracle.given["retain"][name] * oracle.given["forget"][name]).sum()) < 0:
                        assert float((grads[name] * oracle.given[role][name]).sum()) > -1e-12


def test_the_weight_switches_at_epsilon_and_does_not_overflow() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = drawn(generator), drawn(generator)
    for loss, weight in (
        (0.02, 0.5),
        (0.0, 1 / (1 + math.exp(-2))),
        (1e6, 0.0),
        (-1e6, 1.0),
        (0.03, 0.26894142136999512),
    ):
        oracle: Any = Given(*gradients, loss)
        Rectified().combine(oracle, Rectified().init())
        assert oracle.report["weight"] == pytest.approx(weight, rel=1e-12)


def test_training_is_that_of_the_authors_code() -> None:
    """Five epochs of one batch each, AdamW, gamma 1 and epsilon 2, at which this network stands in between."""
    generator = torch.Generator().manual_seed(22)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    request = ex.Request(
        forget=ex.as_data((x[:10], torch.arange(30)[:10] % 3)),
        retain=ex.as_data((x[10:], torch.arange(30)[10:] % 3), ids=list(range(10, 30))),
    )
    stage = methods.gdr_gma(gamma=1.0, epsilon=2.0, projection="released", steps=5, batch=ALL)
    done = ex.unlearn(net, request, task=ex.Classification(3), method=stage)
    assert [float(p.detach().norm()) for p in done.model.parameters()] == pytest.approx(TRAINED, rel=1e-9)


def test_a_role_to_protect_is_needed() -> None:
    with pytest.raises(RunFailed, match="retain"):
        Rectified().combine(SimpleNamespace(roles={"forget": None}), Rectified().init())  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_rest_stays(label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="gdr_gma")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
