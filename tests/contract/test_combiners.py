"""What every combiner keeps to: identity on one objective, scaling, symmetry, no conflict, cuts, purity."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Classification, RunFailed, Scope, registry, split
from expunge.combine import OfMeans, Weighted
from expunge.compose import SAM, Alternate, Clip, Turn, ZerothOrder, clock_of
from expunge.core import Batch, Case, Combiner, Grads, Key
from expunge.implicit import ImplicitSurgery
from expunge.objectives import NLL, SimNPO
from expunge.oracle import Draws, On, Oracle
from expunge.smooth import Curvature, GradientNorm, RandomNoise, Smoothed
from expunge.zeroth import Coordinates

KINDS = registry.parts("combiners")
KINDS.pop("Turn", None)
TURNS = Alternate((Turn(("forget", "retain")),))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Alternate": {"turns": TURNS.turns},
    "OfMeans": {"function": lambda losses: sum(losses.values())},
    "ZerothOrder": {"directions": 0, "mu": 1e-6},
    "Coordinates": {"mu": 1e-6, "count": 64},
    "Clip": {"max_norm": 1e3},
    "SalientRows": {"percentile": 0.0},
    "Rectified": {"gamma": 0.0, "bank": 1},
}
COMBINERS: dict[str, Combiner] = {name: kind(**ARGUMENTS.get(name, {})) for name, kind in KINDS.items()}
COMBINERS |= {f"ImplicitSurgery {form}": ImplicitSurgery(form=form, start=0.5) for form in ("log", "raw", "paper")}
COMBINERS |= {f"Smoothed {type(by).__name__}": Smoothed(by=by) for by in (RandomNoise(), GradientNorm(), Curvature())}

PROTECTING = {
    "OneSidedProjection",
    "FastImplicitSurgery",
    "PrimalDual",
    "SafeGrad",
    "Rectified",
    *(name for name in COMBINERS if name.startswith("ImplicitSurgery")),
}
INVARIANT = {"Nash", "ImplicitSurgery", "ImplicitSurgery log"}  # of degree 0 in the losses: only the rate sets the step
SYMMETRIC = set(COMBINERS) - PROTECTING - {"SalientRows"}  # whose rows are those of one role
HARMLESS = {"UPGrad", "MGDA", "PCGrad", "Nash", "IMTLG", "OneSidedProjection"}  # with two roles, no loss rises


@dataclass(frozen=True)
class Plane:
    """offset + slope . theta: an objective whose gradient is known."""

    slope: Tensor
    offset: float = 20.0
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return (
            self.offset
            + sum(
                (p * g).sum()
                for p, g in zip(case.scope.parameters(case.model).values(), self.slope.split(3), strict=True)
            )
        ).reshape(1)


class Two(nn.Module):
    """Two parameters of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))


def planes(**slopes: Tensor) -> Oracle:
    """An oracle over losses with these gradients."""
    model = Two()
    request = split((torch.zeros(4, 1), torch.zeros(4).long()), forget=[0])
    case = Case(model, request, Classification(2), Scope.all(model))
    roles = {name: On(None, Plane(slope)) for name, slope in slopes.items()}
    return Oracle(case, roles, Draws(case, roles, Key(1), 0, {}, lambda role, step: step), lr=0.1)


def update(combiner: Combiner, **slopes: Tensor) -> Tensor:
    """The first update of a combiner on these gradients, flat [6]."""
    grads, _ = combiner.combine(planes(**slopes), combiner.init())
    return torch.cat([grads.get(name, torch.zeros(3, dtype=torch.float64)) for name in ("a", "b")])


def vector(seed: int) -> Tensor:
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conflicting(seed: int) -> tuple[Tensor, Tensor]:
    """Two gradients with a cosine below zero."""
    first, second = vector(seed), vector(seed + 100) * 0.3
    return first, second - (float(first @ second) / float(first @ first) + 0.2) * first


EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROUGH = {"rtol": 1e-6, "atol": 1e-6}


def close(name: str) -> dict[str, float]:
    """Forward differences of a plane are exact to rounding, which a step of 1e-6 enlarges."""
    return ROUGH if name in ("ZerothOrder", "Coordinates") else EXACT


@pytest.mark.parametrize("name", sorted(set(COMBINERS) - PROTECTING))
def test_one_objective_alone_is_the_identity(name: str) -> None:
    combiner = Alternate((Turn(("forget",)),)) if name == "Alternate" else COMBINERS[name]
    gradient = vector(1)
    torch.testing.assert_close(update(combiner, forget=gradient), gradient, **close(name))


@pytest.mark.parametrize("name", sorted(PROTECTING))
def test_protecting_combiners_say_that_they_need_two_roles(name: str) -> None:
    for role in ("forget", "retain"):
        with pytest.raises(RunFailed, match="retain"):
            update(COMBINERS[name], **{role: vector(1)})


@pytest.mark.parametrize("name", ["OneSidedProjection", "PCGrad", "Weighted"])
def test_without_conflict_nothing_is_projected(name: str) -> None:
    forget = vector(2)
    retain = forget * 0.5 + 0.1 * vector(3)
    assert float(forget @ retain) > 0
    expected = forget if name == "OneSidedProjection" else forget + retain
    torch.testing.assert_close(update(COMBINERS[name], forget=forget, retain=retain), expected, **EXACT)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_conflict_is_removed(name: str, seed: int) -> None:
    """To first order a step raises no loss (of one-sided surgery: not the protected one)."""
    forget, retain = conflicting(seed)
    assert float(forget @ retain) < 0
    step = update(COMBINERS[name], forget=forget, retain=retain)
    assert float(step.norm()) > 1e-3
    assert float(step @ retain) >= -1e-9
    if name != "OneSidedProjection":
        assert float(step @ forget) >= -1e-9


@pytest.mark.parametrize("factor", [1e-3, 7.0])
@pytest.mark.parametrize("name", sorted(COMBINERS))
def test_scaling_all_losses(name: str, factor: float) -> None:
    """An update is of degree one in the losses, or does not depend on their scale at all."""
    forget, retain = conflicting(4)
    plain = update(COMBINERS[name], forget=forget, retain=retain)
    model_losses = {"forget": Plane(forget * factor, 20.0 * factor), "retain": Plane(retain * factor, 20.0 * factor)}
    oracle = planes(forget=forget, retain=retain)
    oracle.roles = {role: On(None, plane) for role, plane in model_losses.items()}
    oracle.draws.roles = oracle.roles
    grads, _ = COMBINERS[name].combine(oracle, COMBINERS[name].init())
    degree = 0 if name in INVARIANT else 1
    torch.testing.assert_close(torch.cat([grads["a"], grads["b"]]) / factor**degree, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SYMMETRIC))
def test_the_order_of_roles_does_not_matter(name: str) -> None:
    first, second = conflicting(6)
    torch.testing.assert_close(
        update(COMBINERS[name], forget=first, retain=second),
        update(COMBINERS[name], retain=first, forget=second),
        **close(name),
    )
    if name not in ("PCGrad", "Alternate"):  # PCGrad of three draws an order; these turns have two roles
        three = {"a": first, "b": second, "c": vector(9)}
        forwards = update(COMBINERS[name], **three)
        torch.testing.assert_close(
            update(COMBINERS[name], **dict(reversed(three.items()))), forwards, rtol=1e-6, atol=1e-6
        )


