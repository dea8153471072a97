"""Distances of what models say on forget examples: activation distance to retrained models, and ZRF to untrained ones.

Paper: Can Bad Teaching Induce Forgetting? (Chundawat et al. 2023), arXiv:2205.08096.
"""

from __future__ import annotations

import copy

import numpy as np
from torch import nn

from expunge import runtime
from expunge.audit import intervals
from expunge.audit.distance import distance_reading, jensen_shannon
from expunge.audit.subject import Outputs, Reading, Subject, run
from expunge.core import Key, Refused, own_streams
from expunge.registry import measure

TEACHERS = 10


@measure
def activation_distance(subject: Subject) -> Reading | None:
    """Mean L2 distance (0 to 1.42) of the class probabilities on forget examples to those of each retrained model.

    Beside it, the same between retrained models. Bootstrap interval over examples; None for a task without classes.
    """
    if subject.outputs("forget").probabilities is None:
        return None
    return distance_reading(subject, "activation_distance", "forget", "l2", _between)


@measure(asked=True)
def zero_retrain_forgetting(subject: Subject) -> Reading | None:
    """ZRF = 1 - mean Jensen-Shannon divergence (nats) from untrained networks on forget examples; mean over 10 of them.

    Near 1 the model answers like an untrained network. That is not the aim: the target is the retrained models' value,
    and the score rewards noise. Runs 10 networks over the forget data; they are copies of the original model with every
    module re-initialised. None where a module with weights cannot re-initialise itself, or without classes.
    """
    mine = subject.outputs("forget").probabilities
    if mine is None:
        return None
    teachers = subject.cache.get(subject.before, "zrf teachers", lambda: _teachers(subject))
    if teachers is None:
        return None
    per_example = np.mean([jensen_shannon(mine, teacher) ** 2 * np.log(2) for teacher in teachers], axis=0)
    key = subject.key.at("resample", "forget")
    low, high = intervals.percentile(1 - intervals.resampled_mean(per_example, subject.draws, key))
    each = [zrf(mine, teacher) for teacher in teachers]
    detail = {
        "teachers": float(len(teachers)),
        "teacher_deviation": float(np.std(each, ddof=1)),
        "legacy": float(np.mean([zrf(mine, teacher, legacy=True) for teacher in teachers])),
    }
    return Reading("zero_retrain_forgetting", float(np.mean(each)), low, high, len(mine), detail=detail)


def softmax_distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[n] L2 distance of the rows of two tables of probabilities [n, C]: 0 to sqrt(2)."""
    one, other = _tables(p, q)
    return np.sqrt(np.square(one - other).sum(1))


def zrf(p: np.ndarray, teacher: np.ndarray, legacy: bool = False) -> float:
    """1 - mean over examples of JS(p, teacher), JS = (KL(p || m) + KL(teacher || m)) / 2 in nats, m their mean.

    `legacy` is what the authors' code computes instead: (KL(m || p) + KL(m || teacher)) / 2, its arguments exchanged,
    averaged over all n C entries, so that it is smaller by the number of classes. Where a probability is 0 and the
    other is not, it is minus infinity; the probabilities are kept above the smallest normal number for that.

    Args:
        p, teacher: [n, C], rows sum to 1.
    """
    one, other = _tables(p, teacher)
    if not legacy:
        return 1 - float((jensen_shannon(one, other) ** 2).mean() * np.log(2))
    tiny = np.finfo(np.float64).tiny
    middle = (one + other) / 2
    logs = [np.log(np.maximum(table, tiny)) for table in (middle, one, other)]
    return 1 - float((middle * (2 * logs[0] - logs[1] - logs[2])).mean() / 2)


def _tables(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, other = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if one.ndim != 2 or one.shape != other.shape:
        raise Refused(f"expected two tables [examples, classes] of one shape, found {one.shape} and {other.shape}")
    for table in (one, other):
        if not np.isfinite(table).all() or table.min() < 0 or np.abs(table.sum(1) - 1).max() > 1e-4:
            raise Refused("expected probabilities whose rows sum to 1, found others: take the softmax first")
    return one, other


def _between(mine: Outputs, theirs: Outputs) -> np.ndarray:
    if mine.probabilities is None or theirs.probabilities is None:
        raise Refused("the activation distance needs the probabilities of a classifier: this task gives none")
    return softmax_distance(mine.probabilities, theirs.probabilities)


def untrained(model: nn.Module, key: Key) -> nn.Module | None:
    """A copy of the model as it would be made anew: every module re-initialises itself, from a stream of its own.

    The global random streams are as before afterwards. None where a module holds weights of its own (or running
    statistics) and has no ``reset_parameters``.
    """
    fresh = copy.deepcopy(model).cpu()
    with own_streams(key.seed):
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                return None
    return fresh.to(runtime.device_of(model))


def _teachers(subject: Subject) -> list[np.ndarray] | None:
    """[teachers] of [n, C] probabilities on the forget data."""
    model, found = subject.opened(subject.before), []
    for number in range(TEACHERS):
        teacher = untrained(model, subject.key.at("teacher", number))
        if teacher is None:
            return None
        said = run(teacher, subject.task, subject.data("forget"), subject.batch, subject.key.at("audit", "forget"))
        found.append(Outputs.of(said).probabilities)
    return [probabilities for probabilities in found if probabilities is not None]
