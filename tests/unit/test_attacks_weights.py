"""Quantisation, pruning and straight lines: pure functions by hand, and readings on models whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.attacks import linear_mode as lines
from expunge.attacks.linear_mode import barrier, between, linear_mode, linear_mode_of, recompute_statistics
from expunge.attacks.prune import pruned, pruned_forget_accuracy, pruned_forget_loss, pruned_reading
from expunge.attacks.quantise import (
    output_channels,
    quantise,
    quantised,
    quantised_forget_accuracy_int4,
    quantised_forget_accuracy_int8,
    quantised_forget_loss_int4,
    quantised_forget_loss_int8,
)
from expunge.audit import report as reporting
from expunge.audit.subject import Cache, Subject
from expunge.core import Refused, Request
from expunge.data.sources import as_data
from expunge.tasks.classification import Classification
from expunge.weights import hash_tensors, tensors_of
from tests.fixtures import NAMES, retrained, tiny

EVERY = (
    quantised_forget_accuracy_int8,
    quantised_forget_accuracy_int4,
    quantised_forget_loss_int8,
    quantised_forget_loss_int4,
    pruned_forget_accuracy,
    pruned_forget_loss,
    linear_mode,
)


def subject(after: nn.Module, count: int = 3) -> Subject:
    case = tiny("classification")
    references = tuple(retrained("classification", seed=seed) for seed in range(count))
    return Subject(case.model, after, case.request, case.task, case.test, references, draws=100)


def test_quantise_by_hand() -> None:
    """int4: seven steps on either side. First row: scale 0.7 / 7 = 0.1; second: 14 / 7 = 2; the third is all zeros."""
    weight = torch.tensor([[0.7, -0.34, 0.06, 0.04], [-14.0, 3.1, 4.9, 0.9], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[0.7, -0.3, 0.1, 0.0], [-14.0, 4.0, 4.0, 0.0], [0.0] * 4], dtype=torch.float64)
    assert torch.allclose(quantise(weight, 4), wanted, atol=1e-12)
    assert torch.allclose(quantise(weight.T, 4, channel=1), wanted.T, atol=1e-12)
    assert torch.equal(quantise(torch.tensor([[1.0, 0.5, -0.49]]), 2), torch.tensor([[1.0, 0.0, 0.0]]))  # 0.5 to even


@pytest.mark.parametrize(("bits", "channel"), [(8, 0), (4, 0), (4, 1), (3, -1)])
def test_quantise_against_torch(bits: int, channel: int) -> None:
    """torch's per-channel rounding with the same scales and no zero point."""
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    top = 2 ** (bits - 1) - 1
    others = [d for d in range(4) if d != channel % 4]
    scale = weight.abs().amax(others) / top
    wanted = torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros_like(scale, dtype=torch.int32), channel % 4, -top, top
    )
    assert torch.allclose(quantise(weight, bits, channel), wanted, atol=1e-6)
    error = (quantise(weight, bits, channel) - weight).abs().amax(others)
    assert bool((error <= scale / 2 + 1e-6).all())
    assert torch.allclose(quantise(quantise(weight, bits, channel), bits, channel), quantise(weight, bits, channel))


def test_what_is_rounded_and_what_is_not() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.Flatten(), nn.LayerNorm(20), nn.Linear(20, 4))
    assert output_channels(model) == {"0.weight": 1}
    rounded = quantised(model, 4)
    assert torch.equal(rounded[0].weight, quantise(model[0].weight, 4, 1))
    assert torch.equal(rounded[3].weight, quantise(model[3].weight, 4, 0))
    assert torch.equal(rounded[3].bias, model[3].bias)
    assert torch.equal(rounded[2].weight, model[2].weight)
    case = tiny("odd")
    twice = quantised(case.model, 4)
    assert twice.mirror.weight is twice.mix.weight


