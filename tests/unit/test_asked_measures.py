"""What every measure that is asked for keeps to: nothing of the caller's is changed, and other structures are no crash."""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.attacks import restoration
from expunge.attacks.gradient_norm import gradient_norms
from expunge.attacks.inversion import inversion
from expunge.attacks.perturbation import input_perturbation
from expunge.attacks.prune import pruned_forget_accuracy
from expunge.attacks.recovery import nested_interval
from expunge.audit import accuracy, intervals
from expunge.audit.agreement import harmonic, retraining_agreement
from expunge.audit.language import token_scores
from expunge.audit.stability import stability_gap_retain, worst_retain
from expunge.audit.subject import Cache, Reading, Subject
from expunge.audit.transfer import knn_forgotten, probe_forgotten
from expunge.challenges.confusion import confuse
from expunge.challenges.difficulty import grand
from expunge.core import Batch, Key, Request
from expunge.registry import is_asked, measures
from expunge.store import Kept, Store
from expunge.tasks.classification import Classification
from tests.conftest import GlobalRandomness
from tests.fixtures import retrained, tiny

SLOW = {"relearn", "relearn_loss", "relearn_benign", "relearn_benign_loss", "anamnesis"}  # they train copies only
ASKED = sorted(name for name in measures() if is_asked(name) and name not in SLOW)


class Counting(nn.Module):
    """A model that counts its calls, in place: a buffer that a look must put back."""

    calls: Tensor

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **named)


@functools.cache
def family(name: str, count: int) -> tuple[nn.Module, ...]:
    return tuple(retrained(name, seed=seed) for seed in range(count))


def subject(name: str = "classification", count: int = 3, **changes: Any) -> Subject:
    case = tiny(name)
    made = Subject(
        case.model, family(name, 4)[3], case.request, case.task, case.test, family(name, 4)[:count], draws=50
    )
    return replace(made, **changes)


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [[t.detach().clone() for t in tensors], grads, flags, hooks]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def odd_state(inner: nn.Module) -> nn.Module:
    """In train mode, a frozen parameter, gradients that a training left."""
    model = Counting(copy.deepcopy(inner)).train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number > 0)
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm", "diffusion"])
def test_no_model_is_changed_and_no_stream_is_drawn_from(task: str, poisoned_randomness: GlobalRandomness) -> None:
    plain = subject(task, 2)
    models = [odd_state(model) for model in (plain.before, plain.after, *plain.retrained)]
    made = replace(plain, before=models[0], after=models[1], retrained=tuple(models[2:]), family=())
    before = [state(model) for model in models]
    for name in ASKED:
        found = measures()[name](made)
        for model, was in zip(models, before, strict=True):
            assert same(state(model), was), name
        if found is not None:
            assert found.low <= found.value <= found.high, name
            assert not any(map(math.isnan, (found.value, found.low, found.high, *found.detail.values()))), name


def test_scores_leave_the_model_as_it_was() -> None:
    case = tiny("causal_lm")
    model, data = odd_state(case.model), case.request.forget.select(range(4))
    was = state(model)
    token_scores(model, case.task, data, 2, Key(0))
    gradient_norms(model, case.task, data, 2, Key(0))
    grand([model], data, case.task)
    assert same(state(model), was)


@pytest.mark.parametrize("name", ASKED)
def test_a_model_of_another_structure_is_no_crash(name: str) -> None:
    """As adapters and shards make it: the same function, under other names."""
    made = subject(after=nn.Sequential(OrderedDict(inside=tiny("classification").model)))
    found = measures()[name](made)
    assert found is None or math.isfinite(found.value)


def test_models_by_name_are_opened_once_for_all_looks(tmp_path: Path) -> None:
    made = subject()
    opened: list[str] = []

    def kept(name: str, model: nn.Module) -> Kept:
        return Kept(name, lambda: opened.append(name) or copy.deepcopy(model))  # type: ignore[func-returns-value]

    named = replace(
        made,
        before=kept("before", made.before),
        after=kept("after", made.after),
        retrained=tuple(kept(f"r{k}", model) for k, model in enumerate(made.retrained)),
        family=(),
        store=Store(tmp_path),
    )
    for data in ("forget", "retain", "test"):  # what they say, from then on in the store
        named.outputs(data)
    for measure, most in ((restoration.restoration, 3), (knn_forgotten, 2), (probe_forgotten, 0)):
        opened.clear()
        assert measure(named) is not None
        assert opened.count("after") <= most


def test_agreement_of_two_retrained_models_is_over_their_own_floor() -> None:
    """Each held-out one is as near to the other as the two are to each other: its likeness is the floor itself."""
    made = subject(count=2)
    found = retraining_agreement(made)
    assert found is not None
    assert found.reference is not None
    expected = []
    for number in range(2):
        held, other = made.held_out(number), made.retrained[1 - number]
        outputs = []
        for name in ("forget", "retain", "test", "test_forgotten"):
            shares = [float(np.mean(held.outputs(name, model).correct)) for model in (held.after, other)]
            outputs.append(1 - abs(shares[0] - shares[1]))
        probes = []
        for measure in (probe_forgotten, knn_forgotten):
            pair = [measure(held.judging(model)) for model in (held.after, other)]
            probes.append(1 - abs(pair[0].value - pair[1].value) / 100)  # type: ignore[union-attr]
        expected.append(harmonic(float(np.mean(outputs)), float(np.mean([1.0, 1.0, *probes]))))
    assert found.reference[0] == pytest.approx(min(expected), abs=1e-9)


