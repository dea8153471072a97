"""Membership inference: can the forget examples be told from examples that were never trained on?

The target is the retrained model's value, not chance: forget examples may differ from test examples by themselves, and
a model that is less sure of them than a retrained one gives them away as well. These are attacks with one threshold for
all examples; they overstate privacy against attacks with a threshold per example.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expunge.audit import intervals, roc
from expunge.audit.subject import Outputs, Reading, Subject
from expunge.core import Key, Refused
from expunge.registry import measure

REPEATS = 20


@measure
def membership_auc(subject: Subject) -> Reading | None:
    """Area under the ROC curve of forget against test examples, by confidence in the true answer; DeLong interval.

    Above 0.5 the forget examples look like training data, below it like nothing the model ever saw. Where whole classes
    are forgotten the test data are without them, as in the field's tables, and a retrained model stands near 0:
    ``membership_auc_same_class`` is then the harder question.
    """
    if not subject.has("test"):
        return None
    forget, unseen = subject.outputs("forget").membership, subject.outputs("test").membership
    value = intervals.auc(forget, unseen)
    low, high = intervals.auc_interval(forget, unseen)
    return Reading(
        "membership_auc", value, low, high, len(forget) + len(unseen), detail={"two_sided": max(value, 1 - value)}
    )


@measure
def membership_auc_same_class(subject: Subject) -> Reading | None:
    """Where whole classes are forgotten: the same against unseen examples of those classes; None otherwise.

    A model that suppresses the records it was given more than it forgets their class falls below 0.5 here.
    """
    if not subject.has("test_forgotten"):
        return None
    forget, unseen = subject.outputs("forget").membership, subject.outputs("test_forgotten").membership
    low, high = intervals.auc_interval(forget, unseen)
    return Reading("membership_auc_same_class", intervals.auc(forget, unseen), low, high, len(forget) + len(unseen))


@measure
def membership_auc_two_sided(subject: Subject) -> Reading | None:
    """The same by distance from the median test confidence: sees examples that are too alike, or on both sides."""
    if not subject.has("test"):
        return None
    forget, unseen = subject.outputs("forget").membership, subject.unseen().membership
    middle = float(np.median(unseen))
    ours, theirs = np.abs(forget - middle), np.abs(unseen - middle)
    low, high = intervals.auc_interval(ours, theirs)
    return Reading("membership_auc_two_sided", intervals.auc(ours, theirs), low, high, len(ours) + len(theirs))


@measure
def membership_tpr(subject: Subject) -> Reading | None:
    """Share of forget examples, in %, that the confidence attack catches where it accuses 1 % of unseen ones wrongly.

    The interval is ``roc.tpr_at``'s: over examples, the threshold's own uncertainty included. In the detail, shares: the
    same at 0.1 % where there are 1,000 unseen examples, and the best balanced accuracy. None below 100 unseen examples
    (``roc.too_few`` says so). 1 % for a model to which both are alike; the target is what retrained models have.
    """
    if not subject.has("test") or roc.too_few(len(subject.unseen()), roc.RATES[0]):
        return None
    forget, unseen = subject.outputs("forget").membership, subject.unseen().membership
    value, low, high = roc.tpr_at(forget, unseen, roc.RATES[0])
    return Reading(
        "membership_tpr",
        100 * value,
        100 * low,
        100 * high,
        len(forget) + len(unseen),
        "%",
        detail=roc.low_rates(forget, unseen),
        curves={"roc": roc.curve(forget, unseen)},
        axes=roc.AXES,
    )


@measure
def attack_confidence(subject: Subject) -> Reading | None:
    """Share of forget examples that a confidence threshold, fitted on retain against test, calls unseen.

    What the field calls "MIA-efficacy", with a threshold sweep for its support-vector classifier on one feature, and
    balanced random draws for the first retain examples. In the detail, ``per_class``: the same with a threshold for each
    class, as Song and Mittal 2021 have it.
    """
    if not (subject.has("test") and subject.has("retain")):
        return None
    return _attack(subject, "attack_confidence", lambda outputs: outputs.membership)


@measure
def attack_entropy(subject: Subject) -> Reading | None:
    """Share of forget examples that a threshold on modified entropy, fitted on retain against test, calls unseen."""
    if not (subject.has("test") and subject.has("retain")) or subject.outputs("forget").probabilities is None:
        return None
    return _attack(subject, "attack_entropy", lambda outputs: -entropy_of(outputs))


def modified_entropy(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i): small for a sure and right answer.

    Unlike the entropy it tells a sure wrong answer from a sure right one. 1 - p of the likeliest class is the sum of
    the others, so that it is not rounded to 0.

    Args:
        probabilities: [n, C], rows sum to 1. labels: [n] int, 0 .. C-1.

    Paper: Song and Mittal 2021. A widely copied implementation takes log p for log(1 - p) and writes one column for
    every label that occurs in the batch; this one does neither.
    """
    p = np.asarray(probabilities, np.float64)
    row, top = np.arange(len(p)), p.argmax(1)
    rest = 1 - p
    without = p.copy()
    without[row, top] = 0
    rest[row, top] = without.sum(1)
    tiny = np.finfo(np.float64).tiny
    terms = p * np.log(np.maximum(rest, tiny))
    terms[row, labels] = rest[row, labels] * np.log(np.maximum(p[row, labels], tiny))
    return -terms.sum(1)


