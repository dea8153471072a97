"""Interclass confusion: training labels of two classes are swapped, and forgetting must undo what that taught.

Unlike the accuracy of random forget sets, it tells methods apart: a model that does nothing keeps confusing the two
classes, and one that is retrained without the mislabelled examples does not. The retrained model's value is the target,
not zero, since classes may be alike by themselves.

Paper: Goel et al., "Towards Adversarial Evaluation of Machine Unlearning" (arXiv:2201.06640). The authors' other code
fixes five classes in the confusion matrix; here there are as many as the task has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.audit import intervals
from expunge.audit.subject import Outputs, Reading, Subject
from expunge.core import Data, Key, Refused, Request
from expunge.data.sources import as_data
from expunge.registry import measure

CONFUSED_TEST = "confused_test"
"""Where a request carries the unseen examples of the two classes, with their true labels."""


@dataclass(frozen=True)
class Confusion:
    """A training set with swapped labels, and the request to forget them.

    Attributes:
        data: the training set, the labels of some examples of the two classes swapped; train the original on it.
        request: forget is every mislabelled example, retain the rest; extra ``confused_test`` where test data were given.
        classes: the two classes.
        ids, truth: int64 [k], the mislabelled examples and their true labels.
    """

    data: Data
    request: Request
    classes: tuple[int, int]
    ids: Tensor
    truth: Tensor


def confuse(
    train: Any,
    classes: tuple[int, int],
    *,
    count: int | None = None,
    share: float | None = None,
    test: Any = None,
    label: str = "y",
    key: Key = Key(0),
) -> Confusion:
    """Swap the labels of some training examples of two classes, and ask to forget exactly those.

    It does not promise that a model confuses the classes: train one on ``data`` and look at its ``confusion_error``.

    Args:
        train: the training set, in any form that ``as_data`` takes.
        classes: two different labels A and B.
        count: examples to mislabel, half from each class: even, >= 2. Or
        share: of each class's examples to mislabel, in (0, 1).
        test: unseen examples; those of the two classes go into the request as ``confused_test``.
        label: column with the labels.
        key: of the draw.

    Raises:
        Refused: for classes that are alike or missing, both or neither of count and share, or too few examples.
    """
    data = as_data(train)
    labels = labels_of(data, label)
    places = [torch.nonzero(labels == c).flatten() for c in _pair(labels, classes)]
    sizes = _sizes([len(place) for place in places], classes, count, share)
    drawn = [
        place[torch.randperm(len(place), generator=key.at("confuse", c).generator())[:size]].sort().values
        for place, size, c in zip(places, sizes, classes, strict=True)
    ]
    swapped = labels.clone()
    swapped[drawn[0]], swapped[drawn[1]] = classes[1], classes[0]
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.cat(drawn)] = True
    wrong = data.annotate(label, swapped)
    everything = torch.arange(len(data))
    extra = {} if test is None else {CONFUSED_TEST: of_classes(as_data(test), classes, label)}
    request = Request(wrong.select(everything[chosen]), wrong.select(everything[~chosen]), extra=extra)
    return Confusion(wrong, request, classes, data.ids[chosen], labels[chosen])


def labels_of(data: Data, label: str = "y") -> Tensor:
    """[n] the labels of all examples, which are read in batches.

    Raises:
        Refused: where the column is missing or does not hold one whole number per example.
    """
    parts = []
    for batch in data.batches(4096):
        found = batch.get(label)
        if not isinstance(found, Tensor) or found.ndim != 1 or found.is_floating_point():
            have = ", ".join(name for name in batch if name != "id")
            raise Refused(f"no column {label!r} with one whole number per example: there is {have}; give label=")
        parts.append(found)
    return torch.cat(parts)


def of_classes(data: Data, classes: Sequence[int], label: str = "y", others: bool = False) -> Data:
    """The examples of these classes, or of all `others`.

    Raises:
        Refused: where there is none.
    """
    inside = torch.isin(labels_of(data, label), torch.as_tensor(list(classes)))
    found = torch.nonzero(inside != others).flatten()
    if len(found) == 0:
        what = "other than" if others else "of"
        raise Refused(f"the test data has no example {what} the classes {', '.join(map(str, classes))}: give some")
    return data.select(found)


def _pair(labels: Tensor, classes: tuple[int, int]) -> tuple[int, int]:
    if len(classes) != 2 or classes[0] == classes[1]:
        raise Refused(f"classes must be two different labels, found {classes!r}")
    for c in classes:
        if not bool((labels == c).any()):
            present = ", ".join(map(str, torch.unique(labels).tolist()[:12]))
            raise Refused(f"class {c} does not occur in the training data: labels are {present}")
    return classes


def _sizes(have: list[int], classes: tuple[int, int], count: int | None, share: float | None) -> list[int]:
    """How many to mislabel of each class."""
    if (count is None) == (share is None):
        raise Refused(f"give exactly one of count and share, found count={count!r}, share={share!r}")
    if share is not None:
        if not 0 < share < 1:
            raise Refused(f"share must lie in (0, 1), found {share!r}")
        return [max(1, min(size - 1, round(share * size))) for size in have]
    if count is None or count < 2 or count % 2:
        raise Refused(f"count must be even and at least 2, half for each class, found {count!r}")
    for size, c in zip(have, classes, strict=True):
        if count // 2 >= size:
            raise Refused(
                f"count={count} would mislabel {count // 2} examples of class {c}, which has {size}: leave some with "
                f"their true label"
            )
    return [count // 2, count // 2]


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] int64 counts, rows true and columns predicted.

    Args:
        labels, predicted: [n] int, 0 .. C-1. classes: C.
    """
    for name, values in (("labels", labels), ("predicted", predicted)):
        if len(values) and (np.min(values) < 0 or np.max(values) >= classes):
            raise Refused(
                f"{name} must lie in 0 to {classes - 1}, found {int(np.min(values))} to {int(np.max(values))}"
            )
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def interclass_error(matrix: np.ndarray, a: int, b: int) -> float:
    """IC-ERR: share of the examples of classes a and b that get any wrong label; NaN where there is none.

    (sum over j != a of M_aj + sum over j != b of M_bj) / (n_a + n_b), in [0, 1], of a matrix as above.
    """
    total = int(matrix[[a, b]].sum())
    return _errors(matrix, a, b) / total if total else float("nan")


