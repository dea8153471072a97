"""Recall: where a model's margins on the forget set stand between retrained models (0) and originals (1)."""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals
from expunge.audit.subject import Reading, Subject
from expunge.core import Refused
from expunge.registry import measure

FEWEST = 3  # originals, without the model that is judged
PRIOR = 4.0  # degrees of freedom that the spread over all examples counts as, in the spread of each


@measure
def recall(subject: Subject) -> Reading | None:
    """What is left of what training on the forget set did to it: 0 as retrained models, 1 as originals.

    Needs three originals of other seeds; with one, its own accidents would count as memory, and every model that descends
    from it has them too. All examples speak together, those the most on which originals and retrained models differ, so
    that it sees what averages over examples do not. Held-out retrained models stand a little above 0, because the mean of
    a few is not their centre: that is why they stand beside. Bootstrap over examples. The judged model and the one that
    it was made from are no originals here, also where they are given among them.
    """
    own = {subject.answers(subject.after), subject.answers(subject.before)}
    originals = tuple(model for model in subject.originals if subject.answers(model) not in own)
    if len(originals) < FEWEST or len(subject.retrained) < 2:
        return None
    margins = subject.outputs("forget").membership
    weights, parts = recalled(margins, subject.margins("forget"), subject.margins("forget", originals))
    total = weights.sum()
    if not total > 0:
        return None
    samples = intervals.resampled_ratio(parts, weights, subject.draws, subject.key.at("resample", "forget"))
    low, high = intervals.percentile(samples)
    return Reading("recall", float(parts.sum() / total), low, high, len(margins), detail={"originals": len(originals)})


def recalled(margins: np.ndarray, retrained: np.ndarray, originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weights [n], parts [n]): recall is sum(parts) / sum(weights).

        recall = sum_x d_x (m_x - r_x) / s_x^2  /  sum_x d_x^2 / s_x^2,    d = o - r

    with m the model's margins, o and r the means over originals and retrained models, and s^2 the variance over the
    retrained models, drawn towards its mean over the examples. It is the coordinate of the model on the line from retrained
    to original, in the metric in which a likelihood ratio of two normal laws measures.

    Args:
        margins: [n]. retrained: [K, n], K >= 2. originals: [J, n], J >= 1.

    Derived here; the per-example law is that of LiRA (arXiv:2112.03570).
    """
    own, theirs, before = (np.asarray(part, np.float64) for part in (margins, retrained, originals))
    if own.ndim != 1 or theirs.shape[1:] != own.shape or before.shape[1:] != own.shape or len(theirs) < 2:
        raise Refused(
            f"recall needs margins [n], [K, n] with K >= 2 and [J, n] of the same examples, found shapes {own.shape}, "
            f"{theirs.shape} and {before.shape}"
        )
    degrees, variance = len(theirs) - 1, theirs.var(0, ddof=1)
    variance = (degrees * variance + PRIOR * variance.mean()) / (degrees + PRIOR)
    tiny = np.finfo(np.float64).tiny
    moved = before.mean(0) - theirs.mean(0)
    return moved**2 / np.maximum(variance, tiny), moved * (own - theirs.mean(0)) / np.maximum(variance, tiny)
