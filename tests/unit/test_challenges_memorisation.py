"""Memorisation from models on random subsets: mislabelled examples come out on top; strata, and the audit's measure."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from torch import nn

from expunge.audit.subject import FORGOTTEN, IN, OUT, Kept, Outputs, Shadows, Subject, run
from expunge.challenges.difficulty import confidence, el2n, entanglement, grand, scores_of, symmetrised_kl
from expunge.challenges.memorisation import (
    Estimate,
    influence_of_shadows,
    memorisation,
    memorised_forget_accuracy,
    of_shadows,
    strata,
)
from expunge.core import Data, Key, Refused
from expunge.data.builtin import suite, train
from expunge.data.sources import as_data, collect
from expunge.data.split import split
from expunge.store import Store
from expunge.tasks.classification import Classification
from tests.fixtures import tiny

EXAMPLES, WRONG, MODELS = 200, 20, 16


@functools.cache
def noisy() -> tuple[Data, np.ndarray]:
    """Digits, a tenth of them with a wrong label; which ones."""
    batch = collect(suite("digits").train.select(torch.arange(EXAMPLES)))
    wrong = np.random.default_rng(2).choice(EXAMPLES, WRONG, replace=False)
    labels = batch["y"].clone()
    labels[wrong] = (labels[wrong] + 1 + torch.from_numpy(wrong) % 9) % 10
    return as_data({"x": batch["x"], "y": labels}, ids=batch["id"]), wrong


@functools.cache
def subsets() -> tuple[tuple[nn.Module, ...], np.ndarray]:
    """Small dense networks on random 0.7 subsets, and who was inside."""
    data, _ = noisy()
    rng = np.random.default_rng(4)
    inside = np.stack([rng.permutation(EXAMPLES) < round(0.7 * EXAMPLES) for _ in range(MODELS)])

    recipe = {"epochs": 40, "lr": 0.1, "weight_decay": 0.0, "batch": 32}
    models = [
        train(dense, data.select(np.flatnonzero(row)), Classification(10), seed, **recipe)
        for seed, row in enumerate(inside)
    ]
    return tuple(models), inside


def dense() -> nn.Module:
    """Wide enough to learn wrong labels by heart."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def outputs(model: nn.Module, data: Data) -> Outputs:
    return Outputs.of(run(model, Classification(10), data, 256, Key(0)))


@functools.cache
def estimate() -> Estimate:
    models, inside = subsets()
    return memorisation(np.stack([np.asarray(outputs(m, noisy()[0]).correct) for m in models]), inside)


def test_mislabelled_examples_are_the_most_memorised() -> None:
    found, wrong = estimate().value, noisy()[1]
    others = np.setdiff1d(np.arange(EXAMPLES), wrong)
    assert np.nanmean(found[wrong]) > np.nanmean(found[others]) + 0.5
    known = np.isfinite(found)
    assert roc_auc_score(np.isin(np.arange(EXAMPLES), wrong)[known], found[known]) > 0.9


def test_another_learner_agrees() -> None:
    """scikit-learn's network on its own subsets ranks the same examples high."""
    data, wrong = noisy()
    batch = collect(data)
    x, y = batch["x"].flatten(1).numpy(), batch["y"].numpy()
    rng, rows, inside = np.random.default_rng(8), [], []
    for seed in range(8):
        chosen = rng.permutation(EXAMPLES) < 140
        fitted = MLPClassifier((64,), solver="lbfgs", max_iter=200, random_state=seed).fit(x[chosen], y[chosen])
        rows.append(fitted.predict(x) == y)
        inside.append(chosen)
    theirs = memorisation(np.stack(rows), np.stack(inside)).value
    known = np.isfinite(theirs) & np.isfinite(estimate().value)
    others = np.setdiff1d(np.flatnonzero(known), wrong)
    assert np.nanmean(theirs[wrong]) > np.nanmean(theirs[others]) + 0.5
    assert spearmanr(theirs[known], estimate().value[known]).statistic > 0.4


