"""Scores of how hard an example is, far cheaper than memorisation: to choose strata by, and to explain results with.

None of them is memorisation: published rank correlations with it are about -0.8 to -0.9 for confidence and 0.6 to 0.7
for hold-out fine-tuning. ``memorisation.strata`` takes any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from expunge.audit.subject import Model, Subject
from expunge.core import Case, Data, Key, Objective, Refused, Request, Task
from expunge.data.sources import as_data
from expunge.objectives import NLL
from expunge.retain_choice import gradient_norms
from expunge.scope import Scope


def el2n(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] |p - onehot(y)|_2, averaged over models (or over the first epochs of one): the error L2 norm, 0 to sqrt 2.

    Args:
        probabilities: [models, n, C] or [n, C], rows sum to 1. labels: [n] int.

    Paper: Paul et al., "Deep Learning on a Data Diet" (NeurIPS 2021, arXiv:2107.07075).
    """
    p, y = _stacked(probabilities, labels)
    return np.linalg.norm(p - np.eye(p.shape[2])[y], axis=2).mean(0)


def confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] probability of the true label, averaged over models or epochs; HIGH for little memorised examples."""
    p, y = _stacked(probabilities, labels)
    return p[:, np.arange(len(y)), y].mean(0)


def _stacked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    p = p[None] if p.ndim == 2 else p
    if p.ndim != 3 or p.shape[1] != len(y):
        raise Refused(f"expected probabilities [models, n, C] and labels [n], found {p.shape} and {y.shape}")
    if len(y) and not (y.min() >= 0 and y.max() < p.shape[2]):
        raise Refused(f"labels must lie in 0 to {p.shape[2] - 1}, found {y.min()} to {y.max()}")
    return p, y


def symmetrised_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[n] (KL(p|q) + KL(q|p)) / 2 in nats, between outputs before and after fine-tuning on held-out data.

    The hold-out proxy of memorisation: what is memorised is what fine-tuning without it changes. Probabilities below
    1e-10 count as that, as in the released code.

    Args:
        p, q: [n, C], rows sum to 1.
    """
    first, second = (np.maximum(np.asarray(part, np.float64), 1e-10) for part in (p, q))
    if first.shape != second.shape or first.ndim != 2:
        raise Refused(f"expected two arrays [n, C] of the same shape, found {first.shape} and {second.shape}")
    return ((first - second) * (np.log(first) - np.log(second))).sum(1) / 2


def entanglement(forget: np.ndarray, retain: np.ndarray) -> float:
    """How mixed forget and retain examples are in the features of the original model: higher is harder to unlearn.

    ES = (mean |f - mu_r|^2 over retain + mean |f - mu_f|^2 over forget) / ((|mu_r - mu|^2 + |mu_f - mu|^2) / 2), mu the
    unweighted mean of the two means. Infinite where the means agree.

    Args:
        forget: [n_f, d] penultimate features. retain: [n_r, d].

    Paper: Zhao et al., "What makes unlearning hard and what to do about it" (NeurIPS 2024, arXiv:2406.01257).
    """
    f, r = np.asarray(forget, np.float64), np.asarray(retain, np.float64)
    if f.ndim != 2 or r.ndim != 2 or f.shape[1] != r.shape[1] or not len(f) or not len(r):
        raise Refused(f"expected features [n, d] of forget and retain examples, found {f.shape} and {r.shape}")
    within = sum(float(np.square(part - part.mean(0)).sum(1).mean()) for part in (f, r))
    middle = (f.mean(0) + r.mean(0)) / 2
    between = sum(float(np.square(part.mean(0) - middle).sum()) for part in (f, r)) / 2
    return within / between if between > 0 else float("inf")


def grand(
    models: Sequence[nn.Module],
    train: Any,
    task: Task,
    *,
    objective: Objective = NLL(),
    scope: Sequence[str] | None = None,
    chunk: int = 64,
    key: Key = Key(0),
) -> np.ndarray:
    """[n] norm of the gradient of each example's loss, averaged over models: GraNd.

    The paper takes models of the first epochs, several seeds; at the end of training the norms of all fitted examples
    are near 0. One forward and backward pass per example and model.

    Args:
        models: >= 1, trained briefly. train: in any form that ``as_data`` takes. task: the modality.
        objective: the loss. scope: name patterns of the parameters that count; all trainable ones by default.
        chunk: examples differentiated together. key: of what the task draws.

    Paper: Paul et al., "Deep Learning on a Data Diet" (NeurIPS 2021, arXiv:2107.07075).
    """
    if not len(models):
        raise Refused("GraNd needs at least one model, found none")
    data = as_data(train)
    norms = [_gradient_norms(model, data, task, objective, scope, chunk, key) for model in models]
    return np.mean(norms, axis=0)


def _gradient_norms(
    model: nn.Module, data: Data, task: Task, objective: Objective, scope: Sequence[str] | None, chunk: int, key: Key
) -> np.ndarray:
    chosen = Scope.all(model) if scope is None else Scope.match(model, *scope)
    return gradient_norms(Case(model, Request(), task, chosen), data, objective, chunk, key).numpy()


def scores_of(subject: Subject, models: Sequence[Model], data: str = "forget") -> dict[str, np.ndarray]:
    """name -> [n]: ``el2n`` and ``confidence`` of an audit's examples over these models; from its store, no training.

    Args:
        models: of the audit, or early ones of the same recipe. data: as ``Subject.outputs``.
    """
    found = [subject.outputs(data, model) for model in models]
    if not found or any(one.probabilities is None or one.labels is None for one in found):
        raise Refused(f"expected at least one model and a task with classes, found {len(found)} models")
    p, labels = np.stack([np.asarray(one.probabilities) for one in found]), np.asarray(found[0].labels)
    return {"el2n": el2n(p, labels), "confidence": confidence(p, labels)}
