"""What counts as shown, finding by finding: written before the reported worlds were run, after trying seed 100 alone.

The last two findings, and the runs that only they read, were added after the others had been seen: TOFU's published GradDiff
loses its forget quality and not its utility, and the length of a run turned out to matter to the comparison with EUPMU.

Every claim is one number per world, and Student's interval of its mean over the worlds has to lie wholly on the claimed
side of a bound. Each world has its own authors, weights and order, so the spread over worlds has that over questions in
it. A finding is shown when all its claims are; what is not shown may still be true.

Rules that choose a point of a run, fixed here: "end" is the last step; "peak" is the point after the start with the
highest forget quality, the earliest of equals; "passing" are the points with forget quality p > 0.05; "forgotten" is the
first point whose mean forget probability is at most the retrained model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from expunge.audit.intervals import t_interval

Point = dict[str, Any]
Runs = Mapping[str, list[Point]]
SUCCESS = 0.05


@dataclass(frozen=True)
class Claim:
    """One number per world, on one side of a bound.

    Attributes:
        says: the criterion. value: of one world's runs. side: "above" or "below". bound: of it.
    """

    says: str
    value: Callable[[Runs], float]
    side: str
    bound: float


def ratios(point: Point) -> np.ndarray:
    """Truth ratios of the forget items, geometric; log scale would give the same test."""
    return np.array(point["correct"]) - np.array(point["wrong"]).mean(1)


def quality(point: Point, runs: Runs, only: np.ndarray | None = None) -> tuple[float, float]:
    """(log10 of the p, distance) of the Kolmogorov-Smirnov test against the retrained model, of all or some items."""
    chosen = np.ones(len(point["correct"]), bool) if only is None else only
    test = stats.ks_2samp(ratios(point)[chosen], ratios(retrained(runs))[chosen])
    return math.log10(max(float(test.pvalue), 1e-300)), float(test.statistic)


def retrained(runs: Runs) -> Point:
    """The retrained model's answers."""
    return runs["retrained"][0]


def utility(point: Point) -> float:
    """MU_mini."""
    return float(point["numbers"]["utility"])


def kept(run: str) -> Callable[[Runs], float]:
    """Utility at the end over that of the original."""
    return lambda runs: utility(runs[run][-1]) / utility(runs["original"][0])


def end_quality(run: str) -> Callable[[Runs], float]:
    """log10 forget quality at the end."""
    return lambda runs: quality(runs[run][-1], runs)[0]


def peak(run: str, runs: Runs) -> Point:
    """The point with the highest forget quality."""
    return max(runs[run][1:], key=lambda point: quality(point, runs)[0])


def passing_utility(run: str, runs: Runs) -> float:
    """Highest utility, as a share of the original's, among the points that pass; 0 where none does."""
    good = [utility(p) for p in runs[run][1:] if quality(p, runs)[0] > math.log10(SUCCESS)]
    return max(good, default=0.0) / utility(runs["original"][0])


def forgotten_utility(run: str, runs: Runs) -> float:
    """Utility, as a share of the original's, at the first point that forgot; 0 where none did."""
    level = retrained(runs)["numbers"]["forget_probability"]
    for point in runs[run][1:]:
        if point["numbers"]["forget_probability"] <= level:
            return utility(point) / utility(runs["original"][0])
    return 0.0


def long_items(runs: Runs) -> np.ndarray:
    """[n] whether a forget answer is long."""
    return np.array(retrained(runs)["long"], bool)


def beyond(run: str, long: bool) -> Callable[[Runs], float]:
    """|mean over the items of one length of loss per token less the retrained model's|, nats, at the peak."""

    def value(runs: Runs) -> float:
        chosen = long_items(runs) == long
        gap = np.array(peak(run, runs)["answer"]) - np.array(retrained(runs)["answer"])
        return abs(float(gap[chosen].mean()))

    return value


def distance(run: str, long: bool) -> Callable[[Runs], float]:
    """Kolmogorov-Smirnov distance to the retrained model, of the items of one length, at the peak."""
    return lambda runs: quality(peak(run, runs), runs, long_items(runs) == long)[1]


