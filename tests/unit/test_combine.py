"""Combiners, each against autograd or a computation by hand; and every registered one against the cut into pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import (
    balance,
    bounded,
    combine,
    compose,
    constrained,
    implicit,
    rectify,
    restriction,
    salient_rows,
    smooth,
    zeroth,
)
from expunge.combine import OfMeans, OneSidedProjection, Weighted
from expunge.compose import SAM, Alternate, Clip, Turn, ZerothOrder
from expunge.core import Batch, Case, Grads, Key, Refused, Request, RunFailed
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.implicit import FastImplicitSurgery, ImplicitSurgery
from expunge.objectives import NLL, NPO, Distill, SimNPO
from expunge.optim import Adam
from expunge.oracle import Draws, On, Oracle, differentiable, positions
from expunge.registry import parts
from expunge.scope import Scope
from expunge.tasks.classification import Classification

torch.set_num_threads(1)
ROWS = {"forget": 13, "retain": 9}


def request() -> Request:
    generator = torch.Generator().manual_seed(3)
    data = {}
    for number, (name, rows) in enumerate(ROWS.items()):
        x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        y, first = torch.randint(0, 3, (rows,), generator=generator), 100 * number
        made = as_data((x, y), ids=range(first, first + rows))
        data[name] = made.annotate("weight", 0.1 + 3 * torch.rand(rows, generator=generator, dtype=torch.float64))
    return Request(**data)


def case(scope: Scope | None = None) -> Case:
    generator = torch.Generator().manual_seed(8)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return Case(model, request(), Classification(3), scope or Scope.all(model))


def oracle(of: Case, accumulate: int = 1, step: int = 0) -> Oracle:
    roles = {"forget": On("forget", NLL()), "retain": On("retain", NLL())}
    draws = Draws(of, roles, Key(5), step, ROWS, lambda role, number: number)
    return Oracle(of, roles, draws, accumulate=accumulate, step=step, lr=0.01)


def update(of: Case, combine: Any, accumulate: int = 1, steps: int = 1) -> Grads:
    """The last of `steps` updates; the model moves between them, so that state and ``settle`` matter."""
    state, start = combine.init(), {n: p.detach().clone() for n, p in of.model.named_parameters()}
    with differentiable(of):
        for step in range(steps):
            asked = oracle(of, accumulate, step)
            grads, state = combine.combine(asked, state)
            with torch.no_grad():
                for name, p in of.model.named_parameters():
                    if name in grads:
                        p.sub_(0.01 * grads[name])
            if hasattr(combine, "settle"):
                state = combine.settle(asked.again(), state)
    with torch.no_grad():
        for name, p in of.model.named_parameters():
            p.copy_(start[name])
    return grads


def loss(of: Case, role: str, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Weighted mean cross-entropy with torch alone."""
    data = of.request.data(role)
    batch = data.batch(torch.arange(len(data)))
    logits = torch.func.functional_call(of.model, weights or dict(of.model.named_parameters()), (batch["x"],))
    return (batch["weight"] * F.cross_entropy(logits, batch["y"], reduction="none")).sum() / batch["weight"].sum()


def autograd(value: Tensor, of: Case) -> Grads:
    names = [n for n, _ in of.model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(value, list(of.model.parameters())), strict=True))


def flat(grads: Grads) -> Tensor:
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def close(found: Grads, expected: Grads, relative: float = 1e-11) -> None:
    assert sorted(found) == sorted(expected)
    assert float((flat(found) - flat(expected)).norm()) <= relative * float(flat(expected).norm())


def log_and_square(losses: dict[str, Tensor]) -> Tensor:
    return torch.log(losses["forget"]) * losses["retain"] ** 2 - torch.tanh(losses["retain"])


MODULES = (
    balance,
    bounded,
    combine,
    compose,
    constrained,
    implicit,
    rectify,
    restriction,
    salient_rows,
    smooth,
    zeroth,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "OfMeans": {"function": log_and_square},
    "Alternate": {"turns": (Turn(("forget", "retain"), combine=OneSidedProjection()), Turn(("forget",)))},
    "ImplicitSurgery": {"start": 0.7},
    "OneSidedProjection": {"tolerance": -5.0},
    "SAM": {"inner": OneSidedProjection()},
}


