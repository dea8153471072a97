"""Any method with any part: a walk over what there is, so that a new method, objective or combiner joins by itself.

Methods inside a pruning, a saliency mask, an adapter, and an adapter that acts through a mask; objectives with every
combiner, surgery and zeroth order among them. What cannot be combined says so itself: a method by a departure from the
contract ``pruned``, ``salient``, ``adapter`` or ``adapter_moves``, which must then fail; an objective by refusing the task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Data, Refused, Request, RunFailed, Scope, as_data, chain, methods, unlearn
from expunge.combine import OneSidedProjection, Weighted
from expunge.compose import ZerothOrder
from expunge.core import Case, Combiner, Grads, Key, Objective, Stage, map_tensors
from expunge.data.sources import collect
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.oracle import Draws, On, Oracle, differentiable
from expunge.run import Outcome
from expunge.saliency import Saliency
from expunge.wrap import LoRA, in_adapter
from expunge.zeroth import Coordinates
from tests.contract.test_combiners import COMBINERS, HARMLESS
from tests.contract.test_methods import METHODS, Picture, contract, same, settings_of, state
from tests.contract.test_objectives import KINDS, moved, objectives
from tests.fixtures import given, tiny

torch.set_num_threads(1)
TASKS = ("classification", "regression")
SHARE, KEEP = 0.5, 0.3


# Methods in brackets


@dataclass
class Look:
    """A stage that changes nothing, and keeps what the method after it is given."""

    scope: Scope | None = field(default=None, repr=False)
    before: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, case: Case) -> Case:
        self.scope, self.before = case.scope, state(case.model)
        return case


Bracket = Callable[[Look, Stage], Stage]
BRACKETS: dict[str, tuple[str, Bracket]] = {
    "pruned": ("pruned", lambda look, stage: methods.prune_first(inner=chain(look, stage), share=SHARE, steps=0)),
    "salient": ("salient", lambda look, stage: chain(Saliency(KEEP), look, stage)),
    "adapter": ("adapter", lambda look, stage: chain(look, in_adapter(LoRA(2), stage))),
    "adapter in a mask": ("adapter", lambda look, stage: chain(Saliency(KEEP), look, in_adapter(LoRA(2), stage))),
}
"""Name -> (the contract, look and method -> what is run)."""

CHEAP = ("pruned", "salient", "adapter")

WALK = [
    pytest.param(name, task, bracket, id=f"{name}-{task}-{bracket}")
    for name, spec in METHODS.items()
    for task in TASKS
    if task in spec.tasks
    for bracket in BRACKETS
]
walk = pytest.mark.parametrize(("name", "task", "bracket"), WALK)


def run(name: str, task: str, bracket: str, look: Look, **changes: Any) -> Outcome:
    """The method inside a bracket, on a tiny model, with little work; the caller's things are watched."""
    spec, found = METHODS[name], tiny(task)
    request = given(spec.needs, found.request, found.task)
    before = Picture.of(found.model, request)
    stage = BRACKETS[bracket][1](look, spec.build(**settings_of(spec, **changes)))
    done = unlearn(found.model, request, task=found.task, method=stage)
    before.assert_unchanged(found.model, request)
    return done