def recovered(run: str, bits: int, what: str) -> Callable[[Runs], float]:
    """Share of what was forgotten that rounding to so many bits brings back, at the peak, less the same of retraining.

    (after - before) / (original rounded - before), of the mean forget probability or extraction strength; from it goes
    what rounding does to a retrained model, over the same denominator.
    """

    def level(point: Point, rounded: bool) -> float:
        part = point["rounded"][str(bits)] if rounded else point
        values = np.array(part["extraction"]) if what == "extraction" else np.exp(-np.array(part["answer"]))
        return float(values.mean())

    def value(runs: Runs) -> float:
        point, again = peak(run, runs), retrained(runs)
        change = level(point, True) - level(point, False) - (level(again, True) - level(again, False))
        return change / max(1e-9, level(runs["original"][0], True) - level(point, False))

    return value


def at_alpha(alpha: float) -> Callable[[Runs], float]:
    """Utility of the task vector at one alpha over that of the original."""

    def value(runs: Runs) -> float:
        point = next(point for point in runs["task_vector"] if point["alpha"] == alpha)
        return utility(point) / utility(runs["original"][0])

    return value


def safe_alpha(runs: Runs) -> float:
    """Membership AUC at the largest alpha that keeps nine tenths of the utility (0 if need be): is it forgotten there?"""
    points = runs["task_vector"]
    good = [p for p in points if utility(p) >= 0.9 * utility(points[0])]
    return float(good[-1]["numbers"]["membership_loss"])


def end_number(run: str, name: str) -> Callable[[Runs], float]:
    """A number at the end."""
    return lambda runs: float(runs[run][-1]["numbers"][name])


def less(first: Callable[[Runs], float], second: Callable[[Runs], float]) -> Callable[[Runs], float]:
    """first - second, in one world."""
    return lambda runs: first(runs) - second(runs)


def collapse(run: str) -> tuple[Claim, ...]:
    """Both collapse criteria of one run."""
    return (
        Claim(f"{run}: utility at the end, as a share of the original's", kept(run), "below", 0.1),
        Claim(f"{run}: log10 forget quality at the end", end_quality(run), "below", math.log10(SUCCESS)),
    )


def surgery(run: str, plain: str = "npo_retain") -> tuple[Claim, ...]:
    """More utility than the same loop with a plain sum, at equal forget quality."""
    return (
        Claim(
            f"{run} less {plain}: highest utility among passing points, share of the original's",
            less(lambda runs: passing_utility(run, runs), lambda runs: passing_utility(plain, runs)),
            "above",
            0.0,
        ),
        Claim(
            f"{run} less {plain}: utility at the point where it has forgotten, share of the original's",
            less(lambda runs: forgotten_utility(run, runs), lambda runs: forgotten_utility(plain, runs)),
            "above",
            0.0,
        ),
    )


def rounding(run: str, bits: int) -> tuple[Claim, ...]:
    """A share of at least a twentieth comes back, in probability and in extraction strength."""
    return tuple(
        Claim(
            f"{run}, {bits} bits: share of the {name} that comes back, beyond retraining",
            recovered(run, bits, what),
            "above",
            0.05,
        )
        for what, name in (("probability", "forget probability"), ("extraction", "extraction strength"))
    )


