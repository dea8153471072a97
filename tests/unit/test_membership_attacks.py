"""Attacks on scores whose answer is known: closed forms, brute force, libraries, and models that leave a known trace."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn

from expunge.audit import intervals, lira, rmia, roc, ulira
from expunge.audit.gaussian import fit, without_each
from expunge.audit.loss_attack import loss_attack, loss_attack_accuracy
from expunge.audit.membership import attack_confidence, best_threshold, class_thresholds, membership_tpr
from expunge.audit.report import measured
from expunge.audit.subject import FORGOTTEN, IN, OUT, Reading, Shadows, Subject
from expunge.core import Key, Refused, Request
from expunge.data.sources import as_data
from expunge.tasks.classification import Classification
from tests.fixtures import retrained, tiny

RNG = np.random.default_rng


# ROC


def test_roc_equals_sklearn() -> None:
    rng = RNG(0)
    for positive, negative in ((rng.normal(1, 1, 80), rng.normal(0, 1, 120)), (rng.integers(0, 6, 50), np.arange(5))):
        truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
        wanted = roc_curve(truth, np.r_[positive, negative], drop_intermediate=False)
        for ours, theirs in zip(roc.roc(positive, negative), wanted, strict=False):
            assert np.allclose(ours, theirs, atol=1e-12)
        best = ((1 - wanted[0] + wanted[1]) / 2).max()
        assert roc.balanced_accuracy(positive, negative) == pytest.approx(best)


def test_a_drawn_curve_is_thin_and_keeps_its_shape() -> None:
    rng = RNG(1)
    positive, negative = rng.normal(1, 1, 5000), rng.normal(0, 1, 20000)
    fpr, tpr = (np.array(line) for line in roc.curve(positive, negative))
    assert len(fpr) <= roc.POINTS
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert ((fpr > 0) & (fpr < 1e-3)).sum() >= 5  # for a log-log plot
    assert np.trapezoid(tpr, fpr) == pytest.approx(intervals.auc(positive, negative), abs=2e-3)
    assert roc.curve([2.0, 3.0], [0.0, 1.0]) == ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0))


def test_the_true_positive_rate_is_sklearns() -> None:
    rng = RNG(2)
    for scores in (rng.normal(size=1500), rng.integers(0, 40, 1500).astype(float)):
        positive, negative = scores[:400] + 1, scores[400:]
        truth = np.r_[np.ones(400), np.zeros(1100)]
        fpr, tpr, _ = roc_curve(truth, np.r_[positive, negative], drop_intermediate=False)
        for rate in (0.001, 0.01, 0.07, 0.5):
            value, low, high = roc.tpr_at(positive, negative, rate)
            assert value == pytest.approx(tpr[fpr <= rate][-1])
            assert low <= value <= high


def test_the_interval_holds_the_true_rate_with_the_threshold_unknown() -> None:
    """True rate Phi(1 - z). With the threshold taken as known, Clopper and Pearson alone miss it more often."""
    rate, trials, held, alone = 0.05, 600, 0, 0
    truth = stats.norm.sf(stats.norm.isf(rate) - 1)
    for trial in range(trials):
        rng = RNG(100 + trial)
        positive, negative = rng.normal(1, 1, 500), rng.normal(0, 1, 200)
        value, low, high = roc.tpr_at(positive, negative, rate)
        held += low <= truth <= high
        ends = intervals.clopper_pearson(round(value * 500), 500)
        alone += ends[0] <= truth <= ends[1]
    assert held >= 0.95 * trials
    assert alone < 0.8 * trials


def test_few_non_members_are_said_to_be_few() -> None:
    assert roc.tpr_at(np.full(50, 9.0), np.arange(1000.0) / 1000, 0.001)[:2] == (1.0, 0.0)  # nothing bounds it below
    with pytest.raises(Refused, match=r"too few examples for an attack .* at least 1000 non-members, found 999"):
        roc.tpr_at(np.ones(10), np.ones(999), 0.001)
    assert roc.too_few(100, 0.01) == ""
    detail = roc.low_rates(np.ones(10), np.ones(500))
    assert "tpr_at_fpr_0.01" in detail
    assert "tpr_at_fpr_0.001" not in detail


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(Refused, match="must lie in"):
        roc.tpr_at(np.ones(10), np.ones(10), rate)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [[1.0, 2.0]]])
def test_scores_must_be_numbers(bad: list[float]) -> None:
    with pytest.raises(Refused, match="scores: expected"):
        roc.roc(bad, [0.0, 1.0])
    with pytest.raises(Refused, match="scores: expected"):
        roc.roc([0.0, 1.0], bad)


def test_normal_scores_have_the_textbook_area() -> None:
    for separation in (0.5, 1.5):
        rng = RNG(3)
        found = roc.separation("x", rng.normal(separation, 1, 4000), rng.normal(0, 1, 4000))
        wanted = stats.norm.cdf(separation / math.sqrt(2))
        assert found.low < wanted < found.high
        assert found.detail["tpr_at_fpr_0.01"] == pytest.approx(
            stats.norm.sf(stats.norm.isf(0.01) - separation), abs=0.03
        )
        assert found.axes == roc.AXES


def test_an_order_is_all_that_counts() -> None:
    rng = RNG(4)
    positive, negative = rng.normal(1, 1, 300), rng.normal(0, 1, 400)
    assert roc.separation("x", positive, negative) == roc.separation("x", np.exp(positive), np.exp(negative))


def test_matched_area_covers_where_scores_of_one_example_hang_together() -> None:
    """Positives and negatives of an example share its difficulty: 150 examples, 6 models, 400 times."""
    held, trials, truth = 0, 400, stats.norm.cdf(0.7 / math.sqrt(2 * (1 + 4)))
    for trial in range(trials):
        rng = RNG(1000 + trial)
        difficulty = rng.normal(0, 2, 150)
        negative = difficulty + rng.normal(0, 1, (6, 150))
        negative[rng.random((6, 150)) < 0.3] = np.nan
        low, high = intervals.matched_auc_interval(difficulty + rng.normal(0.7, 1, 150), negative)
        held += low <= truth <= high
    assert 0.92 * trials <= held <= 0.98 * trials


# normal fits and LiRA


def ragged(seed: int = 5, models: int = 9, examples: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = RNG(seed)
    mask = np.argsort(rng.random((models, examples)), axis=0) < rng.integers(3, models, examples)
    return rng.normal(rng.normal(0, 3, examples), 1, (models, examples)), mask


def test_fits_by_loops() -> None:
    margins, mask = ragged()
    chosen = [margins[mask[:, j], j] for j in range(7)]
    each, pooled = fit(margins, mask, "each"), fit(margins, mask)
    assert np.allclose(each.mean, [np.median(c) for c in chosen])
    assert np.allclose(each.deviation, [c.std() for c in chosen])
    squares = sum(((c - c.mean()) ** 2).sum() for c in chosen)
    assert pooled.deviation[0] == pytest.approx(math.sqrt(squares / sum(len(c) - 1 for c in chosen)))
    assert np.allclose(pooled.mean, each.mean)
    many = fit(RNG(0).normal(size=(64, 3)), np.ones((64, 3), bool))
    assert many.deviation.shape == (3,)  # 64 models: a variance for each example


@pytest.mark.parametrize("variance", ["each", "pooled"])
def test_leaving_out_is_fitting_again(variance: str) -> None:
    margins, mask = ragged()
    found = without_each(margins, mask, variance)
    for model in range(9):
        for example in range(7):
            if not mask[model, example]:
                assert np.isnan(found.mean[model, example])
                continue
            rest = mask.copy()
            rest[model, example] = False
            again = fit(margins, rest, variance)
            assert found.mean[model, example] == pytest.approx(again.mean[example])
            assert found.deviation[model, example] == pytest.approx(again.deviation[example % len(again.deviation)])


def shadows(seed: int, examples: int = 1000, models: int = 16, trace: float = 1.0) -> tuple[np.ndarray, ...]:
    """Margins [models + 1, n] of models that each had half of the examples; the last one is attacked."""
    rng = RNG(seed)
    had = np.argsort(rng.random((models + 1, examples)), axis=0) < (models + 1) // 2
    return rng.normal(0, 3, examples) + trace * had + rng.normal(0, 1, (models + 1, examples)), had


def test_lira_beats_one_threshold_for_all() -> None:
    margins, had = shadows(6, 4000)
    target, truth = margins[-1], had[-1]
    one_for_all = roc_auc_score(truth, target)
    online = roc_auc_score(truth, lira.online_scores(target, margins[:-1], had[:-1], ~had[:-1]))
    offline = roc_auc_score(truth, lira.offline_scores(target, margins[:-1], ~had[:-1]))
    assert one_for_all < 0.62
    assert offline > one_for_all + 0.08
    assert online > one_for_all + 0.08
    assert stats.norm.cdf(1 / math.sqrt(2)) + 0.02 > online  # what knowing every distribution exactly would give


def test_lira_finds_nothing_where_nothing_is() -> None:
    margins, had = shadows(7, 4000, trace=0.0)
    for scores in (
        lira.online_scores(margins[-1], margins[:-1], had[:-1], ~had[:-1]),
        lira.offline_scores(margins[-1], margins[:-1], ~had[:-1]),
    ):
        low, high = intervals.auc_interval(scores[had[-1]], scores[~had[-1]])
        assert low < 0.5 < high


def test_lira_does_not_depend_on_where_an_example_lies() -> None:
    margins, had = shadows(8, 50)
    offset, factor = RNG(9).normal(0, 20, 50), RNG(10).uniform(0.5, 2, 50)
    for change, variance in ((lambda m: m + offset, "pooled"), (lambda m: factor * m + offset, "each")):
        for inside in (had[:-1], None):
            results = []
            for data in (margins, change(margins)):
                arms = (~had[:-1],) if inside is None else (inside, ~had[:-1])
                attack = lira.offline_scores if inside is None else lira.online_scores
                results.append(attack(data[-1], data[:-1], *arms, variance))
            assert np.allclose(*results)


def test_lira_averages_queries() -> None:
    margins, had = shadows(11, 40)
    two = np.stack([margins, margins + RNG(12).normal(size=margins.shape)], axis=2)
    both = lira.online_scores(two[-1], two[:-1], had[:-1], ~had[:-1], "each")
    alone = [lira.online_scores(m[-1], m[:-1], had[:-1], ~had[:-1], "each") for m in (two[:, :, 0], two[:, :, 1])]
    assert np.allclose(both, np.mean(alone, axis=0))
    assert lira.online_scores(margins[-3:], margins[:-3], had[:-3], ~had[:-3]).shape == (3, 40)


def test_lira_refuses_what_it_cannot_use() -> None:
    margins, had = shadows(13, 20)
    nobody = had.copy()
    nobody[:, 3] = False
    with pytest.raises(Refused, match=r"too few models for an attack: expected at least 1 .* found 1 examples"):
        lira.offline_scores(margins[-1], margins, nobody)
    one = np.zeros(had.shape, bool)
    one[0] = True
    with pytest.raises(Refused, match="too few models for a variance"):
        lira.offline_scores(margins[-1], margins, one)
    with pytest.raises(Refused, match="at least 2"):
        fit(margins, one, "each")
    with pytest.raises(Refused, match="found shapes"):
        fit(margins, had[:, :5])
    with pytest.raises(Refused, match="must have the shape"):
        lira.offline_scores(margins[-1, :5], margins, had)
    with pytest.raises(Refused, match="variance must be"):
        fit(margins, had, "global")  # type: ignore[arg-type]
    broken = margins.copy()
    broken[2, 2] = math.nan
    with pytest.raises(Refused, match="NaN"):
        fit(broken, had)
    with pytest.raises(Refused, match="NaN"):
        lira.offline_scores(broken[2], margins, had)


# RMIA


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("strict", [True, False])
def test_rmia_by_all_pairs(gamma: float, strict: bool) -> None:
    rng = RNG(14)
    target, population = rng.integers(0, 9, 60) / 8, rng.integers(0, 9, 40) / 8  # with ties
    evidence, others = rng.integers(1, 5, 60) / 4, rng.integers(1, 5, 40) / 4
    found = rmia.scores(target, evidence, population, others, gamma=gamma, strict=strict)
    for n in range(60):
        beaten = 0
        for z in range(40):
            left, right = target[n] / evidence[n], gamma * population[z] / others[z]
            beaten += left > right if strict else left >= right
        assert found[n] == beaten / 40


def test_rmia_rises_with_the_probability_and_falls_with_the_evidence() -> None:
    rng = RNG(15)
    population, others = rng.random(500), rng.uniform(0.3, 1, 500)
    grid = np.linspace(0, 1, 50)
    assert (np.diff(rmia.scores(grid, np.full(50, 0.5), population, others)) >= 0).all()
    assert (np.diff(rmia.scores(np.full(50, 0.5), grid + 0.1, population, others)) <= 0).all()


def test_rmia_refuses_what_it_cannot_use() -> None:
    half = np.full(4, 0.5)
    with pytest.raises(Refused, match="in \\[0, 1\\]"):
        rmia.scores([0.1, math.nan], half[:2], half, half)
    with pytest.raises(Refused, match="above 0"):
        rmia.scores(half, np.zeros(4), half, half)
    with pytest.raises(Refused, match="above 0 for each of 4, found shape"):
        rmia.scores(half, half[:2], half, half)
    with pytest.raises(Refused, match="gamma"):
        rmia.scores(half, half, half, half, gamma=0.0)
    with pytest.raises(Refused, match="a of RMIA"):
        rmia.offline_evidence(half, 1.1)
    with pytest.raises(Refused, match="known members and non-members"):
        rmia.tuned(half, np.ones(4), half, half, half)
    with pytest.raises(Refused, match="as many IN as OUT"):
        rmia.online_evidence(half, half[:2])


# U-LiRA


def unlearned(seed: int, trace: float, examples: int = 300, models: int = 12) -> tuple[np.ndarray, ...]:
    """Margins [m, n] with `trace` left of what was forgotten, and masks: forgotten, never seen (a third is neither)."""
    rng = RNG(seed)
    states = np.argsort(rng.random((models, examples)), axis=0) % 3
    margins = rng.normal(0, 3, examples) + trace * (states == 2) + rng.normal(0, 1, (models, examples))
    return margins, states == 2, states == 0


@pytest.mark.parametrize("bandwidth", [None, 1.0])
def test_a_method_that_leaves_no_trace_cannot_be_attacked(bandwidth: float | None) -> None:
    """0.5 exactly on average: leaving out in pairs has none of the bias of leaving out one."""
    pairs = [ulira.paired_log_odds(*unlearned(s, 0.0), Key(s), bandwidth=bandwidth) for s in range(150)]
    for found in ([p.accuracy.mean() for p in pairs], [p.area for p in pairs]):
        error = np.std(found, ddof=1) / math.sqrt(len(found))
        assert abs(np.mean(found) - 0.5) < 3 * error < 0.005


@pytest.mark.parametrize("bandwidth", [None, 1.0])
def test_a_trace_is_found_per_example(bandwidth: float | None) -> None:
    margins, forgotten, never = unlearned(1, 2.0, 2000, 24)
    found = ulira.paired_log_odds(margins, forgotten, never, Key(0), bandwidth=bandwidth)
    ceiling = stats.norm.cdf(1.0)  # two normal distributions two deviations apart, known exactly
    assert ceiling - 0.04 < found.accuracy.mean() < ceiling + 0.01
    low, high = ulira.accuracy_interval(found)
    assert low < found.accuracy.mean() < high < low + 0.08
    population = roc_auc_score(forgotten[forgotten | never], margins[forgotten | never])
    assert found.area > population + 0.1


def test_pairs_are_scored_without_themselves() -> None:
    margins, forgotten, never = unlearned(2, 1.0, 12, 15)
    normal = ulira.paired_log_odds(margins, forgotten, never, Key(3))
    kernel = ulira.paired_log_odds(margins, forgotten, never, Key(3), bandwidth=0.7)
    for p in range(normal.models.shape[1]):
        for n in range(12):
            first, second = normal.models[:, p, n]
            assert forgotten[first, n]
            assert never[second, n]
            rest = forgotten.copy(), never.copy()
            rest[0][first, n] = rest[1][second, n] = False
            for model, found, kerneled in (
                (first, normal.forgotten, kernel.forgotten),
                (second, normal.never, kernel.never),
            ):
                again = ulira.log_odds(margins[model], margins, *rest)[n]
                assert found[p, n] == pytest.approx(again, rel=1e-9)
                again = ulira.kernel_log_odds(margins[model], margins, *rest, 0.7)[n]
                assert kerneled[p, n] == pytest.approx(again, rel=1e-9)


def test_kernels_are_sklearns() -> None:
    margins, forgotten, never = unlearned(4, 1.0, 6, 12)
    target = np.array([0.0, 1.0, -5.0, 3.0, 60.0, -60.0])  # the last two end in 0 / 0 outside of logarithms
    found = ulira.kernel_log_odds(target, margins, forgotten, never)
    for n in range(6):
        logs = [
            KernelDensity(kernel="gaussian").fit(margins[mask[:, n], n, None]).score_samples(target[n, None, None])[0]
            for mask in (forgotten, never)
        ]
        assert found[n] == pytest.approx(logs[0] - logs[1], rel=1e-6, abs=1e-9)


def test_a_model_like_the_shadows_stands_at_one_half() -> None:
    """The model is one more that never had the examples, and the method leaves a trace in others: 60 times."""
    held, areas = 0, []
    for seed in range(60):
        margins, forgotten, never = unlearned(100 + seed, 1.5, 200, 13)
        forgotten[-1], never[-1] = False, False
        margins[-1] += np.where(unlearned(100 + seed, 1.5, 200, 13)[1][-1], -1.5, 0.0)  # its trace taken out again
        ours, theirs = ulira.held_against(margins[-1], margins[:-1], forgotten[:-1], never[:-1], Key(seed))
        low, high = intervals.matched_auc_interval(ours, theirs)
        held += low <= 0.5 <= high
        areas.append(intervals.auc(ours, theirs[never[:-1]]))
    assert abs(np.mean(areas) - 0.5) < 3 * np.std(areas) / math.sqrt(60) < 0.02
    assert held >= 53  # P(fewer | 95 %) = 1 %


def test_ulira_refuses_too_few_shadows() -> None:
    margins, forgotten, never = unlearned(5, 1.0, 10, 9)
    with pytest.raises(Refused, match="too few shadow models for U-LiRA"):
        ulira.paired_log_odds(margins, forgotten, never, Key(0))
    with pytest.raises(Refused, match="exclude each other"):
        ulira.log_odds(margins[0], margins, forgotten, forgotten)
    with pytest.raises(Refused, match="bandwidth"):
        ulira.kernel_log_odds(margins[0], margins, forgotten, never, 0.0)


# losses


def losses(seed: int, sizes: tuple[int, int] = (400, 300), shift: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    rng = RNG(seed)
    return rng.exponential(1, sizes[0]), shift + rng.exponential(1, sizes[1])


@pytest.mark.parametrize(("splits", "clip"), [(10, None), (5, 2.0)])
def test_the_loss_attack_is_sklearns(splits: int, clip: float | None) -> None:
    key = Key(5)
    forget, test = losses(16, (300, 300))
    found = loss_attack_accuracy(forget, test, splits=splits, clip=clip, key=key)
    values, members = np.r_[forget, test], np.r_[np.ones(300), np.zeros(300)]
    values = values if clip is None else np.clip(values, -clip, clip)
    cv = StratifiedShuffleSplit(n_splits=splits, test_size=0.1, random_state=key.at("splits").seed % 2**32)
    wanted = cross_val_score(LogisticRegression(tol=1e-10, max_iter=1000), values[:, None], members, cv=cv)
    assert np.allclose(found.splits, wanted, atol=1e-12)
    assert found.accuracy == pytest.approx(wanted.mean())
    assert found.low < found.accuracy < found.high


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_loss_attack_survives_separated_and_huge_losses(scale: float) -> None:
    forget, test = losses(17)
    apart = loss_attack_accuracy(scale * forget, scale * (test + 100))
    assert apart.accuracy == 1.0 == apart.high > apart.low
    assert apart.size == 300
    same = loss_attack_accuracy(np.full(50, scale), np.full(40, scale))
    assert same.accuracy == 0.5


def test_the_loss_attack_at_chance() -> None:
    """True accuracy of an attacker that knows nothing is 0.5; the interval is over examples: 200 times."""
    found = [loss_attack_accuracy(*losses(2000 + i, (200, 200), 0.0), key=Key(i)) for i in range(200)]
    assert abs(np.mean([f.accuracy for f in found]) - 0.5) < 0.01
    assert sum(f.low <= 0.5 <= f.high for f in found) >= 180


def test_the_loss_attack_refuses_what_it_cannot_use() -> None:
    good = np.arange(20.0)
    for bad, words in (
        ((good[:9], good), "too few examples for an attack"),
        ((good, np.r_[good, math.nan]), "NaN"),
        ((good, np.r_[good, math.inf]), "infinity"),
    ):
        with pytest.raises(Refused, match=words):
            loss_attack_accuracy(*bad)
    for setting in ({"splits": 0}, {"test_share": 0.0}, {"test_share": 0.99}, {"clip": 0.0}):
        with pytest.raises(Refused, match=r"expected splits|clip must"):
            loss_attack_accuracy(good, good, **setting)


def test_thresholds_per_class() -> None:
    rng = RNG(18)
    members, others = rng.normal(1, 1, 60), rng.normal(0, 1, 50)
    ours, theirs = rng.integers(0, 3, 60), rng.integers(1, 4, 50)
    found = class_thresholds(members, ours, others, theirs, 5)
    for label in (1, 2):
        assert found[label] == best_threshold(members[ours == label], others[theirs == label])
    assert found[[0, 3, 4]].tolist() == [best_threshold(members, others)] * 3


# measures, on models that answer from a table

C, FORGET, RETAIN, TEST = 4, 300, 500, 400
TOTAL = FORGET + RETAIN + TEST
LABELS = np.arange(TOTAL) % C
EASE = RNG(77).normal(1, 2, TOTAL)


class Answers(nn.Module):
    """A table of logits [n, C], read by example number."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, number: Tensor) -> Tensor:
        return self.logits[number[:, 0].long()]


