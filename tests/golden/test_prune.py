"""Pruning beside torch's own and the authors' scores, the mask under every method, and prune first as a method.

The scores of SynFlow were computed by ``synflow_importance_score`` of OPTML-Group/Unlearn-Sparse on ``convolutions()``, and
the cut by torch's ``global_unstructured`` with them.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import expunge as ex
from expunge import methods
from expunge.core import Case, Key
from expunge.descend import Descend
from expunge.methods.prune_first import prune_first
from expunge.objectives import NLL, Ascent
from expunge.optim import SGD, Adam
from expunge.prune import Prune, flow
from expunge.scope import Scope
from expunge.sections import MethodSection
from expunge.wrap import LoRA, in_adapter
from tests.fixtures import odd, tiny
from tests.golden.by_hand import ALL, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(3)
FLOW = {
    "0.weight": (10917.027527233387, 2079.3177142965606, 34.69600775322896, 32, 6.69174272081616),
    "3.weight": (12117.160155407217, 2110.9428167766223, 855.4149264978992, 40, 8.962252691233006),
}
"""Sum, norm and sixth of the scores; of a cut of 0.6 how many weights are left, and their norm."""


def convolutions() -> nn.Module:
    generator = torch.Generator().manual_seed(23)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    with torch.no_grad():
        for t in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
        model[1].running_var.abs_()
    return model.eval()


def images() -> Case:
    model, x = convolutions(), torch.randn(9, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Case(model, ex.split((x, torch.arange(9) % 3), forget=[0, 1]), TASK, Scope.all(model))


def case_of(model: nn.Module, request: ex.Request, scope: Scope | None = None) -> Case:
    model = copy.deepcopy(model)
    return Case(model, request, TASK, scope or Scope.all(model))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def test_synflow_scores_and_cuts_as_the_authors_code() -> None:
    case = images()
    before = state(case.model)
    weights = {name: p for name, p in case.model.named_parameters() if p.ndim > 2}
    for name, scores in flow(case, weights, Key(0)).items():
        found = float(scores.sum()), float(scores.norm()), float(scores.flatten()[5])
        assert found == pytest.approx(FLOW[name][:3], rel=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in state(case.model).items()), "looking left a trace"
    done = Prune(0.6, "synflow", 3, cuts=1)(case)
    for name, p in weights.items():
        assert int((p != 0).sum()) == int(done.scope.masks[name].sum()) == FLOW[name][3]
        assert float(p.detach().norm()) == pytest.approx(FLOW[name][4], rel=1e-10)
    assert torch.equal(case.model[6].weight, before["6.weight"])
    assert done.scope.masks["6.weight"] is True


def test_synflow_in_many_cuts_is_the_loop_of_its_paper() -> None:
    """Scores anew after each cut, of an exponential schedule: by hand, which gives another mask than one cut."""
    case, net = images(), convolutions()
    with torch.no_grad():
        for t in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
            t.abs_()
    layers = [net[0].weight, net[3].weight]
    total = sum(w.numel() for w in layers)
    for cut in range(10):
        grads = torch.autograd.grad(net(torch.ones(1, 2, 6, 6, dtype=torch.float64)).sum(), layers)
        scores = torch.cat([(w * g).flatten() for w, g in zip(layers, grads, strict=True)])
        level = scores.sort(descending=True).values[round(0.2 ** ((cut + 1) / 10) * total) - 1]
        with torch.no_grad():
            for w, g in zip(layers, grads, strict=True):
                w.mul_(w * g >= level)
    done = Prune(0.8, "synflow", 3, cuts=10)(case)
    once = Prune(0.8, "synflow", 3, cuts=1)(images())
    for name, w in zip(("0.weight", "3.weight"), layers, strict=True):
        assert torch.equal(done.scope.masks[name], w != 0)
    assert any(not torch.equal(done.scope.masks[name], once.scope.masks[name]) for name in ("0.weight", "3.weight"))
    assert done.meter.forward == done.meter.backward == 10


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_magnitudes_are_cut_as_by_torch(share: float) -> None:
    """Over all tensors at once, the linear layers too."""
    model, request = small()
    net = copy.deepcopy(model)
    layers = [(net[0], "weight"), (net[2], "weight")]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=share)
    case = Prune(share)(case_of(model, request))
    for layer, other in ((0, "0.weight"), (2, "2.weight")):
        assert torch.equal(case.model[layer].weight, net[layer].weight)
        assert torch.equal(case.scope.masks[other], net[layer].weight_mask.bool())
        assert torch.equal(case.model[layer].bias, model[layer].bias)
    assert case.meter.history == [{"pruned": round(share * 48), "of": 48.0}]


def test_fine_tuning_and_the_inner_stage_are_those_of_masked_torch() -> None:
    """Adam on the retain data, then ascent on the forget data with momentum and decay: each step times the mask."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    net = copy.deepcopy(model)
    flat = torch.cat([p.detach().abs().flatten() for p in net.parameters() if p.ndim > 1]).sort().values
    masks = [
        p.detach().abs() > flat[round(0.5 * 48) - 1] if p.ndim > 1 else torch.tensor(True) for p in net.parameters()
    ]
    for optimizer, sign, x, y in (
        (torch.optim.Adam(net.parameters(), 1e-2), 1, xr, yr),
        (torch.optim.SGD(net.parameters(), 1e-2, 0.9, weight_decay=1e-2), -1, xf, yf),
    ):
        for _ in range(4):
            with torch.no_grad():
                for p, mask in zip(net.parameters(), masks, strict=True):
                    p.mul_(mask)
            optimizer.zero_grad()
            (sign * F.cross_entropy(net(x), y)).backward()
            for p, mask in zip(net.parameters(), masks, strict=True):
                p.grad.mul_(mask)
            optimizer.step()
    inner = Descend(forget=Ascent(), optimizer=SGD(1e-2, 0.9, 1e-2), steps=4, batch=ALL)
    method = prune_first(inner=inner, steps=4, lr=1e-2, batch=ALL)
    done = ex.unlearn(model, request, task=TASK, method=method)
    for p, q, mask in zip(done.model.parameters(), net.parameters(), masks, strict=True):
        torch.testing.assert_close(p, q * mask, rtol=0, atol=1e-11)
        assert bool((p[~mask.expand(p.shape)] == 0).all())