@pytest.mark.parametrize("name", list(parts("combiners")))
def test_an_update_does_not_depend_on_the_cut_into_pieces(name: str) -> None:
    made = parts("combiners")[name](**SETTINGS.get(name, {}))
    whole = update(case(), made, 1, steps=3)
    assert float(flat(whole).norm()) > 1e-3
    bound = (
        1e-14 / made.mu if name == "Coordinates" else 1e-12
    )  # a difference of losses is divided by mu, and its rounding
    for accumulate in (math.ceil(13 / 5), 13):  # pieces of 5 examples and of 1
        assert float((flat(update(case(), made, accumulate, steps=3)) - flat(whole)).abs().max()) < bound


def test_every_combiner_is_found() -> None:
    here = {
        name: kind
        for module in MODULES
        for name, kind in vars(module).items()
        if getattr(kind, "__module__", "") == module.__name__
    }
    assert set(parts("combiners")) == {
        name for name, kind in here.items() if "combine" in vars(kind) and not name.startswith("_")
    }


def test_weighted_is_the_gradient_of_the_weighted_sum() -> None:
    of = case()
    found = update(of, Weighted({"forget": -0.5, "retain": 2.0}))
    close(found, autograd(-0.5 * loss(of, "forget") + 2 * loss(of, "retain"), of))


def test_of_means_equals_autograd() -> None:
    of = case()
    expected = autograd(log_and_square({role: loss(of, role) for role in ROWS}), of)
    close(update(of, OfMeans(log_and_square)), expected)


def test_clip_scales_to_its_norm_and_leaves_what_is_shorter() -> None:
    of = case()
    whole = update(of, Weighted())
    norm = float(flat(whole).norm())
    clipped = update(of, Clip(Weighted(), norm / 3))
    assert float(flat(clipped).norm()) == pytest.approx(norm / 3, rel=1e-6)
    close(clipped, {n: g / 3 for n, g in whole.items()}, 1e-6)
    assert all(torch.equal(g, whole[n]) for n, g in update(of, Clip(Weighted(), 2 * norm)).items())


@pytest.mark.parametrize("along", [(), ("forget",)])
def test_sam_is_the_gradient_at_the_moved_weights(along: tuple[str, ...]) -> None:
    of = case()
    climbed = sum(loss(of, role) for role in along or tuple(ROWS))
    up = autograd(climbed, of)
    norm = flat(up).norm()
    moved = {n: (p.detach() + 0.3 * up[n] / norm).requires_grad_() for n, p in of.model.named_parameters()}
    value = loss(of, "forget", moved) + loss(of, "retain", moved)
    expected = dict(zip(moved, torch.autograd.grad(value, list(moved.values())), strict=True))
    close(update(of, SAM(Weighted(), 0.3, along)), expected, 1e-7)


def test_zeroth_order_by_coordinates_points_along_the_gradient() -> None:
    of = case()
    expected = autograd(loss(of, "forget") + loss(of, "retain"), of)
    found = update(of, ZerothOrder(Weighted(), mu=1e-6, directions=0))
    assert float(F.cosine_similarity(flat(found), flat(expected), dim=0)) > 0.9999
    assert of.meter.backward == 0
    close(found, expected, 1e-4)


def test_zeroth_order_with_directions_estimates_the_gradient() -> None:
    of = case()
    expected = flat(autograd(loss(of, "forget") + loss(of, "retain"), of))
    found = flat(update(of, ZerothOrder(Weighted(), mu=1e-6, directions=4000)))
    assert float(F.cosine_similarity(found, expected, dim=0)) > 0.98
    assert float(found.norm() / expected.norm()) == pytest.approx(1.0, abs=0.1)


def test_zeroth_order_stays_in_scope() -> None:
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[2, 1] = mask[4, 0] = True
    of = case(Scope({"0.weight": mask}, ("0.weight",)))
    for directions in (0, 8):
        found = update(of, ZerothOrder(Weighted(), mu=1e-6, directions=directions))
        assert list(found) == ["0.weight"]
        assert torch.equal(found["0.weight"] != 0, mask)