def test_an_example_that_every_model_saw_has_no_estimate() -> None:
    inside = np.ones((5, 3), bool)
    inside[:2, 1] = False
    found = memorisation(np.ones((5, 3)), inside)
    assert np.isnan(found.value[[0, 2]]).all()
    assert found.value[1] == 0
    assert found.error[1] > 0, "agreement of five models is no certainty"
    low, high = found.interval
    assert low[1] < 0 < high[1]


def test_cheap_scores_go_with_memorisation() -> None:
    """On models that were trained for a few epochs the same examples stand out."""
    data, wrong = noisy()
    early = [_brief(seed) for seed in range(3)]
    p = np.stack([np.asarray(outputs(model, data).probabilities) for model in early])
    labels = collect(data)["y"].numpy()
    scores = {
        "el2n": el2n(p, labels),
        "confidence": -confidence(p, labels),
        "grand": grand(early, data, Classification(10)),
    }
    for name, score in scores.items():
        assert spearmanr(score, np.nan_to_num(estimate().value)).statistic > 0.4, name
        assert np.isin(np.argsort(-score)[:WRONG], wrong).mean() > 0.6, name


def _brief(seed: int) -> nn.Module:
    return train(dense, noisy()[0], Classification(10), 50 + seed, epochs=6, lr=0.1)


def test_grand_leaves_the_model_and_the_random_state(global_randomness: object) -> None:
    found = tiny("classification")
    found.model.train()
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    grand([found.model], found.request.forget, found.task)
    assert all(torch.equal(before[name], value) for name, value in found.model.state_dict().items())
    assert found.model.training
    assert all(p.grad is None for p in found.model.parameters())
    assert global_randomness.unchanged()  # type: ignore[attr-defined]


def test_strata_are_disjoint_and_in_order() -> None:
    data, _ = noisy()
    scores = np.random.default_rng(0).permutation(EXAMPLES).astype(float)
    made = strata(data, scores, 30, valid=data.select(torch.arange(3)))
    by_id = dict(zip(data.ids.tolist(), scores.tolist(), strict=True))
    low, medium, high = (
        sorted(by_id[i] for i in made[level].forget.ids.tolist()) for level in ("low", "medium", "high")
    )
    assert low == list(range(30))
    assert high == list(range(170, 200))
    assert medium == list(range(85, 115))
    assert all(len(request.retain) == 170 and len(request.valid) == 3 for request in made.values())
    assert list(strata(data, scores, 5, levels=("high",))) == ["high"]
    assert len(strata(data, np.zeros(EXAMPLES), 66)["medium"].forget) == 66
    scores[scores < 50] = math.nan
    some = strata(data, scores, 30)
    assert sorted(by_id[i] for i in some["low"].forget.ids.tolist()) == list(range(50, 80))
    assert len(some["low"].retain) == 170, "an example without a score is retained"


def audited(store: Store | None = None, models: tuple[object, ...] | None = None) -> Subject:
    """An audit whose forget data are a half of the noisy digits, with the subset models as shadows."""
    data, _ = noisy()
    modules, inside = subsets()
    request = split(data, data.ids[:100])
    shadows = Shadows(models or modules, data.ids.numpy(), inside.astype(np.int8))  # type: ignore[arg-type]
    test = suite("digits").test.select(torch.arange(50))
    return Subject(modules[0], modules[1], request, Classification(10), test, shadows=shadows, store=store)


