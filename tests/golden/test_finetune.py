"""Fine-tuning against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import expunge as ex
from expunge.methods.finetune import finetune
from tests.golden.by_hand import ALL, furthest, normalised, whole
from tests.golden.forgetting import small


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 5e-4)])
def test_golden_steps(momentum: float, weight_decay: float) -> None:
    model, request = small()
    x, y = whole(request.retain)
    expected = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(expected.parameters(), 0.02, momentum=momentum, weight_decay=weight_decay)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    method = finetune(lr=0.02, momentum=momentum, weight_decay=weight_decay, steps=6, batch=ALL)
    done = ex.unlearn(model, request, task=ex.Classification(3), method=method)
    assert furthest(done.model, expected) < 1e-12


def test_forget_examples_are_never_read() -> None:
    model, request = small()
    seen: list[int] = []

    def call(net: torch.nn.Module, batch: ex.core.Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.extend(batch["id"].tolist())
        return net(batch["x"])

    ex.unlearn(model, request, task=ex.Classification(3, call=call), method=finetune(steps=4, batch=7))
    assert len(seen) == 28
    assert not set(seen) & set(request.forget.ids.tolist())


def test_norm_stats_move_only_where_asked() -> None:
    model, request = normalised()
    before = dict(model.named_buffers())
    for mode, same in (("frozen", True), ("live", False)):
        method = finetune(norm_stats=mode, steps=3)
        after = dict(ex.unlearn(model, request, task=ex.Classification(3), method=method).model.named_buffers())
        assert torch.equal(after["1.running_mean"], before["1.running_mean"]) is same


@pytest.mark.parametrize(("rise", "checks"), [(0.25, True), (None, False)])
def test_without_a_rise_nothing_watches(rise: float | None, checks: bool) -> None:
    model, request = small()
    done = ex.unlearn(model, request, task=ex.Classification(3), method=finetune(steps=4, lr=1e-4, rise=rise))
    assert (done.record["cost"]["checks"] > 0) is checks