def answers(seed: int, forget: float | np.ndarray = 0.0, retain: float | np.ndarray = 1.5) -> Answers:
    """A model whose margin is an example's ease, noise of its own, and what training on it left."""
    rng = RNG(seed)
    left = np.r_[np.broadcast_to(forget, FORGET), np.broadcast_to(retain, RETAIN), np.zeros(TEST)]
    logits = rng.normal(0, 0.3, (TOTAL, C))
    logits[np.arange(TOTAL), LABELS] += EASE + left + rng.normal(0, 0.7, TOTAL)
    return Answers(torch.tensor(logits))


def subject(after: nn.Module, references: int = 8, **changes: object) -> Subject:
    """Test ids begin at 0 again: they coincide with those of forget examples."""
    column = torch.arange(TOTAL)[:, None].float()
    cuts = [torch.arange(*ends) for ends in ((0, FORGET), (FORGET, FORGET + RETAIN), (FORGET + RETAIN, TOTAL))]
    labels = torch.tensor(LABELS)
    forget, retain = (as_data((column[cut], labels[cut]), ids=cut.tolist()) for cut in cuts[:2])
    test = as_data((column[cuts[2]], labels[cuts[2]]), ids=list(range(TEST)))
    retrained = tuple(answers(500 + seed) for seed in range(references))
    made = Subject(answers(1, 1.5), after, Request(forget, retain), Classification(C), test, retrained, draws=50)
    return replace(made, **changes)


