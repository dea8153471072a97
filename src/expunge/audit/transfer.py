"""Do the features still carry what was to be forgotten? Small classifiers fitted on what the last layer reads.

A network can lose a class in its head alone: its accuracy is then that of a retrained model while its features are
those of the original. These readings fit a fresh classifier on the penultimate features of each model, retrained ones
alike, on the same examples. Retrained features tell classes apart that they were never trained on, so the value to come
near to is theirs, not 0. All are asked for by name: each opens the weights of every model, passes at most ``FIT`` +
``LOOK`` examples once (all of these readings share that pass), and fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from expunge.audit import intervals
from expunge.audit.layers import Layer, activations, find_layers, sample, shuffled
from expunge.audit.subject import Model, Reading, Subject, classifies
from expunge.core import Data, Refused, Task
from expunge.registry import measure

FIT, LOOK = 2000, 1000  # most examples that a classifier is fitted on, and judged on
NEIGHBOURS, REGULARISATION = 5, 1.0

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@measure(asked=True)
def knn_forgotten(subject: Subject) -> Reading | None:
    """Share of unseen examples of the forgotten classes whose 5 nearest neighbours by cosine name their class.

    Neighbours among the forget examples and a sample of the retain examples. Judged on ``test_forgotten``; on a fifth of
    the forget examples, kept out of the fit, where there is none. Wilson interval over those examples. Detail: the same
    on test examples of kept classes ("kept"), and the model's own head on the same examples ("head"). None where no
    whole class is forgotten.

    Paper: arXiv:2503.06991 (k = 5, cosine), there on another data set: ``knn_downstream``.
    """
    return _forgotten(subject, "knn_forgotten", nearest_neighbours)


@measure(asked=True)
def probe_forgotten(subject: Subject) -> Reading | None:
    """The same by a linear probe: logistic regression over all classes on standardised features, C = 1."""
    return _forgotten(subject, "probe_forgotten", linear_probe)


@measure(asked=True)
def prototype_forgotten(subject: Subject) -> Reading | None:
    """The same by the nearest class mean. Detail "misalignment": how far that is above the model's own head.

    A retrained model has a large one too: its head never says the class, which its features may well tell apart.

    Paper: arXiv:2604.08271 (feature-classifier misalignment). Its formula was not found: the difference of the two
    accuracies on the forgotten classes, in points, is ours.
    """
    return _forgotten(subject, "prototype_forgotten", nearest_prototype)


@measure(asked=True)
def knn_downstream(subject: Subject) -> Reading | None:
    """Accuracy on another data set, given as ``request.extra["downstream"]``, by 5 nearest neighbours by cosine.

    On the penultimate features, fitted on a random 80 % and judged on the rest; its labels may be any. Wilson interval
    over the judged examples. None without such data.

    Paper: arXiv:2503.06991. The split is drawn from the subject's key, where the authors fix seed 2.
    """
    return _downstream(subject, "knn_downstream", nearest_neighbours)


@measure(asked=True)
def probe_downstream(subject: Subject) -> Reading | None:
    """The same by a linear probe."""
    return _downstream(subject, "probe_downstream", linear_probe)


def nearest_neighbours(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[m] the label that most of the 5 nearest of `known` have, by cosine; of a tie, the smallest label.

    Args:
        known: [n, d]. labels: [n]. asked: [m, d].
    """
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(NEIGHBOURS, len(known)), metric="cosine")
    return model.fit(known, labels).predict(asked)


def linear_probe(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[m] predictions of multinomial logistic regression on features of mean 0 and variance 1; arguments as above."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = known.mean(0), known.std(0)
    scale = np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), spread, np.inf)  # dead features stay 0
    model = LogisticRegression(C=REGULARISATION, max_iter=2000, tol=1e-4)
    return model.fit((known - mean) / scale, labels).predict((asked - mean) / scale)


def nearest_prototype(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[m] the label of the nearest class mean, by Euclidean distance; arguments as above."""
    classes, means = class_means(known, labels)
    return classes[(np.square(means).sum(1) - 2 * asked @ means.T).argmin(1)]


def class_means(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([C] labels that occur, [C, d] mean features of each), in float64."""
    classes, place = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, place, features.astype(np.float64))
    return classes, sums / np.bincount(place)[:, None]


def penultimate(subject: Subject) -> Layer | None:
    """What the head of the original model reads; None where it has no inner modules, or the model lacks that one."""

    def find() -> Layer | None:
        found = find_layers(subject.opened(subject.before), subject.task, subject.data("forget"), key=subject.key)
        return found[-1] if found else None

    layer = subject.cache.get(subject.before, "penultimate", find)
    return layer if layer is not None and has_layer(subject, subject.after, layer) else None


def has_layer(subject: Subject, model: Model, layer: Layer) -> bool:
    """Whether a model, of another structure perhaps, has a module of that name."""
    return subject.cache.get(model, f"has {layer}", lambda: layer.module in dict(subject.opened(model).named_modules()))


