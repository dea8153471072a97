"""k-FPF for unlearning: its rounds beside torch's own Adam, the modules that it picks, and what stays to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import expunge as ex
from expunge import methods
from expunge.core import Refused
from expunge.methods.k_fpf import most_moved
from expunge.objectives import Ascent
from expunge.scope import Scope
from tests.fixtures import odd
from tests.golden.by_hand import ALL, furthest, two_classes, whole
from tests.golden.forgetting import accuracy, digits

torch.set_num_threads(1)


def test_two_rounds_by_torchs_own_adam() -> None:
    """Every batch takes all; with two classes the wrong label is certain. Fresh moments in each phase."""
    model, request = two_classes()
    (x, y), (kept_x, kept_y) = (whole(request.data(name)) for name in ("forget", "retain"))
    net = copy.deepcopy(model)
    picked = []
    for _ in range(2):
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), 1 - y).backward()
            optimizer.step()
        change = [(p.detach() - b).abs() for p, b in zip(net.parameters(), before, strict=True)]
        first, last = (float(torch.cat([c.flatten() for c in change[i : i + 2]]).mean()) for i in (0, 2))
        layer = net[0] if first > last else net[2]
        picked.append(first > last)
        optimizer = torch.optim.Adam(layer.parameters(), 0.01)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(net(kept_x), kept_y).backward()
            optimizer.step()
    stage = methods.k_fpf(k=2, modules=1, lr=0.02, steps=3, repair_lr=0.01, repair_steps=4, batch=ALL)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=stage)
    assert furthest(done.model, net) < 1e-7
    assert furthest(done.model, model) > 0.02
    assert len(picked) == 2


def test_the_modules_with_the_largest_mean_change_in_scope() -> None:
    """By hand: a large module that moved much in all, little in each weight; a mask hides a change; ties go first."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    names = tuple(name for name, _ in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # 16 of 20: mean 0.8
        model[1].weight.fill_(1.0)
        model[1].bias.fill_(-0.5)  # 4.5 of 5: mean 0.9
        model[2].weight.fill_(1.7)  # 1.7 of 2: mean 0.85
    everything = Scope.all(model)
    assert set(most_moved(model, everything, before, 1).masks) == {"1.weight", "1.bias"}
    assert set(most_moved(model, everything, before, 2).masks) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert len(most_moved(model, everything, before, 9).masks) == 6
    row = torch.tensor([[True, False, False, False]])
    scope = Scope({"0.weight": True, "1.weight": row, "2.bias": True}, names)
    found = most_moved(model, scope, before, 1)
    assert set(found.masks) == {"0.weight"}, "1 and 1: the earlier"


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_others_are_kept(label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="k_fpf")
    assert accuracy(done.model, request.data("forget")) < 0.3
    assert accuracy(done.model, request.data("retain")) > accuracy(model, request.data("retain")) - 0.05


def test_any_objective_forgets_and_shared_modules_are_one() -> None:
    found = odd()
    stage = methods.k_fpf(k=1, forget=Ascent(), steps=3, repair_steps=3, modules=1)
    done = ex.unlearn(found.model, found.request, task=found.task, method=stage)
    assert done.model.again is done.model.shared
    assert furthest(done.model, found.model) > 0


def test_bad_settings_are_refused() -> None:
    bad: dict[str, Any]
    for bad in ({"k": 0}, {"modules": 0}, {"steps": -1}, {"repair_lr": 0.0}):
        with pytest.raises(Refused, match=next(iter(bad))):
            methods.k_fpf(**bad)
