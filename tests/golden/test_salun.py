"""SalUn against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import optim
from expunge.core import Case
from expunge.methods.random_label import random_label
from expunge.methods.salun import salun
from expunge.objectives import NLL, NPO, RandomLabel
from expunge.saliency import Saliency
from expunge.scope import Scope
from tests.golden.by_hand import ALL, furthest, gradients, normalised, two_classes, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


def narrowed(model: nn.Module, request: ex.Request, scope: Scope | None = None, **settings: float) -> dict[str, Tensor]:
    """name -> boolean mask, after a Saliency stage."""
    case = Saliency(**settings)(Case(model, request, TASK, scope or Scope.all(model)))  # type: ignore[arg-type]
    return {name: torch.as_tensor(mask) for name, mask in case.scope.masks.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ranked(scores: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The top share of all entries of all tensors, by sorting them."""
    flat = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    level = flat[round(keep * len(flat)) - 1]
    return {name: score >= level for name, score in scores.items()}


def test_saliency_is_abs_of_sum_not_sum_of_abs() -> None:
    """Signs cancel across examples: per-example gradients, one at a time, added up by hand."""
    model, request = small()
    x, y = whole(request.forget)
    each = [gradients(model, F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])) for i in range(len(x))]
    summed = {name: sum(g[name] for g in each).abs() for name in each[0]}
    absolute = {name: sum(g[name].abs() for g in each) for name in each[0]}
    found = narrowed(model, request, keep=0.5)
    assert same(found, ranked(summed, 0.5))
    assert not same(found, ranked(absolute, 0.5))


@pytest.mark.parametrize("batch", [1, 7, 20])
def test_saliency_does_not_depend_on_the_batch_size(batch: int) -> None:
    """A short last batch weighs what its examples weigh (a sum of batch means would weigh it more)."""
    model, request = small()
    assert same(narrowed(model, request, batch=batch), narrowed(model, request, batch=64))


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5])
def test_mask_density(keep: float) -> None:
    """The share asked for, over all tensors at once: not of each tensor on its own."""
    model, request = small()
    masks = narrowed(model, request, keep=keep)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(keep * total)
    assert max(abs(float(mask.float().mean()) - keep) for mask in masks.values()) > 0.05


def test_density_is_of_what_was_in_scope() -> None:
    model, request = small()
    first = torch.zeros(6, 5, dtype=torch.bool)
    first[:2] = True
    scope = Scope({"0.weight": first, "2.bias": True}, Scope.all(model).universe)
    masks = narrowed(model, request, scope, keep=0.5)
    assert masks.keys() == {"0.weight", "2.bias"}
    assert not bool((masks["0.weight"] & ~first).any())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.5 * (10 + 3))


def test_a_coordinate_without_gradient_is_never_kept() -> None:
    """The last input is always 0: its column has no gradient, and 95 % would reach down to it."""
    model, request = small()
    masks = narrowed(model, request, keep=0.95)
    assert not bool(masks["0.weight"][:, -1].any())


def test_keep_of_all_is_the_scope_and_of_none_the_identity() -> None:
    model, request = small()
    assert all(bool(mask.all()) for mask in narrowed(model, request, keep=1.0).values())
    done = ex.unlearn(model, request, task=TASK, method=salun(keep=0.0, steps=5))
    assert furthest(done.model, model) == 0.0
    with pytest.raises(ValueError, match="keep"):
        Saliency(keep=1.5)


def test_saliency_is_measured_in_eval_mode_and_moves_no_statistics() -> None:
    model, request = normalised()
    noisy = nn.Sequential(model[:3], nn.Dropout(0.5), model[3]).double().train()
    before = copy.deepcopy(noisy.state_dict())
    assert same(narrowed(noisy, request), narrowed(noisy, request))
    assert noisy.training
    assert all(torch.equal(value, before[name]) for name, value in noisy.state_dict().items())
    plain = narrowed(model, request).values()
    assert all(torch.equal(a, b) for a, b in zip(narrowed(noisy, request).values(), plain, strict=True))


