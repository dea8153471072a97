"""Selective synaptic dampening: the formula by hand, its traps, and a retrained model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forgetting import accuracy, digits, small
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Refused
from expunge.registry import methods as registered

torch.set_num_threads(1)
TASK = ex.Classification(3)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def by_hand(model: nn.Module, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean of squared gradients, one example at a time, with torch alone."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in rows:
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        for name, g in zip(total, grads, strict=True):
            total[name] += g.square() / len(rows)
    return total


def pairs(data: ex.Data) -> list[tuple[Tensor, Tensor]]:
    batch = next(iter(data.batches(len(data))))
    return list(zip(batch["x"], batch["y"], strict=True))


@pytest.mark.parametrize(("strength", "exponent"), [(1.0, 1.0), (0.3, 1.0), (1.0, 0.5)])
def test_ssd_importances_equal_squared_single_example_gradients(strength: float, exponent: float) -> None:
    model, request = small(torch.float32)
    forget, whole = by_hand(model, pairs(request.forget)), by_hand(model, pairs(request.forget) + pairs(request.retain))
    stage = methods.ssd(threshold=1.5, strength=strength, exponent=exponent, rise=1.0)
    outcome = ex.unlearn(model, request, task=TASK, method=stage)
    assert not outcome.notes
    moved = 0
    for name, w in weights(model).items():
        chosen = forget[name] > 1.5 * whole[name]
        factor = (strength * whole[name] / forget[name]).pow(exponent).clamp_max(1.0)
        expected = torch.where(chosen, w * factor, w)
        moved += int(chosen.sum())
        torch.testing.assert_close(weights(outcome.model)[name], expected, rtol=1e-5, atol=1e-7)
    assert 0 < moved < sum(w.numel() for w in weights(model).values())


def test_importance_does_not_depend_on_batch_size() -> None:
    model, request = small()
    first, other = (ex.unlearn(model, request, task=TASK, method=methods.ssd(chunk=chunk)).model for chunk in (1, 64))
    for name, w in weights(first).items():
        torch.testing.assert_close(w, weights(other)[name], rtol=1e-10, atol=0)


def test_threshold_above_inverse_forget_share_selects_nothing_and_says_so() -> None:
    model, request = small()
    share = len(request.forget) / (len(request.forget) + len(request.retain))
    outcome = ex.unlearn(model, request, task=TASK, method=methods.ssd(threshold=1 / share))
    assert all(torch.equal(w, weights(model)[n]) for n, w in weights(outcome.model).items())
    (note,) = [note for note in outcome.notes if "no weight was selected" in note]
    assert f"1 / {share:.3g} = {1 / share:.4g}" in note
    forget, whole = by_hand(model, pairs(request.forget)), by_hand(model, pairs(request.forget) + pairs(request.retain))
    largest = max(float((forget[n] / whole[n]).nan_to_num().max()) for n in forget)
    assert largest <= 1 / share * (1 + 1e-12)
    outcome = ex.unlearn(model, request, task=TASK, method=methods.ssd(threshold=0.5 * (largest + 1 / share)))
    assert any(f"largest importance ratio of any weight is {largest:.4g}" in note for note in outcome.notes)


def test_the_default_threshold_selects_its_share_of_the_weights_in_use() -> None:
    model, request = small()
    used = sum(w.numel() for w in weights(model).values()) - 6  # a dead input: 6 weights
    for share in (0.05, 0.2):
        outcome = ex.unlearn(model, request, task=TASK, method=methods.ssd(share=share, rise=1.0))
        row = outcome.record["history"][0]
        assert row["selected"] == round(share * used)
        assert 1.0 <= row["threshold"] < 1 / row["forget_share"]


def test_zero_importance_is_never_selected() -> None:
    model, request = small()  # its last input is 0 in every example: the weights of that input matter to none
    outcome = ex.unlearn(model, request, task=TASK, method=methods.ssd(threshold=0.0, rise=1.0, strength=0.0))
    assert torch.equal(weights(outcome.model)["0.weight"][:, -1], weights(model)["0.weight"][:, -1])
    assert float(weights(outcome.model)["0.weight"][:, :-1].abs().max()) == 0.0  # strength 0 zeroes the selected


def test_zero_exponent_is_the_identity() -> None:
    model, request = small()
    outcome = ex.unlearn(model, request, task=TASK, method=methods.ssd(exponent=0.0))
    assert all(torch.equal(w, weights(model)[n]) for n, w in weights(outcome.model).items())


def test_only_the_scope_moves() -> None:
    model, request = small()
    outcome = ex.unlearn(model, request, task=TASK, method=methods.ssd(threshold=1.0, rise=1.0), scope=["2.*"])
    assert torch.equal(weights(outcome.model)["0.weight"], weights(model)["0.weight"])
    assert not torch.equal(weights(outcome.model)["2.weight"], weights(model)["2.weight"])


def test_the_guard_lowers_the_exponent_and_says_so() -> None:
    model, request = small()
    free, held = (
        ex.unlearn(model, request, task=TASK, method=methods.ssd(rise=rise, threshold=0.5, strength=0.05))
        for rise in (1.0, 0.02)
    )
    assert any("exponent was lowered from 1" in note for note in held.notes)
    x, y = (torch.stack(part) for part in zip(*pairs(request.retain), strict=True))
    before, wild, kept = (float(F.cross_entropy(m(x), y).detach()) for m in (model, free.model, held.model))
    chance = float(torch.log(torch.tensor(3.0)))
    assert kept <= before + 0.02 * (chance - before) + 1e-9 < wild


def test_rows_are_those_declared() -> None:
    model, request = small()
    stage = methods.ssd()
    cost = ex.unlearn(model, request, task=TASK, method=stage).record["cost"]
    declared = registered()["ssd"].rows(dict(stage.settings), len(request.forget), len(request.retain))
    assert {"forward": cost["forward"], "backward": cost["backward"]} == declared


def test_a_bad_setting_is_refused() -> None:
    for bad in ({"threshold": -1.0}, {"share": 1.5}, {"strength": float("nan")}, {"exponent": -0.1}):
        with pytest.raises(Refused, match=next(iter(bad))):
            methods.ssd(**bad)


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_others_are_kept(label: int) -> None:
    model, request = digits(label)
    outcome = ex.unlearn(model, request, task=ex.Classification(10), method="ssd")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(outcome.model, request.forget) < 0.5
    assert accuracy(outcome.model, request.retain) > accuracy(model, request.retain) - 0.05


def test_normalisation_weights_are_dampened_and_its_buffers_are_not() -> None:
    request = small()[1]
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    stage = methods.ssd(threshold=1.0, rise=1.0)
    outcome = ex.unlearn(net, request, task=TASK, method=stage, scope=["1.*"])
    assert not torch.equal(outcome.model[1].weight, net[1].weight)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, dict(outcome.model.named_buffers())[name])


class WithIdle(nn.Module):
    """A model with a layer that it does not use."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.idle = net, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_scope_that_no_loss_reaches_and_a_share_of_zero_are_said_as_such() -> None:
    model, request = small()
    notes = ex.unlearn(WithIdle(model), request, task=TASK, method="ssd", scope=["idle.*"]).notes
    assert "widen the scope" in notes[0]
    assert "share is 0" in ex.unlearn(model, request, task=TASK, method=methods.ssd(share=0.0)).notes[0]
