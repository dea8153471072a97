"""Brackets: what moves, what comes back, and what the teacher inside says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.core import Batch, Case, Key, Refused, chain
from expunge.descend import Descend
from expunge.objectives import NLL, NPO, Distill, Margin, Norm, RandomLabel
from expunge.optim import SGD, AdamW
from expunge.registry import _METHODS, Bound, Method
from expunge.run import unlearn
from expunge.scope import Scope, edit
from expunge.wrap import InAdapter, InputVector, LoRA, in_adapter, with_input_vector
from tests.fixtures import Tiny, odd, seeded, tiny

pytest.importorskip("peft")
torch.set_num_threads(1)


def step(**changes: Any) -> Descend:
    """Ten steps of NPO and NLL with momentum and weight decay."""
    settings: dict[str, Any] = {
        "forget": NPO(),
        "retain": NLL(),
        "optimizer": AdamW(1e-2, weight_decay=0.1),
        "steps": 10,
        "batch": 20,
    }
    return Descend(**{**settings, **changes})


def case_of(found: Tiny, scope: Scope | None = None, **changes: Any) -> Case:
    case = Case(
        found.model,
        found.request,
        found.task,
        scope or Scope.all(found.model),
        {"original": copy.deepcopy(found.model)},
    )
    return replace(case, **changes)


def shape_of(model: nn.Module) -> Any:
    """All that a bracket must put back: module types by name, flags, modes, names, attributes."""
    modules = [
        (name, type(m), m.training, id(m), sorted(m.__dict__), len(m._forward_hooks))
        for name, m in model.named_modules(remove_duplicate=False)
    ]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class Look:
    """A stage that keeps the Case it saw, and may do something with it."""

    def __init__(self, do: Callable[[Case], Any] = lambda case: None):
        self.do, self.case, self.result = do, None, None

    def __call__(self, case: Case) -> Case:
        self.case, self.result = case, self.do(case)
        return case


@pytest.mark.parametrize("name", ["classification", "regression", "causal_lm", "diffusion", "odd"])
def test_the_model_comes_back_plain_and_only_adapted_weights_move(name: str, poisoned_randomness: Any) -> None:
    found = tiny(name)
    structure, before = shape_of(found.model), weights(found.model)
    case = case_of(found)
    after = in_adapter(LoRA(4), step(forget=RandomLabel(), retain=Distill()))(case)
    assert shape_of(after.model) == structure
    assert after.scope is case.scope
    assert after.teachers == case.teachers
    adapted = {f"{layer}.weight" for layer in LoRA(4).layers(found.model, case.scope)}
    assert moved(before, after.model) == adapted
    assert adapted
    for layer in adapted:  # a change of rank 4, to rounding
        change = (after.model.state_dict()[layer] - before[layer]).flatten(1).double()
        values = torch.linalg.svdvals(change)
        assert values[0] > 1e-5
        assert len(values) <= 4 or values[4] < 1e-3 * values[0]


def test_an_odd_model_keeps_its_tied_and_shared_layers_out() -> None:
    found = odd()
    assert set(LoRA(4).layers(found.model, Scope.all(found.model))) == {"left", "right", "head"}
    with pytest.raises(Refused, match="mirror"):
        LoRA(4, targets=("mirror",)).layers(found.model, Scope.all(found.model))


def test_the_merged_function_is_the_function_in_the_adapter() -> None:
    found = tiny("classification")
    batch = found.test.batch(torch.arange(30))
    inside = Look(lambda case: case.task.outputs(case.model, batch).detach())
    after = in_adapter(LoRA(4), chain(step(), inside))(case_of(found))
    with torch.no_grad():
        merged = found.task.outputs(after.model, batch)
        assert (merged - found.task.outputs(tiny("classification").model, batch)).abs().max() > 0.1
    torch.testing.assert_close(merged, inside.result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["classification", "causal_lm"])
def test_a_masked_merge_obeys_the_mask_and_keeps_the_function(name: str) -> None:
    found = tiny(name)
    generator = Key(2).generator()
    masks = {n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in found.model.named_parameters() if p.ndim > 1}
    for layer in [n for n in masks if masks[n].ndim > 1][:1]:
        masks[layer][:] = False
    scope = Scope(masks, Scope.all(found.model).universe)
    before, batch = weights(found.model), found.test.batch(torch.arange(20))
    inside = Look(lambda case: case.task.nll(case.model, batch).detach())
    after = in_adapter(LoRA(8), chain(step(), inside))(case_of(found, scope))
    for layer, value in after.model.state_dict().items():
        mask = masks.get(layer, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], before[layer][~mask])
    assert any(not torch.equal(value, before[n]) for n, value in after.model.state_dict().items())
    with torch.no_grad():
        merged = found.task.nll(after.model, batch)
    torch.testing.assert_close(merged, inside.result, rtol=1e-4, atol=1e-4)
    assert after.scope is scope


def test_layers_out_of_scope_get_no_adapter() -> None:
    found = tiny("classification")
    scope = Scope.match(found.model, "7.*")
    before = weights(found.model)
    after = in_adapter(LoRA(4), step())(case_of(found, scope))
    assert moved(before, after.model) == {"7.weight"}
    with pytest.raises(Refused, match="nothing to attach"):
        in_adapter(LoRA(4), step())(case_of(found, Scope.match(found.model, "*.bias")))


def test_targets_name_layers_or_the_ends_of_their_names() -> None:
    found = tiny("causal_lm")
    scope = Scope.all(found.model)
    assert set(LoRA(targets=("q_proj",)).layers(found.model, scope)) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }
    assert len(LoRA(targets=("layers.1.*",)).layers(found.model, scope)) == 7
    with pytest.raises(Refused, match="query"):
        LoRA(targets=("query",)).layers(found.model, scope)


@pytest.mark.parametrize("name", ["classification", "causal_lm"])
def test_the_teacher_with_adapters_off_is_the_original_to_the_bit(name: str) -> None:
    """copy=False: no second model, and inside the adapter the teacher says what the untouched model says."""
    found, untouched = tiny(name), tiny(name).model
    batch = found.test.batch(torch.arange(12))

    def look(case: Case) -> None:
        flags = [p.requires_grad for p in case.model.parameters()]
        with case.teacher("original") as teacher:
            assert teacher is case.model
            assert torch.equal(found.task.outputs(teacher, batch), found.task.outputs(untouched, batch))
        with case.teacher("original", differentiable=True) as teacher:
            assert not any(p.requires_grad for p in teacher.parameters())
        assert flags == [p.requires_grad for p in case.model.parameters()]
        assert not torch.equal(found.task.outputs(case.model, batch), found.task.outputs(untouched, batch))

    outcome = unlearn(
        found.model, found.request, task=found.task, copy=False, method=in_adapter(LoRA(4), chain(step(), Look(look)))
    )
    assert outcome.model is found.model
    assert "original" not in outcome.case.teachers
    copied = unlearn(untouched, found.request, task=found.task, method=in_adapter(LoRA(4), step()))
    for name_, value in copied.model.state_dict().items():
        assert torch.equal(value, outcome.model.state_dict()[name_])


def test_npo_in_an_adapter_starts_at_its_known_value() -> None:
    """(2 / beta) log 2 at the first step: reference and student are the same numbers."""
    found = tiny("causal_lm")
    outcome = unlearn(
        found.model, found.request, task=found.task, copy=False, method=in_adapter(LoRA(4), step(forget=NPO(beta=0.5)))
    )
    history = [row["loss/forget"] for row in outcome.record["history"]]
    assert history[0] == pytest.approx(4 * 0.6931471805599453, rel=1e-6)
    assert history[-1] < history[0]


def test_needs_are_met_inside_an_adapter_and_refused_outside() -> None:
    found = tiny("classification")
    _METHODS["needy"] = Method(
        "needy", lambda: step(), "none", ("classification",), frozenset({"teacher:original"}), None, "approximate", {}
    )
    try:
        needy = Bound("needy", (), step())
        with pytest.raises(Refused, match="teacher"):
            unlearn(found.model, found.request, task=found.task, method=needy, copy=False)
        inside = in_adapter(LoRA(4), needy)
        assert unlearn(found.model, found.request, task=found.task, method=inside, copy=False).model is found.model
    finally:
        del _METHODS["needy"]


def test_no_steps_change_nothing_and_a_seed_is_the_same_bits() -> None:
    found = tiny("classification")
    same = unlearn(found.model, found.request, task=found.task, method=in_adapter(LoRA(4), step(steps=0)))
    assert moved(weights(found.model), same.model) == set()
    runs = [
        unlearn(found.model, found.request, task=found.task, method=in_adapter(LoRA(4), step()), seed=s).model
        for s in (1, 1, 2)
    ]
    assert moved(weights(runs[0]), runs[1]) == set()
    assert moved(weights(runs[0]), runs[2])


def test_a_failure_inside_leaves_the_model_as_it_was() -> None:
    found = tiny("classification")
    structure, before = shape_of(found.model), weights(found.model)

    def fail(case: Case) -> Case:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        in_adapter(LoRA(4), chain(step(), fail))(case_of(found))
    assert shape_of(found.model) == structure
    assert moved(before, found.model) == set()


def test_adapters_on_adapters_and_bad_settings_are_refused() -> None:
    found = tiny("classification")
    with pytest.raises(Refused, match="adapters already"):
        in_adapter(LoRA(4), in_adapter(LoRA(4), step()))(case_of(found))
    for build in (lambda: LoRA(0), lambda: LoRA(4, alpha=0.0), lambda: LoRA(4, alpha=-1.0)):
        with pytest.raises(Refused):
            build()
    with pytest.raises(Refused, match="replaced the model"):
        in_adapter(LoRA(4), lambda case: replace(case, model=nn.Linear(2, 2)))(case_of(found))


def test_the_formula_of_the_merge() -> None:
    """weight + alpha / rank B A, with B and A set by hand."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 2), nn.Conv2d(2, 3, 1)))(0)
    before, drawn = weights(model), {}

    def fill(case: Case) -> Case:
        values = {
            n: torch.randn(p.shape, generator=Key(1).at(n).generator())
            for n, p in case.scope.parameters(case.model).items()
        }
        drawn.update(values)
        return edit(case, values)

    case = Case(model, tiny("classification").request, tiny("classification").task, Scope.all(model))
    after = in_adapter(LoRA(2, alpha=6.0), fill)(case).model.state_dict()
    for layer in ("0", "1", "2"):
        down, up = drawn[f"{layer}.lora_A.default.weight"], drawn[f"{layer}.lora_B.default.weight"]
        change = (up.flatten(1) @ down.flatten(1)).reshape(before[f"{layer}.weight"].shape)
        torch.testing.assert_close(
            after[f"{layer}.weight"], before[f"{layer}.weight"] + 3.0 * change, rtol=1e-5, atol=1e-5
        )


