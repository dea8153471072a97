"""The bad teacher against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Case, Key
from expunge.edits import reinitialise
from expunge.methods.bad_teacher import bad_teacher
from tests.golden.by_hand import ALL, descended, furthest, kl, normalised, whole
from tests.golden.forgetting import accuracy, digits, small

TASK = ex.Classification(3)


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The random teacher of a run with this seed: a stage takes its key from the Case's."""
    return reinitialise(model, Key(seed).take()[0].at("untrained"))


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (1.0, 0.5), (2.0, 1.0)])
def test_golden_steps(temperature: float, weight: float) -> None:
    model, request = small()
    xf, xr = whole(request.forget)[0], whole(request.retain)[0]
    with torch.no_grad():
        bad, good = untrained(model)(xf), model(xr)
    expected = descended(
        model, [lambda net: kl(bad, net(xf), temperature) + weight * kl(good, net(xr), temperature)] * 5, 1e-3
    )
    method = bad_teacher(temperature=temperature, retain_weight=weight, lr=1e-3, steps=5, batch=ALL)
    done = ex.unlearn(model, request, task=TASK, method=method)
    assert furthest(expected, model) > 1e-3
    assert furthest(done.model, expected) < 1e-11


def test_kl_is_batch_mean_not_element_mean() -> None:
    """The released loss is also divided by the number of classes, which makes the learning rate that much smaller."""
    model, request = small()
    xf = whole(request.forget)[0]
    done = ex.unlearn(model, request, task=TASK, method=bad_teacher(steps=1, batch=ALL))
    with torch.no_grad():
        p, q = F.softmax(untrained(model)(xf), 1), F.softmax(model(xf), 1)
        each = p * (p / q).log()
    first = done.record["history"][0]["loss/forget"]
    assert first == pytest.approx(float(each.sum(1).mean()), rel=1e-10)
    assert first == pytest.approx(3 * float(each.mean()), rel=1e-10)
    assert done.record["history"][0]["loss/retain"] == pytest.approx(0.0, abs=1e-12)


def test_no_labels_are_read() -> None:
    model, request = small()
    seen = []
    for shift in (0, 1):
        x, y = (torch.cat([whole(d)[i] for d in (request.forget, request.retain)]) for i in (0, 1))
        other = ex.split((x, (y + shift) % 3), forget=list(range(20)))
        method = bad_teacher(steps=4)
        work = ex.Case(untrained(model, 5), other, TASK, ex.Scope.all(model), {"original": model})
        method.stage(work)  # the guard reads labels of retain data, to watch; nothing here is near its bound
        seen.append(work.model)
    assert furthest(*seen) == 0.0


def test_both_teachers_are_in_eval_mode_even_where_the_student_is_live() -> None:
    model, request = normalised()
    model = model.train()
    modes: dict[bool, set[bool]] = {True: set(), False: set()}

    def call(net: nn.Module, batch: ex.core.Batch) -> Tensor:
        modes[torch.is_grad_enabled()].add(net.training)
        return net(batch["x"])

    task = ex.Classification(3, call=call)
    ex.unlearn(model, request, task=task, method=bad_teacher(steps=2, norm_stats="live"))
    assert modes == {True: {True}, False: {False}}


def test_the_random_teacher_is_another_for_another_seed_and_does_not_stay() -> None:
    model, request = small()
    assert furthest(untrained(model, 0), untrained(model, 1)) > 0.01
    case = Case(untrained(model), request, TASK, ex.Scope.all(model), {"original": model})
    assert bad_teacher(steps=1)(case).teachers.keys() == {"original"}


def test_a_module_that_cannot_be_drawn_anew_is_refused_by_name() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model, request = small()
    odd = nn.Sequential(Stubborn(), *model)
    with pytest.raises(ex.Refused, match=r"Stubborn|scale"):
        ex.unlearn(odd, request, task=TASK, method=bad_teacher(steps=1))


def test_a_class_is_forgotten_and_the_others_stay() -> None:
    model, request = digits(3)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=bad_teacher()).model
    assert accuracy(model, request.forget) > 0.95
    assert accuracy(done, request.forget) < 0.4
    assert accuracy(done, request.retain) > accuracy(model, request.retain) - 0.1
