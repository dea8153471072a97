"""Measures of distance to retraining on populations and single models whose truth is written down."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audit import activation, distance, klom, populations
from expunge.audit.activation import activation_distance, softmax_distance, untrained, zero_retrain_forgetting, zrf
from expunge.audit.distance import average_gap, forget_output_distance
from expunge.audit.forgetting_score import forgetting_score
from expunge.audit.klom import klom_forget, klom_retain, klom_test
from expunge.audit.margin_shift import forget_margin_shift, margin_shift, retain_margin_shift
from expunge.audit.margin_shift import test_margin_shift as shift_on_test
from expunge.audit.subject import Subject
from expunge.audit.tug_of_war import product, tug_of_war
from expunge.core import Key, Refused, Request
from expunge.data.sources import as_data
from expunge.tasks.classification import Classification
from tests.fixtures import retrained, tiny

N = 120  # examples in each of forget, retain and test


class Table(nn.Module):
    """Two classes; the logit of the true one, and so the margin, is read from a table."""

    def __init__(self, margins: np.ndarray):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(np.stack([np.zeros_like(margins), margins], 1)))

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        return self.logits[number[:, 0].long()]


def population(rng: np.random.Generator, count: int, forget: float = 0.0, retain: float = 0.0) -> tuple[nn.Module, ...]:
    """Models whose margins are normal about the same centres, each with a shift of its own; forget and retain moved."""
    centre = np.random.default_rng(99).normal(1, 2, 3 * N) + np.repeat([forget, retain, 0.0], N)
    return tuple(Table(centre + 0.3 * rng.normal() + rng.normal(size=3 * N)) for _ in range(count))


def subject(after: nn.Module, references: tuple[nn.Module, ...], **changes: object) -> Subject:
    data = as_data((torch.arange(3 * N)[:, None].float(), torch.ones(3 * N, dtype=torch.int64)))
    forget, retain, test = (data.select(torch.arange(i * N, (i + 1) * N)) for i in range(3))
    made = Subject(after, after, Request(forget, retain), Classification(2), test, references, draws=100)
    return replace(made, **changes)


def populations_of(seed: int, count: int, **moved: float) -> Subject:
    rng = np.random.default_rng(seed)
    ours, theirs = population(rng, count, **moved), population(rng, count)
    return subject(ours[0], theirs, unlearned=ours, originals=population(rng, count, 3.0), key=Key(seed))


def test_klom_of_equal_populations_is_its_floor() -> None:
    """The floor of the Gaussian fit at 8 models a side is ((7/5)(1 + 2/8) - 1)/2 = 0.375."""
    found = [klom_forget(populations_of(seed, 16)) for seed in range(12)]
    assert sum(reading.verdict == "outside" for reading in found) <= 2
    assert np.mean([r.value for r in found]) == pytest.approx(0.375, rel=0.15)
    assert np.mean([r.detail["floor"] for r in found]) == pytest.approx(0.375, rel=0.15)
    assert all(r.detail["models"] == 8 for r in found)
    assert all(r.low <= r.value <= r.high for r in found)


def test_klom_sees_where_a_population_moved() -> None:
    made = populations_of(1, 16, forget=2.0)
    forget, retain, test = klom_forget(made), klom_retain(made), klom_test(made)
    assert (forget.verdict, retain.verdict, test.verdict) == ("outside", "within", "within")
    assert forget.value > 2 * forget.reference[1]
    assert forget.detail["do_nothing"] > forget.value > 3 * forget.detail["floor"]
    assert forget.detail["median"] < forget.detail["p95"] < forget.detail["p99"]
    assert forget.detail["energy"] > 1 > abs(forget.detail["energy_floor"])


def test_klom_detail_is_of_the_same_arrays() -> None:
    made = populations_of(2, 10)
    ours, theirs = made.margins("forget", made.unlearned), made.margins("forget")
    detail = klom_retain(made).detail
    assert detail["models"] == 5
    assert klom_forget(made).detail["all_models"] == pytest.approx(klom.gaussian(ours, theirs).mean())
    wanted = np.quantile(klom.released(theirs, ours), 0.95)
    assert klom_forget(made).detail["all_models_released_swapped_p95"] == pytest.approx(wanted)


def test_klom_is_the_released_one_from_fifty_models_a_side_on() -> None:
    rng = np.random.default_rng(0)
    theirs, ours = population(rng, 100), population(rng, 50)
    reading = klom_forget(subject(ours[0], theirs, unlearned=ours))
    assert reading.detail["models"] == 50
    assert reading.value == pytest.approx(0.84, rel=0.12)  # simulated apart
    assert reading.verdict == "within"


def test_halves_are_disjoint_and_of_one_size() -> None:
    for half in populations.halves(5, 16, 7, Key(3)):
        assert len(half.unlearned) == len(half.retrained) == len(half.others) == len(half.originals) == 5
        assert not set(half.retrained) & set(half.others)
    assert populations.halves(5, 16, 4, Key(3))[0].originals.size == 0
    once, again = (populations.halves(9, 9, 0, Key(1))[3].retrained.tolist() for _ in range(2))
    assert once == again


def test_the_score_of_equal_populations_is_near_a_fifth_and_within() -> None:
    reading = forgetting_score(populations_of(3, 16))
    assert reading.value == pytest.approx(0.19, abs=0.03)
    assert reading.detail["floor"] == pytest.approx(0.19, abs=0.03)
    assert reading.verdict == "within"
    assert reading.reference[1] < 0.3  # never against 1
    assert reading.detail["epsilon_bound"] == reading.detail["epsilon_bound_floor"] == 0.0
    moved = forgetting_score(populations_of(3, 16, forget=1.5, retain=-1.0))
    assert moved.verdict == "outside"
    assert moved.detail["utility"] < 1
    assert moved.detail["final"] == pytest.approx(moved.value * moved.detail["utility"])


def test_populations_are_not_asked_of_too_few() -> None:
    made = populations_of(4, 16)
    assert forgetting_score(replace(made, unlearned=made.unlearned[:15])) is None
    assert klom_forget(replace(made, unlearned=made.unlearned[:3])) is None
    assert klom_forget(replace(made, retrained=made.retrained[:7])) is None
    assert klom_forget(replace(made, unlearned=())) is None
    assert klom_test(replace(made, test=None)) is None


def test_margin_shift_is_calibrated() -> None:
    """One more retrained model: z has mean 0, variance near 1, and is rarely beyond 3."""
    rng = np.random.default_rng(7)
    for count in (3, 5, 16):
        spread = rng.gamma(4, 0.25, 20000)
        models = 5 + spread * rng.normal(size=(count + 1, 20000))
        shift = margin_shift(models[0], models[1:])
        assert abs(shift.mean()) < 0.03
        assert shift.std() == pytest.approx(1.0, abs=0.1)
        assert (np.abs(shift) > 3).mean() < 0.012
        even = rng.normal(size=(count + 1, 20000))
        wanted = 2 / math.sqrt(1 + math.pi / (2 * count + math.pi - 2))  # two deviations, over those of a prediction
        assert margin_shift(even[0] + 2, even[1:]).mean() == pytest.approx(wanted, rel=0.06)


def test_margin_shift_by_hand() -> None:
    theirs = np.array([[0.0, 4.0], [1.0, 4.0], [5.0, 10.0]])
    variance = np.array([7.0, 12.0])
    drawn = (2 * variance + 4 * variance.mean()) / 6 * (1 + math.pi / (6 + math.pi - 2))
    assert np.allclose(margin_shift(np.array([3.0, 3.0]), theirs), np.array([2.0, -1.0]) / np.sqrt(drawn))


def test_margin_shift_and_its_band() -> None:
    """Held-out retrained models stand about 0; what remembers is above them, what over-forgets below."""
    rng = np.random.default_rng(11)
    references = population(rng, 8)
    held = [forget_margin_shift(subject(references[0], references).held_out(i)).value for i in range(8)]
    assert abs(np.mean(held)) < 0.1
    for moved, sign in ((2.0, 1), (-2.0, -1)):
        (model,) = population(np.random.default_rng(5), 1, moved)
        made = subject(model, references)
        reading = forget_margin_shift(made)
        assert sign * reading.value > max(abs(value) for value in held)
        assert reading.low < reading.value < reading.high
        assert abs(retain_margin_shift(made).value) < 1
        assert abs(shift_on_test(made).value) < 1
        assert reading.detail["far"] > 0.02
    (scattered,) = population(np.random.default_rng(6), 1)
    with torch.no_grad():
        scattered.logits[:N, 1] += 6 * torch.tensor([1.0, -1.0]).repeat(N // 2)
    found = forget_margin_shift(subject(scattered, references))
    assert abs(found.value) < 1 < found.detail["mean_size"]  # the mean alone would not see it


def test_margin_shift_needs_three_retrained_models() -> None:
    references = population(np.random.default_rng(0), 3)
    made = subject(references[0], references)
    assert forget_margin_shift(made) is not None
    assert forget_margin_shift(made.held_out(1)) is not None
    assert forget_margin_shift(subject(references[0], references[:2])) is None
    assert shift_on_test(replace(made, test=None)) is None
    with pytest.raises(Refused, match="2 of them or more"):
        margin_shift(np.zeros(3), np.zeros((1, 3)))
    with pytest.raises(Refused, match="one model"):
        margin_shift(np.zeros((2, 3)), np.zeros((2, 3)))


def test_tug_of_war_by_hand() -> None:
    assert product(np.array([0.9, 1.0, 0.8]), np.array([0.7, 0.9, 0.8])) == pytest.approx(0.8 * 0.9 * 1.0)
    with pytest.raises(Refused, match="from 0 to 1"):
        product(np.array([90.0]), np.array([70.0]))
    rng = np.random.default_rng(2)
    models = population(rng, 5)
    shares = np.array([(m.logits[:, 1] > 0).double().reshape(3, N).mean(1).tolist() for m in models])
    made = subject(models[0], models[1:])
    reading = tug_of_war(made)
    assert reading.value == pytest.approx(np.mean((1 - np.abs(shares[0] - shares[1:])).prod(1)))
    assert reading.low < reading.value < reading.high <= 1
    between = [
        np.mean([(1 - np.abs(a - b)).prod() for j, b in enumerate(shares[1:]) if j != i])
        for i, a in enumerate(shares[1:])
    ]
    assert reading.detail["floor"] == pytest.approx(np.mean(between))


def test_tug_of_war_pairs_by_seed() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = population(rng, 4), population(rng, 6)
    reading = tug_of_war(subject(ours[0], theirs, unlearned=ours))
    each = []
    for a, b in zip(ours, theirs, strict=False):
        one, other = ((m.logits[:, 1] > 0).double().reshape(3, N).mean(1) for m in (a, b))
        each.append(float((1 - (one - other).abs()).prod()))
    assert reading.value == pytest.approx(np.mean(each))
    assert reading.n == reading.detail["pairs"] == 4
    half = 3.182446 * np.std(each, ddof=1) / 2  # Student, 3 degrees of freedom
    assert reading.low == pytest.approx(max(0.0, np.mean(each) - half), abs=1e-6)
    far = tug_of_war(subject(ours[0], theirs, unlearned=population(rng, 4, 4.0, -4.0)))
    assert far.verdict == "outside"


def test_activation_distance_and_zrf_against_the_authors() -> None:
    """vikram2000b/bad-teaching-unlearning f1aa988, metrics.py (actv_dist, JSDiv), on these arrays."""
    rng = np.random.default_rng(2205)
    p, q = rng.dirichlet(np.ones(6) / 2, 40), rng.dirichlet(np.ones(6) / 2, 40)
    assert softmax_distance(p, q).mean() == pytest.approx(0.6325675161437289, abs=1e-9)
    assert zrf(p, q, legacy=True) == pytest.approx(0.8934691998046264, abs=1e-9)


def test_zrf_known_answers() -> None:
    sure, other, even = np.eye(2)[[0, 0]], np.eye(2)[[1, 1]], np.full((2, 2), 0.5)
    assert zrf(even, even) == 1.0
    assert zrf(sure, other) == pytest.approx(1 - math.log(2))  # disjoint: the divergence is log 2
    with pytest.raises(Refused, match="sum to 1"):
        zrf(2 * even, even)
    with pytest.raises(Refused, match="one shape"):
        softmax_distance(even, np.full((3, 2), 0.5))


def test_activation_distance_beside_its_floor() -> None:
    models = population(np.random.default_rng(8), 5)
    soft = [m.logits[:N].detach().softmax(1).numpy() for m in models]
    reading = activation_distance(subject(models[0], models[1:]))
    assert reading.value == pytest.approx(np.mean([np.linalg.norm(soft[0] - s, axis=1).mean() for s in soft[1:]]))
    pairs = [np.linalg.norm(soft[i] - soft[j], axis=1).mean() for i in range(1, 5) for j in range(1, i)]
    assert reading.detail["floor"] == pytest.approx(np.mean(pairs))
    assert reading.verdict == "within"


def test_a_pair_of_models_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = distance.jensen_shannon
    monkeypatch.setattr(distance, "jensen_shannon", lambda p, q: calls.append(1) or real(p, q))
    models = population(np.random.default_rng(9), 6)
    made = subject(models[0], models[1:])
    for one in (made, *map(made.held_out, range(5))):
        forget_output_distance(one)
    assert len(calls) == 6 * 5 / 2


def test_zrf_runs_untrained_networks_and_touches_nothing(global_randomness: object) -> None:
    case = tiny("classification")
    before = copy.deepcopy(case.model.state_dict())
    made = Subject(case.model, case.model, case.request, case.task, case.test, draws=50)
    reading = zero_retrain_forgetting(made)
    assert global_randomness.unchanged()
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    assert reading.detail["teachers"] >= 10
    assert reading.low <= reading.value <= reading.high
    new = zero_retrain_forgetting(made.judging(untrained(case.model, Key(77))))
    assert reading.value < zero_retrain_forgetting(made.judging(retrained("classification"))).value + 0.3
    assert reading.value < new.value  # what was never trained answers most like the untrained
    assert new.value > 0.95


def test_untrained_networks_need_modules_that_can_start_anew() -> None:
    one, other = untrained(nn.Linear(4, 3), Key(1)), untrained(nn.Linear(4, 3), Key(1))
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, untrained(nn.Linear(4, 3), Key(2)).weight)
    batch = nn.BatchNorm1d(3)
    batch.running_mean.fill_(5.0)
    assert untrained(batch, Key(0)).running_mean.abs().max() == 0
    assert untrained(Table(np.zeros(4)), Key(0)) is None
    made = subject(Table(np.zeros(3 * N)), ())
    assert zero_retrain_forgetting(made) is None
    assert activation.activation_distance(made) is None  # no retrained model


def test_the_gap_sees_what_the_mean_hides() -> None:
    """Pitfalls of the average gap: signs that cancel, a part that varies most, and the number of models of the floor."""
    models = population(np.random.default_rng(12), 6)
    made = subject(models[0], models[1:])
    reading, values = average_gap(made), np.stack([distance.points(made, m) for m in models])
    mine, theirs = values[0], values[1:]
    fewer = [np.abs(mine - np.delete(theirs, i, 0).mean(0)).mean() for i in range(5)]
    assert reading.detail["same_number"] == pytest.approx(np.mean(fewer))
    drawn = np.stack([distance.resampled(made, m).var(0) for m in models[1:]]).mean(0)
    deviation = np.sqrt((4 * theirs.var(0, ddof=1) + drawn) / 5)
    assert reading.detail["standardised"] == pytest.approx((np.abs(mine - theirs.mean(0)) / deviation).mean())


def test_running_statistics_stay_as_they_are() -> None:
    """A forward pass in training mode would move them, even at a learning rate of 0."""
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    made = subject(model, (copy.deepcopy(model),) * 1)
    average_gap(made)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_shared_weights_resample_as_drawing_does() -> None:
    made = populations_of(5, 4)
    quick = distance.resampled(made, made.after)[:, 0]
    right = made.outputs("forget").correct
    slow = 100 * distance.intervals.resampled_mean(right, made.draws, made.key.at("resample").at("forget"))
    assert np.allclose(quick, slow, rtol=0, atol=1e-9)