def entropy_of(outputs: Outputs) -> np.ndarray:
    """[n] modified entropy of what a classifier says."""
    if outputs.probabilities is None or outputs.labels is None:
        raise Refused("the modified entropy needs the probabilities of a classifier: this task gives none")
    return modified_entropy(outputs.probabilities, outputs.labels)


def best_threshold(members: np.ndarray, others: np.ndarray) -> float:
    """The t for which "member where score >= t" has the best balanced accuracy; the middle one of several."""
    scores = np.unique(np.concatenate([members, others]))
    edges = np.concatenate([[-np.inf], (scores[1:] + scores[:-1]) / 2, [np.inf]])
    caught = 1 - np.searchsorted(np.sort(members), edges, "left") / len(members)
    spared = np.searchsorted(np.sort(others), edges, "left") / len(others)
    best = np.flatnonzero(caught + spared >= (caught + spared).max() - 1e-12)
    return float(edges[best[len(best) // 2]])


def class_thresholds(
    members: np.ndarray,
    member_labels: np.ndarray,
    others: np.ndarray,
    other_labels: np.ndarray,
    classes: int,
    otherwise: float | None = None,
) -> np.ndarray:
    """[classes] ``best_threshold`` of each class; another where a class has no examples on one of the sides.

    Args:
        members, others: [p], [q] scores, larger for members. member_labels, other_labels: their classes, 0 .. classes-1.
        otherwise: that other one; ``best_threshold`` of all examples where None.
    """
    found = np.full(classes, best_threshold(members, others) if otherwise is None else otherwise)
    for label in np.intersect1d(member_labels, other_labels):
        found[label] = best_threshold(members[member_labels == label], others[other_labels == label])
    return found


def _attack(subject: Subject, name: str, score: Callable[[Outputs], np.ndarray]) -> Reading:
    """Mean over repeated balanced draws of retain and test; the interval is over the draws and the forget examples."""
    asked = [subject.outputs(data) for data in ("forget", "retain", "test")]
    (forget, retain, test), labels = (score(outputs) for outputs in asked), [outputs.labels for outputs in asked]
    size = min(len(retain), len(test))
    unseen, by_class = np.empty((REPEATS, len(forget))), np.empty((REPEATS, len(forget)))
    accuracies = np.empty(REPEATS)
    for number in range(REPEATS):
        key = subject.key.at("attack", number)
        kept = [_draw(len(group), size, key.at(data)) for group, data in ((retain, "retain"), (test, "test"))]
        members, others = retain[kept[0]], test[kept[1]]
        threshold = best_threshold(members, others)
        unseen[number] = forget < threshold
        accuracies[number] = ((members >= threshold).mean() + (others < threshold).mean()) / 2
        if labels[0] is not None and labels[1] is not None and labels[2] is not None:
            classes = 1 + int(max(group.max() for group in labels if group is not None))
            limits = class_thresholds(members, labels[1][kept[0]], others, labels[2][kept[1]], classes, threshold)
            by_class[number] = forget < limits[labels[0]]
    low, high = intervals.percentile(_nested(unseen, subject.draws, subject.key.at("attack", "interval")))
    detail = {"attacker_accuracy": 100 * float(accuracies.mean()), "repeats": float(REPEATS)}
    if labels[0] is not None:
        detail["per_class"] = 100 * float(by_class.mean())
    return Reading(name, 100 * float(unseen.mean()), 100 * low, 100 * high, len(forget), "%", detail=detail)


def _draw(count: int, size: int, key: Key) -> np.ndarray:
    """`size` of `count` positions without repetition; with repetition where they would always be the same, all."""
    rng = np.random.Generator(np.random.PCG64(key.seed))
    return rng.choice(count, size, replace=size == count)


def _nested(table: np.ndarray, draws: int, key: Key) -> np.ndarray:
    """[draws] means of a table [repeats, examples], resampling the repeats first and then the examples."""
    repeats = np.concatenate(list(intervals.choices(len(table), draws, key.at("repeats"))))
    examples = intervals.choices(table.shape[1], draws, key.at("examples"))
    weights = np.stack([np.bincount(row, minlength=len(table)) for row in repeats]) / len(table)
    means, start = [], 0
    for block in examples:
        per_example = weights[start : start + len(block)] @ table
        means.append(np.take_along_axis(per_example, block, 1).mean(1))
        start += len(block)
    return np.clip(np.concatenate(means), 0.0, 1.0)  # shares, and sums of weights are not exact
