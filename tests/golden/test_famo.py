"""FAMO (arXiv:2306.03792) beside the authors' class, and how its weights move.

The numbers were computed by ``famo.FAMO`` of Cranial-XIX/FAMO in float64, eight steps of SGD on the network below.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import expunge as ex
from expunge import Descend, RunFailed, methods
from expunge.balance import FAMO
from expunge.combine import State
from expunge.core import Refused
from expunge.objectives import NLL, Ascent
from expunge.optim import SGD
from expunge.oracle import Oracle
from tests.golden.by_hand import ALL, thirty
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
WEIGHT = 0.1931611598195333
NORMS = [5.560260707189887, 1.7709739678924106, 1.2848434570578957, 0.2325679175465574]


def test_steps_are_those_of_the_authors_code() -> None:
    net, request = thirty()
    done = ex.unlearn(net, request, task=ex.Classification(2), method=methods.famo(lr=0.3, steps=8, batch=ALL))
    assert [float(p.detach().norm()) for p in done.model.parameters()] == pytest.approx(NORMS, rel=1e-9)
    assert done.record["cost"]["forward"] == 8 * 60
    assert done.record["cost"]["backward"] == 8 * 30


def test_the_weights_are_those_of_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forget loss fell by less, so that it came to weigh more."""
    net, request = thirty()
    states: list[State] = []
    settle = FAMO.settle

    def kept(self: FAMO, after: Oracle, state: State) -> State:
        states.append(settle(self, after, state))
        return states[-1]

    monkeypatch.setattr(FAMO, "settle", kept)
    ex.unlearn(net, request, task=ex.Classification(2), method=methods.famo(lr=0.3, steps=8, batch=ALL))
    assert states[-1]["w"] == pytest.approx({"forget": WEIGHT, "retain": -WEIGHT}, rel=1e-9)


def test_the_update_is_a_convex_combination_that_favours_the_smaller_loss() -> None:
    """At equal z: 1 / L_k over their sum; the recorded shares say so."""
    net, request = thirty()
    (x_f, y_f), (x_r, y_r) = ((b["x"], b["y"]) for d in (request.forget, request.retain) for b in d.batches(99))
    losses = [float(F.cross_entropy(net(x_f), 1 - y_f).detach()), float(F.cross_entropy(net(x_r), y_r).detach())]
    done = ex.unlearn(net, request, task=ex.Classification(2), method=methods.famo(steps=1, batch=ALL))
    row = done.record["history"][0]
    inverse = [1 / loss for loss in losses]
    assert row["share/forget"] == pytest.approx(inverse[0] / sum(inverse), rel=1e-6)
    assert row["share/forget"] + row["share/retain"] == pytest.approx(1.0, rel=1e-12)


def test_a_loss_below_its_floor_is_told_of() -> None:
    model, request = small()
    with pytest.raises(RunFailed, match="'forget' above its floor 0"):
        ex.unlearn(model, request, task=ex.Classification(3), method=methods.famo(forget=Ascent()))
    stage = Descend(Ascent(), NLL(), combine=FAMO({"forget": -50.0}), optimizer=SGD(0.01), steps=2)
    ex.unlearn(model, request, task=ex.Classification(3), method=stage)
    for bad in ({"lr": 0.0}, {"decay": -1.0}):
        with pytest.raises(Refused, match=next(iter(bad))):
            FAMO(**bad)


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_rest_stays(label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="famo")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
