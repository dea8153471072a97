"""Relearning attacks on models that forgot nothing, that only suppress, that were retrained; and what they leave alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.attacks.anamnesis import Anamnesis, anamnesis, anamnesis_of
from expunge.attacks.recovery import (
    Finetune,
    drawn,
    finetuned,
    nested_interval,
    normalised_recovery,
    parted,
)
from expunge.attacks.relearn import (
    Relearning,
    relearn,
    relearn_benign,
    relearn_benign_loss,
    relearn_loss,
    relearned,
)
from expunge.audit import intervals
from expunge.audit import report as reporting
from expunge.audit.subject import Subject
from expunge.core import Key, Refused
from expunge.optim import SGD
from expunge.store import Kept, Store
from expunge.weights import hash_tensors, tensors_of
from tests.fixtures import NAMES, retrained, tiny

SHORT = Relearning(doses=(0.5,), rates=(3e-3, 1e-2), steps=8, seeds=2, batch=32)


def suppressed(by: float = 7.0) -> nn.Module:
    """The original with the bias of the forgotten class pushed down: it says another class and keeps everything."""
    model = tiny("classification").model
    with torch.no_grad():
        model[-1].bias[3] -= by
    return model


def subject(after: nn.Module, count: int = 3, **changes: object) -> Subject:
    case = tiny("classification")
    references = tuple(retrained("classification", seed=seed) for seed in range(count))
    made: dict = {"retrained": references, "draws": 100, "request": case.request, **changes}
    return Subject(case.model, after, made.pop("request"), case.task, case.test, **made)


def test_what_is_only_suppressed_comes_back_sooner() -> None:
    """After one push of the head's bias back up, everything is there again."""
    made = subject(suppressed())
    assert made.outputs("forget").correct.mean() < 0.2
    reading = relearned(made, SHORT)
    curves = {name: np.array(curve[1]) for name, curve in reading.curves.items()}
    retrained_area = (curves["retrained"][1:] + curves["retrained"][:-1]).mean() / 2
    assert reading.value == pytest.approx((curves["unlearned"][1:] + curves["unlearned"][:-1]).mean() / 2)
    assert reading.low > retrained_area + 20
    assert (curves["unlearned"] >= curves["retrained"]).all()
    assert curves["original"].min() == 100
    assert reading.detail["rho_max"] > 0.5
    assert reading.detail["class_level"] == 1
    assert reading.n == 10
    assert set(curves) == {"unlearned", "original", "retrained", "fresh"}
    assert anamnesis_of(made, Anamnesis(seeds=1)).value < 0.7


def test_a_retrained_model_is_as_slow_as_the_others_and_doing_nothing_is_not() -> None:
    made = subject(retrained("classification", seed=3), 3)
    row = reporting.measured(made, "retrained", "method", ("relearn_benign",)).readings["relearn_benign"]
    assert row.verdict == "within"
    nothing = reporting.measured(made.judging(made.before), "original", "control", ("relearn_benign",))
    assert nothing.readings["relearn_benign"].verdict not in ("", "within")


def test_the_index_of_retrained_models_is_about_one_and_that_of_doing_nothing_is_zero() -> None:
    quick = Anamnesis(seeds=1)
    made = subject(retrained("classification", seed=0), 7)
    held = [anamnesis_of(made.held_out(number), quick) for number in range(7)]
    low, high = intervals.next_interval([reading.value for reading in held])
    assert 0 < low < 1 < high
    assert anamnesis_of(made.judging(made.before), quick).value == 0
    assert all(reading.low <= reading.value <= reading.high for reading in held)


def test_no_model_is_changed_and_no_stream_is_drawn_from(poisoned_randomness: object) -> None:
    made = subject(suppressed(), 1)
    made.after.train()
    made.after[0].weight.requires_grad_(False)
    models = (made.before, made.after, *made.retrained)
    before = [hash_tensors(tensors_of(model)) for model in models]
    relearned(made, SHORT)
    relearned(made, SHORT, benign=True)
    anamnesis_of(made, Anamnesis(seeds=1, cap=10))
    assert [hash_tensors(tensors_of(model)) for model in models] == before
    assert made.after.training
    assert [p.requires_grad for p in made.after.parameters()].count(False) == 1
    assert all(p.grad is None for model in models for p in model.parameters())


def test_the_same_key_gives_the_same_bits_and_every_model_the_same_batches() -> None:
    twin = copy.deepcopy(suppressed())
    first, second, again = (relearned(subject(model, 1), SHORT) for model in (suppressed(), twin, suppressed()))
    assert first.to_json() == second.to_json() == again.to_json()
    other = relearned(subject(suppressed(), 1, key=Key(5)), SHORT)
    assert other.to_json() != first.to_json()


def test_the_held_out_half_is_never_trained_on() -> None:
    made = subject(suppressed())
    learnt, held = parted(made.data("forget"), Key(0))
    assert len(learnt) == len(held) == 10
    assert not np.isin(learnt.ids, held.ids).any()
    assert sorted([*learnt.ids.tolist(), *held.ids.tolist()]) == sorted(made.data("forget").ids.tolist())
    assert torch.isin(drawn(learnt, 4, Key(1)).ids, learnt.ids).all()
    assert len(drawn(learnt, 40, Key(1))) == 10