def test_an_audit_estimates_from_its_shadows(tmp_path: Path) -> None:
    """The same numbers as by hand, from kept outputs alone once a store is filled: no model is opened again."""
    subject = audited(Store(tmp_path))
    assert np.allclose(of_shadows(subject).value, estimate().value[:100], equal_nan=True)
    kept = tuple(Kept(subject.address(model), _never) for model in subject.shadows.models)
    again = replace(audited(Store(tmp_path), kept), after=kept[1], before=kept[0])
    assert np.allclose(of_shadows(again).value, estimate().value[:100], equal_nan=True)
    on_test = influence_of_shadows(subject)
    assert on_test.value.shape == (100, 50)
    assert np.abs(np.nanmean(on_test.value)) < 0.1
    scores = scores_of(subject, subject.shadows.models[:2])
    assert scores["el2n"].shape == scores["confidence"].shape == (100,)


def _never() -> nn.Module:
    raise AssertionError("a model was opened")


def test_the_measure_reads_the_most_memorised_third() -> None:
    subject = audited()
    reading = memorised_forget_accuracy(subject)
    assert reading is not None
    value = estimate().value[:100]
    states = subject.shadows.states[:, :100]
    known = np.flatnonzero(((states == IN).sum(0) >= 4) & ((states == OUT).sum(0) >= 4))
    third = known[np.argsort(value[known], kind="stable")][-(len(known) // 3) :]
    correct = np.asarray(subject.outputs("forget").correct)
    assert reading.value == pytest.approx(100 * correct[third].mean())
    assert reading.n == len(third)
    assert reading.low <= reading.value <= reading.high
    assert reading.detail["memorisation_low"] <= reading.detail["memorisation_medium"]
    assert reading.detail["memorisation_high"] > reading.detail["memorisation_medium"] + 0.1
    assert reading.detail["accuracy_low"] > reading.value, "what is little memorised is known to a model without it too"


def test_the_measure_does_not_apply_without_shadows() -> None:
    subject = audited()
    assert memorised_forget_accuracy(replace(subject, shadows=None)) is None
    assert memorised_forget_accuracy(replace(subject, shadows=replace(subject.shadows, unlearned=True))) is None
    gone = replace(subject.shadows, states=np.full_like(subject.shadows.states, FORGOTTEN))
    assert memorised_forget_accuracy(replace(subject, shadows=gone)) is None
    found = tiny("regression")
    other = Shadows((found.model,), found.request.forget.ids.numpy(), np.ones((1, 20), np.int8))
    assert (
        memorised_forget_accuracy(Subject(found.model, found.model, found.request, found.task, shadows=other)) is None
    )


def test_bad_input_is_refused_in_one_sentence() -> None:
    data, _ = noisy()
    subject = audited()
    for call, words in (
        (lambda: memorisation(np.ones((3, 4)), np.ones((3, 5), bool)), "one entry per model and example"),
        (lambda: memorisation(np.ones(3), np.ones((3, 5), bool)), "a row per model"),
        (lambda: memorisation(2 * np.ones((3, 4)), np.ones((3, 4), bool)), r"lie in \[0, 1\]"),
        (lambda: of_shadows(replace(subject, shadows=None)), "give the audit such shadows"),
        (lambda: strata(data, np.zeros(3), 5), "one score for each of 200"),
        (lambda: strata(data, np.full(EXAMPLES, math.nan), 5), "a third of the 0 examples with a score"),
        (lambda: strata(data, np.zeros(EXAMPLES), 67), "size must lie in 1 to 66"),
        (lambda: strata(data, np.zeros(EXAMPLES), 6, levels=("lowest",)), "unknown stratum 'lowest'"),
        (lambda: el2n(np.ones((2, 3)), np.zeros(2, int) + 7), "labels must lie in 0 to 2"),
        (lambda: confidence(np.ones((2, 3)), np.zeros(5, int)), "expected probabilities"),
        (lambda: symmetrised_kl(np.ones((2, 3)), np.ones((2, 4))), "same shape"),
        (lambda: entanglement(np.ones((2, 3)), np.ones((2, 4))), "expected features"),
        (lambda: grand([], data, Classification(10)), "at least one model"),
        (lambda: scores_of(subject, []), "at least one model"),
    ):
        with pytest.raises(Refused, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
