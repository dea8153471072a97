"""Explanations that were given before a deletion: does unlearning break those that retraining would have kept?

A person was told "change this much and the answer is yes". The right to an explanation then stands against another
person's right to be forgotten: the model is changed, and the promise may be void.
"""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals
from expunge.audit.subject import Reading, Subject
from expunge.core import Refused
from expunge.registry import measure

DATA = "recourses"


@measure
def recourse_invalidation(subject: Subject) -> Reading | None:
    """Share of the explanations valid before forgetting that flip under this model and not under retraining, in %.

    Explanations are the data ``request.extra["recourses"]``: inputs that people were told to reach, labelled with the
    class that they were promised. Mean over the retrained models; Wilson's interval over explanations. A retrained model
    reads above 0 as well (it flips what other seeds keep), so nearer to retrained is better: 0 is what a model gives
    that forgot nothing. It does not see explanations that should have become void and did not: see ``kept_wrongly``.

    None without such data or without retrained models.

    Raises:
        Refused: where no explanation is valid under the model before forgetting.

    Paper: after Krishna, Ma and Lakkaraju, ICML 2023 (arXiv:2302.04288); the rate is a derived form.
    """
    if DATA not in subject.request.extra or not subject.retrained:
        return None
    before, after, *others = (
        subject.outputs(DATA, model).correct for model in (subject.before, subject.after, *subject.retrained)
    )
    if before is None or after is None:
        return None
    found = invalidation(before, after, np.stack([other for other in others if other is not None]))
    count = int(found["issued"])
    low, high = intervals.wilson(found["invalidated"] * count, count)
    detail = {name: 100 * share for name, share in found.items() if name not in ("invalidated", "issued")}
    return Reading(
        "recourse_invalidation",
        100 * found["invalidated"],
        100 * float(low),
        100 * float(high),
        count,
        "%",
        detail=detail,
    )


def invalidation(before: np.ndarray, after: np.ndarray, retrained: np.ndarray) -> dict[str, float]:
    """What became of explanations, as shares of those that were valid before.

    Args:
        before, after: [n] bool, whether each explanation has its promised class. retrained: [m, n] bool.

    Returns:
        ``invalidated``: flip under the model and not under retraining; ``kept_wrongly``: hold under the model and flip
        under retraining; ``flipped``, ``flipped_by_retraining``: flip at all. The retrained are averaged. And ``issued``,
        how many were valid before.
    """
    issued, now = np.asarray(before, bool), np.asarray(after, bool)
    again = np.atleast_2d(np.asarray(retrained, bool))
    if issued.shape != now.shape or again.shape[1:] != issued.shape:
        raise Refused(
            f"explanations were judged in shapes {issued.shape}, {now.shape} and {again.shape}: expected [n], [n] and "
            f"[models, n]"
        )
    if not issued.any():
        raise Refused(
            f"none of the {len(issued)} explanations has its promised class under the model before forgetting: were they "
            f"issued for another model, or is their label not the desired class?"
        )
    now, kept = now[issued], again[:, issued].mean(0)
    return {
        "invalidated": float((~now * kept).mean()),
        "kept_wrongly": float((now * (1 - kept)).mean()),
        "flipped": float((~now).mean()),
        "flipped_by_retraining": float((1 - kept).mean()),
        "issued": float(issued.sum()),
    }
