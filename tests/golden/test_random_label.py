"""Random labelling against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Batch
from expunge.methods.random_label import random_label
from expunge.registry import methods
from tests.golden.by_hand import ALL, descended, furthest, normalised, two_classes, whole
from tests.golden.forgetting import small


def labels_shown(steps: int, seed: int = 0, **settings: Any) -> tuple[list[tuple[Tensor, Tensor]], dict[int, int]]:
    """(ids, labels) of every differentiated forget batch, and the true label of every forget example."""
    model, request = small()
    shown: list[tuple[Tensor, Tensor]] = []

    def call(net: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and bool(torch.isin(batch["id"], request.forget.ids).all()):
            shown.append((batch["id"].clone(), batch["y"].clone()))
        return net(batch["x"])

    method = random_label(steps=steps, lr=1e-6, batch=ALL, **settings)
    ex.unlearn(model, request, task=ex.Classification(3, call=call), method=method, seed=seed)
    truth = dict(zip(request.forget.ids.tolist(), whole(request.forget)[1].tolist(), strict=True))
    return shown, truth


def test_random_label_is_never_the_truth() -> None:
    shown, truth = labels_shown(50)
    assert len(shown) == 50
    for ids, labels in shown:
        assert all(label != truth[i] for i, label in zip(ids.tolist(), labels.tolist(), strict=True))


def test_random_labels_are_uniform_over_the_others_and_drawn_anew_at_every_step() -> None:
    shown, truth = labels_shown(100)
    assert set(truth.values()) == {0}
    ones = sum(int((labels == 1).sum()) for _, labels in shown)
    drawn = sum(len(labels) for _, labels in shown)
    assert abs(ones - drawn / 2) < 4 * (drawn / 4) ** 0.5  # four standard deviations of a fair coin
    by_id = [dict(zip(ids.tolist(), labels.tolist(), strict=True)) for ids, labels in shown]
    assert all(len({step[i] for step in by_id}) == 2 for i in truth)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_golden_steps_with_two_classes(weight: float) -> None:
    model, request = two_classes()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    expected = descended(
        model, [lambda net: F.cross_entropy(net(xf), 1 - yf) + weight * F.cross_entropy(net(xr), yr)] * 5, 1e-3
    )
    method = random_label(retain_weight=weight, lr=1e-3, steps=5, batch=ALL)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=method)
    assert furthest(done.model, expected) < 1e-12


def test_norm_stats_move_only_where_asked() -> None:
    """The published runs train in train mode; frozen is the default, and then no running statistic moves."""
    model, request = normalised()
    before = dict(model.named_buffers())
    for mode, same in (("frozen", True), ("live", False)):
        method = random_label(norm_stats=mode, steps=3)
        after = dict(ex.unlearn(model, request, task=ex.Classification(3), method=method).model.named_buffers())
        assert torch.equal(after["1.running_mean"], before["1.running_mean"]) is same


def test_any_label_is_drawn_over_all_classes() -> None:
    shown, truth = labels_shown(100, labels="any")
    assert set(truth.values()) == {0}
    drawn = torch.cat([labels for _, labels in shown])
    for label in range(3):
        assert abs(int((drawn == label).sum()) - len(drawn) / 3) < 4 * (len(drawn) * 2 / 9) ** 0.5
    data = ex.split((torch.rand(20, 3), torch.rand(20)), forget=[0, 1])
    with pytest.raises(ex.Refused, match="AnyLabel needs classes"):
        ex.unlearn(nn.Linear(3, 1), data, task=ex.Regression(), method=random_label(labels="any"))


def test_golden_passes() -> None:
    """As the authors' loop runs: SGD over the forget data, then over the retain data, one momentum through both."""
    model, request = two_classes()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    net = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        for x, y in ((xf, 1 - yf), (xr, yr)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    sgd = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
    method = random_label(turns="passes", retain_weight=1.0, steps=6, batch=ALL, rise=None, **sgd)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=method)
    assert furthest(done.model, model) > 1e-3
    assert furthest(done.model, net) < 1e-12


@pytest.mark.parametrize("steps", [0, 2, 3, 5, 11, 13, 27])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_passes_read_all_of_one_then_all_of_the_other_at_the_declared_price(steps: int, weight: float) -> None:
    model, request = small()
    forget = set(request.forget.ids.tolist())
    shown: list[list[int]] = []

    def call(net: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            shown.append(batch["id"].tolist())
        return net(batch["x"])

    settings = {"turns": "passes", "steps": steps, "batch": 8, "retain_weight": weight}
    task = ex.Classification(3, call=call)
    done = ex.unlearn(model, request, task=task, method=random_label(**settings, lr=1e-5))
    counts = [-(-len(data) // 8) for data in (request.forget, request.retain)]
    kinds = ([True] * counts[0] + [False] * counts[1]) * steps
    assert [forget >= set(ids) for ids in shown] == [kind for kind in kinds[:steps] if kind or weight]
    if steps >= counts[0]:
        assert {i for ids in shown[: counts[0]] for i in ids} == forget, "a pass is all of the forget data"
    spec = methods()["random_label"]
    bound = {name: parameter.default for name, parameter in spec.settings().items()} | settings
    declared = spec.rows(bound, len(request.forget), len(request.retain))
    assert {kind: done.record["cost"][kind] for kind in declared} == declared


def test_a_guard_of_passes_looks_at_the_end_of_rounds() -> None:
    model, request = small()
    around = sum(-(-len(data) // 8) for data in (request.forget, request.retain))
    probe = min(128, len(request.retain))
    for steps, looks in ((2 * around, 2), (2 * around + 1, 3)):
        method = random_label(turns="passes", steps=steps, batch=8, lr=1e-5)
        done = ex.unlearn(model, request, task=ex.Classification(3), method=method)
        assert done.record["cost"]["checks"] == probe + (1 + looks) * 32  # a short run: 32 of the probe at each look
