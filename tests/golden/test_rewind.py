"""Weight rewinding: OMP, IMP and SynFlow as their published loops, by hand with torch's own pruning, and bad checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import expunge as ex
from expunge.core import Case
from expunge.methods.prune_first import prune_first
from expunge.prune import Prune
from expunge.rewind import Rewind
from expunge.scope import Scope
from tests.golden.by_hand import ALL, whole
from tests.golden.forgetting import small

torch.set_num_threads(1)
TASK = ex.Classification(3)


def early() -> nn.Module:
    """The small network with other weights, those of an early epoch."""
    model = copy.deepcopy(small()[0])
    generator = torch.Generator().manual_seed(41)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def trained(net: nn.Module, x: Tensor, y: Tensor, masks: list[Tensor], steps: int) -> None:
    """Adam from nothing, the gradient and the weights within the masks of the two layers."""
    layers = [net[0].weight, net[2].weight]  # type: ignore[index]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for weight, mask in zip(layers, masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()


@pytest.mark.parametrize(("rounds", "on"), [(1, "retain"), (3, "retain"), (3, "all")])
def test_omp_and_imp_rewind_as_the_published_loop(rounds: int, on: str) -> None:
    """Cut by torch among what is left, all weights back to the early ones, train within the mask; again."""
    model, request = small()
    (xr, yr), (xf, yf) = whole(request.retain), whole(request.forget)
    x, y = (torch.cat([xr, xf]), torch.cat([yr, yf])) if on == "all" else (xr, yr)
    net, masks, total = copy.deepcopy(model), [torch.ones(6, 5), torch.ones(3, 6)], 48
    for number in range(rounds):
        layers = [(net[0], "weight"), (net[2], "weight")]
        for (layer, name), mask in zip(layers, masks, strict=True):
            torch_prune.custom_from_mask(layer, name, mask)
        left = round(0.3 ** ((number + 1) / rounds) * total)
        torch_prune.global_unstructured(
            layers, torch_prune.L1Unstructured, amount=int(sum(map(torch.sum, masks))) - left
        )
        masks = [layer.weight_mask.clone() for layer, _ in layers]
        for layer, name in layers:
            torch_prune.remove(layer, name)
        net.load_state_dict(early().state_dict())
        with torch.no_grad():
            for (layer, _), mask in zip(layers, masks, strict=True):
                layer.weight.mul_(mask)
        trained(net, x, y, masks, 5)
    method = prune_first(share=0.7, rounds=rounds, rewind=early(), on=on, lr=1e-2, steps=5, batch=ALL)
    done = ex.unlearn(model, request, task=TASK, method=method)
    for name, p in done.model.named_parameters():
        torch.testing.assert_close(p, net.get_parameter(name), rtol=0, atol=1e-10)
    assert int((done.model[0].weight == 0).sum() + (done.model[2].weight == 0).sum()) == 48 - round(0.3 * 48)  # type: ignore[index]


def test_synflow_scores_the_weights_that_training_begins_from() -> None:
    model, request = small()
    method = prune_first(share=0.5, by="synflow", cuts=1, rewind=early(), steps=0)
    done = ex.unlearn(model, request, task=TASK, method=method).model
    case = Case(early(), request, TASK, Scope.all(model))
    expected = Prune(0.5, "synflow", cuts=1)(case).model
    for p, q in zip(done.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_only_what_is_in_scope_goes_back_and_buffers_with_the_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    old = copy.deepcopy(model)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.add_(1)
    _, request = small(torch.float32)
    half = torch.tensor([[True, False, True]] * 4)
    now = copy.deepcopy(model)
    Rewind(old)(Case(now, request, TASK, Scope({"0.weight": half}, Scope.all(now).universe)))
    assert torch.equal(now[0].weight, torch.where(half, old[0].weight, model[0].weight))
    assert torch.equal(now[1].running_mean, model[1].running_mean)
    assert torch.equal(now[2].weight, model[2].weight)
    Rewind(old)(Case(now, request, TASK, Scope.all(now)))
    for a, b in zip((*now.parameters(), *now.buffers()), (*old.parameters(), *old.buffers()), strict=True):
        assert torch.equal(a, b)


def test_a_weights_file_is_the_model_that_it_was_written_from(tmp_path: Path) -> None:
    model, request = small()
    ex.save_weights(early(), tmp_path / "early.safetensors")
    found = [
        ex.unlearn(model, request, task=TASK, method=prune_first(rewind=rewind, steps=2)).model
        for rewind in (early(), str(tmp_path / "early.safetensors"))
    ]
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in found), strict=True))


def test_another_model_a_missing_file_and_a_number_are_refused(tmp_path: Path) -> None:
    model, request = small()
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with pytest.raises(ex.Refused, match=r"'0.weight' is \(7, 5\) there and \(6, 5\) here"):
        ex.unlearn(model, request, task=TASK, method=prune_first(rewind=other))
    with pytest.raises(ex.Refused, match="no weights file"):
        ex.unlearn(model, request, task=TASK, method=prune_first(rewind=str(tmp_path / "none.safetensors")))
    with pytest.raises(ex.Refused, match="rewind"):
        Rewind(3)  # type: ignore[arg-type]
    now = copy.deepcopy(model)
    case = Case(now, ex.Request(retain=request.retain), TASK, Scope.all(now))
    with pytest.raises(ex.Refused, match="no data called 'forget'"):
        prune_first(on="all")(case)
