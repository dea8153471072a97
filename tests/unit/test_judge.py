"""The verdict: retrained models pass, doing nothing fails, ruin fails, and the audit says when it cannot know."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from expunge.audit import audit, judge
from expunge.audit.judge import Equivalence, Verdict
from expunge.audit.subject import Reading
from expunge.core import Refused
from tests.unit.test_audit_measures import FORGET, TOTAL, Answers, C, answers, retrained_models, subject


def reading(
    value: float, name: str = "forget_accuracy", width: float = 2.0, n: int = 10_000, unit: str = "points"
) -> Reading:
    part = 0.01 if "auc" in name else 1.0  # an area ends at 1
    return Reading(name, part * value, part * (value - width / 2), part * (value + width / 2), n, unit)


def family(values: np.ndarray, name: str = "forget_accuracy", width: float = 2.0) -> list[Reading]:
    return [reading(value, name, width) for value in values]


def test_the_band_is_students_prediction_interval() -> None:
    """By the textbook's formula, with the variance over examples as one more degree of freedom."""
    values = np.array([50.0, 52.0, 49.0, 51.0, 53.0])
    spread = judge.spread_of(family(values, width=2 * 1.96 * 0.5))
    assert spread.deviation == pytest.approx(np.sqrt((4 * values.var(ddof=1) + 0.25) / 5))
    quantile = stats.t.ppf(1 - 0.02 / 8, 5)
    assert spread.band(4) == pytest.approx(quantile * spread.deviation * np.sqrt(1 + 1 / 5))
    assert spread.error() == pytest.approx(stats.t.ppf(0.95, 5) * spread.deviation / np.sqrt(5))


@pytest.mark.parametrize("count", [3, 5, 16])
def test_one_in_fifty_genuine_models_fails_and_a_far_one_does_not_pass(count: int) -> None:
    """4,000 draws of independent normal measures, four at once: the rate of false alarms is the one declared."""
    rng = np.random.default_rng(count)
    failed = far = 0
    trials, names = 4000, ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership_auc")
    for _ in range(trials):
        values = rng.normal(50, 2, (4, count + 1))
        references = {name: family(row[1:], name, 2 * 1.96 * 2) for name, row in zip(names, values, strict=True)}
        ours = {name: reading(row[0], name, 2 * 1.96 * 2) for name, row in zip(names, values, strict=True)}
        failed += judge.decide(ours, references).word != "forgotten"
        shifted = {**ours, "forget_accuracy": reading(values[0, 0] + 60, "forget_accuracy", 2 * 1.96 * 2)}
        far += judge.decide(shifted, references).word == "not forgotten"
    assert failed / trials < 0.02 + 3 * np.sqrt(0.02 * 0.98 / trials)
    if count == 16:
        assert failed / trials > 0.01  # and not empty strictness either
        assert far == trials


@pytest.mark.parametrize(
    ("name", "shift", "word", "how"),
    [
        ("forget_accuracy", 30, "not forgotten", "under-forgot"),
        ("forget_accuracy", -30, "over-forgotten", "over-forgot"),
        ("retain_accuracy", -30, "over-forgotten", "lost utility"),
        ("test_accuracy", -30, "over-forgotten", "lost utility"),
        ("retain_accuracy", 30, "forgotten", "above"),
        ("forget_margin_shift", 30, "not forgotten", "under-forgot"),
        ("membership_auc", -30, "over-forgotten", "over-forgot"),
    ],
)
def test_each_direction_has_its_word(name: str, shift: float, word: str, how: str) -> None:
    values = np.random.default_rng(0).normal(50, 1, 8)
    names = ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership_auc", "forget_margin_shift")
    references = {other: family(values, other) for other in names}
    ours = {other: reading(values.mean() + (shift if other == name else 0), other) for other in names}
    found = judge.decide(ours, references)
    assert found.word == word
    assert {test.name: test.word for test in found.tests}[name] == how
    assert (how in " ".join(found.reasons)) == (word != "forgotten")


