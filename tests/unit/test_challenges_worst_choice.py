"""Worst-case selection as a stage: the same choice as the function, metered, repeatable, and a method goes on with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import expunge as ex
from expunge import methods
from expunge.challenges.worst_case import fine_tuning, worst_case
from expunge.challenges.worst_choice import ForgetWorstCase
from expunge.class_choice import training_data
from expunge.core import Case, Key, Refused
from expunge.descend import _Run
from tests.contract.test_methods import Killed, Picture, same, state
from tests.fixtures import tiny

LOWER = fine_tuning(batch=50, epochs=1)


def case_of(found: Any, seed: int = 0) -> Case:
    return Case(found.model, found.request, found.task, ex.Scope.all(found.model), rng=Key(seed))


@pytest.mark.parametrize("settings", [{"size": 12}, {"size": 2, "by": "class"}, {"size": 9, "reverse": True}])
def test_the_stage_chooses_as_the_function_does_and_counts_what_it_costs(settings: dict[str, Any]) -> None:
    found = tiny("classification")
    found.model.train()
    before = Picture.of(found.model, found.request)
    case = case_of(found)
    done = ForgetWorstCase(lower=LOWER, rounds=2, **settings)(case)
    before.assert_unchanged(found.model, found.request)
    key, rng = Key(0).take()
    chosen = worst_case(
        found.model, training_data(found.request), found.task, lower=LOWER, rounds=2, key=key, **settings
    )
    assert torch.equal(done.request.data("forget").ids, chosen.ids)
    assert torch.equal(done.request.data("retain").ids, chosen.request.data("retain").ids)
    assert done.request.valid is found.request.valid
    assert done.rng == rng
    assert case.meter.forward == 2 * (100 + 100)
    assert case.meter.backward == 2 * 100
    assert not case.meter.history, "the steps of a lower level are no steps of the run"


def test_killed_at_every_step_the_choice_and_the_weights_are_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, count, at, step = tiny("classification"), 0, -1, _Run._step
    stage = ex.chain(ForgetWorstCase(12, lower=LOWER, rounds=2), methods.grad_diff(steps=2, batch=5))

    def stepping(run: _Run) -> None:
        nonlocal count
        step(run)
        count += 1
        if count == at:
            raise Killed

    monkeypatch.setattr(_Run, "_step", stepping)

    def once(name: str) -> Any:
        return ex.unlearn(
            found.model, found.request, task=found.task, method=stage, seed=3, out=tmp_path / name, every=0.0
        )

    undisturbed = once("whole")
    ids = undisturbed.case.request.data("forget").ids
    assert set(ids.tolist()) != set(found.request.data("forget").ids.tolist())
    total = count
    assert total == 2 * 2 + 2
    for moment in range(1, total + 1):
        count, at = 0, moment
        with pytest.raises(Killed):
            once(str(moment))
        at = -1
        resumed = once(str(moment))
        assert same(state(resumed.model), state(undisturbed.model))
        assert torch.equal(resumed.case.request.data("forget").ids, ids)


def test_what_cannot_be_is_refused() -> None:
    for settings, setting in (
        ({"size": 0}, "size"),
        ({"size": 3, "by": "loss"}, "by"),
        ({"size": 3, "start": "odd"}, "start"),
        ({"size": 3, "rounds": 0}, "rounds"),
        ({"size": 3, "lr": 0.0}, "lr"),
        ({"size": 3, "gamma": -1.0}, "gamma"),
        ({"size": 3, "lower": None}, "lower"),
    ):
        with pytest.raises(Refused, match=f"ForgetWorstCase: {setting}"):
            ForgetWorstCase(**settings)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="size must lie in 1 to 99"):
        ForgetWorstCase(100, rounds=1)(case_of(tiny("classification")))