def test_doses_are_those_that_half_of_the_forget_set_holds() -> None:
    assert Relearning().counts(20) == (1, 2, 5, 10)
    assert Relearning().counts(1000) == (1, 5, 10, 50, 100, 500)
    assert Relearning(doses=(7, 0.25)).counts(40) == (7, 10)
    assert Relearning().counts(2) == (1,)


def test_the_kept_runs_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = subject(suppressed(), 1)
    first = relearned(made, SHORT)

    def never(*_: object) -> None:
        raise AssertionError("a run was repeated")

    monkeypatch.setattr("expunge.attacks.relearn.finetuned", never)
    assert relearned(made, SHORT).to_json() == first.to_json()


def test_models_in_a_store_are_opened(tmp_path: object) -> None:
    model = suppressed()
    made = subject(Kept("suppressed", lambda: copy.deepcopy(model)), 1, store=Store(tmp_path))
    assert relearned(made, SHORT).value == relearned(subject(model, 1), SHORT).value


def test_a_run_that_diverges_stays_where_it_was_and_is_counted() -> None:
    made = subject(suppressed(), 0)
    data = made.data("forget")
    run = finetuned(made, made.after, Finetune(SGD(1e30), 5, 32), data, (data, None), Key(0))
    assert run.diverged
    assert run.held.shape == (6, 20)
    assert np.isnan(run.test).all()
    assert not np.isnan(run.held).any()


def test_normalised_recovery_by_hand() -> None:
    found = normalised_recovery(np.array([0.0, 0.4, 1.0, 1.0]), np.array([0.0, 0.2, 0.5, 0.99]), 1.0)
    assert found[:3] == pytest.approx([0.0, 0.25, 1.0])
    assert np.isnan(found[3])
    assert normalised_recovery(np.array([3.0]), np.array([2.0]), 4.0) == pytest.approx([0.5])


def test_the_interval_covers_the_mean_of_seeds_and_examples() -> None:
    """A table of seed effect + example effect around 0.5, drawn anew 200 times."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        table = 0.5 + rng.normal(0, 0.1, (12, 1)) + rng.normal(0, 0.3, (1, 40)) + rng.normal(0, 0.2, (12, 40))
        low, high = nested_interval(table, 400, Key(trial))
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199


@pytest.mark.parametrize("name", [name for name in NAMES if name != "classification"])
def test_tasks_without_labels_are_read_by_their_loss(name: str) -> None:
    case = tiny(name)
    made = Subject(
        case.model, retrained(name, seed=1), case.request, case.task, case.test, (retrained(name, seed=2),), draws=50
    )
    quick = Relearning(doses=(5,), rates=(1e-3,), steps=2, seeds=2)
    reading = relearned(made, quick)
    assert (reading.name, reading.unit) == ("relearn_loss", case.task.unit)
    assert relearn(made) is relearn_benign(made) is None
    assert reading.low <= reading.value <= reading.high
    assert reading.curves["original"][1][0] < reading.curves["unlearned"][1][0]
    assert np.isfinite(anamnesis_of(made, Anamnesis(cap=3, seeds=1)).value)
    assert relearned(made, quick, benign=True).n == 20


def test_an_odd_model_is_attacked_like_any_other() -> None:
    case = tiny("odd")
    made = Subject(case.model, case.model, case.request, case.task, case.test, (), draws=50)
    assert relearned(made, SHORT).value > 90


def test_one_forget_example_leaves_nothing_to_hold_out() -> None:
    case = tiny("classification")
    made = subject(case.model, request=replace(case.request, forget=case.request.forget.select([0])))
    assert relearn(made) is None
    with pytest.raises(Refused, match="at least 2 forget examples, found 1"):
        relearned(made)


def test_without_retrained_models_there_is_no_index_and_no_normalised_recovery() -> None:
    made = subject(suppressed(), 0)
    assert anamnesis(made) is relearn_loss(made) is relearn_benign_loss(made) is None
    assert relearn_benign(replace(made, request=replace(made.request, retain=None))) is None
    with pytest.raises(Refused, match="found none, give retrained="):
        anamnesis_of(made)
    reading = relearned(made, SHORT)
    assert "rho_max" not in reading.detail
    assert "retrained" not in reading.curves
    with pytest.raises(Refused, match="retrained models at the same steps"):
        normalised_recovery(np.zeros(3), np.zeros(0), 1.0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"doses": ()}, "doses must be"),
        ({"doses": (0,)}, "doses must be"),
        ({"doses": (0.7,)}, "doses must be"),
        ({"doses": (-0.1,)}, "doses must be"),
        ({"rates": (0.0,)}, "rates must be positive"),
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        Relearning(**settings)


def test_a_dose_that_the_forget_set_does_not_hold_is_refused() -> None:
    with pytest.raises(Refused, match=r"no dose of \(50,\) fits the 10 forget examples"):
        relearned(subject(suppressed(), 0), Relearning(doses=(50,)))
    with pytest.raises(Refused, match=r"alpha must be in \(0, 1\)"):
        Anamnesis(alpha=1.5)
    with pytest.raises(Refused, match="cap must be at least 1"):
        Anamnesis(cap=0)