def family(trace: float, unlearned: bool = True, models: int = 18, seed: int = 0) -> Shadows:
    """Shadow models of forget and retain examples, a third in each state; `trace` is left of what is forgotten."""
    states = RNG(seed).integers(0, 3, (models, FORGET + RETAIN)).astype(np.int8)
    left = np.where(states == IN, 1.5, np.where(states == FORGOTTEN, trace, 0.0))
    made = tuple(answers(3000 + number, row[:FORGET], row[FORGET:]) for number, row in enumerate(left))
    return Shadows(made, np.arange(FORGET + RETAIN), states, unlearned)


MEASURES = {
    "lira": lira.lira,
    "lira_online": lira.lira_online,
    "rmia": rmia.rmia,
    "ulira": ulira.ulira,
    "membership_tpr": membership_tpr,
    "loss_attack": loss_attack,
}


def read(made: Subject) -> dict[str, Reading]:
    return {name: reading for name, kind in MEASURES.items() if (reading := kind(made)) is not None}


def test_do_nothing_is_caught_and_retrained_models_are_not(poisoned_randomness: object) -> None:
    made = subject(answers(1, 1.5), shadows=family(0.6))
    row = measured(made, "nothing", "method").readings
    for name in ("lira", "lira_online", "rmia", "ulira"):
        assert row[name].low > 0.6, name
        assert row[name].verdict not in ("within", "unclear"), name
        assert row[name].detail["balanced_accuracy"] > 0.55
        assert max(len(line) for line in row[name].curves["roc"]) <= roc.POINTS
    assert row["lira"].value > row["membership_auc"].value + 0.1
    fresh = measured(subject(answers(2), shadows=family(0.6)), "retrained", "method").readings
    for name in MEASURES:
        assert fresh[name].verdict in ("within", "unclear"), name
        middle = {"membership_tpr": 1.0, "loss_attack": 50.0}.get(name, 0.5)
        assert fresh[name].low - 0.02 < middle < fresh[name].high + 0.02, name


