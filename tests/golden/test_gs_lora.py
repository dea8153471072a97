"""GS-LoRA and GS-LoRA++ beside the authors' code, the groups, the bound, and that a class is forgotten, and another after it.

The numbers were computed by ``get_structure_loss`` and ``get_prototype_loss`` (engine_cl.py) and ``calculate_prototypes``
(util/utils.py) of bjzhb666/GS-LoRA @ a92fb97 on the arrays of ``face``: the loss of its ``train_one_epoch`` with beta 0.2,
alpha 0.01, BND 6, weights 0.3 and 0.2, BND_pro 18, and two steps of AdamW at 1e-2 and half of it, decay 0.05.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import expunge as ex
from expunge import adapters, methods, sparse_adapter
from expunge.bounded import After, Bounded
from expunge.core import Case, Key
from expunge.group_lasso import GroupLasso, group_norms, grouped
from expunge.likeness import head_name
from expunge.objectives import NLL
from expunge.oracle import Draws, On, Oracle
from expunge.prototypes import ToPrototype, prototypes
from expunge.scope import Scope
from tests.golden.face import CLASSES, Face, examples, factors
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(CLASSES)
FORGET, RETAIN, LASSO, AWAY, NEAR = (
    0.05964670994334048,
    6.082216718346893,
    16.238824632965027,
    0.11282861985878197,
    0.5126849083933389,
)
TOTAL, TOTAL_PP = 7.432675622687875, 12.90136401840891
MERGED = [3.2577607302110736, 2.8692656916948476, 2.580031069313386, 2.778717178826316, 2.622169104974261]
MERGED += [3.4001895734802257, 2.792756722080311, 2.7660382654937674, 2.928031876131712, 3.18698860385743]
MERGED += [2.673113495925473, 2.290587415876491]
MERGED_PP = [3.2582242200502143, 2.869599032731511, 2.580009257031245, 2.785154084779937, 2.6221729108141307]
MERGED_PP += [3.400189707823234, 2.792830731495112, 2.7662344509136654, 2.927983190067717, 3.186618390034367]
MERGED_PP += [2.673111417927922, 2.2906155939480337]
LASSO_AFTER, LASSO_AFTER_PP = 16.175270062548034, 16.17301849426553
SHARED: dict[str, Any] = {
    "rank": 2,
    "alpha": 1.0,
    "targets": "layers.*",
    "beta": 0.2,
    "bound": 6.0 / math.log(CLASSES),
    "sparsity": 0.01,
    "warmup": 0.0,
    "steps": 2,
}


def request() -> ex.Request:
    return ex.split(examples(), forget=[0, 1, 2, 3])


@pytest.fixture
def given_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters begin at the numbers that the authors' code was given, and no guard looks."""
    order = iter([(block, layer) for block in range(6) for layer in (0, 2)])

    def begin(layer: Any, _key: Key) -> None:
        down, up = factors(*next(order))
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)

    monkeypatch.setattr(adapters, "_begin", begin)
    monkeypatch.setattr(sparse_adapter, "Guard", lambda: None)


def merged(model: nn.Module) -> list[float]:
    return [float(layer[k].weight.detach().norm()) for layer in model.layers for k in (0, 2)]  # type: ignore[union-attr]


@pytest.mark.usefixtures("given_factors")
def test_gs_lora_losses_and_steps_are_those_of_the_authors_code() -> None:
    done = ex.unlearn(Face(), request(), task=TASK, method=methods.gs_lora(**SHARED))
    first, last = done.record["history"][0], done.record["history"][-1]
    found = first["loss/forget"], first["loss/retain"], first["loss/groups"]
    assert found == pytest.approx((FORGET, RETAIN, LASSO), rel=1e-9)
    assert 0.2 * (6.0 - found[0]) + found[1] + 0.01 * found[2] == pytest.approx(TOTAL, rel=1e-9)
    assert merged(done.model) == pytest.approx(MERGED, rel=1e-8)
    norms = [last[f"group/layers.{block}"] for block in range(6)]
    assert sum(norms) == pytest.approx(LASSO_AFTER, rel=1e-9)
    assert last["groups"] == last["groups_selected"] == 6