def inside(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by the names of the model that went in: a method may put something beside that model."""
    return {name.removeprefix("model."): value for name, value in state(model).items()}


def adapted(model: nn.Module) -> set[str]:
    """The weights that an adapter stands on, and no others move."""
    return {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


@walk
def test_a_method_inside_a_part(name: str, task: str, bracket: str) -> None:
    """It runs and does something; all is finite; to the bit nothing moves that is pruned, masked or not adapted."""
    spec, look, key = METHODS[name], Look(), BRACKETS[bracket][0]
    with contract(spec, key, task):
        done = run(name, task, bracket, look)
        found = inside(done.model)
        assert all(bool(torch.isfinite(value).all()) for value in found.values())
        open_to = adapted(done.model) if key == "adapter" else set(look.scope.masks)
        for parameter, start in look.before.items():
            free: Any = look.scope.masks.get(parameter, False) if parameter in open_to else False
            changed = found[parameter] != start
            assert not bool((changed & ~torch.as_tensor(free)).any()), f"{parameter} moved where it may not"
    if f"contract:{key}" in spec.departures:
        return
    with contract(spec, f"{key}_moves", task):
        assert not same(state(done.model), look.before), "the method changed nothing"


@pytest.mark.parametrize(("name", "task", "bracket"), [case for case in WALK if case.values[2] in CHEAP])
def test_dose_zero_is_the_identity_inside_a_part(name: str, task: str, bracket: str) -> None:
    """What comes back is what the method was given."""
    spec, look, key = METHODS[name], Look(), BRACKETS[bracket][0]
    if spec.dose is None or f"contract:{key}" in spec.departures:
        pytest.skip("no dose" if spec.dose is None else spec.departures[f"contract:{key}"])
    done = run(name, task, bracket, look, **{spec.dose: 0})
    assert same(inside(done.model), look.before)


@pytest.mark.parametrize("task", TASKS)
def test_the_brackets_hold_something(task: str) -> None:
    """The walk is a test only if there are weights to hold, and pruned ones are 0."""
    for bracket, share in (("pruned", SHARE), ("salient", KEEP)):
        look = Look()
        run("finetune", task, bracket, look)
        whole = sum(p.numel() for p in tiny(task).model.parameters())
        assert look.scope.count(tiny(task).model) == pytest.approx(share * whole, rel=0.1)
    run("finetune", task, "pruned", look := Look())
    for parameter, mask in look.scope.masks.items():
        if isinstance(mask, Tensor):
            assert not bool(look.before[parameter][~mask].any())


# Objectives with combiners


def fitting(task: str, name: str) -> tuple[Case, Objective]:
    """A case in float64, a part of its first and last layer in scope, and the objective, if it is one per example there."""
    case = moved(task)
    parameters = case.scope.parameters(case.model)
    ends = [next(iter(parameters)), *list(parameters)[-2:]]
    masks = {n: (torch.arange(p.numel()) % 4 == 0).reshape(p.shape) for n, p in parameters.items() if n in ends}
    objective = objectives(case)[name]
    if getattr(objective, "parameters_only", False):
        pytest.skip("a penalty, which has no examples")
    request = Request(*(wide(case.request.data(part)) for part in ("forget", "retain", "valid")))
    case = Case(case.model, request, case.task, Scope(masks, case.scope.universe), case.teachers)
    try:
        asked(case, objective).evaluate("forget")
    except Refused as error:
        if f"task {task!r}" not in str(error):
            raise
        pytest.skip(str(error))
    return case, objective


def wide(data: Data) -> Data:
    """The same examples in float64."""
    batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, collect(data))
    return as_data({name: values for name, values in batch.items() if name != "id"}, ids=batch["id"])


def asked(case: Case, objective: Objective) -> Oracle:
    """What a combiner asks at the first step."""
    roles = {"forget": On("forget", objective), "retain": On("retain", NLL())}
    draws = Draws(case, roles, Key(1), 0, dict.fromkeys(roles, 7), lambda role, step: step)
    return Oracle(case, roles, draws, lr=1e-3)


def flat(case: Case, grads: Grads) -> Tensor:
    """[n] over the scope; absent gradients are 0."""
    named = case.scope.parameters(case.model).items()
    return torch.cat([grads[n].flatten() if n in grads else torch.zeros_like(p).flatten() for n, p in named]).detach()


def update(case: Case, objective: Objective, combiner: Combiner) -> Tensor:
    """The first update, flat."""
    return flat(case, combiner.combine(asked(case, objective), combiner.init())[0])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


pairs = pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS for name in sorted(KINDS)])


@pairs
def test_every_combiner_takes_every_objective(task: str, name: str) -> None:
    """Two steps are finite; where surgery protects the retain loss, it does not rise to first order."""
    case, objective = fitting(task, name)
    start = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    with differentiable(case):
        forget, retain = (flat(case, asked(case, objective).grad({role: 1.0})) for role in ("forget", "retain"))
        loss = asked(case, objective).evaluate("forget")
    assert float(forget.norm()) > 0
    for label, combiner in COMBINERS.items():
        plan = Descend(objective, NLL(), combine=combiner, optimizer=SGD(1e-4), steps=2, batch=7)
        try:
            plan(case)
        except RunFailed as error:
            if loss > 0 or "above its floor" not in str(error):
                raise
        for parameter, value in case.model.named_parameters():
            assert bool(torch.isfinite(value).all()), f"{label}: {parameter}"
            with torch.no_grad():
                value.copy_(start[parameter])
        if label in HARMLESS:
            with differentiable(case):
                step = update(case, objective, combiner)
            assert float(step @ retain) >= -1e-9 * float(step.norm() * retain.norm()), f"{label} raises the retain loss"


def estimators(inner: Combiner) -> dict[str, Combiner]:
    """All coordinates in scope, by both ways to walk them."""
    return {
        "ZerothOrder": ZerothOrder(inner, mu=1e-6, directions=0),
        "Coordinates": Coordinates(inner, mu=1e-6, count=10_000),
    }


@pytest.mark.parametrize("inner", [Weighted(), OneSidedProjection()], ids=["weighted", "surgery"])
@pairs
def test_zeroth_order_takes_every_objective(task: str, name: str, inner: Combiner) -> None:
    """The update is autograd's, by losses alone; under surgery the retain loss does not rise to first order."""
    case, objective = fitting(task, name)
    with differentiable(case):
        exact, retain = update(case, objective, inner), flat(case, asked(case, objective).grad({"retain": 1.0}))
    for combiner in estimators(inner).values():
        found = update(case, objective, combiner)
        assert bool(torch.isfinite(found).all())
        if not getattr(objective, "constants", False):  # weights that depend on the model, and have no gradient
            assert cosine(found, exact) > 0.9999
        if isinstance(inner, OneSidedProjection):
            assert float(found @ retain) >= -1e-4 * float(found.norm() * retain.norm())
