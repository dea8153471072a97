"""DCTAdamW: its basis, a step by hand, the authors' numbers, its state, its resume, and scopes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn

from expunge.core import Key, Refused
from expunge.descend import Descend
from expunge.lean import DCTAdamW, cosine_basis, projected
from expunge.objectives import NLL, NPO
from expunge.optim import AdamW
from expunge.run import unlearn
from expunge.scope import Scope
from tests.fixtures import tiny
from tests.unit.test_wrap import Dying, Stop, moved, weights

torch.set_num_threads(1)


def stepped(optimizer: DCTAdamW, shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A weight given by a formula after steps along gradients given by a formula."""
    k = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape)
    weight = nn.Parameter((0.4 * torch.sin(0.7 * k)).to(dtype))
    built = optimizer.build({"weight": weight})
    for step in range(steps):
        grad = torch.cos((0.3 + 0.11 * step) * k + step) * (1 + 0.5 * torch.sin(0.9 * k * step))
        weight.grad = grad.to(dtype)
        built.step()
    return weight.detach()


def test_the_basis_is_the_cosine_transform_of_scipy_and_orthogonal() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 6))
    ours = torch.from_numpy(rows) @ cosine_basis(6)
    np.testing.assert_allclose(ours.numpy(), scipy.fft.dct(rows, type=3, norm="ortho", axis=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cosine_basis(6).T @ cosine_basis(6), torch.eye(6, dtype=torch.float64))


def test_one_step_by_hand() -> None:
    """[3, 2] and one column: n = 2, so Q is (1, 1; 1, -1) / sqrt(2) and S is the sums and differences of each row."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    built = DCTAdamW(lr=0.1, rank=1, weight_decay=0.5).build({"weight": weight})
    weight.grad = torch.tensor([[1.0, -3.0], [2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    built.step()
    # |sums| 2 + 2 + 4 = 8; |differences| 4 + 2 + 4 = 10: the second column, of signs + + -; Adam's first step is a sign
    signs = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    change = torch.stack([signs, -signs], 1) / 2**0.5
    decayed = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64) * (1 - 0.1 * 0.5)
    torch.testing.assert_close(weight.detach(), decayed - 0.1 * change, rtol=1e-7, atol=1e-7)
    assert built.state[weight]["columns"] == [1]


def test_the_norm_decides_which_columns_are_kept() -> None:
    """Sums (3, 0, 0), differences (2, 2, 0): the first has more energy, the second the larger sum of sizes."""
    similarity = torch.tensor([[3.0, 2.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    for norm, column in ((1, 1), (2, 0)):
        weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        built = DCTAdamW(rank=1, norm=norm).build({"weight": weight})
        weight.grad = similarity @ cosine_basis(2).T
        built.step()
        assert built.state[weight]["columns"] == [column]


# Six steps in float64 of the authors' DCTAdamW (IST-DASLab/ISTA-DASLab-Optimizers, proj="dct", rotate_subspace=True),
# with two changes: its cosine matrix in float64 in place of float32, and its rotation of the moments not written into
# its own input (torch.matmul(w, R, out=w)), which on a CPU gives moments that are no product of the two.
AUTHORS = {
    ((7, 5), 1): [-0.0664424262053, 0.182937937422, 0.374962570007, 0.374077324138, 0.169468445951, -0.12430967946],
    ((4, 9), 1): [-0.0264447238605, 0.319111782618, 0.361668401482, 0.357738802349, 0.154657913581, -0.107264740052],
    ((4, 9), 3): [-0.0605392880866, 0.292183179512, 0.372568464641, 0.346767683251, 0.18125180502, -0.109372173448],
}


@pytest.mark.parametrize(("shape", "refresh"), list(AUTHORS))
def test_the_authors_numbers(shape: tuple[int, int], refresh: int) -> None:
    ours = stepped(DCTAdamW(lr=0.05, rank=2, weight_decay=0.1, refresh=refresh), shape, 6)
    assert ours.flatten()[:6].tolist() == pytest.approx(AUTHORS[shape, refresh], abs=1e-11)


def test_without_rotation_a_column_that_stays_keeps_its_moments() -> None:
    """The same two of three columns at each step, of which now one and now the other is the larger: Adam on the two."""
    basis, k = cosine_basis(3), torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    weight, low = (
        nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(4, 2, dtype=torch.float64)),
    )
    built = DCTAdamW(lr=0.1, rank=2, rotate=False).build({"weight": weight})
    plain = torch.optim.Adam([low], lr=0.1)
    for step in range(4):
        low.grad = torch.cos(k + step) * torch.tensor([4.0, 1.0] if step % 2 else [1.0, 4.0], dtype=torch.float64)
        weight.grad = low.grad @ basis[:, [0, 2]].T
        built.step()
        plain.step()
    torch.testing.assert_close(weight.detach(), low.detach() @ basis[:, [0, 2]].T, rtol=1e-9, atol=1e-9)


def test_a_convolution_is_the_matrix_of_its_kernels_and_both_orientations_agree() -> None:
    settings = DCTAdamW(lr=0.05, rank=2)
    flat = stepped(settings, (7, 6), 4)
    torch.testing.assert_close(stepped(settings, (7, 2, 3, 1), 4).reshape(7, 6), flat, rtol=0, atol=0)
    wide = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    tall = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    built = settings.build({"wide": wide, "tall": tall})
    for step in range(3):
        wide.grad = torch.sin(torch.arange(15.0, dtype=torch.float64) * (step + 1)).reshape(3, 5)
        tall.grad = wide.grad.T.clone()
        built.step()
    torch.testing.assert_close(wide.T, tall, rtol=1e-12, atol=1e-12)


def test_small_vectors_and_vast_weights_get_plain_adamw() -> None:
    for shape, whole in (((7,), 100), ((7, 2), 100), ((7, 6), 7)):
        assert not projected(shape, 2, whole)
        k = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape)
        ours, theirs = nn.Parameter(torch.sin(k)), nn.Parameter(torch.sin(k))
        built = DCTAdamW(lr=0.05, rank=2, weight_decay=0.1, whole=whole).build({"weight": ours})
        plain = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1)
        for step in range(4):
            ours.grad = torch.cos(k + step)
            theirs.grad = torch.cos(k + step)
            built.step()
            plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def held(optimizer: torch.optim.Optimizer) -> int:
    """Numbers that an optimizer keeps."""
    sizes = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.numel() if isinstance(v, Tensor) else len(v) if isinstance(v, list) else 1 for v in sizes)


def test_the_state_is_rank_over_short_side_of_adams() -> None:
    """Projections of the tiny Llama are 32 or 64 by 32 (16 by 32): at rank 4 an eighth (a fourth) of Adam's moments."""
    model = tiny("causal_lm").model
    parameters = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    lean, adam = DCTAdamW(rank=4).build(parameters), AdamW().build(parameters)
    for optimizer in (lean, adam):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    expected = sum(2 * max(p.shape) * 4 + 4 + 1 for p in parameters.values())
    assert held(lean) == expected
    assert held(adam) == sum(2 * p.numel() + 1 for p in parameters.values())
    assert held(lean) < 0.17 * held(adam)


def step(**changes: Any) -> Descend:
    settings: dict[str, Any] = {"forget": NPO(), "retain": NLL(), "steps": 8, "batch": 20}
    return Descend(**{**settings, "optimizer": DCTAdamW(5e-3, rank=4, weight_decay=0.1, refresh=3), **changes})


def test_it_forgets_and_obeys_the_masks_of_the_scope() -> None:
    found = tiny("causal_lm")
    generator = Key(3).generator()
    masks = {n: torch.rand(p.shape, generator=generator) < 0.4 for n, p in found.model.named_parameters() if p.ndim > 1}
    scope = Scope(masks, Scope.all(found.model).universe)
    before = weights(found.model)
    outcome = unlearn(found.model, found.request, task=found.task, method=step(), scope=scope)
    for name, value in outcome.model.state_dict().items():
        mask = masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], before[name][~mask])
        assert name not in masks or not torch.equal(value, before[name])
    losses = [row["loss/forget"] for row in outcome.record["history"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kill", [2, 5, 8])
def test_a_killed_run_ends_in_the_same_bits(kill: int, tmp_path: Path) -> None:
    found = tiny("causal_lm")

    def run(retain: Any, **where: Any) -> Any:
        return unlearn(found.model, found.request, task=found.task, method=step(retain=retain), **where)

    whole = run(NLL()).model
    with pytest.raises(Stop):
        run(Dying(kill), out=tmp_path / "run", every=0.0)
    assert moved(weights(whole), run(NLL(), out=tmp_path / "run", every=0.0).model) == set()


def test_half_precision_resumes_in_its_own_columns() -> None:
    """torch casts what it loads to the weight's type: a column number above 256 would not survive bfloat16."""
    weight = nn.Parameter(torch.zeros(600, 400, dtype=torch.bfloat16))
    built = DCTAdamW(rank=2).build({"weight": weight})
    weight.grad = (torch.ones(600, 1, dtype=torch.float64) @ cosine_basis(400).T[399:]).to(torch.bfloat16)
    built.step()
    again = DCTAdamW(rank=2).build({"weight": weight})
    again.load_state_dict(built.state_dict())
    assert again.state[weight]["columns"] == built.state[weight]["columns"]
    assert 399 in again.state[weight]["columns"]


def test_settings_print_themselves_and_bad_ones_are_refused() -> None:
    assert repr(DCTAdamW(1e-4, rank=16)).startswith("DCTAdamW(lr=0.0001, rank=16, betas=(0.9, 0.999)")
    assert replace(DCTAdamW(), rank=3).rank == 3
    bad: dict[str, Any] = {"rank": 0, "betas": (1.0, 0.9), "weight_decay": -1.0, "refresh": 0, "norm": 3, "whole": 1}
    for name, value in bad.items():
        with pytest.raises(Refused, match=name):
            DCTAdamW(**{name: value})