def test_training_on_all_data_by_the_published_optimizer_without_a_guard() -> None:
    """SGD with momentum and decay on forget and retain data together, at a rate that a guard would not bear."""
    model, request = small()
    x, y = (torch.cat(parts) for parts in zip(whole(request.forget), whole(request.retain), strict=True))
    net = copy.deepcopy(model)
    layers = [(net[0], "weight"), (net[2], "weight")]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.5)
    optimizer = torch.optim.SGD(net.parameters(), 2.0, 0.9, weight_decay=5e-4)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    sgd = {"optimizer": "sgd", "lr": 2.0, "momentum": 0.9, "weight_decay": 5e-4}
    method = prune_first(on="all", **sgd, steps=6, batch=ALL, rise=None)
    done = ex.unlearn(model, request, task=TASK, method=method)
    for layer, _ in layers:
        torch_prune.remove(layer, "weight")
    for name, p in done.model.named_parameters():
        torch.testing.assert_close(p, net.get_parameter(name), rtol=0, atol=1e-10)
    assert done.record["cost"]["checks"] == 0


INNER = {
    "ssd": lambda: methods.ssd(),
    "npo": lambda: methods.npo(steps=3),
    "salun": lambda: methods.salun(steps=3),
    "iau": lambda: methods.iau(),
    "influence": lambda: methods.influence(),
    "fisher_forgetting": lambda: methods.fisher_forgetting(),
    "adapter": lambda: in_adapter(LoRA(2), Descend(retain=NLL(), optimizer=Adam(1e-2), steps=3)),
}


