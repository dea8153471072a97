"""Retraining: the forget data has no influence to the bit, frozen and running values, and the declared price."""

from __future__ import annotations

import pytest
import torch
from forgetting import accuracy, digits, small
from torch import nn

import expunge as ex
import expunge.core
from expunge import methods
from expunge.registry import methods as registered

torch.set_num_threads(1)
TASK = ex.Classification(3)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def requests() -> tuple[ex.Request, ex.Request]:
    """The same retain data, beside two different sets to forget."""
    _, request = small()
    batch = next(iter(request.forget.batches(100)))
    other = ex.as_data((batch["x"].flip(0) * 3 + 1, (batch["y"] + 1) % 3), ids=request.forget.ids)
    return request, ex.core.Request(forget=other, retain=request.retain)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def test_the_forget_data_and_the_trained_weights_have_no_influence_to_the_bit() -> None:
    first, other = requests()
    model, changed = normalised(), normalised()
    with torch.no_grad():
        for value in changed.parameters():
            value.mul_(3.0)
        changed[1].running_mean.add_(5.0)
        changed[1].num_batches_tracked.add_(9)
    a = ex.unlearn(model, first, task=TASK, method=methods.retrain(epochs=3.0)).model
    b = ex.unlearn(changed, other, task=TASK, method=methods.retrain(epochs=3.0)).model
    c = ex.unlearn(model, first, task=TASK, method=methods.retrain(epochs=3.0), seed=1).model
    assert same(a, b)
    assert not same(a, c)


def test_running_statistics_are_learnt_from_the_retain_data() -> None:
    model, (request, _) = normalised(), requests()
    outcome = ex.unlearn(model, request, task=TASK, method=methods.retrain(epochs=3.0))
    assert int(outcome.model[1].num_batches_tracked) == 6  # 80 examples in batches of 64: 2 steps an epoch
    assert not torch.equal(outcome.model[1].running_mean, model[1].running_mean)
    assert not outcome.notes


def test_what_is_frozen_or_out_of_scope_stays_and_is_noted() -> None:
    model, (request, _) = normalised(), requests()
    model[0].bias.requires_grad_(False)
    model[1].running_mean.add_(1.0)
    outcome = ex.unlearn(model, request, task=TASK, method=methods.retrain(epochs=2.0), scope=["4.*"])
    moved = [n for n, v in outcome.model.state_dict().items() if not torch.equal(v, model.state_dict()[n])]
    assert sorted(moved) == ["4.bias", "4.weight"]
    kept = 5 * 6 + 6 + 6 + 6
    assert any(note.startswith(f"{kept} of the model's weights") for note in outcome.notes)


def test_zero_epochs_give_an_untrained_model() -> None:
    model, (request, _) = normalised(), requests()
    outcome = ex.unlearn(model, request, task=TASK, method=methods.retrain(epochs=0.0))
    assert torch.equal(outcome.model[1].weight, torch.ones(6, dtype=torch.float64))
    assert not torch.equal(outcome.model[0].weight, model[0].weight)
    assert float(outcome.model[0].weight.detach().abs().max()) <= 5**-0.5


def test_make_builds_the_model() -> None:
    model, (request, _) = normalised(), requests()

    def make() -> nn.Module:
        fresh = normalised()
        nn.init.zeros_(fresh[4].weight)
        return fresh

    outcome = ex.unlearn(model, request, task=TASK, method=methods.retrain(epochs=0.0, make=make))
    assert float(outcome.model[4].weight.detach().abs().max()) == 0.0


@pytest.mark.parametrize(("epochs", "batch"), [(3.0, 64), (2.5, 7), (1.0, 1000)])
def test_rows_are_those_declared(epochs: float, batch: int) -> None:
    model, (request, _) = normalised(), requests()
    stage = methods.retrain(epochs=epochs, batch=batch)
    cost = ex.unlearn(model, request, task=TASK, method=stage).record["cost"]
    declared = registered()["retrain"].rows(dict(stage.settings), 20, 80)
    assert {"forward": cost["forward"], "backward": cost["backward"]} == declared


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_retain_data_is_learnt_and_the_forgotten_class_is_not(optimizer: str) -> None:
    model, request = digits(3)
    rate = 0.1 if optimizer == "sgd" else 3e-3
    stage = methods.retrain(optimizer=optimizer, lr=rate, epochs=30.0, schedule="cosine")
    outcome = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
    assert accuracy(outcome.model, request.retain) > 0.97
    assert accuracy(outcome.model, request.forget) == 0.0
