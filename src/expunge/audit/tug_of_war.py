"""Tug of war: how near a model is to retraining on forget, retain and test accuracy at once, as one product.

Paper: RUM, "What makes unlearning hard and what to do about it" (Zhao et al. 2024).
"""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals
from expunge.audit.distance import points, resampled
from expunge.audit.subject import Model, Outputs, Reading, Subject
from expunge.core import Refused
from expunge.registry import measure

PARTS = ("forget", "retain", "test")


@measure
def tug_of_war(subject: Subject) -> Reading | None:
    """ToW = product over forget, retain and test data of 1 - |accuracy - retrained accuracy|; 1 for equal ones.

    With two or more ``unlearned`` models each is paired with the retrained one at its place (the same seed) and Student's
    interval is over pairs; else it is the mean over the retrained models, with an interval over examples. The reference is
    what retrained models score against each other, over all pairs: they do not reach 1 either. Nearness of accuracies
    does not prove that anything was forgotten. None without labels, test data or retrained models.
    """
    if not subject.retrained or not all(subject.has(data) for data in PARTS):
        return None
    if subject.outputs("forget").correct is None:
        return None
    theirs = np.stack([accuracies(subject, model) for model in subject.retrained])
    pairs = min(len(subject.unlearned), len(theirs))
    if pairs >= 2:
        ours = np.stack([accuracies(subject, model) for model in subject.unlearned[:pairs]])
        each = product(ours, theirs[:pairs])
        (low, high), count = intervals.t_interval(each), pairs
    else:
        mine = accuracies(subject, subject.after)
        each = product(mine, theirs)
        (low, high), count = _over_examples(subject, float(each.mean())), len(subject.outputs("forget"))
    value, ends = float(each.mean()), (max(0.0, low), min(1.0, high))
    gaps = (ours if pairs >= 2 else mine[None]).mean(0) - theirs[: pairs if pairs >= 2 else None].mean(0)
    detail = {"pairs": float(pairs), **{data: float(gap) for data, gap in zip(PARTS, gaps, strict=True)}}
    if len(theirs) < 2:
        return Reading("tug_of_war", value, *ends, count, "", "higher", detail=detail)
    floors = [float(product(one, np.delete(theirs, place, 0)).mean()) for place, one in enumerate(theirs)]
    band = intervals.next_interval(floors) if len(floors) > 2 else (min(floors), max(floors))
    band = (max(0.0, band[0]), min(1.0, band[1]))
    verdict = "outside" if value < band[0] else "within"
    detail["floor"] = float(np.mean(floors))
    return Reading("tug_of_war", value, *ends, count, "", "higher", band, verdict, detail)


def product(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """ToW of accuracies as shares: [..., metrics] against [..., metrics] that broadcast -> [...].

    Raises:
        Refused: for accuracies outside 0 .. 1.
    """
    one, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    for values in (one, other):
        if not ((values >= 0) & (values <= 1)).all():
            raise Refused("the tug of war is of accuracies from 0 to 1, found others: divide percent by 100")
    return (1 - np.abs(one - other)).prod(-1)


def accuracies(subject: Subject, model: Model) -> np.ndarray:
    """[3] forget, retain and test accuracy of a model, as shares."""
    return np.array([share_right(subject.outputs(data, model)) for data in PARTS])


def share_right(outputs: Outputs) -> float:
    """Accuracy of a classifier, 0 to 1."""
    if outputs.correct is None:
        raise Refused("an accuracy needs labels: this task has none")
    return float(outputs.correct.mean())


def _over_examples(subject: Subject, value: float) -> intervals.Interval:
    """value -+ the 95% quantile of the sum over data of |resampled gap - gap|, which bounds the error of a product."""
    noise = np.zeros(subject.draws)
    for model in subject.retrained:
        places = slice(0, len(PARTS))
        drawn = resampled(subject, subject.after)[:, places] - resampled(subject, model)[:, places]
        seen = points(subject, subject.after)[places] - points(subject, model)[places]
        noise += np.abs(drawn - seen).sum(1) / (100 * len(subject.retrained))
    half = float(np.quantile(noise, 0.95))
    return value - half, value + half