def test_a_ruined_model_is_over_forgotten_whatever_its_margins_say() -> None:
    """A random network knows neither the class nor its absence: for a forgotten class its AUC lies above retraining's."""
    values = np.random.default_rng(0).normal(0, 1, 8)
    names = ("forget_accuracy", "retain_accuracy", "membership_auc", "forget_margin_shift")
    references = {name: family(values + 90 * (name == "retain_accuracy"), name) for name in names}
    ours = {name: reading(0.0, name) for name in names}
    ours |= {"retain_accuracy": reading(10, "retain_accuracy"), "membership_auc": reading(50, "membership_auc")}
    assert judge.decide(ours, references).word == "over-forgotten"
    ours["forget_accuracy"] = reading(60)
    assert judge.decide(ours, references).word == "not forgotten", "what it still says right, it has not forgotten"


def test_too_few_references_cannot_tell_and_the_number_is_right() -> None:
    values = np.random.default_rng(1).normal(50, 2, 3)
    ours, references = {"forget_accuracy": reading(54)}, {"forget_accuracy": family(values)}
    found = judge.decide(ours, references)
    assert found.word == "cannot tell"
    assert found.needed is not None
    spread = judge.spread_of(references["forget_accuracy"])
    assert 54 - spread.mean > spread.band(1, found.needed) + 2 * spread.error(found.needed)
    assert 54 - spread.mean <= spread.band(1, found.needed - 1) + 2 * spread.error(found.needed - 1)
    for count in (0, 1, 2):
        some = judge.decide(ours, {"forget_accuracy": family(values[:count])})
        assert (some.word, some.needed) == ("cannot tell", 3)


def test_equal_references_do_not_make_one_example_a_failure() -> None:
    """All retrained models at exactly 0 of 50 right: one more that gets one example right is no remembering model."""
    zeros = [Reading("forget_accuracy", 0.0, 0.0, 7.1, 50, "%")] * 16
    one = Reading("forget_accuracy", 2.0, 0.4, 10.5, 50, "%")
    assert judge.decide({"forget_accuracy": one}, {"forget_accuracy": zeros}).word == "forgotten"
    many = Reading("forget_accuracy", 30.0, 19.0, 44.0, 50, "%")
    assert judge.decide({"forget_accuracy": many}, {"forget_accuracy": zeros}).word == "not forgotten"


def test_the_audit_judges_itself() -> None:
    near = Equivalence("forget_accuracy", 0.0, -1.0, 1.0, 3.0, "equivalent")
    far = Equivalence("forget_accuracy", 40.0, 39.0, 41.0, 3.0, "different", "under-forgot")
    good, failing = Verdict("forgotten", tests=(near,)), Verdict("not forgotten", tests=(far,))
    assert judge.controlled(good, failing, 3, [good] * 16).word == "forgotten"
    assert judge.controlled(good, failing, 3, [good] * 15 + [failing]).word == "forgotten"
    broken = judge.controlled(good, failing, 3, [good] * 10 + [failing] * 6)
    assert broken.word == "audit broken"
    assert "6 of 16" in broken.reasons[0]
    blind = judge.controlled(good, good, None, [good] * 16)
    assert blind.word == "audit broken"
    assert "doing nothing passes" in blind.reasons[0]
    few = judge.controlled(good, Verdict("cannot tell"), 9, [good] * 4)
    assert (few.word, few.needed) == ("cannot tell", 9)
    assert "about 9 would do" in few.reasons[0]