def test_what_is_suppressed_is_seen_from_below() -> None:
    found = read(subject(answers(3, -1.5), shadows=family(0.6)))
    for name in ("lira", "lira_online", "rmia", "ulira"):
        assert found[name].high < 0.4, name


def test_a_random_model_has_no_members() -> None:
    made = subject(Answers(torch.tensor(RNG(19).normal(size=(TOTAL, C)))))
    found = read(made)
    assert set(found) == {"lira", "rmia", "membership_tpr", "loss_attack"}  # the others need shadow models
    for name, reading in found.items():
        assert reading.low <= {"membership_tpr": 1.0, "loss_attack": 50.0}.get(name, 0.5) <= reading.high


def test_what_a_method_leaves_is_read_from_its_shadows() -> None:
    weak, strong = (ulira.ulira(subject(answers(2), shadows=family(t))).detail for t in (0.0, 1.5))
    for name in ("shadow_accuracy", "kernel_accuracy"):
        assert abs(weak[name] - 50) < 3
        assert strong[name] > 65
    assert weak["shadow_accuracy_low"] < 50 < weak["shadow_accuracy_high"]
    assert strong["called_forgotten"] < 40  # a retrained model is called one that never saw them
    kept = ulira.ulira_retain(subject(answers(2), shadows=family(0.5)))
    assert kept.low > 0.6  # they were kept, and that shows


