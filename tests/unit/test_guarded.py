"""An edit that is taken only as far as the retain loss allows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from expunge.core import Case, Key, Request
from expunge.data.sources import as_data
from expunge.guarded import guarded_edit
from expunge.scope import Scope
from expunge.tasks.classification import Classification

torch.set_num_threads(1)


def case(retain: bool = True) -> Case:
    """A model that is right and sure about two examples."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(4 * torch.eye(2))
    data = as_data((torch.eye(2, dtype=torch.float64), torch.arange(2)))
    return Case(model, Request(forget=data, retain=data if retain else None), Classification(2), Scope.all(model))


def shrunk(dose: float) -> dict[str, Tensor]:
    return {"weight": (1 - dose) * 4 * torch.eye(2, dtype=torch.float64)}


def loss(scale: float) -> float:
    return math.log1p(math.exp(-scale))


def test_the_first_dose_inside_the_bound_is_taken() -> None:
    of = case()
    taken = guarded_edit(of, shrunk, 1.0, Key(0), name="dose", rise=0.2)
    bound = loss(4) + 0.2 * (math.log(2) - loss(4))
    tried = [0.7**number for number in range(20)]
    assert taken == next(dose for dose in tried if loss(4 * (1 - dose)) <= bound) < 1
    assert torch.equal(of.model.weight, shrunk(taken)["weight"])
    assert [note for note in of.meter.notes if note.startswith("dose was lowered from 1")]
    assert of.meter.forward == 0


def test_where_no_dose_keeps_the_bound_the_model_is_put_back_to_the_bit() -> None:
    of = case()
    before = of.model.weight.detach().clone()
    assert guarded_edit(of, lambda dose: {"weight": -before}, 1.0, Key(0), name="dose", rise=0.2) == 0.0
    assert torch.equal(of.model.weight, before)
    assert any("from 1 to 0" in note for note in of.meter.notes)


def test_a_dose_that_gives_numbers_that_are_not_finite_is_passed_over() -> None:
    of = case()
    taken = guarded_edit(of, lambda dose: shrunk(0.0 if dose < 1 else math.inf), 1.0, Key(0), name="dose", rise=0.2)
    assert taken == pytest.approx(0.7)


def test_a_whole_dose_inside_the_bound_is_not_noted_and_zero_is_the_identity() -> None:
    of = case()
    assert guarded_edit(of, shrunk, 0.1, Key(0), name="dose", rise=0.5) == 0.1
    assert not of.meter.notes
    of = case()
    assert guarded_edit(of, shrunk, 0.0, Key(0), name="dose", rise=0.0) == 0.0
    assert torch.equal(of.model.weight, 4 * torch.eye(2, dtype=torch.float64))
    assert not of.meter.notes


def test_without_data_to_watch_the_dose_is_taken_and_that_is_noted() -> None:
    of = case(retain=False)
    assert guarded_edit(of, shrunk, 0.9, Key(0), name="dose", rise=0.0) == 0.9
    assert any("nothing could watch" in note for note in of.meter.notes)