def test_genuine_models_pass_on_answers_and_doing_nothing_fails() -> None:
    """Whole reports: each of 12 retrained models in turn audited against the 11 others."""
    models = retrained_models(12)
    words = []
    for number, model in enumerate(models[:4]):
        others = models[:number] + models[number + 1 :]
        report = audit(subject(model, answers(2, 1.0), others, draws=50))
        words.append(report.verdict)
        assert report.row("original").verdict == "not forgotten"
    assert words == ["forgotten"] * 4
    assert audit(subject(answers(2, 1.0), answers(2, 1.0), models, draws=50)).verdict == "not forgotten"
    assert audit(subject(answers(5, 0.1, 0.3, 0.3), answers(2, 1.0), models, draws=50)).verdict == "over-forgotten"


def test_a_request_that_can_show_nothing_breaks_the_audit() -> None:
    report = audit(subject(answers(1, 0.6), answers(2, 0.6), retrained_models(16), draws=50))
    assert report.verdict in ("audit broken", "cannot tell")
    assert report.reasons


def test_references_that_disagree_with_each_other_are_not_hidden() -> None:
    """Half of them saw the forget set: their spread is so wide that nothing can be told, and it is said."""
    wrong = tuple(answers(200 + seed, forget=1.0) for seed in range(4))
    report = audit(subject(answers(1, 0.6), answers(2, 1.0), (*retrained_models(4), *wrong), draws=50))
    assert report.verdict in ("cannot tell", "audit broken")


def test_shares_near_their_end_are_judged_where_their_spread_is_even() -> None:
    """Genuine models with 1,300 examples and an error rate that varies by a factor: skewed near 100 %."""
    rng, n, failed, trials = np.random.default_rng(5), 1300, 0, 1500
    for _ in range(trials):
        rates = 0.008 * np.exp(rng.normal(0, 0.4, 9))
        shares = 100 * (1 - rng.binomial(n, rates) / n)
        readings = [Reading("retain_accuracy", v, v - 0.3, min(100.0, v + 0.3), n, "%") for v in shares]
        names = ("retain_accuracy",)
        failed += judge.decide({names[0]: readings[0]}, {names[0]: readings[1:]}).word not in ("forgotten",)
    assert failed / trials < 0.035, "on the plain scale it is 5 %"


def test_the_transform_is_undone_in_what_is_shown() -> None:
    values = np.random.default_rng(2).normal(90, 2, 6)
    references = [reading(v, "retain_accuracy", 2.0, 500, "%") for v in values]
    test = judge.equivalence(reading(40, "retain_accuracy", 2.0, 500, "%"), references, 4)
    assert test is not None
    assert test.difference == pytest.approx(40 - values.mean(), abs=0.2)
    assert test.low < test.difference < test.high < -test.margin
    band = judge.judged(reading(91, "retain_accuracy", 2.0, 500, "%"), references, 4).reference
    assert band is not None
    assert 0 < band[0] < 91 < band[1] <= 100


def test_an_original_that_fails_only_by_being_worse_is_no_control() -> None:
    """A random network in the place of the original fails too, which says nothing of whether remembering is seen."""
    references = retrained_models(8)
    assert audit(subject(answers(7, 0.6), answers(2, 1.0), references, draws=50)).verdict == "forgotten"
    report = audit(subject(answers(7, 0.6), answers(9, 0.25, 0.25, 0.25), references, draws=50))
    assert report.row("original").verdict == "over-forgotten"
    assert report.verdict == "audit broken"
    assert "not of their recipe" in report.reasons[0]


def test_half_an_original_is_not_forgotten_however_far_a_few_references_spread() -> None:
    """A band of four that reaches past the middle between retraining and the original, which it does find."""
    references = {"forget_accuracy": family(np.array([48.0, 49.0, 51.0, 52.0]))}
    spread = judge.spread_of(references["forget_accuracy"])
    limit = spread.band(1)
    before = judge.decide({"forget_accuracy": reading(50 + limit + 2 * spread.error() + 0.1)}, references)
    good = judge.decide({"forget_accuracy": reading(50 + 0.2 * limit)}, references)
    half = judge.decide({"forget_accuracy": reading(50 + 0.95 * limit)}, references)
    assert (before.word, good.word, half.word) == ("not forgotten", "forgotten", "forgotten")
    assert judge.controlled(good, before, 4, [good] * 4).word == "forgotten"
    found = judge.controlled(half, before, 4, [good] * 4)
    assert found.word == "cannot tell"
    assert "of the way from retraining back to doing nothing" in found.reasons[0]