def test_no_shadow_is_scored_by_itself() -> None:
    shadow = family(0.6)
    made = subject(shadow.models[4], shadows=shadow)
    assert lira.shadows_apart(made) == [n for n in range(18) if n != 4]
    again = subject(answers(2), shadows=shadow, retrained=shadow.models[:3])
    assert lira.shadows_apart(again) == list(range(3, 18))


def test_reasons_for_not_applying() -> None:
    plain = subject(answers(2))
    assert "none were given" in lira.why_not_online(plain)
    assert "shadow models" in ulira.why_not(plain)
    assert ulira.ulira(plain) is ulira.ulira_retain(plain) is lira.lira_online(plain) is None
    few = subject(answers(2), shadows=family(0.5, models=4))
    assert "that at least 4 shadow models forgot" in ulira.why_not(few)
    assert "that at least 4 shadow models kept" in ulira.why_not(few, "retain")
    assert ulira.ulira(few) is None
    trained = family(0.5, unlearned=False)
    assert "went through the audited method" in ulira.why_not(subject(answers(2), shadows=trained))
    assert lira.lira_online(subject(answers(2), shadows=trained)) is not None
    alone = subject(answers(2), references=0, shadows=trained)
    assert "retrained" in lira.why_not_online(alone)
    assert "retrained" in rmia.why_not(alone)
    assert lira.lira(subject(answers(2), references=1)) is None
    assert rmia.rmia(subject(answers(2), references=1)) is not None


