"""Gradient ascent against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

import expunge as ex
from expunge import optim
from expunge.descend import Descend
from expunge.methods.gradient_ascent import gradient_ascent
from expunge.objectives import Ascent
from tests.golden.by_hand import ALL, descended, furthest, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


def test_golden_steps() -> None:
    model, request = small()
    x, y = whole(request.forget)
    expected = descended(model, [lambda net: -F.cross_entropy(net(x), y)] * 4, 1e-3)
    done = ex.unlearn(model, request, task=TASK, method=gradient_ascent(lr=1e-3, steps=4, batch=ALL))
    assert furthest(expected, model) > 1e-3
    assert furthest(done.model, expected) < 1e-12


def test_golden_steps_of_the_published_optimizer() -> None:
    model, request = small()
    x, y = whole(request.forget)
    net = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        optimizer.zero_grad()
        (-F.cross_entropy(net(x), y)).backward()
        optimizer.step()
    sgd = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    done = ex.unlearn(model, request, task=TASK, method=gradient_ascent(**sgd, steps=4, batch=ALL, rise=None))
    assert furthest(net, model) > 1e-3
    assert furthest(done.model, net) < 1e-12


def test_needs_no_retain_data_and_says_that_nothing_watched() -> None:
    model, request = small()
    done = ex.unlearn(model, ex.Request(forget=request.forget), task=TASK, method=gradient_ascent(steps=2))
    assert any("nothing could watch" in note for note in done.notes)
    assert done.record["cost"]["checks"] == 0
    assert furthest(done.model, model) > 0


def test_the_learning_rate_is_the_stopping_rule_so_the_last_harmless_state_comes_back() -> None:
    """Far too long a run: by itself it destroys the model, with the guard the retain loss is within its bound."""
    model, request = small()
    x, y = whole(request.retain)
    loss = {}
    for name, method in {
        "bare": gradient_ascent(lr=5e-2, steps=60, rise=None),
        "guarded": gradient_ascent(lr=5e-2, steps=60),
    }.items():
        done = ex.unlearn(model, request, task=TASK, method=method)
        loss[name] = float(F.cross_entropy(done.model(x), y).detach())
    start, chance = float(F.cross_entropy(model(x), y).detach()), float(torch.tensor(3.0).log())
    assert loss["bare"] > chance
    assert loss["guarded"] <= start + 0.05 * (chance - start) + 1e-9  # the probe is the whole retain set here


def test_ascent_is_inert_where_examples_are_memorised_under_sgd_and_not_under_adam() -> None:
    """The gradient of a memorised example is next to zero: SGD at the published rate moves nothing, Adam does."""
    model, request = small()
    with torch.no_grad():
        sharp = torch.nn.Sequential(*model[:2], torch.nn.Linear(6, 3).double())
        sharp[2].weight.copy_(model[2].weight * 40)
        sharp[2].bias.copy_(model[2].bias * 40)
    right = sharp(whole(request.forget)[0]).argmax(1) == whole(request.forget)[1]
    request = ex.Request(forget=request.forget.select(torch.nonzero(right).flatten()[:10]), retain=request.retain)
    x, y = whole(request.forget)
    published = Descend(forget=Ascent(), optimizer=optim.SGD(1e-4, 0.9, 5e-4), steps=50)
    before = float(F.cross_entropy(sharp(x), y).detach())
    plain = float(F.cross_entropy(ex.unlearn(sharp, request, task=TASK, method=published).model(x), y).detach())
    adam = Descend(forget=Ascent(), optimizer=optim.Adam(1e-2), steps=50)
    moved = float(F.cross_entropy(ex.unlearn(sharp, request, task=TASK, method=adam).model(x), y).detach())
    assert abs(plain - before) < 0.01 * abs(moved - before)
