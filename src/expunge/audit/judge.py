"""The verdict: is this model equivalent to retrained ones, and could this audit have told if it were not?

Two one-sided tests per deciding measure, with the margin set from the spread of the retrained models. With K of them, mean
m and standard deviation s, let t(q) be Student's quantile at their degrees of freedom:

    band    P = t(1 - a / 2M) s sqrt(1 + 1/K)       where one more retrained model lies, all M measures together, but for a
    error   h = t(0.95) s / sqrt(K)                 of the retrained mean, one-sided
    margin  P + h

The difference d of the model from m is *equivalent* where its whole 90% interval d -+ h lies inside the margin, *different*
where it lies wholly outside, and *unclear* between. A genuine retrained model is equivalent in all M with probability
1 - a, by construction (for normal values). The tests are about these examples: they are the forget set itself.
Shares and areas are compared as asin(sqrt(share)).

The audit judges itself by the same rule: doing nothing must fail, and retrained models, each held out, must pass.

Source: two one-sided tests, Schuirmann 1987; the margin from the spread is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from expunge.audit.subject import Reading

Word = Literal["forgotten", "not forgotten", "over-forgotten", "cannot tell", "audit broken"]
Outcome = Literal["equivalent", "different", "unclear"]

ENOUGH = 3  # retrained models from which a spread can be told
LARGEST = 256  # retrained models: the most that "how many would be needed" answers
FALSE_ALARM = 0.02  # a: share of genuine retrained models that may fail a whole verdict
SURPRISE = 0.01  # probability of as many failures among held-out retrained models, below which the test is wrong
RATIO = "ratio"  # unit of readings that are ratios

DECISIVE = (
    *("forget_accuracy", "forget_loss", "forget_margin_shift", "forget_margin_distance", "recall", "membership_auc"),
    *("retain_accuracy", "retain_loss", "test_accuracy", "test_loss"),
)
"""The measures that decide. With every measure some would leave its band by chance."""

APART = "forget_margin_distance"  # has no direction of its own
UTILITY = ("retain_accuracy", "retain_loss", "test_accuracy", "test_loss")
_ABOVE = {
    "forget_accuracy": "under-forgot",
    "forgotten_class_accuracy": "under-forgot",
    "membership_auc": "under-forgot",
    "membership_auc_same_class": "under-forgot",
    "forget_margin_shift": "under-forgot",
    "recall": "under-forgot",
    "membership_tpr": "under-forgot",
    "lira": "under-forgot",
    "lira_online": "under-forgot",
    "rmia": "under-forgot",
    "ulira": "under-forgot",
    "lm_zlib": "under-forgot",
    "lm_reference": "under-forgot",
    "lm_min_k": "under-forgot",
    "lm_min_k_plus": "under-forgot",
    "lm_gradient_norm": "under-forgot",
    "lm_privacy_leakage": "over-forgot",
    "lm_written": "under-forgot",
    "lm_leak": "under-forgot",
    "exact_memorisation": "under-forgot",
    "extraction_strength": "under-forgot",
    "input_perturbation": "under-forgot",
    "relearn": "under-forgot",
    "relearn_benign": "under-forgot",
    "quantised_forget_accuracy_int8": "under-forgot",
    "quantised_forget_accuracy_int4": "under-forgot",
    "pruned_forget_accuracy": "under-forgot",
    "relearn_loss": "over-forgot",
    "relearn_benign_loss": "over-forgot",
    "quantised_forget_loss_int8": "over-forgot",
    "quantised_forget_loss_int4": "over-forgot",
    "pruned_forget_loss": "over-forgot",
    "anamnesis": "over-forgot",
    "linear_mode": "over-forgot",
    "attack_confidence": "over-forgot",
    "attack_entropy": "over-forgot",
    "forget_loss": "over-forgot",
    "retain_accuracy": "above",
    "test_accuracy": "above",
    "retain_loss": "lost utility",
    "test_loss": "lost utility",
}
_NAMED: dict[str, Word] = {
    "under-forgot": "not forgotten",
    "over-forgot": "over-forgotten",
    "lost utility": "over-forgotten",
}
_OPPOSITE = {
    "under-forgot": "over-forgot",
    "over-forgot": "under-forgot",
    "above": "lost utility",
    "lost utility": "above",
}


@dataclass(frozen=True)
class Equivalence:
    """One pair of one-sided tests.

    Attributes:
        name: of the measure. difference: model less the retrained mean, in the measure's unit; low, high: 90%.
        margin: the largest difference that counts as none. outcome: see the module.
        word: how it differs: "under-forgot", "over-forgot", "lost utility", "above", "outside"; "" where it does not.
        needed: retrained models with which an unclear outcome would be clear, if the spread stayed; None where it is
            clear, or would stay unclear.
    """

    name: str
    difference: float
    low: float
    high: float
    margin: float
    outcome: Outcome
    word: str = ""
    needed: int | None = None


@dataclass(frozen=True)
class Spread:
    """Centre and spread of the retrained models in one measure.

    Shares and areas, which end at 0 and at `top`, are compared as asin(sqrt(value / top)): near an end their spread is
    skewed and depends on the mean, and there it is neither.

    Attributes:
        mean, deviation: of the values so transformed. count: retrained models. degrees: of freedom of the deviation.
        top: the largest value there can be, above 0; None where there is none, and nothing is transformed.
        step: the smallest difference there can be: one example, of a share.
        ratio: whether the values are ratios, >= 0, which are compared as log(1 + value): equal factors are about equally far.
    """

    mean: float
    deviation: float
    count: int
    degrees: int
    top: float | None = None
    step: float = 0.0

    ratio: bool = False

    def at(self, value: float) -> float:
        """The value transformed."""
        if self.ratio:
            return math.log1p(max(0.0, value))
        return value if self.top is None else math.asin(math.sqrt(min(1.0, max(0.0, value / self.top))))

    def back(self, place: float) -> float:
        """The inverse of ``at``, for any number."""
        if self.ratio:
            return max(0.0, math.expm1(place))
        return place if self.top is None else self.top * math.sin(min(math.pi / 2, max(0.0, place))) ** 2

    def band(self, tests: int, count: int | None = None) -> float:
        """P: half of the range in which one more retrained model lies, `tests` measures together."""
        count = self.count if count is None else count
        degrees = self.degrees + count - self.count
        quantile = float(stats.t.ppf(1 - FALSE_ALARM / (2 * tests), degrees))
        return quantile * self.deviation * math.sqrt(1 + 1 / count)

    def error(self, count: int | None = None) -> float:
        """h: one-sided 95% error of the retrained mean."""
        count = self.count if count is None else count
        return float(stats.t.ppf(0.95, self.degrees + count - self.count)) * self.deviation / math.sqrt(count)

    def outcome(self, value: float, tests: int, count: int | None = None) -> Outcome:
        """How a value compares; with another number of retrained models of the same spread."""
        size, band = abs(self.at(value) - self.mean), self.band(tests, count)
        if size <= band or abs(value - self.back(self.mean)) <= self.step:
            return "equivalent"
        return "different" if size > band + 2 * self.error(count) else "unclear"


def spread_of(readings: Sequence[Reading]) -> Spread:
    """Of two or more readings of retrained models.

    The variance over examples, from the readings' own intervals, counts as one more degree of freedom: a few equal
    values are no proof that the next one is equal. Readings without an interval give none.
    """
    first = readings[0]
    step = 1.0000001 * 100 / first.n if first.unit == "%" and first.n else 0.0
    scale = Spread(0.0, 0.0, len(readings), 1, ceiling(first), step, first.unit == RATIO)
    values = np.array([scale.at(reading.value) for reading in readings])
    prior = float(np.mean([((scale.at(r.high) - scale.at(r.low)) / (2 * 1.96)) ** 2 for r in readings]))
    variance, degrees = float(values.var(ddof=1)), len(values) - 1
    if math.isfinite(prior) and prior > 0:
        variance, degrees = (degrees * variance + prior) / (degrees + 1), degrees + 1
    return replace(scale, mean=float(values.mean()), deviation=math.sqrt(variance), degrees=degrees)


def equivalence(reading: Reading, references: Sequence[Reading], tests: int) -> Equivalence | None:
    """Test one reading against those of two or more retrained models; None with fewer."""
    if len(references) < 2:
        return None
    spread = spread_of(references)
    centre, place, error = spread.back(spread.mean), spread.at(reading.value), spread.error()
    found, outcome = reading.value - centre, spread.outcome(reading.value, tests)
    reach = math.copysign(spread.band(tests) + error, place - spread.mean)
    margin = max(abs(spread.back(spread.mean + reach) - centre), spread.step)
    word = "" if outcome == "equivalent" else direction(reading.name, found)
    needed = None
    if outcome == "unclear":
        counts = range(len(references) + 1, LARGEST + 1)
        needed = next((k for k in counts if spread.outcome(reading.value, tests, k) != "unclear"), None)
    low, high = (spread.back(place + sign * error) - centre for sign in (-1, 1))
    return Equivalence(reading.name, found, low, high, margin, outcome, word, needed)


def direction(name: str, difference: float) -> str:
    """What a difference from the retrained mean says in this measure: see ``Equivalence.word``."""
    above = _ABOVE.get(name, "outside")
    return above if difference > 0 else _OPPOSITE.get(above, "outside")


def needed_to_tell(reading: Reading, references: Sequence[Reading], tests: int) -> int | None:
    """Retrained models with which this reading would be different, if difference and spread stayed; None for never."""
    if len(references) < 2:
        return None
    spread = spread_of(references)
    counts = range(max(ENOUGH, spread.count), LARGEST + 1)
    return next((k for k in counts if spread.outcome(reading.value, tests, k) == "different"), None)


def judged(reading: Reading, references: Sequence[Reading], tests: int) -> Reading:
    """The reading with the band of the retrained models and how it stands to it.

    Below three retrained models the band is their own intervals together, which knows nothing of the spread of seeds.
    """
    if reading.better != "nearer_retrained" or not references:
        return reading
    if len(references) < ENOUGH:
        low, high = min(r.low for r in references), max(r.high for r in references)
        inside = low <= reading.value <= high or not (reading.low > high or reading.high < low)
        word = _ABOVE.get(reading.name, "outside")
        verdict = "within" if inside else word if reading.value > high else _OPPOSITE.get(word, "outside")
        return replace(reading, reference=_clipped(reading, low, high), verdict=verdict)
    test = equivalence(reading, references, tests)
    if test is None:
        return reading
    spread = spread_of(references)
    low, high = (spread.back(spread.mean + sign * spread.band(tests)) for sign in (-1, 1))
    verdict = {"equivalent": "within", "unclear": "unclear", "different": test.word}[test.outcome]
    return replace(reading, reference=_clipped(reading, low, high), verdict=verdict)


def _clipped(reading: Reading, low: float, high: float) -> tuple[float, float]:
    """What the unit allows."""
    top = ceiling(reading)
    return (low, high) if top is None else (max(0.0, low), min(top, high))


def ceiling(reading: Reading) -> float | None:
    """The largest value that a share (%) or an area under a curve can have, above 0; None for other numbers."""
    area = "auc" in reading.name or (reading.unit == "" and "roc" in reading.curves)
    return 100.0 if reading.unit == "%" else 1.0 if area else None


@dataclass(frozen=True)
class Verdict:
    """What the audit says of one model.

    Attributes:
        word: "forgotten": equivalent to retrained models in every deciding measure. "not forgotten" and
            "over-forgotten": different from them, too near to the original or too far beyond (lost utility is
            over-forgetting). "cannot tell": too few retrained models. "audit broken": doing nothing passes, or genuine
            retrained models fail.
        reasons: sentences. needed: retrained models that would be needed, where "cannot tell".
        tests: the pairs of one-sided tests behind it.
    """

    word: Word
    reasons: tuple[str, ...] = ()
    needed: int | None = None
    tests: tuple[Equivalence, ...] = ()


def decide(
    readings: Mapping[str, Reading], references: Mapping[str, Sequence[Reading]], enough: int = ENOUGH
) -> Verdict:
    """The verdict on one model's readings, before the audit has judged itself.

    Args:
        readings: measure -> reading of the model. references: measure -> readings of the retrained models.
        enough: retrained models below which nothing is decided, >= 2.
    """
    names = deciding(readings, references)
    count = max((len(references.get(name, ())) for name in DECISIVE if name in readings), default=0)
    if count < enough:
        return Verdict("cannot tell", (_too_few(count),), ENOUGH)
    found = (equivalence(readings[name], references[name], len(names)) for name in names)
    tests = _signed(tuple(test for test in found if test is not None))
    word = _word([test for test in tests if test.outcome == "different"])
    if word is None:
        unclear = [test for test in tests if test.outcome == "unclear" and test.word != "above"]
        if not unclear:
            return Verdict("forgotten", _reasons("forgotten", tests, readings), None, tests)
        wanted = [test.needed for test in unclear]
        needed = None if None in wanted else max(number for number in wanted if number is not None)
        return Verdict("cannot tell", _reasons("cannot tell", tests, readings), needed, tests)
    return Verdict(word, _reasons(word, tests, readings), None, tests)


def _signed(tests: tuple[Equivalence, ...]) -> tuple[Equivalence, ...]:
    """The distance of single examples says that, the shift of all of them which way; nearer than retrained is no failure."""
    shift = next((test for test in tests if test.name == "forget_margin_shift"), None)
    way = "under-forgot" if shift is not None and shift.low > 0 else "over-forgot"
    return tuple(
        replace(test, word="above" if test.difference < 0 else way) if test.name == APART and test.word else test
        for test in tests
    )


def deciding(readings: Mapping[str, Reading], references: Mapping[str, Sequence[Reading]]) -> tuple[str, ...]:
    """The deciding measures that a model and two or more retrained ones have."""
    return tuple(name for name in DECISIVE if name in readings and len(references.get(name, ())) >= 2)


def _too_few(count: int) -> str:
    have = "no retrained model was given" if count == 0 else f"only {count} retrained model{'s' if count > 1 else ''}"
    return f"{have}: how much retraining varies by itself cannot be told from fewer than {ENOUGH}"


def _word(different: Sequence[Equivalence]) -> Word | None:
    """Forget accuracy first, then utility, then the finer signs: a ruined model knows nothing, whatever its margins."""
    words = {test.name: test.word for test in different}
    order = ("forget_accuracy", "forget_loss", *UTILITY, "forget_margin_shift", "recall", "membership_auc", APART)
    return next((_NAMED[words[name]] for name in order if words.get(name) in _NAMED), None)


def _reasons(word: Word, tests: Sequence[Equivalence], readings: Mapping[str, Reading]) -> tuple[str, ...]:
    from expunge.audit.words import number, title  # words reads judge's words too

    if word == "forgotten":
        within, above = (", ".join(title(t.name) for t in tests if (t.word == "above") == out) for out in (False, True))
        better = (f"better than retrained models are, which does not count against it, in: {above}",) if above else ()
        return (f"no further from the retrained mean than retrained models are, in: {within}", *better)
    said = []
    for test in sorted(tests, key=lambda test: _NAMED.get(test.word) != word):  # what decided first
        if test.outcome == "equivalent" or test.word == "above":
            continue
        unit = readings[test.name].unit
        how = {"different": test.word, "unclear": "too near the limit to tell"}[test.outcome]
        said.append(
            f"{title(test.name)}: {how}; it differs from the retrained mean by {number(test.difference, unit)} "
            f"({number(test.low, unit)} to {number(test.high, unit)}), and {number(test.margin, unit)} counts as none"
        )
    return tuple(said)


def controlled(verdict: Verdict, do_nothing: Verdict, needed: int | None, held_out: Sequence[Verdict]) -> Verdict:
    """The verdict on a model, after the audit has judged itself.

    Doing nothing must fail by what it still remembers: an original that is only worse than retrained models is not of
    their recipe. And few retrained models, which spread far, do not make a model "forgotten" that is half an original.

    Args:
        verdict: of the model. do_nothing: of the original. held_out: of each retrained model, against the others.
        needed: retrained models with which doing nothing would fail; None where no number is known to do.
    """
    if verdict.word == "cannot tell" and not verdict.tests:
        return verdict
    failed = sum(found.word != "forgotten" for found in held_out)
    if held_out and stats.binom.sf(failed - 1, len(held_out), FALSE_ALARM) < SURPRISE:
        reason = f"{failed} of {len(held_out)} genuine retrained models, each held out, do not pass: the test is wrong, not strict"
        return Verdict("audit broken", (reason, *verdict.reasons), None, verdict.tests)
    if do_nothing.word == "not forgotten":
        return _half_way(verdict, do_nothing)
    if do_nothing.word == "over-forgotten":
        reason = (
            "the original model fails, but not by remembering: it is worse than retrained models or beyond them, so it is "
            "not of their recipe, and nothing shows that remembering would be seen"
        )
        return Verdict("audit broken", (reason, *verdict.reasons), None, verdict.tests)
    if needed is not None and needed > len(held_out):
        reason = f"doing nothing cannot be told from retraining with {len(held_out)} retrained models: about {needed} would do"
        return Verdict("cannot tell", (reason, *verdict.reasons), needed, verdict.tests)
    reason = "doing nothing passes as well: on this request these measures cannot show that anything was forgotten"
    return Verdict("audit broken", (reason, *verdict.reasons), None, verdict.tests)


def _half_way(verdict: Verdict, do_nothing: Verdict) -> Verdict:
    """Not "forgotten" but "cannot tell" where a measure that finds the original has the model half way to it."""
    if verdict.word != "forgotten":
        return verdict
    found, reasons = {test.name: test for test in verdict.tests}, []
    for original in do_nothing.tests:
        ours = found.get(original.name) if original.word == "under-forgot" and original.outcome == "different" else None
        if ours is not None and ours.difference / original.difference >= 0.5:
            from expunge.audit.words import title

            share = f"{100 * ours.difference / original.difference:.0f}%"
            reasons.append(
                f"{title(ours.name)}: {share} of the way from retraining back to doing nothing, which so few retrained "
                f"models do not tell from retraining; more of them would"
            )
    return Verdict("cannot tell", tuple(reasons), None, verdict.tests) if reasons else verdict