def test_at_restores_the_weights_to_the_bit() -> None:
    of = case()
    before = {n: p.detach().clone() for n, p in of.model.named_parameters()}
    shift = {n: 1e-3 * torch.ones_like(p) for n, p in before.items()}
    with differentiable(of):
        asked = oracle(of)
        moved = asked.at(shift)
        shifted = {n: (p + 1e-3).requires_grad_() for n, p in before.items()}
        assert moved.losses["forget"] == pytest.approx(float(loss(of, "forget", shifted).detach()), rel=1e-12)
        moved.grad({"retain": 1.0})
        assert all(torch.equal(p, before[n]) for n, p in of.model.named_parameters())
        with pytest.raises(RunFailed):
            oracle(of).at({n: torch.full_like(p, torch.nan) for n, p in before.items()}).losses["forget"]
        assert all(torch.equal(p, before[n]) for n, p in of.model.named_parameters())
        assert asked.losses["forget"] == pytest.approx(float(loss(of, "forget").detach()), rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 3, 13])
def test_hvp_equals_finite_differences(accumulate: int) -> None:
    of = case()
    generator = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in of.model.named_parameters()}
    first, other = (
        {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
        for _ in range(2)
    )
    with differentiable(of):
        found = oracle(of, accumulate).hvp({"forget": first, "retain": other})
        total = torch.zeros(())
        for role, vector in (("forget", first), ("retain", other)):
            ahead, behind = (
                flat(oracle(of).at({n: h * v for n, v in vector.items()}).grad({role: 1.0})) for h in (1e-5, -1e-5)
            )
            total = total + (ahead - behind) / 2e-5
    assert float((flat(found) - total).norm()) <= 1e-8 * float(total.norm())


def test_fast_surgery_weighs_its_first_step_by_its_start() -> None:
    of = case()
    expected = autograd(loss(of, "forget") / 4 + 3 * loss(of, "retain") / 4, of)
    close(update(of, FastImplicitSurgery(start=3.0)), expected)


def test_a_protected_role_that_is_absent_is_named() -> None:
    of = case()
    with differentiable(of), pytest.raises(RunFailed, match="'other'"):
        OneSidedProjection(protect="other").combine(oracle(of), {})


# ---- Alternate --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Own:
    """A bowl on some parameters, deep in proportion to the examples seen; remembers their ids."""

    pattern: str
    seen: list[Tensor] = field(default_factory=list, repr=False)

    def __call__(self, of: Case, batch: Batch) -> Tensor:
        self.seen.append(batch["id"])
        bowl = sum((p - 1).square().sum() for n, p in of.model.named_parameters() if n.startswith(self.pattern))
        return bowl * (1 + batch["x"][:, 0].abs())


def run(steps: int, combine: Any, **roles: Any) -> dict[str, Tensor]:
    of = case()
    stage = Descend(**roles, combine=combine, optimizer=Adam(0.05, weight_decay=0.1), steps=steps, batch=4)
    return {n: p.detach().clone() for n, p in stage(of).model.named_parameters()}


TURNS = Alternate((Turn(("forget",), 1, "0.*"), Turn(("retain",), 2, "2.*")))


def test_alternate_moves_only_its_turns_names() -> None:
    states = [run(steps, TURNS, forget=NLL(), retain=NLL()) for steps in range(7)]
    for step in range(6):
        acting = "0." if step % 3 == 0 else "2."
        moved = {n for n in states[step] if not torch.equal(states[step][n], states[step + 1][n])}
        assert moved == {acting + "weight", acting + "bias"}


def test_alternate_keeps_each_turns_moments_as_if_it_ran_alone() -> None:
    both = run(9, TURNS, forget=Own("0."), retain=Own("2."))
    first = run(3, Weighted(), forget=Own("0."))
    other = run(6, Weighted(), retain=Own("2."))
    for name, value in both.items():
        assert torch.equal(value, (first if name.startswith("0.") else other)[name])


def test_alternates_clock_counts_the_turns_of_a_role() -> None:
    turns = Alternate((Turn(("a",), 2), Turn(("b", "a"), 1), Turn(("b",), 3)))
    acted = {"a": 0, "b": 0, "c": 0}
    for step in range(20):
        offset = step % 6
        for role in acted:
            assert turns.clock(role, step) == acted[role]
        for role in ("a",) if offset < 2 else ("a", "b") if offset == 2 else ("b",):
            acted[role] += 1


def test_a_role_reads_its_next_batch_at_its_own_turns() -> None:
    forget, retain = Own("0."), Own("2.")
    of = case()
    stage = Descend(forget=forget, retain=retain, combine=TURNS, optimizer=Adam(0.05), steps=9, batch=4)
    key, _ = of.rng.take()
    stage(of)
    for name, objective, turns in (("forget", forget, 3), ("retain", retain, 6)):
        data = of.request.data(name)
        expected = [data.ids[positions(key.at("order", name), len(data), 4, index)] for index in range(turns)]
        assert torch.equal(torch.stack(objective.seen), torch.stack(expected))


def test_shifts_add_up() -> None:
    """So that one wrapper inside another sees the weights that both have moved."""
    of = case()
    shift = {name: torch.full_like(p, 0.01) for name, p in of.scope.parameters(of.model).items()}
    twice = {name: 2 * value for name, value in shift.items()}
    with differentiable(of):
        at = oracle(of).at(shift).at({"0.weight": shift["0.weight"]})
        both = oracle(of).at({**shift, "0.weight": twice["0.weight"]})
        assert at.losses["retain"] == pytest.approx(both.losses["retain"], rel=1e-12)
        assert at.losses["retain"] != pytest.approx(oracle(of).at(shift).losses["retain"], rel=1e-6)


def test_sharpness_by_losses_alone_equals_sharpness_by_gradients() -> None:
    exact = update(case(), SAM(Weighted(), radius=0.3))
    estimate = update(case(), ZerothOrder(SAM(Weighted(), radius=0.3), mu=1e-6, directions=0))
    close(estimate, exact, 1e-4)


def test_sam_around_turns_that_move_a_part() -> None:
    """The climb is in all of the scope, the turn in a part of it."""
    alone = update(case(), Alternate((Turn(("forget",), scope="0.*"),)))
    found = update(case(), SAM(Alternate((Turn(("forget",), scope="0.*"),)), radius=1e-9))
    assert found.keys() == alone.keys() == {"0.weight", "0.bias"}
    close(found, alone, 1e-6)


def test_a_turn_of_an_unknown_role_is_refused() -> None:
    with pytest.raises(Refused, match="'froget'"):
        update(case(), Alternate((Turn(("froget",)),)))


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: ImplicitSurgery(form="Log"), "form"),  # type: ignore[arg-type]
        (lambda: Turn(("forget",), steps=0), "steps"),
        (lambda: Alternate(()), "turns"),
        (lambda: Clip(max_norm=0.0), "max_norm"),
        (lambda: SAM(radius=-1.0), "radius"),
        (lambda: ZerothOrder(mu=0.0), "mu"),
        (lambda: NPO(beta=0.0), "beta"),
        (lambda: SimNPO(beta=-1.0), "beta"),
        (lambda: Distill(temperature=float("nan")), "temperature"),
    ],
)
def test_a_part_refuses_what_is_out_of_its_range(make: Any, setting: str) -> None:
    with pytest.raises(Refused, match=f"{setting} must be"):
        make()


def test_sam_lets_implicit_surgery_compare_like_with_like() -> None:
    """Without a step nothing has changed, so the multiplier must not move: before and after are both at the moved weights."""
    inner = ImplicitSurgery(tolerance=0.0, dual_decay=0.0, start=1.0)
    for combiner in (SAM(inner, radius=0.3), Clip(SAM(SAM(inner, radius=0.3), radius=0.1))):
        of = case()
        with differentiable(of):
            look = oracle(of)
            _, state = combiner.combine(look, combiner.init())
            settled = combiner.settle(look.again(), state)
        assert settled["w"] == 1.0
        assert "shifts" not in settled