FINDINGS: dict[str, tuple[str, tuple[Claim, ...]]] = {
    "ga_collapse": ("Gradient ascent collapses", collapse("gradient_ascent")),
    "grad_diff_collapse": ("GradDiff collapses", collapse("grad_diff")),
    "npo_stays": (
        "NPO with a retain term does not collapse",
        (
            Claim("npo_fast: utility at the end, as a share of the original's", kept("npo_fast"), "above", 0.8),
            Claim(
                "npo_fast less gradient_ascent: log10 forget quality at the end",
                less(end_quality("npo_fast"), end_quality("gradient_ascent")),
                "above",
                0.0,
            ),
            Claim(
                "npo_fast less grad_diff: log10 forget quality at the end",
                less(end_quality("npo_fast"), end_quality("grad_diff")),
                "above",
                0.0,
            ),
        ),
    ),
    "length": (
        "NPO is further from retraining on short answers than on long ones, and than SimNPO on short ones",
        (
            Claim(
                "npo_retain, short less long: nats per token from retraining",
                less(beyond("npo_retain", False), beyond("npo_retain", True)),
                "above",
                0.0,
            ),
            Claim(
                "short answers, npo_retain less simnpo: nats per token from retraining",
                less(beyond("npo_retain", False), beyond("simnpo", False)),
                "above",
                0.0,
            ),
            Claim(
                "short answers, npo_retain less simnpo: distance of truth ratios from retraining",
                less(distance("npo_retain", False), distance("simnpo", False)),
                "above",
                0.0,
            ),
        ),
    ),
    "idk_knowledge": (
        "IdkNLL refuses and leaves knowledge in",
        (
            Claim(
                "idk_nll less retrained: ROUGE-L recall of the forget answers at the end",
                less(end_number("idk_nll", "forget_rouge"), end_number("retrained", "forget_rouge")),
                "below",
                0.0,
            ),
            Claim(
                "idk_nll less retrained: membership AUC at the end",
                less(end_number("idk_nll", "membership_loss"), end_number("retrained", "membership_loss")),
                "above",
                0.0,
            ),
            Claim(
                "idk_nll less retrained: extraction strength at the end",
                less(end_number("idk_nll", "extraction_strength"), end_number("retrained", "extraction_strength")),
                "above",
                0.2,
            ),
        ),
    ),
    "idk_membership": (
        "After IdkNLL membership stays near 1",
        (Claim("idk_nll: membership AUC at the end", end_number("idk_nll", "membership_loss"), "above", 0.9),),
    ),
    "cliff": (
        "The task vector has a cliff",
        (
            Claim("utility at alpha 1, as a share of the original's", at_alpha(1.0), "above", 0.7),
            Claim("utility at alpha 5, as a share of the original's", at_alpha(5.0), "below", 0.1),
            Claim(
                "membership AUC at the largest alpha that keeps nine tenths of the utility", safe_alpha, "above", 0.6
            ),
        ),
    ),
    "quantise_int8": ("8-bit rounding brings knowledge back (NPO)", rounding("npo_retain", 8)),
    "quantise_int4": ("4-bit rounding brings knowledge back (NPO)", rounding("npo_retain", 4)),
    "quantise_slow_int4": ("4-bit rounding brings knowledge back (NPO, a third of the rate)", rounding("npo_slow", 4)),
    "projection": (
        "One-sided projection keeps more utility than a sum, at equal forgetting",
        surgery("npo_projection"),
    ),
    "eupmu": ("EUPMU keeps more utility than a sum, at equal forgetting", surgery("npo_eupmu")),
    "grad_diff_quality": (
        "Added later: GradDiff's forget quality collapses, whatever its utility does",
        collapse("grad_diff")[1:],
    ),
    "eupmu_long": (
        "Added later: EUPMU keeps more utility than a sum in runs of 96 steps too",
        surgery("npo_eupmu_long", "npo_retain_long"),
    ),
}
"""Name -> (title, claims)."""


def judge(worlds: Mapping[int, Runs]) -> dict[str, Any]:
    """Every finding with its claims, their values, intervals and verdicts; those of runs that were not made are left out."""
    found = {}
    for name, (title, claims) in FINDINGS.items():
        try:
            judged = [judged_claim(claim, list(worlds.values())) for claim in claims]
        except KeyError:
            continue
        verdict = "shown" if all(claim["holds"] for claim in judged) else "not shown"
        found[name] = {"title": title, "verdict": verdict, "claims": judged}
    return found


def judged_claim(claim: Claim, worlds: Sequence[Runs]) -> dict[str, Any]:
    """One claim as JSON."""
    values = [claim.value(runs) for runs in worlds]
    low, high = t_interval(values)
    holds = low > claim.bound if claim.side == "above" else high < claim.bound
    return {
        "criterion": claim.says,
        "side": claim.side,
        "bound": round(claim.bound, 4),
        "values": [round(value, 4) for value in values],
        "mean": round(float(np.mean(values)), 4),
        "interval": [round(low, 4), round(high, 4)],
        "holds": bool(holds),
    }