def test_few_unseen_examples() -> None:
    test = subject(answers(2)).test
    small, smaller = (subject(answers(2), test=test.select(range(size))) for size in (15, 9))
    assert membership_tpr(small) is None
    assert "too few examples for RMIA" in rmia.why_not(small)
    assert lira.lira(small).n == FORGET + 15
    assert loss_attack(small).detail["examples_per_side"] == 15
    assert loss_attack(smaller) is None
    none = subject(answers(2), test=None)
    assert [kind(none) for kind in (lira.lira, rmia.rmia, membership_tpr, loss_attack)] == [None] * 4


def test_a_class_that_goes_is_held_against_its_own() -> None:
    made = subject(answers(2))
    gone, kept = np.flatnonzero(LABELS[:FORGET] == 2), np.flatnonzero(LABELS[FORGET : FORGET + RETAIN] != 2)
    made = replace(made, request=Request(made.request.forget.select(gone), made.request.retain.select(kept)))
    unseen = int((LABELS[FORGET + RETAIN :] == 2).sum())
    assert lira.lira(made).n == len(gone) + unseen
    assert loss_attack(made).detail["examples_per_side"] == min(len(gone), unseen)
    assert rmia.rmia(made).detail["population"] == unseen // 2
    assert rmia.rmia(made).n == len(gone) + unseen - unseen // 2
    assert 0 <= attack_confidence(made).detail["per_class"] <= 100


