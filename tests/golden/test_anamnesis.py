"""The anamnesis index against problems whose number of steps is known, and against a loop written by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.attacks.anamnesis import Anamnesis, anamnesis_index, anamnesis_of
from expunge.attacks.recovery import Finetune, batches_until
from expunge.audit.subject import Subject
from expunge.core import Key, Refused, Request
from expunge.data.sources import as_data
from expunge.optim import SGD, Adam
from expunge.tasks.regression import Regression
from tests.fixtures import retrained, tiny


class Constant(nn.Module):
    """Predicts one number, whatever it is asked."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), 1)


def quadratic(after: float, retrained: tuple[float, ...], original: float = 0.1) -> Subject:
    """Loss e^2 / 2 of the error e; gradient e, so that a step of rate r leaves (1 - r) e."""
    data = as_data({"x": torch.zeros(6, 1, dtype=torch.float64), "y": torch.zeros(6, 1, dtype=torch.float64)})
    request = Request(forget=data.select(range(4)), retain=data.select([4, 5]))
    models = tuple(Constant(value) for value in retrained)
    return Subject(Constant(original), Constant(after), request, Regression(variance=1.0), None, models, draws=50)


def steps(start: float, rate: float, original: float = 0.1, alpha: float = 0.05) -> int:
    """The first t with ((1 - rate)^t start)^2 <= (1 + alpha) original^2."""
    return max(0, math.ceil(math.log(original * math.sqrt(1 + alpha) / abs(start)) / math.log(1 - rate)))


@pytest.mark.parametrize(
    ("after", "others", "rate"), [(1.0, (2.0, 4.0), 0.1), (0.5, (3.0,), 0.2), (-6.0, (1.0,), 0.05)]
)
def test_the_number_of_steps_on_a_quadratic(after: float, others: tuple[float, ...], rate: float) -> None:
    settings = Anamnesis(optimizer=SGD(rate, momentum=0.0), cap=200, seeds=2)
    reading = anamnesis_of(quadratic(after, others), settings)
    wanted = [steps(start, rate) for start in others]
    assert reading.detail["batches"] == steps(after, rate) > 0
    assert reading.detail["batches_retrained"] == np.mean(wanted)
    assert reading.value == pytest.approx(steps(after, rate) / np.mean(wanted))
    assert reading.low <= reading.value <= reading.high
    assert reading.detail["share > cap of 200"] == 0


def test_a_cap_is_said_and_never_silent() -> None:
    rate = 0.1
    cap = steps(2.0, rate) + 1
    settings = Anamnesis(optimizer=SGD(rate, momentum=0.0), cap=cap, seeds=2)
    late = anamnesis_of(quadratic(50.0, (2.0, 2.0)), settings)
    assert late.detail[f"share > cap of {cap}"] == 1
    assert late.value == pytest.approx(cap / steps(2.0, rate))
    assert late.high == math.inf
    early = anamnesis_of(quadratic(1.0, (50.0, 50.0)), settings)
    assert early.detail[f"share > cap of {cap}, retrained"] == 1
    assert early.value == pytest.approx(steps(1.0, rate) / cap)
    assert early.low == 0
    neither = anamnesis_of(quadratic(50.0, (50.0, 50.0)), settings)
    assert (neither.low, neither.value, neither.high) == (0, 1, math.inf)


def test_retrained_models_that_need_no_step() -> None:
    settings = Anamnesis(optimizer=SGD(0.1, momentum=0.0), seeds=2)
    assert anamnesis_of(quadratic(0.05, (0.1, 0.08)), settings).value == 1
    late = anamnesis_of(quadratic(2.0, (0.1, 0.08)), settings)
    assert late.value == steps(2.0, 0.1) > 20
    assert late.detail["share relearnt at once, retrained"] == 1
    assert anamnesis_of(quadratic(0.05, (2.0, 2.0)), settings).value == 0


def test_the_index_by_hand() -> None:
    times = np.array([[10.0, np.inf], [20.0, 30.0]])
    assert anamnesis_index(np.array([5.0, 15.0]), times, 40) == pytest.approx(10 / 25)
    assert anamnesis_index(np.array([np.inf, 15.0]), times, 20) == pytest.approx(17.5 / 17.5)
    assert anamnesis_index(np.zeros(2), np.zeros((1, 2)), 5) == 1
    assert anamnesis_index(np.array([3.0, 4.0]), np.zeros((1, 2)), 5) == 3.5
    with pytest.raises(Refused, match="at least one run"):
        anamnesis_index(np.zeros(2), np.zeros((0, 2)), 5)


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_a_loop_written_by_hand(seed: int) -> None:
    """Full batches of torch's Adam, checked before the first step and after each."""
    case, start = tiny("classification"), retrained("classification", seed=seed)
    forget = next(case.request.forget.batches(100))
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(forget["x"]).argmax(1) == forget["y"]).double().mean())

    goal, wanted = 0.7, 0
    while accuracy() < goal:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(forget["x"]), forget["y"]).backward()
        optimizer.step()
        wanted += 1
    subject = Subject(case.model, start, case.request, case.task, case.test)
    plan = Finetune(Adam(3e-3), 200, 64)
    found = batches_until(lambda look: look.values.mean() >= goal, subject, start, plan, case.request.forget, Key(seed))
    assert found == wanted > 3
    assert (
        batches_until(lambda look: False, subject, start, Finetune(Adam(3e-3), 2, 64), case.request.forget, Key(0))
        == math.inf
    )
