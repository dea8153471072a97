"""LiRA against the authors' released code, run beside ours on the arrays below (its numbers are written down here).

Source: tensorflow/privacy, research/mi_lira_2021/plot.py at 03035d5d, functions generate_ours and generate_ours_offline.
Where that code is right ours agrees; where it has a known defect ours differs, and agrees with the defect put in.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from expunge.audit.gaussian import Fit, fit
from expunge.audit.lira import density_scores, offline_scores, online_scores
from expunge.audit.membership import entropy_of, modified_entropy
from expunge.audit.subject import Outputs

MODELS, EXAMPLES, QUERIES = 8, 6, 2
ONLINE = (
    *(-0.0691492798650385, -2.877566506473017, -2.3821939106993653, -2.2156103850392626, 3.3107800530219658),
    *(1.7414771258282762, 0.39561507817660085, 10.85865783897788, 3.3189740313795046, -1.8745091996685534),
    *(5.987242048258773, 1.5708639641818114),
)
OFFLINE = (
    *(-1.2302144310581795, -5.788350075761929, -4.951735938593325, -3.228232607091867, -1.9866308158069923),
    *(-2.2054101717889014, -0.8427589557960383, -1.9736487556687365, -3.683566384264829, -5.264773178365078),
    *(-1.6420509974923383, -2.635569506832219),
)
ONLINE_FIXED = (
    *(-0.03804090252278136, 0.06852213318538858, -1.6657401448867237, -0.1923346084143358, 2.467631766038309),
    *(-0.1664699061696846, 0.2401092296872982, 3.1682138350238818, -0.2759453512413097, 0.8207505599356439),
    *(2.8349407906672823, -0.14439851611912824),
)
OFFLINE_FIXED = (
    *(-1.34286751261504, -1.9131484257204454, -3.6621612944019235, -1.377430808769578, -1.5659893147816835),
    *(-1.6146371204298258, -1.1288870791531331, -1.436115964296072, -2.8689190447884863, -1.955948357590108),
    *(-1.8832969712245915, -1.7468662853830645),
)
"""What the released code returns for the two attacked models, one after the other: *smaller* for members."""


def uniform(seed: int, *shape: int) -> np.ndarray:
    """A linear congruential generator: the same numbers with every version of numpy."""
    found, state = [], seed
    for _ in range(math.prod(shape)):
        state = (1103515245 * state + 12345) % 2**31
        found.append((state >> 8) / 2**23)
    return np.array(found).reshape(shape)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memberships [8, 6] (four of eight for each example), margins [8, 6, 2], and margins [2, 6, 2] to be attacked."""
    keep = np.argsort(uniform(1, MODELS, EXAMPLES), axis=0) < MODELS // 2
    everyone = np.concatenate([keep, uniform(2, 2, EXAMPLES) < 0.5])
    base = 3 * uniform(3, EXAMPLES, QUERIES)
    scores = base + 1.5 * everyone[:, :, None] + 4 * uniform(4, MODELS + 2, EXAMPLES, QUERIES)
    return keep, scores[:-2], scores[-2:]


def spread(margins: np.ndarray, mask: np.ndarray) -> float:
    """The released code's one deviation: of all margins of the arm together."""
    return float(np.concatenate([margins[mask[:, j], j] for j in range(EXAMPLES)]).std())


def test_online_with_a_variance_per_example() -> None:
    keep, margins, target = arrays()
    ours = online_scores(target, margins, keep, ~keep, "each")
    assert np.allclose(-ours.ravel(), ONLINE, rtol=1e-12)


def test_the_released_offline_form() -> None:
    keep, margins, target = arrays()
    assert np.allclose(-density_scores(target, margins, ~keep, "each").ravel(), OFFLINE, rtol=1e-12)


def test_one_deviation_for_all_takes_the_arm_that_it_is_for() -> None:
    """The released online branch gives the OUT models the deviation of the IN models; ours does not."""
    keep, margins, target = arrays()
    means = [fit(margins, mask).mean for mask in (keep, ~keep)]
    own = [np.full(1, spread(margins, mask)) for mask in (keep, ~keep)]
    assert own[0] != pytest.approx(own[1], rel=1e-3)

    def score(outside: np.ndarray) -> np.ndarray:
        inside = Fit(means[0], own[0]).log_density(target)
        return (inside - Fit(means[1], outside).log_density(target)).mean(-1).ravel()

    assert np.allclose(-score(own[0]), ONLINE_FIXED, rtol=1e-12)  # with the defect: the released numbers
    assert not np.allclose(-score(own[1]), ONLINE_FIXED, rtol=1e-2)
    pooled = online_scores(target, margins, keep, ~keep, "pooled").ravel()
    assert not np.allclose(-pooled, ONLINE_FIXED, rtol=1e-2)
    outside = Fit(means[1], own[1]).log_density(target).mean(-1).ravel()
    assert np.allclose(outside, OFFLINE_FIXED, rtol=1e-12)  # the offline branch has no such defect