@pytest.mark.usefixtures("given_factors")
def test_gs_lora_pp_losses_and_steps_are_those_of_the_authors_code() -> None:
    method = methods.gs_lora_pp(**SHARED, away=0.3, near=0.2)
    done = ex.unlearn(Face(), request(), task=TASK, method=method)
    first, last = done.record["history"][0], done.record["history"][-1]
    found = first["loss/forget"], first["loss/away"], first["loss/retain"]
    assert found == pytest.approx((FORGET, AWAY, RETAIN + 0.2 * NEAR), rel=1e-9)
    total = 0.2 * (6.0 - found[0]) + found[2] + 0.01 * first["loss/groups"] + 0.3 * (18.0 - found[1])
    assert total == pytest.approx(TOTAL_PP, rel=1e-9)
    assert merged(done.model) == pytest.approx(MERGED_PP, rel=1e-8)
    assert sum(last[f"group/layers.{block}"] for block in range(6)) == pytest.approx(LASSO_AFTER_PP, rel=1e-9)


def test_forget_loss_and_distance_share_a_pass_and_in_pieces_have_one_each_for_the_same_steps() -> None:
    """In pieces a loss is known only when its graphs are gone. 2 steps, 4 examples to forget and 8 to keep."""
    method = methods.gs_lora_pp(**SHARED, away=0.3, near=0.2)
    whole, cut = (ex.unlearn(Face(), request(), task=TASK, method=method, pieces=pieces) for pieces in (1, 2))
    assert merged(cut.model) == pytest.approx(merged(whole.model), rel=1e-9)
    rows = [done.record["cost"]["backward"] for done in (whole, cut)]
    assert rows == [2 * (4 + 8), 2 * (4 + 4 + 8)]
    for role in ("forget", "away"):
        assert cut.record["history"][0][f"loss/{role}"] == pytest.approx(whole.record["history"][0][f"loss/{role}"])


def test_prototypes_are_class_means_whatever_the_chunk_and_the_distance_is_zero_at_one() -> None:
    model = Face()
    case = Case(model, request(), TASK, Scope.all(model))
    head = head_name(case)
    x, y = examples()
    seen = x
    with torch.no_grad():
        for layer in model.layers:
            seen = seen + layer(seen)  # type: ignore[operator]
        by_hand = torch.stack([seen[y == c].mean(0) for c in range(CLASSES)])
    for chunk in (2, 5, 99):
        torch.testing.assert_close(prototypes(case, head, chunk, Key(0)), by_hand, rtol=1e-12, atol=1e-12)
    own = seen[:1].expand(CLASSES, -1)
    batch = {"id": torch.arange(1), "x": x[:1], "y": y[:1]}
    assert float(ToPrototype(own, head)(case, batch).detach()) == pytest.approx(0.0, abs=1e-15)


def oracle(bounds: dict[str, float], progress: float = 0.0) -> tuple[Oracle, Case]:
    model, asked = small()
    case = Case(model, asked, ex.Classification(3), Scope.all(model))
    roles = {"forget": On("forget", NLL()), "retain": On("retain", NLL())}
    draws = Draws(case, roles, Key(0), 0, dict.fromkeys(roles, 16), lambda _role, step: step, {})
    return Oracle(case, roles, draws, progress=progress), case


def test_a_bounded_role_is_raised_below_its_bound_and_left_alone_above_it() -> None:
    asked, _ = oracle({})
    forget, retain = asked.grad({"forget": 1.0}), asked.grad({"retain": 1.0})
    level = asked.losses["forget"]
    for bound, weight in ((level + 0.1, -0.3), (level - 0.1, 0.0)):
        found, _ = Bounded({"forget": 0.3}, {"forget": bound}).combine(oracle({})[0], {})
        for name, value in found.items():
            torch.testing.assert_close(value, weight * forget[name] + retain[name], rtol=1e-10, atol=1e-12)
    with pytest.raises(ex.Refused, match="nothing"):
        Bounded(bounds={"nothing": 1.0}).combine(oracle({})[0], {})


