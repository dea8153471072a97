"""Accuracy on the forget, retain and test data; the loss per unit where a task has no labels.

Facts: forget accuracy is 100 less "unlearning accuracy". Where whole classes are forgotten they are taken out of the
test data and reported apart. None of these is to be driven up or down: the target is the retrained model's value.
"""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals
from expunge.audit.subject import Better, Reading, Subject
from expunge.registry import measure


@measure
def forget_accuracy(subject: Subject) -> Reading | None:
    """Share of the forget examples that the model still labels correctly, with a Wilson interval over examples."""
    return _accuracy(subject, "forget_accuracy", "forget", "nearer_retrained")


@measure
def retain_accuracy(subject: Subject) -> Reading | None:
    """Share of the retain examples labelled correctly, with a Wilson interval over examples."""
    return _accuracy(subject, "retain_accuracy", "retain", "nearer_retrained")


@measure
def test_accuracy(subject: Subject) -> Reading | None:
    """Share of the test examples labelled correctly, without classes that were forgotten whole; Wilson interval."""
    return _accuracy(subject, "test_accuracy", "test", "nearer_retrained")


@measure
def forgotten_class_accuracy(subject: Subject) -> Reading | None:
    """Share of the test examples of the forgotten classes labelled correctly, where whole classes are forgotten."""
    return _accuracy(subject, "forgotten_class_accuracy", "test_forgotten", "nearer_retrained")


@measure
def lowest_class_accuracy(subject: Subject) -> Reading | None:
    """Test accuracy of the class that is labelled worst, forgotten classes left out; its line is every class.

    An average hides a class that paid for the forgetting. Wilson interval over the examples of that class, which was
    chosen for being lowest: it lies too low, and so does the retrained models' own, beside which it stands.
    """
    if not subject.has("test"):
        return None
    found = subject.outputs("test")
    if found.labels is None or found.correct is None:
        return None
    classes, place, n = np.unique(found.labels, return_inverse=True, return_counts=True)
    right = np.bincount(place, weights=found.correct)
    low, high = (100 * ends for ends in intervals.wilson(right, n))
    share = 100 * right / n
    worst = int(share.argmin())
    line = tuple(tuple(float(value) for value in part) for part in (classes, share, low, high))
    return Reading(
        "lowest_class_accuracy",
        float(share[worst]),
        float(low[worst]),
        float(high[worst]),
        int(n[worst]),
        "%",
        detail={"class": float(classes[worst])},
        curves={"accuracy": line},
        axes=("class", "test accuracy (%)"),
    )


@measure
def forget_loss(subject: Subject) -> Reading | None:
    """Loss per unit on the forget examples, for tasks without labels; bootstrap interval over examples."""
    return _loss(subject, "forget_loss", "forget")


@measure
def retain_loss(subject: Subject) -> Reading | None:
    """Loss per unit on the retain examples, for tasks without labels; bootstrap interval over examples."""
    return _loss(subject, "retain_loss", "retain")


@measure
def test_loss(subject: Subject) -> Reading | None:
    """Loss per unit on the test examples, for tasks without labels; bootstrap interval over examples."""
    return _loss(subject, "test_loss", "test")


for _function in (test_accuracy, test_loss):
    _function.__test__ = False  # their names begin as a test's does


def _accuracy(subject: Subject, name: str, data: str, better: Better) -> Reading | None:
    if not subject.has(data) or (correct := subject.outputs(data).correct) is None:
        return None
    low, high = intervals.wilson(correct.sum(), len(correct))
    return Reading(name, 100 * float(correct.mean()), 100 * float(low), 100 * float(high), len(correct), "%", better)


def _loss(subject: Subject, name: str, data: str) -> Reading | None:
    if not subject.has(data) or subject.outputs(data).correct is not None:
        return None
    found = subject.outputs(data)
    value = float(np.average(found.loss, weights=found.units))
    samples = intervals.resampled_ratio(
        found.loss * found.units, found.units, subject.draws, subject.key.at("resample", data)
    )
    low, high = intervals.percentile(samples)
    return Reading(name, value, low, high, len(found), subject.task.unit)