def _errors(matrix: np.ndarray, a: int, b: int) -> int:
    return int(matrix[[a, b]].sum() - matrix[a, a] - matrix[b, b])


def targeted_confusion(matrix: np.ndarray, a: int, b: int) -> int:
    """FGT: how many examples of the two classes are taken for the other one, M_ab + M_ba."""
    return int(matrix[a, b] + matrix[b, a])


@measure
def confusion_error(subject: Subject) -> Reading | None:
    """Share of unseen examples of the two confused classes that get a wrong label (IC-ERR), with a Wilson interval.

    Applies where the request carries ``confused_test``, as ``confuse`` makes it. In the detail: the same on the retain
    examples of the two classes, and on the forget examples against their true labels (memorisation).
    """
    return _reading(subject, "confusion_error", _errors)


@measure
def confusion_targeted(subject: Subject) -> Reading | None:
    """Share of unseen examples of the two confused classes that are taken for the other one (FGT / (n_a + n_b)).

    The paper's count is in the detail, with the shares on retain and forget examples as ``confusion_error``.
    """
    return _reading(subject, "confusion_targeted", targeted_confusion)


def _reading(subject: Subject, name: str, count: Callable[[np.ndarray, int, int], int]) -> Reading | None:
    if CONFUSED_TEST not in subject.request.extra:
        return None
    found = subject.outputs(CONFUSED_TEST)
    if found.labels is None or found.probabilities is None:
        return None
    classes = np.unique(found.labels)
    if len(classes) != 2:
        raise Refused(
            f"{CONFUSED_TEST} holds examples of {len(classes)} classes: expected the two that were confused, as "
            f"challenges.confusion.confuse gives them"
        )
    a, b = int(classes[0]), int(classes[1])
    matrices = {"test": _matrix(found, a, b, False), "forget": _matrix(subject.outputs("forget"), a, b, True)}
    if subject.has("retain"):
        matrices["retain"] = _matrix(subject.outputs("retain"), a, b, False)
    counts = {part: count(matrix, a, b) for part, matrix in matrices.items()}
    sizes = {part: int(matrix[[a, b]].sum()) for part, matrix in matrices.items()}
    low, high = intervals.wilson(counts["test"], sizes["test"])
    detail = {part: 100 * counts[part] / sizes[part] for part in matrices if part != "test" and sizes[part]}
    value = 100 * counts["test"] / sizes["test"]
    return Reading(
        name,
        value,
        100 * float(low),
        100 * float(high),
        sizes["test"],
        "%",
        detail={"count": float(counts["test"]), **detail},
    )


def _matrix(outputs: Outputs, a: int, b: int, mislabelled: bool) -> np.ndarray:
    """Of the examples of the two classes; the truth of a mislabelled example is the other class."""
    if outputs.labels is None or outputs.probabilities is None:
        raise Refused("a confusion matrix needs the labels of a classifier: this task has none")
    inside = np.isin(outputs.labels, (a, b))
    labels = outputs.labels[inside]
    truth = a + b - labels if mislabelled else labels
    return confusion_matrix(truth, outputs.probabilities[inside].argmax(1), outputs.probabilities.shape[1])
