"""A teacher's answers kept as a column, and objectives that share one forward pass: the same update, fewer rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge as ex
from expunge.core import Key, Refused
from expunge.data.sources import MapStyle
from expunge.methods.bad_teacher import bad_teacher
from expunge.methods.eupmu import eupmu
from expunge.methods.scrub import scrub
from expunge.methods.surgery import surgery
from expunge.objectives import NLL, Distill
from expunge.oracle import differentiable, prepared
from expunge.runner_up import RunnerUp
from expunge.together import Together
from expunge.told import told
from tests.golden.by_hand import furthest
from tests.golden.forgetting import small

TASK = ex.Classification(3)


def case_of() -> ex.Case:
    model, request = small()
    return ex.Case(model, request, TASK, ex.Scope.all(model), {"original": model})


@pytest.mark.parametrize(
    "method",
    [
        scrub(epochs=2, retain_steps=9, batch=16, lr=1e-3),
        bad_teacher(steps=9),
        surgery(steps=9, forget=RunnerUp()),
        eupmu(steps=9, forget=RunnerUp()),
    ],
    ids=["scrub", "bad_teacher", "surgery", "eupmu"],
)
def test_the_same_model_with_fewer_rows(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    model, request = small()
    with torch.no_grad():  # scrub's first step climbs from a stationary point, where rounding decides the way
        start = [p + 0.05 for p in model.parameters()]
    found = []
    for kept in (1, 0):
        monkeypatch.setattr(ex.Classification, "kept_outputs", kept)
        work, _ = small()
        with torch.no_grad():
            for parameter, value in zip(work.parameters(), start, strict=True):
                parameter.copy_(value)
        case = ex.Case(work, request, TASK, ex.Scope.all(work), {"original": model}, rng=Key(3))
        done = method(case)
        assert done.request is case.request
        found.append((work, case.meter.forward))
    assert furthest(found[0][0], found[1][0]) < 1e-10
    assert found[0][1] < found[1][1]


def test_nothing_is_asked_beforehand_where_few_rows_are_read_or_answers_may_change() -> None:
    case = case_of()
    retain = case.request.data("retain")
    columns = told(case, {"retain": (Distill(), len(retain))}).request.data("retain").columns
    assert columns["told/original"].shape == (len(retain), 3)
    assert "told/original" not in told(case, {"retain": (Distill(), len(retain) - 1)}).request.data("retain").columns
    rows = [tuple(retain.batch(torch.tensor([i]))[name][0] for name in ("x", "y")) for i in range(len(retain))]
    read = ex.Data(MapStyle(rows, ("x", "y")), torch.arange(len(rows)), retain.ids)
    drawn = replace(case, request=replace(case.request, retain=read))
    assert told(drawn, {"retain": (Distill(), 10**6)}).request.data("retain").columns == {}


def test_together_is_the_weighted_sum_from_one_forward_pass() -> None:
    case = case_of()
    teacher = small()[0]
    with torch.no_grad():
        next(teacher.parameters()).add_(0.1)
    other = replace(case, teachers={"original": teacher})
    batch = next(prepared(other, other.request.data("retain"), 16, Key(0), Together()))
    with differentiable(other), other.meter.watch(other.model):
        expected = 1.0 * NLL()(other, batch) + 0.5 * Distill()(other, batch)
        separate = other.meter.forward
        assert torch.equal(Together()(other, batch), expected)
        assert (separate, other.meter.forward) == (32, 48)


def test_objectives_that_weigh_examples_differently_are_refused() -> None:
    class Twice(NLL):
        def weigh(self, case: ex.Case, batch: Any) -> torch.Tensor:
            return 1.0 + torch.arange(len(batch["id"]))

    case = case_of()
    batch = case.request.data("retain").batch(torch.arange(4))
    with pytest.raises(Refused, match="weigh the examples differently"):
        Together((NLL(), Twice()), (1.0, 1.0)).weigh(case, batch)
    with pytest.raises(ValueError, match="as many as there are parts"):
        Together((NLL(),), (1.0, 1.0))