class Fragile(nn.Module):
    """Forgets by a nudge that a coarse grid rounds away: weight [[8, 0.5 + nudge]] on input (0, 1), against 0.4."""

    def __init__(self, nudge: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[7.0, 1.0 - nudge], [7.0, 0.0]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.weight.T
        return logits + torch.tensor([0.0, 0.8], dtype=x.dtype)


def test_a_forgetting_that_rounds_away_is_seen() -> None:
    """1 - nudge < 0.8 says class 1 (forgotten); int4 rounds it back to 1 and says class 0; int8 does not."""
    x = torch.tensor([[0.0, 1.0]] * 8, dtype=torch.float64)
    data = as_data({"x": x, "y": torch.zeros(8, dtype=torch.int64)})
    request = Request(forget=data.select(range(6)), retain=data.select([6, 7]))
    made = Subject(Fragile(0.0), Fragile(0.4), request, Classification(2), None, (Fragile(0.9),), draws=20)
    assert made.outputs("forget").correct.mean() == 0
    four, eight = quantised_forget_accuracy_int4(made), quantised_forget_accuracy_int8(made)
    assert (four.value, four.detail["before"], four.detail["change"]) == (100, 0, 100)
    assert four.detail["change_retrained"] == 0
    assert (eight.value, eight.detail["change"]) == (0, 0)
    assert quantised_forget_loss_int4(made) is None


def test_pruned_sets_exactly_the_smallest_to_zero() -> None:
    case = tiny("classification")
    for share in (0.0, 0.3, 0.9, 1.0):
        lighter = pruned(case.model, share)
        pairs = [(a, b) for a, b in zip(case.model.parameters(), lighter.parameters(), strict=True) if a.ndim >= 2]
        old, new = (torch.cat([pair[i].detach().flatten() for pair in pairs]) for i in (0, 1))
        gone = new == 0
        assert int(gone.sum()) == round(share * len(old))
        assert torch.equal(new[~gone], old[~gone])
        if 0 < share < 1:
            assert float(old[gone].abs().max()) <= float(old[~gone].abs().min())
        assert all(
            torch.equal(a, b) for a, b in zip(case.model.parameters(), lighter.parameters(), strict=True) if a.ndim < 2
        )


def test_pruning_reads_the_accuracy_of_every_share() -> None:
    made = subject(tiny("classification").model)
    reading = pruned_forget_accuracy(made)
    batch = next(made.data("forget").batches(100))
    with torch.no_grad():
        right = [
            100 * float((pruned(made.after, share / 10)(batch["x"]).argmax(1) == batch["y"]).double().mean())
            for share in range(1, 10)
        ]
    assert reading.curves["unlearned"][1][1:] == pytest.approx(right)
    assert reading.value == pytest.approx(np.mean(right))
    assert reading.detail["gain"] == pytest.approx(max(right) - 100)
    assert reading.low <= reading.value <= reading.high
    chance = reading.curves["retrained"]
    assert all(low <= mean <= high for mean, low, high in zip(*chance[1:], strict=True))


def test_the_barrier_by_hand() -> None:
    assert barrier(np.array([0.0, 2.0, 1.0])) == (1.5, 1)
    assert barrier(np.array([3.0, 2.0, 1.0])) == (0.0, 0)
    height, place = barrier(np.array([1.0, 0.5, 4.0, 1.0]))
    assert (height, place) == (3.0, 2)


class Well(nn.Module):
    """A double well in its one weight: logits (0, 4 (w^2 - 1)^2), so that w = 1 and w = -1 are alike, and 0 is not."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hill = 4 * (self.weight**2 - 1) ** 2
        return torch.stack([torch.zeros_like(x[:, 0]), hill.expand(len(x))], 1)


def test_the_barrier_of_a_double_well_is_its_hill() -> None:
    """Loss log(1 + e^h) of class 0: log 2 at both ends, log(1 + e^4) in the middle."""
    data = as_data({"x": torch.zeros(8, 1, dtype=torch.float64), "y": torch.zeros(8, dtype=torch.int64)})
    request = Request(forget=data.select(range(3)), retain=data.select(range(3, 8)))
    made = Subject(Well(1.0), Well(-1.0), request, Classification(2), None, (Well(-1.0),), draws=20)
    reading = linear_mode(made)
    wanted = math.log(1 + math.exp(4)) - math.log(2)
    assert reading.value == pytest.approx(wanted, abs=1e-6)
    assert reading.detail["at"] == 0.5
    assert reading.detail["barrier_retrained"] == reading.detail["forget_barrier"] == pytest.approx(wanted, abs=1e-6)
    assert reading.detail["retain_accuracy_barrier"] == pytest.approx(100)
    assert linear_mode(made.judging(made.before)).value == 0
    assert len(reading.curves["unlearned"][0]) == 11


def test_a_nudged_model_lies_in_the_basin_of_the_original_and_retrained_ones_do_not() -> None:
    case = tiny("classification")
    nudged = case.model
    with torch.no_grad():
        nudged[-1].bias[3] -= 1.0
    made = subject(nudged, 4)
    row = reporting.measured(made, "nudged", "method", ("linear_mode",)).readings["linear_mode"]
    assert row.value < 0.05 < row.detail["barrier_retrained"]
    other = reporting.measured(subject(retrained("classification", seed=3), 3), "r", "method", ("linear_mode",))
    assert other.readings["linear_mode"].verdict == "within"


def test_the_ends_of_the_line_are_the_models_themselves() -> None:
    first, second = tiny("odd").model, retrained("odd")
    for share, end in ((0.0, first), (1.0, second)):
        middle = tensors_of(between(first, second, share))
        floating = {name: value for name, value in tensors_of(end).items() if value.is_floating_point()}
        assert all(torch.equal(middle[name], value) for name, value in floating.items())
    half = between(first, second, 0.25)
    assert torch.allclose(half.left.weight, 0.75 * first.left.weight + 0.25 * second.left.weight)
    assert half.mirror.weight is half.mix.weight


def test_statistics_are_those_of_the_model_between() -> None:
    """One batch: the very mean and (unbiased) variance of what enters the layer."""
    case = tiny("odd")
    made = Subject(case.model, retrained("odd"), case.request, case.task, case.test, (), draws=20)
    middle = between(made.before, made.after, 0.5)
    recompute_statistics(made, middle, case.request.retain)
    batch = next(case.request.retain.batches(100))
    with torch.no_grad():
        entering = middle.left(batch["x"]["top"].flatten(1)) + middle.right(batch["x"]["bottom"].flatten(1))
    assert torch.allclose(middle.norm.running_mean, entering.mean(0), atol=1e-5)
    assert torch.allclose(middle.norm.running_var, entering.var(0), atol=1e-4)
    assert middle.norm.momentum == case.model.norm.momentum
    assert not any(module.training for module in middle.modules())
    parts = between(made.before, made.after, 0.5)
    recompute_statistics(replace(made, batch=20), parts, case.request.retain)
    assert torch.allclose(parts.norm.running_mean, entering.mean(0), atol=1e-5)
    assert linear_mode(made).detail["statistics_recomputed"] == 1
    alone = replace(made, request=replace(case.request, retain=None), cache=Cache())
    assert linear_mode(alone).detail["statistics_recomputed"] == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "classification"])
def test_tasks_without_labels_are_read_by_their_loss(name: str) -> None:
    case = tiny(name)
    made = Subject(case.model, retrained(name), case.request, case.task, case.test, (), draws=20)
    found = {measure.__name__: measure(made) for measure in EVERY}
    assert {name for name, reading in found.items() if reading is None} == {
        "quantised_forget_accuracy_int8",
        "quantised_forget_accuracy_int4",
        "pruned_forget_accuracy",
    }
    assert all(r.low <= r.value <= r.high for r in found.values() if r is not None)
    assert found["quantised_forget_loss_int8"].detail["before"] == pytest.approx(
        found["quantised_forget_loss_int8"].value, rel=0.1
    )


def test_no_model_is_changed_and_no_stream_is_drawn_from(poisoned_randomness: object) -> None:
    made = subject(retrained("classification", seed=4), 1)
    made.after.train()
    models = (made.before, made.after, *made.retrained)
    before = [hash_tensors(tensors_of(model)) for model in models]
    first = [measure(made) for measure in EVERY]
    assert [hash_tensors(tensors_of(model)) for model in models] == before
    assert made.after.training
    again = [measure(subject(made.after, 1)) for measure in EVERY]
    assert [r and r.to_json() for r in first] == [r and r.to_json() for r in again]


def test_bad_input_is_refused_in_a_sentence() -> None:
    with pytest.raises(Refused, match="bits must be a whole number of 2 to 16, found 1"):
        quantise(torch.ones(2, 2), 1)
    with pytest.raises(Refused, match="finite floating weights"):
        quantise(torch.tensor([[math.nan]]), 4)
    with pytest.raises(Refused, match="finite floating weights"):
        quantise(torch.ones(2, 2, dtype=torch.int64), 4)
    with pytest.raises(Refused, match=r"share must lie in \[0, 1\], found 1.5"):
        pruned(nn.Linear(2, 2), 1.5)
    made = subject(tiny("classification").model, 0)
    with pytest.raises(Refused, match=r"share must lie in \[0, 1\]"):
        pruned_reading(made, (-0.1,), labelled=True)
    with pytest.raises(Refused, match="points must be at least 3, found 2"):
        linear_mode_of(made, 2)
    other = replace(made, before=nn.Linear(2, 2))
    assert linear_mode(other) is None
    with pytest.raises(Refused, match="different structure"):
        between(nn.Linear(2, 2), nn.Linear(3, 2), 0.5)
    assert lines.POINTS == 11
