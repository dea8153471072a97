"""Gradient difference against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import expunge as ex
from expunge.methods.grad_diff import grad_diff
from tests.golden.by_hand import ALL, descended, furthest, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


@pytest.mark.parametrize(("forget", "retain"), [(1.0, 1.0), (0.3, 0.7), (0.05, 1.0)])
def test_golden_steps_of_grad_diff_and_neg_grad_plus(forget: float, retain: float) -> None:
    """NegGrad+ with alpha = 0.7 is 0.7 L_r - 0.3 L_f."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    expected = descended(
        model, [lambda net: retain * F.cross_entropy(net(xr), yr) - forget * F.cross_entropy(net(xf), yf)] * 4, 1e-3
    )
    method = grad_diff(forget_weight=forget, retain_weight=retain, lr=1e-3, steps=4, batch=ALL)
    done = ex.unlearn(model, request, task=TASK, method=method)
    assert furthest(done.model, expected) < 1e-12


def test_golden_steps_of_the_published_optimizer_of_neg_grad_plus() -> None:
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    net = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        optimizer.zero_grad()
        (0.7 * F.cross_entropy(net(xr), yr) - 0.3 * F.cross_entropy(net(xf), yf)).backward()
        optimizer.step()
    sgd = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    method = grad_diff(forget_weight=0.3, retain_weight=0.7, **sgd, steps=4, batch=ALL, rise=None)
    done = ex.unlearn(model, request, task=TASK, method=method)
    assert furthest(net, model) > 1e-3
    assert furthest(done.model, net) < 1e-12


def test_without_a_guard_the_last_state_comes_back_whatever_it_is() -> None:
    model, request = small()
    method = grad_diff(forget_weight=1.0, lr=5e-2, steps=150, rise=None)
    done = ex.unlearn(model, request, task=TASK, method=method)
    x, y = whole(request.retain)
    assert done.record["cost"]["checks"] == 0
    assert float(F.cross_entropy(done.model(x), y).detach()) > float(torch.tensor(3.0).log())


def test_forget_and_retain_have_means_of_their_own() -> None:
    """One mean over a joint batch of 20 and 80 would weigh the retain loss four times."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)

    def joint(net: torch.nn.Module) -> torch.Tensor:
        sign = torch.cat([-torch.ones(len(xf)), torch.ones(len(xr))]).double()
        return (sign * F.cross_entropy(net(torch.cat([xf, xr])), torch.cat([yf, yr]), reduction="none")).mean()

    pooled = descended(model, [joint] * 3, 1e-3)
    method = grad_diff(forget_weight=1.0, lr=1e-3, steps=3, batch=ALL)
    assert furthest(ex.unlearn(model, request, task=TASK, method=method).model, pooled) > 1e-4


def test_each_forget_example_is_seen_once_per_pass_of_its_own_not_once_per_retain_batch() -> None:
    """20 forget examples in batches of 5 beside 80 retain examples: 4 steps see each forget example once."""
    model, request = small()
    forget = set(request.forget.ids.tolist())
    seen: list[int] = []

    def call(net: torch.nn.Module, batch: ex.core.Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.extend(i for i in batch["id"].tolist() if i in forget)
        return net(batch["x"])

    ex.unlearn(model, request, task=ex.Classification(3, call=call), method=grad_diff(steps=4, batch=5))
    assert sorted(seen) == sorted(forget)


def test_the_forget_term_wins_in_the_end_and_the_guard_gives_back_a_state_before_that() -> None:
    model, request = small()
    x, y = whole(request.retain)
    done = ex.unlearn(model, request, task=TASK, method=grad_diff(forget_weight=1.0, lr=5e-2, steps=150))
    start, now = (float(F.cross_entropy(m(x), y).detach()) for m in (model, done.model))
    assert any("was kept" in note for note in done.notes)
    assert now <= start + 0.05 * (float(torch.tensor(3.0).log()) - start) + 1e-9
