"""Worst-case forget sets on digits, beside random ones; the projection itself is in the golden tests."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audit.subject import Outputs, run
from expunge.challenges.worst_case import WorstCase, fine_tuning, random_sets, worst_case
from expunge.core import Data, Key, Refused, Request
from expunge.data.builtin import Suite, suite, train
from expunge.data.sources import collect
from expunge.descend import Descend
from expunge.methods.finetune import finetune
from expunge.methods.grad_diff import grad_diff
from expunge.objectives import NLL
from expunge.oracle import Oracle
from expunge.run import unlearn
from tests.fixtures import tiny

SIZE = 40


@functools.cache
def small() -> tuple[Suite, Data, nn.Module]:
    """Digits, 400 of them, and a network trained on those."""
    digits = suite("digits")
    data = digits.train.select(torch.arange(400))
    return digits, data, train(digits.make, data, digits.task, epochs=12)


@functools.cache
def selected() -> WorstCase:
    digits, data, model = small()
    return worst_case(model, data, digits.task, SIZE, rounds=4)


def loss_after(request: Request, model: nn.Module) -> float:
    """Mean loss on the forget data."""
    return float(Outputs.of(run(model, small()[0].task, request.forget, 256, Key(0))).loss.mean())


def test_the_worst_case_is_forgotten_less_than_any_random_set() -> None:
    """After fine-tuning on the rest its loss is below that of each of ten random sets, and so it is after retraining:
    the examples are easy ones."""
    digits, data, model = small()
    found = selected()
    assert len(found.request.forget) == SIZE
    assert len(found.request.retain) == 400 - SIZE
    assert set(found.ids.tolist()) == set(found.request.forget.ids.tolist())

    def tuned(request: Request) -> float:
        done = unlearn(model, request, task=digits.task, method=finetune(lr=0.02, steps=30))
        return loss_after(request, done.model)

    others = [tuned(request) for request in random_sets(data, SIZE, 10)]
    assert tuned(found.request) < min(others) / 10
    fresh = train(digits.make, found.request.retain, digits.task, 1, epochs=12)
    assert loss_after(found.request, fresh) < min(others)


def test_reverse_selects_the_examples_of_highest_loss() -> None:
    digits, data, model = small()
    found = worst_case(model, data, digits.task, SIZE, rounds=2, reverse=True)
    assert loss_after(found.request, model) > 5 * np.mean([loss_after(r, model) for r in random_sets(data, SIZE, 5)])
    assert not set(found.ids.tolist()) & set(selected().ids.tolist())


def test_the_released_setting_returns_its_random_start() -> None:
    """Upper rate 0.01, two rounds: 50 nats would be needed for two examples to change places."""
    digits, data, model = small()
    found = worst_case(model, data, digits.task, SIZE, rounds=2, lr=0.01, start="random")
    assert [step["kept"] for step in found.history] == [1.0, 1.0]


def test_weights_stay_in_the_set_and_the_history_is_finite() -> None:
    found = selected()
    assert found.weights.shape == (400,)
    assert found.weights.sum() == pytest.approx(SIZE)
    assert found.weights.min() >= 0
    assert found.weights.max() <= 1
    assert len(found.history) == 4
    assert all(np.isfinite(list(step.values())).all() for step in found.history)
    assert found.history[-1]["objective"] < found.history[0]["objective"]


def test_gamma_pulls_towards_even_weights() -> None:
    digits, data, model = small()
    spread = [
        float(np.std(worst_case(model, data, digits.task, SIZE, rounds=2, gamma=gamma).weights)) for gamma in (0.0, 0.4)
    ]
    assert spread[1] < spread[0]


def test_same_key_same_set_and_the_model_is_left_alone(global_randomness: object) -> None:
    digits, data, model = small()
    before = copy.deepcopy(model.state_dict())
    one, two = (worst_case(model, data, digits.task, 10, rounds=2, start="random", key=Key(3)) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert np.array_equal(one.weights, two.weights)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert global_randomness.unchanged()  # type: ignore[attr-defined]


def test_a_lower_step_moves_every_coordinate_by_the_rate() -> None:
    found = tiny("classification")
    before = copy.deepcopy(found.model)
    done = unlearn(found.model, found.request, task=found.task, method=_one_step())
    moved = [(a - b).abs() for a, b in zip(done.model.parameters(), before.parameters(), strict=True)]
    sizes = torch.cat([part.flatten() for part in moved])
    assert torch.all(torch.isclose(sizes, torch.tensor(1e-3), rtol=1e-2) | (sizes == 0))
    assert float((sizes > 0).float().mean()) > 0.5


def _one_step() -> Descend:
    stage = fine_tuning(lr=1e-3, batch=10**6)
    assert isinstance(stage, Descend)
    return Descend(retain=NLL(), combine=stage.combine, optimizer=stage.optimizer, steps=1, batch=10**6)


def test_the_lower_level_weighs_each_example_by_one_less_w(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fully selected examples are not trained on; others carry 1 - w, times a weight column of the data's own."""
    found = tiny("classification")
    data = found.request.retain.annotate("weight", torch.full((80,), 2.0))
    seen: list[torch.Tensor] = []
    pieces = Oracle._pieces

    def watched(oracle: Oracle, role: str) -> object:
        seen.append(oracle.draws.batch(role)["weight"])
        return pieces(oracle, role)

    monkeypatch.setattr(Oracle, "_pieces", watched)
    worst_case(found.model, data, found.task, 8, rounds=1, lower=fine_tuning(batch=100, epochs=1), start="random")
    assert seen[0].tolist() == [2.0] * 72
    seen.clear()
    worst_case(found.model, data, found.task, 8, rounds=1, lower=fine_tuning(batch=100, epochs=1))
    assert torch.allclose(seen[0], torch.full((80,), 2 * 0.9, dtype=torch.float64))