def test_the_sparsity_begins_after_its_warm_up() -> None:
    assert [After(0.2, 3.0)(share) for share in (0.0, 0.19, 0.2, 1.0)] == [0.0, 0.0, 3.0, 3.0]
    model, asked = small()
    done = ex.unlearn(model, asked, task=ex.Classification(3), method=methods.gs_lora(warmup=0.5, steps=6))
    assert ["loss/groups" in row for row in done.record["history"][:6]] == [False] * 3 + [True] * 3


def test_groups_are_blocks_layers_or_matrices() -> None:
    model = nn.ModuleDict(
        {
            "vit": nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(3)),
            "res": nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)),
            "head": nn.Linear(2, 2),
        }
    )
    names = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    found = grouped(model, names, "block")
    assert list(found) == ["vit.0", "vit.1", "vit.2", "res.0", "res.1", "head"]
    assert found["vit.1"] == ["vit.1.0.weight", "vit.1.1.weight"]
    assert len(grouped(model, names, "layer")) == len(grouped(model, names, "matrix")) == 10
    everything = dict(model.named_parameters())
    assert (len(grouped(model, everything, "layer")), len(grouped(model, everything, "matrix"))) == (10, 20)
    with pytest.raises(ex.Refused, match="'block'"):
        GroupLasso("row")  # type: ignore[arg-type]


def test_a_group_at_zero_has_no_gradient_and_not_nan() -> None:
    model, asked = small()
    case = Case(model, asked, ex.Classification(3), Scope.all(model))
    with torch.no_grad():
        held = model[0].weight.clone()
        model[0].weight.zero_()
    value = GroupLasso("matrix")(case, {})
    (slope,) = torch.autograd.grad(value.sum(), [model[0].weight])
    norms = group_norms(case, "matrix")
    with torch.no_grad():
        model[0].weight.copy_(held)
    assert bool((slope == 0).all())
    assert norms["0.weight"] == 0.0
    assert sum(norms.values()) == pytest.approx(float(value.detach()))


def test_a_heavy_lasso_leaves_fewer_groups() -> None:
    """With one adapter per layer of four, the share of the largest group's norm rises."""
    model, asked = digits(8)
    spread = []
    for sparsity in (0.0, 0.3):
        method = methods.gs_lora(sparsity=sparsity, groups="matrix", warmup=0.0, weight_decay=0.0)
        norms = [
            v
            for n, v in ex.unlearn(model, asked, task=ex.Classification(10), method=method)
            .record["history"][-1]
            .items()
            if "/" in n
        ]
        spread.append(sum(norms) / max(norms))
    assert spread[1] < spread[0]


@pytest.mark.parametrize("name", ["gs_lora", "gs_lora_pp"])
def test_two_classes_are_forgotten_one_after_the_other(name: str) -> None:
    """The second request does not bring back the first, and what is never asked for stays."""
    model, first = digits(8)
    batch = next(iter(first.retain.batches(999)))  # type: ignore[union-attr]
    second = ex.split((batch["x"], batch["y"]), forget="label == 3")
    task, method = ex.Classification(10), methods.__dict__[name]()
    once = ex.unlearn(model, first, task=task, method=method).model
    twice = ex.unlearn(once, second, task=task, method=method).model
    assert accuracy(model, first.forget) > 0.9 < accuracy(once, second.forget)  # type: ignore[arg-type]
    assert accuracy(once, first.forget) < 0.2  # type: ignore[arg-type]
    assert accuracy(twice, first.forget) < 0.2 > accuracy(twice, second.forget)  # type: ignore[arg-type]
    assert accuracy(twice, second.retain) > 0.95  # type: ignore[arg-type]
