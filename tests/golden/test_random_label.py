"""Random labelling against plain torch, and the traps of its sheet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Batch
from expunge.methods.random_label import random_label
from tests.golden.by_hand import ALL, descended, furthest, normalised, two_classes, whole
from tests.golden.forgetting import small


def labels_shown(steps: int, seed: int = 0) -> tuple[list[tuple[Tensor, Tensor]], dict[int, int]]:
    """(ids, labels) of every differentiated forget batch, and the true label of every forget example."""
    model, request = small()
    shown: list[tuple[Tensor, Tensor]] = []

    def call(net: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and bool(torch.isin(batch["id"], request.forget.ids).all()):
            shown.append((batch["id"].clone(), batch["y"].clone()))
        return net(batch["x"])

    method = random_label(steps=steps, lr=1e-6, batch=ALL)
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
