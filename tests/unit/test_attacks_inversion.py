"""Gradient inversion: exact where it can be exact, blind where there is nothing, and able to see through dropout."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from expunge.attacks.inversion import (
    deduced_labels,
    first_dense_inputs,
    inversion,
    inversion_of,
    psnr,
    similarity,
)
from expunge.attacks.matching import Inversion, masked, match, total_variation
from expunge.audit import intervals
from expunge.audit.subject import Subject
from expunge.core import Key, Refused
from expunge.oracle import gradient_graph
from expunge.store import Kept, Store
from expunge.tasks.classification import Classification
from expunge.weights import hash_tensors, tensors_of
from tests.fixtures import retrained, seeded, tiny


def dense(seed: int, dropout: float = 0.0) -> nn.Module:
    """A perceptron with smooth units, whose second derivatives say something."""
    return seeded(
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 48),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(48, 24),
            nn.Tanh(),
            nn.Linear(24, 5),
        ).eval()
    )(seed)


def ascended(model: nn.Module, batch: dict, rate: float = 0.05, sign: int = 1) -> nn.Module:
    """One step up (or down) the loss of these records, as plain gradient ascent unlearns."""
    after = copy.deepcopy(model)
    F.cross_entropy(after(batch["x"]), batch["y"]).backward()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += sign * rate * parameter.grad
            parameter.grad = None
    return after


def subject(model: nn.Module, rows: list[int], references: int = 0, sign: int = 1, by: str = "random") -> Subject:
    """The deleted records are these rows of the forget set; the update is one step of ascent on them."""
    case = tiny("classification", by)
    forget = case.request.forget.select(rows)
    after = ascended(model, forget.batch(torch.arange(len(rows))), sign=sign)
    others = tuple(dense(100 + seed) for seed in range(references))
    return Subject(model, after, replace(case.request, forget=forget), case.task, case.test, others, draws=100)


def changes(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    named = dict(after.named_parameters())
    return {name: (named[name] - p).detach() for name, p in before.named_parameters()}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_dense_layer_gives_one_record_away_exactly(sign: int) -> None:
    """Whatever the loss above, its sign and the size of the step: every row is the record."""
    rng = np.random.default_rng(0)
    record, slope = rng.normal(size=30), rng.normal(size=12)
    slope[3] = 0.0
    rows = first_dense_inputs(sign * 0.01 * np.outer(slope, record), sign * 0.01 * slope)
    assert rows.shape == (11, 30)
    assert np.allclose(rows, record, rtol=1e-12)
    two = first_dense_inputs(np.outer([1.0, 3.0], [2.0, 0.0]) + np.outer([1.0, 1.0], [0.0, 4.0]), np.array([2.0, 4.0]))
    assert np.allclose(two, [[6 / 4, 4 / 4], [2 / 2, 4 / 2]])  # mixtures: the largest change of the bias first


@pytest.mark.parametrize("sign", [1, -1])
def test_one_deleted_record_is_read_off_two_published_models(sign: int) -> None:
    made = subject(dense(0).double().float(), [4], sign=sign)
    reading = inversion(made)
    assert reading.value == 1.0
    assert reading.detail["auc_first_layer"] == 1.0
    assert reading.detail["similarity"] > 0.999
    assert reading.detail["psnr_best"] > 40 > reading.detail["psnr_best_unseen"]
    assert reading.detail["sign"] == sign
    assert reading.detail["labels_right"] == 1
    assert reading.detail["paired_difference_low"] > 0


def test_gradient_matching_alone_finds_the_record() -> None:
    """Without the rows of the first layer: from noise, by the gradient."""
    made = subject(dense(1), [7])
    before, after = copy.deepcopy(made.before), made.after
    batch = made.data("forget").batch(torch.arange(1))
    template = {**made.data("test").batch(torch.tensor([0])), "y": batch["y"]}
    guess, distance = match(before, made.task, template, changes(before, after), 1, Inversion(iterations=300), Key(0))
    assert distance < 0.02
    found = similarity(guess.flatten(1).double().numpy(), batch["x"].flatten(1).double().numpy())[0]
    start, far = match(before, made.task, template, changes(before, after), -1, Inversion(iterations=1), Key(0))
    noise = similarity(start.flatten(1).double().numpy(), batch["x"].flatten(1).double().numpy())[0]
    assert found > 0.9 > 0.5 > noise
    assert far > distance


def test_masks_of_dropout_are_found_with_the_record() -> None:
    """The update was made with a mask: an attack that knows nothing of it is further off, in gradient and in input."""
    model, task = dense(2, dropout=0.5), Classification(5)
    data = tiny("classification", "random").request.forget
    gains = []
    for row in range(4):
        batch = data.batch(torch.tensor([row]))
        mask = (torch.rand(1, 48, generator=Key(row).generator()) < 0.5).float()
        with masked([model[3]], [mask]):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            grads = torch.autograd.grad(loss, list(model.parameters()))
        change = {name: 0.05 * grad for (name, _), grad in zip(model.named_parameters(), grads, strict=True)}
        template = {**data.batch(torch.tensor([row + 8])), "y": batch["y"]}
        found = {}
        for aware in (True, False):
            settings = Inversion(iterations=150, dropout=aware)
            guess, distance = match(model, task, template, change, 1, settings, Key(1))
            record = batch["x"].flatten(1).double().numpy()
            found[aware] = (distance, similarity(guess.flatten(1).double().numpy(), record)[0])
        assert found[True][0] < 0.5 * found[False][0]
        gains.append(found[True][1] - found[False][1])
    assert min(gains) > 0


def test_a_mask_takes_the_place_of_what_dropout_draws() -> None:
    layer, x = nn.Dropout(0.25).eval(), torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    with masked([layer], [mask]):
        assert torch.allclose(layer(x), x * mask / 0.75)
    assert torch.equal(layer(x), x)
    assert not layer._forward_hooks


def test_the_derivative_of_the_match_is_right() -> None:
    """Second derivatives of the distance in the inputs, against finite differences in float64."""
    model = dense(3).double()
    labels = torch.tensor([1, 4])
    target = {
        name: torch.randn(p.shape, dtype=p.dtype, generator=Key(1).generator()) for name, p in model.named_parameters()
    }

    def distance(x: Tensor) -> Tensor:
        grads = gradient_graph(lambda: F.cross_entropy(model(x), labels), dict(model.named_parameters()))
        inner = sum((grads[name] * target[name]).sum() for name in grads)
        return inner / sum(grad.square().sum() for grad in grads.values()).sqrt()

    x = torch.randn(2, 64, dtype=torch.float64, generator=Key(2).generator()).requires_grad_(True)
    (slope,) = torch.autograd.grad(distance(x), x)
    direction = torch.randn(2, 64, dtype=torch.float64, generator=Key(3).generator())
    step = 1e-5
    numeric = float((distance(x.detach() + step * direction) - distance(x.detach() - step * direction)).detach()) / (
        2 * step
    )
    assert float((slope * direction).sum()) == pytest.approx(numeric, rel=1e-5)


def test_genuinely_other_models_and_doing_nothing_show_nothing() -> None:
    """A model from other weights is no step of any record: near chance. Doing nothing publishes nothing."""
    made = subject(dense(0), list(range(12)), 2)
    for model in (*made.retrained, made.before):
        reading = inversion(made.judging(model))
        assert reading.low < 0.5 < reading.high
    nothing = inversion(made.judging(made.before))
    assert nothing.detail["distance"] == 1
    assert "auc_first_layer" not in nothing.detail


def test_several_records_are_told_from_unseen_ones_of_their_class() -> None:
    case = tiny("classification")
    forget = case.request.forget.select(range(4))
    after = ascended(case.model, forget.batch(torch.arange(4)))
    made = Subject(case.model, after, replace(case.request, forget=forget), case.task, case.test, draws=100)
    reading = inversion(made)
    assert reading.low > 0.5
    assert reading.detail["paired_difference_low"] > 0
    assert reading.n == 4 + 60
    assert reading.detail["distance"] < 0.1


def test_labels_are_read_off_the_last_layer() -> None:
    """The gradient in the bias is p - onehot, summed over records."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    gradient = 3 * p - np.array([0, 2, 0, 1])
    assert deduced_labels(0.01 * gradient, 3, 1).tolist() in ([1, 1, 1], [1, 1, 3])
    assert deduced_labels(-0.01 * gradient, 3, -1).tolist() == deduced_labels(0.01 * gradient, 3, 1).tolist()
    assert deduced_labels(np.array([0.5, -1.0, 0.5]), 4, 1).tolist() == [1] * 4
    assert deduced_labels(np.array([2.0, -3.0, -1.0]), 4, 1).tolist() == [1, 1, 1, 2]
    assert len(deduced_labels(np.zeros(3), 5, 1)) == 5