def test_a_run_that_broke_on_its_way_is_outside() -> None:
    """A loss that was no number is the worst there is: infinite, and surely so."""
    made = subject("regression")
    history = [
        {"watch/retain": value, "watch_error/retain": error} for value, error in ((math.nan, math.nan), (0.5, 0.1))
    ]
    ends = {"watch/retain": 0.5, "watch_error/retain": 0.1}
    watch = {"every": 1, "unit": made.task.unit, "probes": {"retain": {"examples": 80, "data": ""}}}
    record = {"watch": watch, "watched": {"start": ends, "end": ends}, "history": history}
    watched = replace(made, record=record)
    worst, gap = worst_retain(watched), stability_gap_retain(watched)
    assert worst is not None
    assert (worst.value, worst.low, worst.high) == (math.inf,) * 3
    assert worst.verdict == "outside"
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == (math.inf,) * 3
    broken = {**ends, "watch/retain": math.nan}
    never_back = stability_gap_retain(
        replace(watched, record={**record, "watched": {"start": ends, "end": broken}, "history": history[:1]})
    )
    assert never_back is not None
    assert not math.isnan(never_back.value)
    assert accuracy.retain_loss(watched) is not None


def test_one_example_of_a_class_and_no_other_cannot_be_restored() -> None:
    case = tiny("classification")
    request = Request(case.request.forget.select([0]), case.request.retain)
    made = subject(request=request, test=None)
    assert restoration.restoration(made) is None
    assert restoration.restoration_as_published(made) is None


def test_a_task_of_the_users_own_that_names_no_label_column() -> None:
    """All that a classifier must have, and the inputs; how labels are kept is its own affair."""
    inner = Classification(5)
    needed = ("name", "unit", "stochastic", "check", "prepare", "nll", "units", "chance", "outputs", "divergence")
    own = SimpleNamespace(
        **{name: getattr(inner, name) for name in (*needed, "relabel", "classes", "labels", "logits", "inputs")}
    )
    made = subject(task=own)
    for name in ASKED:
        measures()[name](made)
    assert inversion(made) is None


def test_unseen_records_are_counted_once() -> None:
    """Fewer unseen records than deleted ones: repeating them would narrow the interval."""
    made = subject()
    few = made.data("test_forgotten").select(range(3))
    others = made.data("test").select(range(20))
    rows = [batch for data in (few, others) for batch in data.batches(100)]
    test = made.test.select(torch.nonzero(torch.isin(made.test.ids, torch.cat([b["id"] for b in rows]))).flatten())  # type: ignore[union-attr]
    found = inversion(replace(made, test=test))
    assert found is not None
    assert found.n == len(made.data("forget")) + 3


@pytest.mark.parametrize("measure", [pruned_forget_accuracy, input_perturbation])
def test_none_right_of_twenty_is_no_certainty(measure: Callable[[Subject], Reading | None]) -> None:
    """Models that never name the class: every resample gives 0, and still one of the next twenty may be right."""

    def beheaded(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model[7].weight[3], model[7].bias[3] = 0.0, -1e4  # type: ignore[index]
        return model

    made = subject()
    others = tuple(beheaded(model) for model in made.retrained)
    found = measure(replace(made, after=beheaded(made.after), retrained=others, family=()))  # type: ignore[arg-type]
    assert found is not None
    assert found.value == 0
    assert found.high == pytest.approx(100 * float(intervals.wilson(0, 20)[1]))


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm"])
def test_a_disturbance_does_not_depend_on_the_size_of_a_pass(task: str) -> None:
    found = [input_perturbation(replace(subject(task), batch=size, cache=Cache())) for size in (256, 7)]
    assert found[0] is not None
    assert found[1] is not None
    for line, points in found[0].curves.items():
        assert np.allclose(points, found[1].curves[line], rtol=1e-5, atol=1e-6)


def test_disturbed_inputs_are_prepared() -> None:
    """A task may change its inputs in ``prepare``: the undisturbed accuracy is then that of the audit."""

    @dataclass(frozen=True)
    class Scaled(Classification):
        def prepare(self, batch: Batch, rng: Key) -> Batch:
            return {**batch, "x": -batch["x"]}

    made = subject(task=Scaled(5))
    found = input_perturbation(made)
    assert found is not None
    assert found.curves["original"][1][0] == pytest.approx(
        100 * float(np.mean(made.outputs("forget", made.before).correct))
    )
    assert found.curves["original"][1][0] < 100


def test_shares_that_are_all_alike() -> None:
    assert nested_interval(np.ones((3, 20)), 50, Key(0), shares=True) == pytest.approx((1 - 0.16113, 1.0), abs=1e-4)
    assert nested_interval(np.ones((3, 20)), 50, Key(0)) == pytest.approx((1.0, 1.0))
    spread = np.random.default_rng(0).random((3, 20))
    assert nested_interval(spread, 50, Key(0), shares=True) == nested_interval(spread, 50, Key(0))


def test_some_of_a_class_keep_their_label() -> None:
    train = tiny("classification").request.retain
    made = confuse(train, (0, 1), share=0.99)
    left = torch.cat([batch["y"] for batch in made.request.retain.batches(100)])
    assert bool((left == 0).any())
    assert bool((left == 1).any())