def trained(weight: bool = True) -> Case:
    """A float64 classifier, unequal weights, a masked scope."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (50,), generator=generator)
    with torch.random.fork_rng([]):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    columns = {"x": x, "y": y, **({"weight": torch.rand(50, generator=generator) * 3 + 0.01} if weight else {})}
    names = tuple(name for name, _ in model.named_parameters())
    scope = Scope({"0.weight": torch.rand(6, 4, generator=generator) < 0.5, "2.weight": True, "2.bias": True}, names)
    return Case(model, split(columns, forget=list(range(20))), Classification(3), scope)


def oracle_of(case: Case, combiner: Combiner, pieces: int, step: int = 0) -> Oracle:
    roles = {"forget": On("forget", SimNPO()), "retain": On("retain", NLL())}
    draws = Draws(case, roles, Key(2), step, {"forget": 11, "retain": 11}, clock_of(combiner))
    return Oracle(case, roles, draws, accumulate=pieces, step=step, lr=0.01)


def two_steps(combiner: Combiner, pieces: int) -> list[Grads]:
    """Two updates with a settle between them, batches of 11 cut in `pieces`."""
    case, state, updates = trained(), combiner.init(), []
    for step in range(2):
        oracle = oracle_of(case, combiner, pieces, step)
        grads, state = combiner.combine(oracle, state)
        updates.append({name: grad.clone() for name, grad in grads.items()})
        with torch.no_grad():
            for name, parameter in case.scope.parameters(case.model).items():
                if name in grads:
                    parameter.sub_(0.01 * grads[name])
        settle = getattr(combiner, "settle", None)
        state = state if settle is None else settle(oracle.again(), state)
    return updates


CUTS = {
    **COMBINERS,
    "ZerothOrder": ZerothOrder(mu=1e-2, directions=4),
    "Coordinates": Coordinates(mu=0.1, count=30, queries=2),
    "SAM along": SAM(Weighted(), along=("forget",)),
    "Clip tight": Clip(Weighted(), 1e-2),
    "OfMeans log": OfMeans(lambda losses: losses["forget"].log() + losses["retain"].log()),
}


@pytest.mark.parametrize("name", sorted(CUTS))
def test_cutting_a_batch_changes_nothing(name: str) -> None:
    """Batches of 11 in one piece, pieces of 4 (three of them) and of 1, in float64."""
    whole = two_steps(CUTS[name], 1)
    assert all(float(grad.norm()) > 0 for grad in whole[0].values())
    for pieces in (3, 11):
        for found, expected in zip(two_steps(CUTS[name], pieces), whole, strict=True):
            assert found.keys() == expected.keys()
            for parameter, value in expected.items():
                assert float((found[parameter] - value).abs().max()) < 1e-12 * max(1.0, float(value.abs().max()))


@pytest.mark.parametrize("name", sorted(CUTS))
def test_a_combiner_is_pure(name: str, poisoned_randomness: Any) -> None:
    """Same bits twice; the state it was given, the weights and the global random state as before."""
    combiner, case = CUTS[name], trained()
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    state = combiner.init()
    given = copy.deepcopy(state)
    found = []
    for _ in range(2):
        oracle = oracle_of(case, combiner, 1)
        grads, new = combiner.combine(oracle, state)
        if hasattr(combiner, "settle"):
            held = copy.deepcopy(new)
            combiner.settle(oracle.again(), new)
            assert new == held, "settle changed the state that it was given"
        found.append({n: g.clone() for n, g in grads.items()})
        assert all(math.isfinite(value) for value in oracle.report.values())
    assert state == given, "combine changed the state that it was given"
    assert set(found[0]) <= set(case.scope.masks)
    for parameter, grad in found[0].items():
        assert torch.equal(grad, found[1][parameter])
        assert grad.dtype == torch.float64
    mask = case.scope.masks["0.weight"]
    assert not bool(found[0]["0.weight"][~mask].any())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in case.model.named_parameters())


def test_weights_of_examples_matter() -> None:
    """The test of cuts is one of unequal weights only if they do."""
    case = trained(weight=False)
    plain, _ = Weighted().combine(oracle_of(case, Weighted(), 1), {})
    assert float((plain["2.bias"] - two_steps(Weighted(), 1)[0]["2.bias"]).abs().max()) > 1e-3