def test_a_retrained_model_given_twice_counts_once() -> None:
    first, *others = retrained_models(4)
    for twin in (first, copy.deepcopy(first)):
        with pytest.raises(Refused, match=r"retrained models 1 and 4 are the same"):
            audit(subject(answers(5, 0.6), answers(2, 1.0), (first, *others[:2], twin), draws=50))


def test_a_model_among_its_own_references_does_not_judge_itself() -> None:
    references = retrained_models(8)
    model = copy.deepcopy(references[0])
    report = audit(subject(model, answers(2, 1.0), references, draws=50))
    assert "judged against the others" in " ".join(report.row("unlearned").notes)
    held = audit(subject(model, answers(2, 1.0), references[1:], draws=50))
    test = {test.name: test for test in report.row("unlearned").tests}["forget_accuracy"]
    assert test == {test.name: test for test in held.row("unlearned").tests}["forget_accuracy"]


def test_one_reference_is_called_one() -> None:
    report = audit(subject(answers(5, 0.6), answers(2, 1.0), retrained_models(1), draws=50))
    assert report.reasons[0].startswith("only 1 retrained model:")


def test_better_than_retrained_is_not_said_to_be_equal() -> None:
    values = np.random.default_rng(0).normal(50, 1, 8)
    names = ("forget_accuracy", "retain_accuracy")
    ours = {"forget_accuracy": reading(values.mean()), "retain_accuracy": reading(90, "retain_accuracy")}
    found = judge.decide(ours, {name: family(values, name) for name in names})
    assert found.word == "forgotten"
    assert "Retain" not in found.reasons[0]
    assert "better than retrained models are" in found.reasons[1]
    assert "Retain accuracy" in found.reasons[1]


def test_readings_without_an_interval_add_no_degree_of_freedom() -> None:
    values = np.array([1.0, 2.0, 4.0])
    for width in (0.0, np.inf):
        spread = judge.spread_of(family(values, width=width))
        assert (spread.deviation, spread.degrees) == (pytest.approx(values.std(ddof=1)), 2)


def test_answers_that_are_right_on_average_and_wrong_one_by_one_do_not_pass() -> None:
    """Forget examples differ in difficulty; a model with the difficulties of others has every average of retraining."""
    rng = np.random.default_rng(0)
    ease = rng.normal(1.5, 2, TOTAL)
    mixed = np.r_[rng.permutation(ease[:FORGET]), ease[FORGET:]]

    def model(seed: int, ease: np.ndarray, memory: float = 0.0) -> Answers:
        logits = np.zeros((TOTAL, C))
        margin = ease + memory * (np.arange(TOTAL) < FORGET) + np.random.default_rng(seed).normal(0, 0.5, TOTAL)
        logits[np.arange(TOTAL), np.arange(TOTAL) % C] = margin + np.log(C - 1)
        return Answers(torch.tensor(logits))

    references = tuple(model(10 + seed, ease) for seed in range(8))
    before = model(1, ease, memory=2.0)
    assert audit(subject(model(2, ease), before, references, draws=50)).verdict == "forgotten"
    report = audit(subject(model(2, mixed), before, references, draws=50))
    assert report.verdict == "over-forgotten"
    assert [t.name for t in report.row("unlearned").tests if t.outcome == "different"] == ["forget_margin_distance"]
    some = np.where(np.arange(TOTAL) < FORGET // 10, 3.0, 0.0)
    assert audit(subject(model(2, ease + some), before, references, draws=50)).verdict == "not forgotten"
