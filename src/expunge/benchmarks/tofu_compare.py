"""A model's TOFU numbers, each with an interval and beside the retrained model's.

Departures: each number has a 95 % interval from a bootstrap over items (the published ones have none), and a comparison is
over the questions that both models were asked. The models are what they are: no interval speaks of other training seeds.

Paper: Maini et al. 2024 (arXiv:2401.06121); the formulas are in ``tofu_scores``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from expunge.audit import intervals
from expunge.benchmarks.tofu_scores import (
    METRICS,
    UTILITY,
    Form,
    Said,
    harmonic_mean,
    model_utility,
    per_item,
    truth_ratio,
)
from expunge.core import Key, Refused

SUCCESS = 0.05


@dataclass(frozen=True)
class Score:
    """One number of a model, and beside it the retrained model's.

    Attributes:
        name: "<set> <metric>" or "model_utility". form: of the truth ratio; "" where it has no part in the number.
        value, low, high: with its 95 % interval, over all n items of the model.
        retrained: the retrained model's, over the `shared` items; None without one.
        gap: model less retrained with its 95 % interval, both over the shared items, which are resampled together.
    """

    name: str
    form: str
    value: float
    low: float
    high: float
    n: int
    retrained: float | None = None
    gap: tuple[float, float, float] | None = None
    shared: int = 0


@dataclass(frozen=True)
class ForgetQuality:
    """The Kolmogorov-Smirnov test of two models' truth ratios on the same n questions.

    Attributes:
        p_value, log10: 1 and 0 are ideal. log10 is minus infinity where p is below the smallest number.
        log10_low, log10_high: what the test would say, with this n, at the ends of the distance's interval.
        distance, low, high: largest difference of the two distribution functions, with its 95 % interval.
        least: log10 of the smallest p that n questions can give: p values of other n are not comparable.
        form: of the truth ratio.
    """

    p_value: float
    log10: float
    log10_low: float
    log10_high: float
    distance: float
    low: float
    high: float
    n: int
    least: float
    form: str

    @property
    def successful(self) -> bool:
        """p > 0.05, as the paper counts. That a test sees no difference proves none, with few questions least of all."""
        return self.p_value > SUCCESS


def scores(
    model: Mapping[str, Said],
    retrained: Mapping[str, Said] | None = None,
    form: Form = "geometric",
    draws: int = 1000,
    key: Key = Key(0),
) -> tuple[Score, ...]:
    """Every metric of every set that is given, and the model utility where all three of its sets are.

    Args:
        model, retrained: set (of ``SETS``) -> what was said. form: of the truth ratio. draws: bootstrap resamples.

    Raises:
        Refused: for an unknown set or form, or a set of which the two models share no question.
    """
    alone = _Cells(model, form, draws, key)
    if retrained is None:
        return alone.scores()
    both = {name: _asked_both(name, said, retrained[name]) for name, said in model.items() if name in retrained}
    ours = _Cells({name: said.of(both[name]) for name, said in model.items() if name in both}, form, draws, key)
    theirs = _Cells({name: retrained[name].of(asked) for name, asked in both.items()}, form, draws, key)
    return tuple(_beside(score, ours, theirs) for score in alone.scores())


def forget_quality(
    model: Said, retrained: Said, form: Form = "geometric", draws: int = 1000, key: Key = Key(0)
) -> ForgetQuality:
    """Whether the forget truth ratios of a model could be a retrained model's: on questions that both were asked.

    The test takes the two samples for independent, as the paper does, although they are answers to the same questions.
    Its interval resamples questions, both answers together: by the triangle inequality the distance D is off by at most
    the largest |F* - G* - (F - G)|, so that D -+ its 95 % quantile covers at least as often as it says. p has no interval
    of its own: its ends are those of D, tested with the same n. The original evaluation caps n at 300, open-unlearning
    takes all 40, 200 or 400.
    """
    asked = _asked_both("forget", model, retrained)
    ours, theirs = (truth_ratio(said.correct, said.wrong, form) for said in (model.of(asked), retrained.of(asked)))
    n, test = len(asked), stats.ks_2samp(ours, theirs)
    noise = _distance_noise(ours, theirs, draws, key.at("tofu", "forget"))
    low, high = intervals.distance_interval(float(test.statistic), noise)
    high = min(1.0, high)
    return ForgetQuality(
        p_value=float(test.pvalue),
        log10=_log10(float(test.pvalue)),
        log10_low=_log10(_p_value(math.ceil(high * n - 1e-9), n)),
        log10_high=_log10(_p_value(math.floor(low * n + 1e-9), n)),
        distance=float(test.statistic),
        low=low,
        high=high,
        n=n,
        least=_log10(_p_value(n, n)),
        form=form,
    )


class _Cells:
    """The values of a model and their bootstrap: one resampling of the items for all metrics of a set."""

    def __init__(self, model: Mapping[str, Said], form: Form, draws: int, key: Key):
        self.form = form
        self.means: dict[str, float] = {}
        self.sampled: dict[str, np.ndarray] = {}
        self.sizes: dict[str, int] = {}
        for name, said in model.items():
            for metric, values in per_item(said, name, form).items():
                cell = f"{name} {metric}"
                self.means[cell], self.sizes[cell] = float(values.mean()), len(values)
                self.sampled[cell] = intervals.resampled_mean(values, draws, key.at("tofu", name))
        nine = [f"{name} {metric}" for name in UTILITY for metric in METRICS]
        if set(nine) <= set(self.means):
            self.means["model_utility"] = model_utility([self.means[cell] for cell in nine])
            self.sampled["model_utility"] = harmonic_mean(np.stack([self.sampled[cell] for cell in nine]))
            self.sizes["model_utility"] = sum(self.sizes[f"{name} rouge"] for name in UTILITY)

    def scores(self) -> tuple[Score, ...]:
        found = []
        for cell, value in self.means.items():
            low, high = intervals.share_interval(self.sampled[cell], self.sizes[cell])
            form = self.form if cell.endswith(("truth_ratio", "utility")) else ""
            found.append(Score(cell, form, value, low, high, self.sizes[cell]))
        return tuple(found)


def _beside(score: Score, ours: _Cells, theirs: _Cells) -> Score:
    if score.name not in ours.means or score.name not in theirs.means:
        return score
    low, high = intervals.percentile(ours.sampled[score.name] - theirs.sampled[score.name])
    retrained = theirs.means[score.name]
    gap = (ours.means[score.name] - retrained, low, high)
    return replace(score, retrained=retrained, gap=gap, shared=ours.sizes[score.name])


def _asked_both(name: str, first: Said, second: Said) -> list[str]:
    known = set(second.questions)
    found = [question for question in first.questions if question in known]
    if not found:
        raise Refused(f"the two models share no question of {name}: compare logs of one forget set")
    return found


def _distance_noise(first: np.ndarray, second: np.ndarray, draws: int, key: Key) -> np.ndarray:
    """[draws] largest |F* - G* - (F - G)| over all values, questions resampled with both answers."""
    grid = np.unique(np.concatenate([first, second]))
    below = (first[:, None] <= grid).astype(np.float64) - (second[:, None] <= grid)
    centred, n = below - below.mean(0), len(first)
    found = []
    for rows in intervals.choices(n, draws, key, len(grid)):
        counts = np.zeros((len(rows), n))
        np.add.at(counts, (np.arange(len(rows))[:, None], rows), 1.0)
        found.append(np.abs(counts @ centred / n).max(1))
    return np.concatenate(found)


def _p_value(steps: int, n: int) -> float:
    """Two-sided p of a distance of steps/n between two samples of n: of one that is the other shifted by so many."""
    ranks = np.arange(n)
    return float(stats.ks_2samp(ranks, ranks + steps).pvalue)


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
