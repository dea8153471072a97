"""Is a reading where a retrained model's would be? Too little forgetting and too much are failures alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from expunge.audit import intervals
from expunge.audit.distance import difference
from expunge.audit.subject import Reading, Subject

ENOUGH = 3  # retrained models from which a spread can be told
FAILURES = ("under-forgot", "over-forgot", "lost utility")
_ABOVE = {
    "forget_accuracy": "under-forgot",
    "forgotten_class_accuracy": "under-forgot",
    "membership_auc": "under-forgot",
    "membership_auc_same_class": "under-forgot",
    "attack_confidence": "over-forgot",
    "attack_entropy": "over-forgot",
    "forget_loss": "over-forgot",
    "retain_accuracy": "above",
    "test_accuracy": "above",
    "retain_loss": "lost utility",
    "test_loss": "lost utility",
}
_DECISIVE = (
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "forget_loss",
    "retain_loss",
    "test_loss",
    "membership_auc",
)
_OPPOSITE = {
    "under-forgot": "over-forgot",
    "over-forgot": "under-forgot",
    "above": "lost utility",
    "lost utility": "above",
}


def band(readings: Sequence[Reading]) -> tuple[float, float]:
    """Where one more retrained model is expected, from the readings of the retrained models.

    From three models on, the 95 % prediction interval of normal values, in which the variance of the examples counts
    as one more degree of freedom: a few equal values are no proof that the next one is equal. Below that the models'
    own intervals together, which knows nothing of the spread between seeds. Clipped to what the unit allows.
    """
    if len(readings) >= ENOUGH:
        prior = float(np.mean([((r.high - r.low) / (2 * 1.96)) ** 2 for r in readings]))
        low, high = intervals.next_interval([r.value for r in readings], prior=prior)
    else:
        low, high = min(r.low for r in readings), max(r.high for r in readings)
    ceiling = 100.0 if readings[0].unit == "%" else 1.0 if "auc" in readings[0].name else None
    return (low, high) if ceiling is None else (max(0.0, low), min(ceiling, high))


def judged(subject: Subject, reading: Reading, references: Sequence[Reading]) -> Reading:
    """The reading with its reference and verdict.

    A verdict other than "within" needs two things: the value lies outside the reference, and not by the chance of the
    examples (the paired difference from the retrained mean excludes 0, or the interval lies outside the reference).
    """
    if reading.better != "nearer_retrained" or not references:
        return reading
    low, high = band(references)
    paired = difference(subject, reading.name)
    sure = reading.low > high or reading.high < low if paired is None else paired[1] > 0 or paired[2] < 0
    verdict = "within"
    if sure and not low <= reading.value <= high:
        word = _ABOVE.get(reading.name, "outside")
        verdict = word if reading.value > high else _OPPOSITE.get(word, "outside")
    return replace(reading, reference=(low, high), verdict=verdict)


def verdict(readings: Mapping[str, Reading]) -> str:
    """One phrase for a whole row; "" where there was nothing to judge against.

    Only the metrics of the average gap decide: with every measure some would leave its reference by chance.
    """
    found = {readings[name].verdict for name in _DECISIVE if name in readings}
    words = [word for word in FAILURES if word in found]
    if words:
        return ", ".join(words)
    gap = readings.get("average_gap")
    if gap is None or not gap.verdict:
        return ""
    return (
        "within the retrained spread"
        if gap.verdict == "within"
        else "further from retraining than retrained models are"
    )