def labels_of(task: Task, data: Data) -> np.ndarray:
    """[n] the labels of any data of a classification task."""
    parts = [task.labels(batch).cpu().numpy() for batch in data.batches(1024)]  # type: ignore[attr-defined]
    return np.concatenate(parts)


@dataclass(frozen=True)
class _Parts:
    """Examples to fit on, of forgotten classes to judge on, and of kept classes to judge on."""

    fit: tuple[Data, ...]
    judge: Data
    kept: Data | None


def _parts(subject: Subject) -> _Parts | None:
    """The same examples for every model; None where no class is forgotten whole."""
    if not classifies(subject.task) or not subject.forgotten_classes():
        return None
    key = subject.key.at("transfer")
    forget = sample(subject.data("forget"), FIT // 2, key.at("forget"))
    retain = sample(subject.data("retain"), FIT - len(forget), key.at("retain"))
    if subject.has("test_forgotten"):
        judge = subject.data("test_forgotten")
    else:
        order = shuffled(len(forget), key.at("held out"))
        held = max(1, len(forget) // 5)
        forget, judge = forget.select(np.sort(order[held:])), forget.select(np.sort(order[:held]))
    kept = sample(subject.data("test"), LOOK, key.at("kept")) if subject.has("test") else None
    return None if len(forget) == 0 else _Parts((forget, retain), sample(judge, LOOK, key.at("judge")), kept)


@dataclass(frozen=True)
class _Table:
    """Features and labels of one data set: [n, d] float32, [n]."""

    x: np.ndarray
    y: np.ndarray


def _table(subject: Subject, opened: nn.Module, data: Data, layer: Layer) -> _Table:
    found = activations(opened, subject.task, data, [layer], size=subject.batch, key=subject.key.at("transfer"))[0]
    if not np.isfinite(found).all():
        raise Refused("a model's features are not finite: it cannot be probed; was its run stopped by a guard?")
    return _Table(found, labels_of(subject.task, data))


def _features(subject: Subject, parts: _Parts, layer: Layer) -> tuple[_Table, _Table, _Table | None]:
    """Fitted on, judged on, kept: one pass for all of the readings."""

    def compute() -> tuple[_Table, _Table, _Table | None]:
        model = subject.opened(subject.after)
        fit = [_table(subject, model, data, layer) for data in parts.fit]
        joined = _Table(np.concatenate([t.x for t in fit]), np.concatenate([t.y for t in fit]))
        kept = None if parts.kept is None else _table(subject, model, parts.kept, layer)
        return joined, _table(subject, model, parts.judge, layer), kept

    return subject.cache.get(subject.after, "transfer features", compute)


def _forgotten(subject: Subject, name: str, predict: Predict) -> Reading | None:
    parts, layer = _parts(subject), penultimate(subject)
    if parts is None or layer is None:
        return None
    fit, judge, kept = _features(subject, parts, layer)
    right = predict(fit.x, fit.y, judge.x) == judge.y
    detail = {"head": 100 * _head(subject, parts.judge)}
    detail["misalignment"] = 100 * float(right.mean()) - detail["head"]
    if kept is not None:
        detail["kept"] = 100 * float((predict(fit.x, fit.y, kept.x) == kept.y).mean())
    return _share(name, right, detail)


def _head(subject: Subject, data: Data) -> float:
    """Accuracy of the model's own head on these examples, from what it already said of them."""
    name = "test_forgotten" if subject.has("test_forgotten") else "forget"
    correct = subject.outputs(name).correct
    if correct is None:
        raise Refused("a classifier was expected: this task gives no labels")
    return float(correct[np.isin(subject.ids(name), data.ids.numpy())].mean())


def _downstream(subject: Subject, name: str, predict: Predict) -> Reading | None:
    if "downstream" not in subject.request.extra or not classifies(subject.task):
        return None
    layer = penultimate(subject)
    if layer is None:
        return None
    key = subject.key.at("downstream")
    data = sample(subject.request.extra["downstream"], FIT + LOOK, key.at("sample"))

    def compute() -> _Table:
        return _table(subject, subject.opened(subject.after), data, layer)

    table = subject.cache.get(subject.after, "downstream features", compute)
    order, held = shuffled(len(data), key.at("split")), len(data) // 5
    test, train = order[:held], order[held:]
    if held == 0 or len(np.unique(table.y[train])) < 2:
        raise Refused(
            f"downstream data has {len(data)} examples of {len(np.unique(table.y))} classes: expected at least 5 "
            f"examples and 2 classes, of which 80 % are fitted on and 20 % judged"
        )
    return _share(name, predict(table.x[train], table.y[train], table.x[test]) == table.y[test], {})


def _share(name: str, right: np.ndarray, detail: dict[str, float]) -> Reading:
    low, high = intervals.wilson(right.sum(), len(right))
    return Reading(name, 100 * float(right.mean()), 100 * float(low), 100 * float(high), len(right), "%", detail=detail)
