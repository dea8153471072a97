"""Membership inference: can the forget examples be told from examples that were never trained on?

The target is the retrained model's value, not chance: forget examples may differ from test examples by themselves, and
a model that is less sure of them than a retrained one gives them away as well. These are attacks with one threshold for
all examples; they overstate privacy against attacks with a threshold per example.
"""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals
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
def attack_confidence(subject: Subject) -> Reading | None:
    """Share of forget examples that a confidence threshold, fitted on retain against test, calls unseen.

    What the field calls "MIA-efficacy", with a threshold sweep for its support-vector classifier on one feature, and
    balanced random draws for the first retain examples.
    """
    if not (subject.has("test") and subject.has("retain")):
        return None
    scores = [subject.outputs(data).membership for data in ("forget", "retain", "test")]
    return _attack(subject, "attack_confidence", *scores)


@measure
def attack_entropy(subject: Subject) -> Reading | None:
    """Share of forget examples that a threshold on modified entropy, fitted on retain against test, calls unseen."""
    if not (subject.has("test") and subject.has("retain")) or subject.outputs("forget").probabilities is None:
        return None
    scores = [-entropy_of(subject.outputs(data)) for data in ("forget", "retain", "test")]
    return _attack(subject, "attack_entropy", *scores)


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


def _attack(subject: Subject, name: str, forget: np.ndarray, retain: np.ndarray, test: np.ndarray) -> Reading:
    """Mean over repeated balanced draws of retain and test; the interval is over the draws and the forget examples."""
    size = min(len(retain), len(test))
    unseen = np.empty((REPEATS, len(forget)))
    accuracies = np.empty(REPEATS)
    for number in range(REPEATS):
        key = subject.key.at("attack", number)
        members, others = _draw(retain, size, key.at("retain")), _draw(test, size, key.at("test"))
        threshold = best_threshold(members, others)
        unseen[number] = forget < threshold
        accuracies[number] = ((members >= threshold).mean() + (others < threshold).mean()) / 2
    low, high = intervals.percentile(_nested(unseen, subject.draws, subject.key.at("attack", "interval")))
    return Reading(
        name,
        100 * float(unseen.mean()),
        100 * low,
        100 * high,
        len(forget),
        "%",
        detail={"attacker_accuracy": 100 * float(accuracies.mean()), "repeats": REPEATS},
    )


def _draw(scores: np.ndarray, size: int, key: Key) -> np.ndarray:
    """`size` of the scores without repetition; all of them, with repetition, where that would always be the same."""
    rng = np.random.Generator(np.random.PCG64(key.seed))
    return scores[rng.choice(len(scores), size, replace=size == len(scores))]


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