@pytest.mark.parametrize(
    "optimizer",
    [optim.SGD(0.05, 0.9, 0.1), optim.Adam(1e-2, weight_decay=0.1), optim.AdamW(1e-2, weight_decay=0.1)],
    ids=["sgd", "adam", "adamw"],
)
def test_masked_weights_survive_momentum_and_weight_decay(optimizer: optim.Optimizer) -> None:
    """Masking gradients is not enough: decay pulls on every weight it is given. To the bit, and the rest moves."""
    model, request = small()
    masks = narrowed(model, request, keep=0.5)
    stage = ex.chain(
        Saliency(0.5), ex.Descend(forget=RandomLabel(), retain=NLL(), optimizer=optimizer, steps=20, batch=16)
    )
    done = ex.unlearn(model, request, task=TASK, method=stage).model
    for name, p in model.named_parameters():
        moved = done.get_parameter(name) != p
        assert not bool((moved & ~masks[name]).any()), f"{name} moved where it was masked"
        assert bool(moved[masks[name]].all())


def test_golden_steps_with_two_classes() -> None:
    """The whole method by hand: mask, masked Adam steps on both losses."""
    model, request = two_classes()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    scores = {n: g.abs() for n, g in gradients(model, F.cross_entropy(model(xf), yf, reduction="sum")).items()}
    masks = ranked(scores, 0.4)
    net, lr, state = copy.deepcopy(model), 2e-3, {}
    for t in range(1, 6):
        loss = F.cross_entropy(net(xf), 1 - yf) + 2.0 * F.cross_entropy(net(xr), yr)
        for name, grad in gradients(net, loss).items():
            m, v = state.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            state[name] = m, v
            step = lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            with torch.no_grad():
                net.get_parameter(name).sub_(torch.where(masks[name], step, torch.zeros_like(step)))
    method = salun(keep=0.4, retain_weight=2.0, lr=lr, steps=5, batch=ALL)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=method)
    assert furthest(done.model, model) > 5e-3
    assert furthest(done.model, net) < 1e-12


def test_keeping_all_is_random_labelling() -> None:
    model, request = two_classes()
    settings = {"retain_weight": 2.0, "lr": 1e-3, "steps": 4, "batch": ALL}
    runs = [
        ex.unlearn(model, request, task=ex.Classification(2), method=m).model
        for m in (salun(keep=1.0, **settings), random_label(**settings))
    ]
    assert furthest(*runs) < 1e-12


def test_batch_statistics_are_never_masked() -> None:
    """In live mode running statistics move whatever is kept, as in the published runs; frozen, nothing does."""
    model, request = normalised()
    live = ex.unlearn(model, request, task=TASK, method=salun(keep=0.0, steps=3, norm_stats="live")).model
    assert furthest(live, model) == 0.0
    assert not torch.equal(live[1].running_mean, model[1].running_mean)
    frozen = ex.unlearn(model, request, task=TASK, method=salun(steps=3)).model
    assert torch.equal(frozen[1].running_mean, model[1].running_mean)


def test_another_objective_is_one_argument() -> None:
    """SalUn with NPO: its forget loss starts at (2 / beta) log 2, and half of the weights stay."""
    model, request = small()
    done = ex.unlearn(model, request, task=TASK, method=salun(forget=NPO(beta=0.5), steps=5))
    assert done.record["history"][0]["loss/forget"] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-12)
    masks = narrowed(model, request, keep=0.5)
    for name, p in model.named_parameters():
        assert not bool(((done.model.get_parameter(name) != p) & ~masks[name]).any())


def test_golden_passes_with_sgd() -> None:
    """As the authors' loop runs: masked SGD over the forget data, then the retain data; masked weights do not decay."""
    model, request = two_classes()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    scores = {n: g.abs() for n, g in gradients(model, F.cross_entropy(model(xf), yf, reduction="sum")).items()}
    masks, net, held = ranked(scores, 0.4), copy.deepcopy(model), {}
    for _ in range(2):
        for x, y in ((xf, 1 - yf), (xr, yr)):
            for name, grad in gradients(net, F.cross_entropy(net(x), y)).items():
                weight = net.get_parameter(name)
                grad = grad + 0.01 * weight.detach()
                held[name] = grad if name not in held else 0.9 * held[name] + grad
                with torch.no_grad():
                    weight.sub_(0.05 * torch.where(masks[name], held[name], torch.zeros_like(grad)))
    sgd = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    method = salun(keep=0.4, turns="passes", retain_weight=1.0, steps=4, batch=ALL, rise=None, **sgd)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=method)
    assert furthest(done.model, model) > 5e-3
    assert furthest(done.model, net) < 1e-12