def test_classes_and_another_lower_level() -> None:
    """Whole classes, unlearned by gradient difference: the class that stays known is chosen."""
    found = tiny("classification")
    data = _everything(found.request)
    chosen = worst_case(found.model, data, found.task, 2, by="class", rounds=3, lower=grad_diff(steps=5))
    labels = collect(chosen.request.forget)["y"]
    assert chosen.classes == tuple(sorted(set(labels.tolist())))
    assert len(chosen.classes) == 2
    assert len(chosen.ids) == 40
    assert chosen.weights.shape == (5,)


def _everything(request: Request) -> Data:
    parts = [collect(data) for data in (request.forget, request.retain) if data is not None]
    from expunge.data.sources import as_data

    return as_data(
        {name: torch.cat([part[name] for part in parts]) for name in ("x", "y")},
        ids=torch.cat([part["id"] for part in parts]),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 0}, "size must lie in 1 to 79"),
        ({"size": 80}, "size must lie in 1 to 79"),
        ({"rounds": 0}, "rounds >= 1"),
        ({"lr": 0.0}, "lr > 0"),
        ({"gamma": float("nan")}, "gamma >= 0"),
        ({"start": "best"}, "'even' or 'random'"),
        ({"by": "image"}, "'example' or 'class'"),
        ({"by": "class", "size": 5}, "class 3 has no training example"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changes: dict[str, object], words: str) -> None:
    found = tiny("classification")
    settings = {"size": 8, **changes}
    size = settings.pop("size")
    with pytest.raises(Refused) as caught:
        worst_case(found.model, found.request.retain, found.task, size, **settings)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_need_a_task_with_classes_and_random_sets_a_size() -> None:
    found = tiny("regression")
    with pytest.raises(Refused, match="has none; use by='example'"):
        worst_case(found.model, found.request.retain, found.task, 1, by="class")
    assert len(worst_case(found.model, found.request.retain, found.task, 5, rounds=1).ids) == 5
    with pytest.raises(Refused, match="at least one set"):
        random_sets(found.request.retain, 80, 1)
