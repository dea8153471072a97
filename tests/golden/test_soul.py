"""Sophia against the numbers of its authors' code and a loop by hand, and SOUL against plain torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.journal import load_tree, save_tree
from expunge.methods.soul import soul
from expunge.objectives import NLL, NPO, Ascent
from expunge.optim import Sophia
from tests.golden.by_hand import ALL, furthest, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)
START = (1.0, -0.5, 0.25, 2.0, 0.0)
SLOPE = (1e-3, -0.02, 0.3, -4.0, 0.0)
RELEASED = (
    (0.989, -0.4895, 0.251236229208097, 1.997953144373408, 0.0),
    (0.978011, -0.493085779210637, 0.252020449905270, 1.995931426525604, 0.0),
    (0.987032989, -0.493784109968496, 0.251702715536105, 1.993945629824522, 0.0),
    (0.976045956011, -0.490051576223163, 0.251458695001390, 1.991938670852391, 0.0),
)
"""Printed by SophiaG of OPTML-Group/SOUL (src/optim/sophia.py) with lr 0.01, betas (0.9, 0.95), rho 0.04, weight decay
0.1, bs 5120, for the gradients of ``slope_at`` at steps 0 to 3, in float64."""


def slope_at(step: int) -> Tensor:
    """Gradients some of which change sign from step to step."""
    return torch.tensor(SLOPE, dtype=torch.float64) * torch.cos(torch.arange(5, dtype=torch.float64) + 2 * step)


def trace(setting: Sophia) -> list[Tensor]:
    """The weights after each of four steps."""
    weight = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = setting.build({"weight": weight})
    seen = []
    for step in range(4):
        weight.grad = slope_at(step)
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


def test_the_authors_numbers_with_their_momentum_applied_twice() -> None:
    """Their 0.9 moves m twice in a step, which is 0.81 once."""
    for found, expected in zip(trace(Sophia(0.01, (0.81, 0.95), weight_decay=0.1)), RELEASED, strict=True):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-15)


def test_momentum_moves_once_in_a_step() -> None:
    """The documented difference: with 0.9 the coordinate that is not clipped lands elsewhere from the first step on."""
    found = trace(Sophia(0.01, (0.9, 0.95), weight_decay=0.1))
    by_hand: list[Tensor] = []
    weight, m, h = torch.tensor(START, dtype=torch.float64), torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(4):
        g = slope_at(step)
        m, h = 0.9 * m + 0.1 * g, 0.95 * h + 0.05 * g**2
        moved = [
            0.01 * math.copysign(min(abs(a) / (204.8 * b + 1e-15), 1.0), a)
            for a, b in zip(m.tolist(), h.tolist(), strict=True)
        ]
        weight = weight * (1 - 0.001) - torch.tensor(moved, dtype=torch.float64)
        by_hand.append(weight)
    for mine, expected in zip(found, by_hand, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-14)
    once, twice = 1.998 - float(found[0][3]), 1.998 - RELEASED[0][3]  # the first step, less what the decay took
    assert once / twice == pytest.approx(0.1 / 0.19, rel=1e-9)


def test_no_coordinate_moves_by_more_than_lr_and_small_gradients_by_exactly_lr() -> None:
    weight = nn.Parameter(torch.zeros(6))
    weight.grad = torch.tensor([1e-12, -1e-6, 4e-3, 1e-2, -1e3, 0.0])
    Sophia(0.5).build({"weight": weight}).step()
    moved = weight.detach()
    assert bool((moved.abs() <= 0.5).all())
    assert moved[:2].tolist() == [-0.5, 0.5]
    # m = 0.1 g and h = 0.05 g^2: clipped where |g| <= 2 / 204.8
    assert float(moved[2]) == -0.5
    assert float(moved[3]) == pytest.approx(-0.5 * 2 / (204.8 * 1e-2), rel=1e-6)
    assert float(moved[4]) == pytest.approx(0.5 * 2 / (204.8 * 1e3), rel=1e-6)
    assert float(moved[5]) == 0.0


def test_half_precision_survives_gradients_whose_square_is_zero() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    weight.grad = torch.tensor([1e-5, 0.0, -1e-5], dtype=torch.float16)
    Sophia(0.25).build({"weight": weight}).step()
    assert weight.tolist() == [-0.25, 0.0, 0.25]


def test_a_weight_without_a_gradient_is_neither_moved_nor_decayed() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Sophia(0.1, weight_decay=0.5).build({"one": one, "other": other})
    one.grad = torch.ones(2)
    optimizer.step()
    assert other.tolist() == [1.0, 1.0]
    assert len(optimizer.state_dict()["state"]) == 1


def test_state_saved_and_loaded_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.tensor(START))
    optimizer = Sophia(0.01).build({"weight": weight})
    for step in range(5):
        if step == 2:
            again = nn.Parameter(weight.detach().clone())
            resumed = Sophia(0.01).build({"weight": again})
            save_tree(tmp_path / "state", optimizer.state_dict())
            resumed.load_state_dict(load_tree(tmp_path / "state"))
        weight.grad = slope_at(step).float()
        optimizer.step()
        if step >= 2:
            again.grad = slope_at(step).float()
            resumed.step()
    assert torch.equal(weight, again)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"rho": 0.0}, "rho"),
        ({"scale": -1.0}, "scale"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "decay"),
    ],
)
def test_bad_numbers_are_refused(setting: dict, word: str) -> None:
    with pytest.raises(ex.Refused, match=word):
        Sophia(**setting)


@pytest.mark.parametrize("forget", [Ascent(), NPO(0.5)])
def test_golden_steps(forget: object) -> None:
    """Six steps over whole data, written in plain torch."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    before = F.cross_entropy(model(xf), yf, reduction="none").detach()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in weights.items()}
    h = {name: torch.zeros_like(p) for name, p in weights.items()}
    for _ in range(6):
        nll = F.cross_entropy(torch.func.functional_call(model, weights, (xf,)), yf, reduction="none")
        pull = -nll if isinstance(forget, Ascent) else -2 / 0.5 * F.logsigmoid(0.5 * (nll - before))
        hold = F.cross_entropy(torch.func.functional_call(model, weights, (xr,)), yr)
        grads = torch.autograd.grad(0.3 * pull.mean() + 2.0 * hold, list(weights.values()))
        for (name, p), g in zip(weights.items(), grads, strict=True):
            m[name] = 0.8 * m[name] + 0.2 * g
            h[name] = 0.9 * h[name] + 0.1 * g * g
            step = (m[name].abs() / (0.1 * 50 * h[name] + 1e-15)).clamp(max=1.0)
            p.data.sub_(2e-3 * m[name].sign() * step)
    done = ex.unlearn(
        model,
        request,
        task=TASK,
        method=soul(
            forget=forget, forget_weight=0.3, retain_weight=2.0, lr=2e-3, momentum=0.8, decay=0.9, rho=0.1, scale=50.0,
            steps=6, batch=ALL,
        ),
    )  # fmt: skip
    assert max(float((p - weights[n]).detach().abs().max()) for n, p in done.model.named_parameters()) < 1e-11


def test_any_descend_takes_the_optimizer_and_pieces_do_not_matter() -> None:
    model, request = small()
    stages = [
        ex.Descend(forget=Ascent(), retain=NLL(), optimizer=Sophia(1e-3), steps=4, batch=12, accumulate=pieces)
        for pieces in (1, 5)
    ]
    one, five = (ex.unlearn(model, request, task=TASK, method=stage).model for stage in stages)
    assert furthest(one, five) < 1e-12
    assert furthest(one, model) > 1e-3
