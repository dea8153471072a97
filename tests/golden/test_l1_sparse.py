"""l1-sparse against plain torch, and the traps of its sheet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import expunge as ex
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
