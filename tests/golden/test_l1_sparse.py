"""l1-sparse against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import expunge as ex
from expunge.combine import Decay
from expunge.methods.l1_sparse import l1_sparse
from expunge.oracle import Oracle
from tests.golden.by_hand import ALL, descended, furthest, normalised, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


def test_l1_weight_decays_linearly_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha (1 - t / steps) at step t: alpha at the first, alpha / steps at the last, nothing after it."""
    asked: list[float] = []
    grad = Oracle.grad

    def watching(oracle: Oracle, weights: dict[str, float], scope: ex.Scope | None = None) -> dict[str, torch.Tensor]:
        asked.append(weights["sparsity"])
        return grad(oracle, weights, scope)

    monkeypatch.setattr(Oracle, "grad", watching)
    model, request = small()
    ex.unlearn(model, request, task=TASK, method=l1_sparse(alpha=0.02, steps=8))
    torch.testing.assert_close(torch.tensor(asked), torch.tensor([0.02 * (8 - t) / 8 for t in range(8)]))


def test_golden_steps_over_every_parameter_scales_and_biases_included() -> None:
    """On a network with BatchNorm, whose scale and bias are in the norm too."""
    model, request = normalised()
    x, y = whole(request.retain)

    def at(step: int):  # type: ignore[no-untyped-def]  # a closure over the step
        def loss(net: nn.Module) -> torch.Tensor:
            size = sum(p.abs().sum() for p in net.parameters())
            return F.cross_entropy(net(x), y) + 5e-3 * (1 - step / 6) * size

        return loss

    expected = descended(model, [at(t) for t in range(6)], 2e-3)
    done = ex.unlearn(model, request, task=TASK, method=l1_sparse(alpha=5e-3, lr=2e-3, steps=6, batch=ALL))
    assert furthest(done.model, expected) < 1e-12
    plain = ex.unlearn(model, request, task=TASK, method=l1_sparse(alpha=0.0, lr=2e-3, steps=6, batch=ALL))
    for name, p in plain.model.named_parameters():
        assert not torch.equal(p, done.model.get_parameter(name)), f"the norm leaves {name} out"


def test_golden_the_published_optimizer() -> None:
    """SGD with momentum and weight decay, the norm's weight falling once per epoch, as the authors' loop does."""
    model, request = small()
    x, y = whole(request.retain)
    hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(hand.parameters(), 0.05, momentum=0.9, weight_decay=5e-3)
    for epoch in (0, 0, 0, 1, 1, 1):
        optimizer.zero_grad()
        norm = torch.linalg.vector_norm(torch.cat([p.flatten() for p in hand.parameters()]), ord=1)
        (F.cross_entropy(hand(x), y) + 1e-2 * (1 - epoch / 2) * norm).backward()
        optimizer.step()
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3, "levels": 2, "steps": 6, "batch": ALL}
    done = ex.unlearn(model, request, task=TASK, method=l1_sparse(alpha=1e-2, optimizer="sgd", **settings))
    assert not done.notes, "the guard stopped the run, which theirs has not"
    assert furthest(done.model, hand) < 1e-6


def test_weights_shrink_and_none_is_cut_to_zero() -> None:
    model, request = small()
    size = {}
    for alpha in (0.0, 1e-2):
        done = ex.unlearn(model, request, task=TASK, method=l1_sparse(alpha=alpha, steps=60)).model
        size[alpha] = sum(float(p.detach().abs().sum()) for p in done.parameters())
        assert all(bool((p != 0).all()) for p in done.parameters())
    assert size[1e-2] < 0.95 * size[0.0]


def test_forget_data_are_not_needed() -> None:
    model, request = small()
    seen: set[int] = set()

    def call(net: nn.Module, batch: ex.core.Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.update(batch["id"].tolist())
        return net(batch["x"])

    ex.unlearn(model, request, task=ex.Classification(3, call=call), method=l1_sparse(steps=5))
    assert seen
    assert not seen & set(request.forget.ids.tolist())


def authors_weight(alpha: float, epoch: int, epochs: int, no_l1_epochs: int) -> float:
    """The rule that unlearn/FT.py of OPTML-Group/Unlearn-Sparse @ 80ba55d states, in our own words."""
    left = epochs - no_l1_epochs
    return alpha * (1 - epoch / left) if epoch < left else 0.0


@pytest.mark.parametrize(("epochs", "quiet"), [(10, 0), (10, 3), (7, 2)])
def test_the_schedule_by_epochs_is_that_of_the_authors(epochs: int, quiet: int) -> None:
    weight = Decay(2e-4, until=1 - quiet / epochs, levels=epochs)
    for step in range(epochs * 13):
        expected = authors_weight(2e-4, step // 13, epochs, quiet)
        assert weight(step / (epochs * 13)) == pytest.approx(expected, abs=1e-18)


def test_the_other_forms_of_the_schedule() -> None:
    shares = (0.0, 0.25, 0.5, 0.75)
    assert [Decay(2.0, "constant", 0.5)(s) for s in shares] == [2.0, 2.0, 0.0, 0.0]
    assert [Decay(2.0, "rising")(s) for s in shares] == [0.0, 0.5, 1.0, 1.5]
    assert [Decay(2.0, "rising", 0.5)(s) for s in shares] == [0.0, 1.0, 0.0, 0.0]
    for wrong in ({"form": "none"}, {"until": 0.0}, {"levels": 0}):
        with pytest.raises(ex.Refused, match=next(iter(wrong))):
            Decay(1.0, **wrong)  # type: ignore[arg-type]


def test_the_settings_of_the_method_reach_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    grad = Oracle.grad

    def watching(oracle: Oracle, weights: dict[str, float], scope: ex.Scope | None = None) -> dict[str, torch.Tensor]:
        asked.append(weights["sparsity"])
        return grad(oracle, weights, scope)

    monkeypatch.setattr(Oracle, "grad", watching)
    model, request = small()
    stage = l1_sparse(alpha=0.02, steps=8, schedule="rising", without=0.25, levels=4)
    ex.unlearn(model, request, task=TASK, method=stage)
    assert asked == pytest.approx([0.0, 0.0, 0.02 / 3, 0.02 / 3, 0.04 / 3, 0.04 / 3, 0.0, 0.0], abs=1e-15)