def test_weights_of_half_precision_keep_their_type() -> None:
    found = tiny("classification")
    model = found.model.bfloat16()
    retype = {part: getattr(found.request, part) for part in ("forget", "retain")}
    calls = replace(found.task, call=lambda model, batch: model(batch["x"].bfloat16()).float())
    after = in_adapter(LoRA(4), step())(
        Case(model, replace(found.request, **retype), calls, Scope.all(model), {"original": copy.deepcopy(model)})
    )
    assert {p.dtype for p in after.model.parameters()} == {torch.bfloat16}


class Stop(Exception):
    """A kill."""


class Dying:
    """An objective that kills the run at its n-th call."""

    def __init__(self, after: int):
        self.left = after

    def __repr__(self) -> str:
        return "NLL()"

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise Stop
        return case.task.nll(case.model, batch) / case.task.units(batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        return case.task.units(batch)


@pytest.mark.parametrize("kill", [1, 4, 7, 12, 15])
def test_a_run_killed_inside_an_adapter_ends_in_the_same_bits(kill: int, tmp_path: Path) -> None:
    found = tiny("classification")

    def method(retain: Any) -> Any:
        first = Descend(retain=retain, optimizer=SGD(0.01), steps=5, batch=20)
        return chain(first, in_adapter(LoRA(4), chain(step(retain=retain, steps=6), step(retain=retain, steps=5))))

    whole = unlearn(found.model, found.request, task=found.task, method=method(NLL())).model
    with pytest.raises(Stop):
        unlearn(
            found.model, found.request, task=found.task, method=method(Dying(kill)), out=tmp_path / "run", every=0.0
        )
    again = unlearn(
        found.model, found.request, task=found.task, method=method(NLL()), out=tmp_path / "run", every=0.0
    ).model
    assert moved(weights(whole), again) == set()


# Input vectors


def vector(steps: int = 40) -> Descend:
    return Descend(forget=Margin(), retain=NLL(), others={"size": Norm()}, optimizer=AdamW(0.05), steps=steps, batch=40)


def test_an_input_vector_moves_alone_and_forgets() -> None:
    found = tiny("classification")
    before, batch = weights(found.model), found.request.forget.batch(torch.arange(20))
    outcome = unlearn(found.model, found.request, task=found.task, method=with_input_vector(vector()))
    model = outcome.model
    assert isinstance(model, InputVector)
    assert model.vector.shape == (1, 8, 8)
    assert float(model.vector.detach().norm()) > 0.1
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        shifted = {**batch, "x": batch["x"] + model.vector}
        assert torch.equal(found.task.nll(model, batch), found.task.nll(found.model, shifted))
        assert found.task.nll(model, batch).mean() > 2 * found.task.nll(found.model, batch).mean()
    assert outcome.case.scope.masks.keys() == {f"model.{name}" for name, _ in found.model.named_parameters()}
    assert all(name in dict(model.named_parameters()) for name in outcome.case.scope.universe)


def test_a_finished_run_with_a_vector_is_read_back(tmp_path: Path) -> None:
    found = tiny("classification")
    first, second = (
        unlearn(found.model, found.request, task=found.task, method=with_input_vector(vector(3)), out=tmp_path / "run")
        for _ in range(2)
    )
    assert second.case is None
    assert moved(weights(first.model), second.model) == set()


def test_rows_through_a_wrapped_model_are_counted_once() -> None:
    found = tiny("classification")
    method = with_input_vector(Descend(forget=Margin(), steps=3, batch=20))
    assert unlearn(found.model, found.request, task=found.task, method=method).record["cost"]["forward"] == 60
    again = unlearn(
        found.model, found.request, task=found.task, method=chain(method, Descend(retain=NLL(), steps=2, batch=10))
    )
    assert again.record["cost"]["forward"] == 80


def test_without_a_copy_the_teacher_has_no_vector() -> None:
    found = tiny("classification")
    batch = found.test.batch(torch.arange(10))

    def look(case: Case) -> None:
        with case.teacher("original") as teacher:
            assert torch.equal(found.task.nll(teacher, batch), found.task.nll(tiny("classification").model, batch))
        assert not torch.equal(found.task.nll(case.model, batch), found.task.nll(tiny("classification").model, batch))

    method = with_input_vector(chain(vector(5), Look(look), Descend(forget=Distill(), steps=1)))
    outcome = unlearn(found.model, found.request, task=found.task, method=method, copy=False)
    assert "original" not in outcome.case.teachers
    assert outcome.model.model is found.model


def test_vectors_of_other_shapes_tasks_and_calls() -> None:
    found = tiny("classification")
    one = unlearn(found.model, found.request, task=found.task, method=with_input_vector(vector(2), shape=(1, 1, 8)))
    assert one.model.vector.shape == (1, 1, 8)
    strange = odd()
    with pytest.raises(Refused, match="shape"):
        unlearn(strange.model, strange.request, task=strange.task, method=with_input_vector(vector(2)))
    both = unlearn(
        strange.model, strange.request, task=strange.task, method=with_input_vector(vector(2), shape=(1, 4, 8))
    )
    assert both.model.vector.abs().sum() > 0
    words = tiny("causal_lm")
    with pytest.raises(Refused, match="shape"):
        unlearn(words.model, words.request, task=words.task, method=with_input_vector(vector(2)))
    noisy = tiny("diffusion")
    plain = Descend(forget=RandomLabel(), retain=NLL(), steps=2, batch=20)
    assert unlearn(noisy.model, noisy.request, task=noisy.task, method=with_input_vector(plain)).model.vector.shape == (
        1,
        8,
        8,
    )


def test_brackets_print_themselves_and_hold_their_stage() -> None:
    inner = step()
    assert repr(in_adapter(LoRA(8), inner)).startswith(
        "InAdapter(adapter=LoRA(rank=8, alpha=16.0, targets=()), inner=Descend("
    )
    assert isinstance(in_adapter(LoRA(8), inner), InAdapter)
    assert in_adapter(LoRA(8), inner).inner is inner
