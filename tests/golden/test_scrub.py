"""SCRUB against plain torch, and the known mistakes of other code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.methods.scrub import scrub
from tests.golden.by_hand import ALL, descended, furthest, kl, normalised, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


def passes(history: list[dict[str, float]]) -> str:
    """One letter per step: F where the forget data acted, R where the retain data did."""
    return "".join("F" if "loss/forget" in row else "R" for row in history)


def test_forget_pass_comes_before_retain_pass() -> None:
    """20 forget examples in batches of 8 are 3 steps; 80 retain ones in batches of 16 are 5; 2 of 4 epochs ascend."""
    model, request = small()
    method = scrub(epochs=4, ascent_epochs=2, forget_batch=8, batch=16, retain_steps=99, lr=1e-5)
    done = ex.unlearn(model, request, task=TASK, method=method)
    assert passes(done.record["history"]) == "FFFRRRRR" * 2 + "RRRRR" * 2
    rows = 6 * 8 + 20 * 16  # each forward of the student is differentiated; the teacher is asked once of each example
    assert (done.record["cost"]["forward"], done.record["cost"]["backward"]) == (rows + 100, rows)


def test_both_passes_are_in_one_epoch_not_either_or() -> None:
    """Some ports make the max pass or the min pass in an epoch, never both."""
    model, request = small()
    method = scrub(epochs=1, ascent_epochs=1, forget_batch=ALL, batch=ALL, lr=1e-5)
    assert passes(ex.unlearn(model, request, task=TASK, method=method).record["history"]) == "FR"


def test_a_retain_pass_is_cut_short_so_that_cost_does_not_grow_with_the_retain_set() -> None:
    model, request = small()
    method = scrub(epochs=2, ascent_epochs=1, forget_batch=ALL, batch=8, retain_steps=3, lr=1e-5)
    assert passes(ex.unlearn(model, request, task=TASK, method=method).record["history"]) == "FRRRRRR"


@pytest.mark.parametrize(("temperature", "alpha", "gamma"), [(1.0, 0.5, 1.0), (2.0, 0.5, 1.0), (4.0, 0.001, 0.99)])
def test_golden_rounds_with_one_optimizer_through_all_of_them(temperature: float, alpha: float, gamma: float) -> None:
    """F R F R R, Adam's moments carried through; KL from the teacher, at the temperature and times its square."""
    model, request = small()
    (xf, _), (xr, yr) = whole(request.forget), whole(request.retain)
    with torch.no_grad():
        teacher_forget, teacher_retain = model(xf), model(xr)

    def leave(net: nn.Module) -> Tensor:
        return -kl(teacher_forget, net(xf), temperature)

    def mend(net: nn.Module) -> Tensor:
        logits = net(xr)
        return alpha * kl(teacher_retain, logits, temperature) + gamma * F.cross_entropy(logits, yr)

    start = copy.deepcopy(model)
    with torch.no_grad():  # at the teacher's own weights the KL has no gradient: begin a little way off
        for i, p in enumerate(start.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    case_teacher = {"original": model}
    expected = descended(start, [leave, mend, leave, mend, mend], 1e-3)
    settings = {"epochs": 3, "ascent_epochs": 2, "lr": 1e-3, "forget_batch": ALL, "batch": ALL}
    method = scrub(distill_weight=alpha, label_weight=gamma, temperature=temperature, **settings)
    work = copy.deepcopy(start)
    method(ex.Case(work, request, TASK, ex.Scope.all(work), case_teacher))
    assert furthest(expected, start) > 1e-3
    assert furthest(work, expected) < 1e-11
    fresh = start
    for loss in (leave, mend, leave, mend, mend):
        fresh = descended(fresh, [loss], 1e-3)  # an optimizer anew for each pass: another end
    assert furthest(fresh, expected) > 1e-4


def test_teacher_is_in_eval_mode_and_student_in_train_mode_where_live() -> None:
    model, request = normalised()
    model = model.train()
    modes: dict[str, set[bool]] = {"with gradient": set(), "without": set()}

    def call(net: nn.Module, batch: ex.core.Batch) -> Tensor:
        modes["with gradient" if torch.is_grad_enabled() else "without"].add(net.training)
        return net(batch["x"])

    task = ex.Classification(3, call=call)
    ex.unlearn(model, request, task=task, method=scrub(epochs=1, norm_stats="live", lr=1e-5))
    assert modes == {"with gradient": {True}, "without": {False}}


def test_the_guard_looks_at_the_ends_of_rounds_only() -> None:
    """Within a round the retain loss is meant to rise first: 2 rounds, 2 looks and one at the start, 32 rows each
    in so short a run, and once the whole 80."""
    model, request = small()
    method = scrub(epochs=2, ascent_epochs=1, forget_batch=4, batch=16, retain_steps=2, lr=1e-5)
    done = ex.unlearn(model, request, task=TASK, method=method)
    assert len(done.record["history"]) == 5 + 2 + 2
    assert done.record["cost"]["checks"] == 80 + 3 * 32


def test_divergence_in_the_max_step_is_undone() -> None:
    """The usual failure: a forget pass that destroys the model. A state whose retain loss is in bounds comes back."""
    model, request = small()
    x, y = whole(request.retain)
    done = ex.unlearn(model, request, task=TASK, method=scrub(lr=0.3, forget_batch=2, retain_steps=1))
    start, now = (float(F.cross_entropy(m(x), y).detach()) for m in (model, done.model))
    assert any("was kept" in note for note in done.notes)
    assert now <= start + 0.25 * (float(torch.tensor(3.0).log()) - start) + 1e-9
