"""Forget sets made of the classes that are nearest in meaning to another data set: a harder thing to forget for it.

"Top class-wise" forgetting of arXiv:2503.06991: the training classes most related to a downstream set are forgotten,
and the downstream set is then asked whether its features suffered or stayed (``knn_downstream``). The authors publish
lists of classes; their ranking procedure was not found. The ranking here is derived, and ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from expunge.audit.layers import activations, find_layers
from expunge.audit.subject import classifies
from expunge.audit.transfer import class_means, labels_of
from expunge.core import Data, Key, Refused, Request, Task


@dataclass(frozen=True)
class Ranking:
    """Training classes from the nearest to the furthest.

    Attributes:
        classes: [C] labels, nearest first. nearness: [C] their cosine similarity to the nearest downstream class.
    """

    classes: tuple[int, ...]
    nearness: tuple[float, ...]


def rank_classes(means: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([C] places from the nearest to the furthest, [C] nearness in that order). Derived, not the paper's.

    Nearness of a training class is its largest cosine similarity to a downstream class, both taken from the mean of
    the training classes: activations are mostly positive, so that from 0 everything would be near to everything. Ties
    keep the order of the classes.

    Args:
        means: [C, d] one embedding per training class. others: [K, d] one per downstream class, of the same kind.
    """
    means, others = np.asarray(means, np.float64), np.asarray(others, np.float64)
    if means.ndim != 2 or others.ndim != 2 or means.shape[1] != others.shape[1] or len(means) < 2 or len(others) < 1:
        raise Refused(
            f"classes cannot be ranked from embeddings of shapes {means.shape} and {others.shape}: expected [classes, d] "
            f"of at least 2 training classes and [classes, d] of the downstream set, of the same d"
        )
    if not (np.isfinite(means).all() and np.isfinite(others).all()):
        raise Refused("classes cannot be ranked from embeddings that are not finite")
    centre = means.mean(0)
    nearness = (_unit(means - centre) @ _unit(others - centre).T).max(1)
    order = np.argsort(-nearness, kind="stable")
    return order, nearness[order]


def forget_related(
    train: Data,
    downstream: Data,
    task: Task,
    top: int,
    *,
    model: nn.Module | None = None,
    embeddings: tuple[np.ndarray, np.ndarray] | None = None,
    valid: Data | None = None,
    size: int = 256,
    key: Key = Key(0),
) -> tuple[Request, Ranking]:
    """A request to forget the `top` training classes nearest to a downstream set, which it carries as ``downstream``.

    It promises nothing about meaning beyond what the embeddings hold: with the penultimate features of a model, near is
    what that model confuses.

    Args:
        train: the training examples. downstream: another labelled data set; its labels may be any.
        task: a classification task. top: how many classes, 1 .. C - 1.
        model: the model whose penultimate features, averaged per class, are the embeddings.
        embeddings: or one's own, ([C, d], [K, d]): of the labels that occur in `train` and in `downstream`, ascending.
        valid: unseen examples for the request. size: examples per pass. key: of what the task draws.

    Raises:
        Refused: for a task without classes, both or neither of `model` and `embeddings`, or a `top` out of range.
    """
    if not classifies(task):
        raise Refused(f"related classes need a classification task, found {task.name!r}")
    labels = labels_of(task, train)
    names = np.unique(labels)
    if not 1 <= top < len(names):
        raise Refused(f"top must lie in [1, {len(names) - 1}] for {len(names)} training classes, found {top}")
    if model is not None and embeddings is None:
        means, others = (_embedded(model, task, data, size, key) for data in (train, downstream))
    elif embeddings is not None and model is None:
        means, others = embeddings
        _check_rows(means, len(names), "training")
        _check_rows(others, len(np.unique(labels_of(task, downstream))), "downstream")
    else:
        raise Refused("give either model=, whose features rank the classes, or embeddings=(train, downstream)")
    order, nearness = rank_classes(means, others)
    going = np.isin(labels, names[order[:top]])
    request = Request(
        train.select(np.flatnonzero(going)),
        train.select(np.flatnonzero(~going)),
        valid,
        extra={"downstream": downstream},
    )
    return request, Ranking(tuple(int(name) for name in names[order]), tuple(map(float, nearness)))


def _check_rows(embedding: np.ndarray, classes: int, of: str) -> None:
    if len(embedding) != classes:
        raise Refused(f"{len(embedding)} {of} embeddings were given for {classes} {of} classes: give one per class")


def _embedded(model: nn.Module, task: Task, data: Data, size: int, key: Key) -> np.ndarray:
    """[classes, d] mean penultimate features, by ascending label; one pass."""
    layers = find_layers(model, task, data, key=key)
    if not layers:
        raise Refused("this model has no layers to take features from: give embeddings= instead")
    found = activations(model, task, data, layers[-1:], size=size, key=key)[0]
    return class_means(found, labels_of(task, data))[1]


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