def test_the_same_key_gives_the_same_bits() -> None:
    first, again = (read(subject(answers(4, 0.5), shadows=family(0.5))) for _ in range(2))
    assert first == again
    other = read(subject(answers(4, 0.5), shadows=family(0.5), key=Key(9)))
    assert other["rmia"] != first["rmia"]
    assert other["lira"] == first["lira"]  # nothing is drawn


def test_on_real_digits_the_original_model_is_caught() -> None:
    """20 of 100 training images, drawn at random; five retrained models, each also held against the others."""
    case = tiny("classification", "random")
    references = tuple(retrained("classification", "random", seed=seed) for seed in range(5))
    made = Subject(case.model, case.model, case.request, case.task, case.test, references)
    for attack in (lira.lira, rmia.rmia):
        found, held = attack(made), [attack(made.held_out(number)) for number in range(5)]
        assert found.low > 0.5
        assert found.value > max(reading.value for reading in held)
        assert sum(reading.low <= 0.5 <= reading.high for reading in held) >= 4


def test_states_of_unknown_examples_are_out() -> None:
    assert (family(0.5).of(np.array([TOTAL + 5])) == OUT).all()


def test_rmia_survives_references_that_rule_the_true_class_out() -> None:
    """A loss of a thousand leaves a probability of 0 in any float: a reason for no evidence, not for no audit."""
    made = subject(answers(1))
    sure = tuple(Answers(1e4 * model.logits.data) for model in made.retrained)  # type: ignore[operator]
    found = rmia.rmia(replace(made, retrained=sure, before=sure[0]))
    assert found is not None
    assert 0 <= found.value <= 1