def test_similarity_and_psnr_by_hand() -> None:
    rng = np.random.default_rng(4)
    guesses, records = rng.normal(size=(3, 20)), rng.normal(size=(6, 20))
    wanted = [max(np.corrcoef(record, guess)[0, 1] for guess in guesses) for record in records]
    assert np.allclose(similarity(guesses, records), wanted)
    assert similarity(np.ones((1, 20)), records).tolist() == [0.0] * 6
    errors = [min(np.mean((record - guess) ** 2) for guess in guesses) for record in records]
    assert np.allclose(psnr(guesses, records, 2.0), 10 * np.log10(4 / np.array(errors)))
    assert np.isfinite(psnr(records, records, 1.0)).all()


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0], [3.0, 1.0]]]])
    assert float(total_variation(image)) == pytest.approx((3 + 0) / 2 + (1 + 2) / 2)
    assert float(total_variation(torch.ones(2, 5))) == 0


def test_the_value_is_the_area_of_matched_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities put in by hand: deleted ones 0.9 and 0.1, unseen ones as they come."""
    made = subject(dense(0), [0, 1])
    seen: list[np.ndarray] = []

    def known(_guesses: np.ndarray, records: np.ndarray) -> np.ndarray:
        seen.append(np.array([0.9, 0.1]) if len(records) == 2 else np.linspace(0, 1, len(records)))
        return seen[-1]

    monkeypatch.setattr("expunge.attacks.inversion.similarity", known)
    reading = inversion_of(made, Inversion(iterations=1))
    truth = np.r_[np.ones(2), np.zeros(len(seen[1]))]
    assert reading.value == pytest.approx(roc_auc_score(truth, np.r_[seen[0], seen[1]]))
    assert (reading.low, reading.high) == intervals.auc_interval(seen[0], seen[1])


def test_no_model_is_changed_and_no_stream_is_drawn_from(poisoned_randomness: object) -> None:
    made = subject(dense(0, dropout=0.2), [0, 1, 2], 1)
    made.after.train()
    models = (made.before, made.after)
    before = [hash_tensors(tensors_of(model)) for model in models]
    first = inversion_of(made, Inversion(iterations=5))
    assert [hash_tensors(tensors_of(model)) for model in models] == before
    assert made.after.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for model in models for module in model.modules())
    assert all(p.grad is None and p.requires_grad for model in models for p in model.parameters())
    assert inversion_of(replace(made, cache=type(made.cache)()), Inversion(iterations=5)).to_json() == first.to_json()


def test_models_in_a_store_are_opened(tmp_path: object) -> None:
    made = subject(dense(0), [0, 1])
    model = made.after
    kept = replace(made, after=Kept("ascended", lambda: copy.deepcopy(model)), store=Store(tmp_path))
    assert inversion_of(kept, Inversion(iterations=3)).value == inversion_of(made, Inversion(iterations=3)).value


@pytest.mark.parametrize("name", ["regression", "odd"])
def test_it_does_not_apply_to_other_tasks_and_nested_inputs(name: str) -> None:
    case = tiny(name)
    made = Subject(case.model, retrained(name), case.request, case.task, case.test, draws=20)
    assert inversion(made) is None
    with pytest.raises(Refused, match="a classifier of one floating input"):
        inversion_of(made)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"records": 9}, "records must be in 1 .. 8, found 9"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"rate": 0.0}, "rate must be a positive number"),
        ({"smoothness": -1.0}, "smoothness must be at least 0"),
        ({"compared": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        Inversion(**settings)


def test_other_bad_input_is_refused() -> None:
    made = subject(dense(0), [0])
    other = replace(made, after=nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    assert inversion(other) is None
    assert inversion(replace(made, test=None, request=replace(made.request, valid=None))) is None
    with pytest.raises(Refused, match=r"\[units, inputs\] and \[units\]"):
        first_dense_inputs(np.zeros((2, 3)), np.zeros(3))
    assert first_dense_inputs(np.zeros((2, 3)), np.zeros(2)).shape == (0, 3)
    assert math.isfinite(inversion(made).value)