def test_the_pooled_deviation_is_the_one_within_examples() -> None:
    """That of all margins together, as released, grows with the differences between examples and blurs every score."""
    keep, margins, _ = arrays()
    shifted = margins + 100 * np.arange(EXAMPLES)[:, None]
    values = [margins[keep[:, j], j, q] for j in range(EXAMPLES) for q in range(QUERIES)]
    wanted = math.sqrt(sum(((v - v.mean()) ** 2).sum() for v in values) / sum(len(v) - 1 for v in values))
    for found in (fit(margins, keep, "pooled"), fit(shifted, keep, "pooled")):
        assert found.deviation[0] == pytest.approx(wanted, rel=1e-9)
    assert spread(shifted, keep) > 50 * wanted


def test_the_offline_score_is_one_sided() -> None:
    """The order of 1 - Pr[N(OUT) > margin], by scipy; the released density form is not, and loses most of the area."""
    rng = np.random.default_rng(8)
    examples, models = 3000, 16
    difficulty = rng.normal(0, 2, examples)
    margins = difficulty + rng.normal(0, 1, (models, examples))
    members = np.arange(examples) < examples // 2
    target = difficulty + members + rng.normal(0, 1, examples)
    outside = np.ones((models, examples), bool)
    one_sided = offline_scores(target, margins, outside)
    pooled = math.sqrt(margins.var(0, ddof=1).mean())
    tail = stats.norm.sf(target, np.median(margins, 0), pooled)
    assert np.allclose(np.exp(-one_sided), tail, rtol=1e-6)
    area = roc_auc_score(members, one_sided)
    wanted = stats.norm.cdf(1 / math.sqrt(2 * (1 + math.pi / 2 / models)))  # of a margin less a median of 16
    assert area == pytest.approx(wanted, abs=0.03)
    assert roc_auc_score(members, density_scores(target, margins, outside)) < 0.65 < area


def test_scores_far_out_are_still_ordered() -> None:
    margins, target = np.random.default_rng(9).normal(size=(5, 4)), np.array([10.0, 50.0, 200.0, 1e6])
    scores = offline_scores(target, margins - margins.mean(0), np.ones((5, 4), bool))
    assert np.isfinite(scores).all()
    assert (np.diff(scores) > 0).all()


def test_an_example_with_more_models_uses_them_all() -> None:
    """The released code cuts every example to the smallest number of models."""
    keep, margins, _ = arrays()
    keep = keep.copy()
    keep[:, 0] = True
    keep[:3, 0] = False  # example 0: five IN, three OUT; the others four and four
    found = fit(margins, keep, "each")
    assert np.allclose(found.mean[0], np.median(margins[3:, 0], axis=0))
    assert np.allclose(found.deviation[0], margins[3:, 0].std(axis=0))


def test_modified_entropy_is_the_textbook_value_where_the_copied_code_gives_9_51() -> None:
    """0.84 for the right class, of four. By hand: 0.16 ln(1/0.84) + 0.1 ln(1/0.9) + 0.05 ln(1/0.95) + 0.01 ln(1/0.99)
    = 0.027897 + 0.010536 + 0.002565 + 0.000101 = 0.041098.

    The copied code has two defects. Its log(1 - p) is log p. And it changes the column of every label of the batch in
    every row: with all four labels in the batch, each term becomes (1 - p) log p.
    """
    row = np.array([0.84, 0.1, 0.05, 0.01])
    p, labels = np.stack([np.roll(row, shift) for shift in range(4)]), np.arange(4)

    def copied(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
        factor, logs = p.copy(), np.log(p)  # second defect of one line: these logs stand for log(1 - p) as well
        factor[:, labels] = (1 - p)[:, labels]  # and every row gets the columns of all labels
        return -(factor * logs).sum(1)

    assert np.round(copied(p, labels), 2).tolist() == [9.51] * 4
    assert modified_entropy(p, labels) == pytest.approx([0.041098] * 4, abs=5e-7)
    logits = np.log(p)
    outputs = Outputs.of({"logits": logits.astype(np.float32), "label": labels})
    assert entropy_of(outputs) == pytest.approx([0.041098] * 4, abs=1e-6)