@pytest.mark.parametrize("name", sorted(INNER))
def test_pruned_weights_stay_zero_under_any_method(name: str) -> None:
    model, request = digits(8)
    stage = ex.chain(Prune(0.5), INNER[name]())
    done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
    flat = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.ndim > 1])
    level = flat.kthvalue(round(0.5 * len(flat))).values
    moved = 0
    for p, q in zip(done.model.parameters(), model.parameters(), strict=True):
        if p.ndim > 1:
            assert bool((p[q.abs() <= level] == 0).all())
        moved += int(((p != q) & (p != 0)).sum())
    assert moved > 0


def test_only_what_is_in_scope_is_ranked_and_pruned() -> None:
    model, request = small()
    half = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    scope = Scope({"0.weight": half, "2.bias": True}, Scope.all(model).universe)
    case = Prune(0.5)(case_of(model, request, scope))
    kept = case.scope.masks["0.weight"]
    assert case.scope.masks.keys() == {"0.weight", "2.bias"}
    assert int(kept.sum()) == round(0.5 * int(half.sum()))
    assert not bool((kept & ~half).any())
    assert torch.equal(case.model[0].weight, torch.where(half & ~kept, 0, model[0].weight))
    assert torch.equal(case.model[2].weight, model[2].weight)


def test_no_share_is_no_change_and_the_whole_share_leaves_nothing() -> None:
    model, request = small()
    for by in ("magnitude", "synflow"):
        case = Prune(0.0, by)(case_of(model, request))
        assert torch.equal(case.model[0].weight, model[0].weight)
        assert case.meter.forward == 0
        case = Prune(1.0, by)(case_of(model, request))
        assert not bool(case.model[0].weight.any() | case.model[2].weight.any())


def test_refusals_name_the_setting() -> None:
    model, request = small()
    for wrong in ({"share": 1.5}, {"by": "luck"}, {"dimensions": 0}, {"cuts": 0}):
        with pytest.raises(ex.Refused, match=next(iter(wrong))):
            Prune(**wrong)
    with pytest.raises(ex.Refused, match="dimensions"):
        Prune(0.5, dimensions=3)(case_of(model, request))
    found = tiny("causal_lm")
    with pytest.raises(ex.Refused, match="magnitude"):
        Prune(0.5, "synflow")(Case(found.model, found.request, found.task, Scope.all(found.model)))
    with pytest.raises(ex.Refused, match="inner"):
        prune_first(inner="ssd")


def test_the_needs_of_the_inner_method_are_checked_before_any_work() -> None:
    model, request = small()
    without = ex.Request(forget=request.forget, retain=request.retain)
    with pytest.raises(ex.Refused, match="npo needs the original model"):
        ex.unlearn(copy.deepcopy(model), without, task=TASK, method=prune_first(inner=methods.npo()), copy=False)


def test_a_run_file_names_the_inner_method() -> None:
    section = MethodSection(name="prune_first", share=0.3, inner={"name": "ssd", "share": 0.02})
    assert "share=0.3" in repr(section.stage()).replace("('share', 0.3)", "share=0.3")
    assert dict(section.stage().settings)["inner"] == methods.ssd(share=0.02)


def test_an_odd_model_is_pruned_by_flow() -> None:
    """Two inputs, a dict output, tied and shared layers: each weight once, and buffers put back."""
    found = odd()
    before = state(found.model)
    case = Prune(0.5, "synflow", cuts=3)(Case(found.model, found.request, found.task, Scope.all(found.model)))
    after = state(case.model)
    assert all(torch.equal(value, before[name]) for name, value in after.items() if value.ndim < 2)
    assert case.model.mirror.weight is case.model.mix.weight
    for name, value in after.items():
        assert torch.equal(value, value.where(value == 0, before[name]))


def test_a_class_is_forgotten_and_the_others_are_kept() -> None:
    model, request = digits(8)
    task = ex.Classification(10)
    done = ex.unlearn(model, request, task=task, method=prune_first(inner=methods.iau(), share=0.8))
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.2
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
    pruned = sum(int((p == 0).sum()) for p in done.model.parameters() if p.ndim > 1)
    assert pruned >= round(0.8 * sum(p.numel() for p in model.parameters() if p.ndim > 1))
