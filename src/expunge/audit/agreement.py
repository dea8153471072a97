"""One number for how near a model is to retrained ones in what it says and in what it computes: ours, not a paper's.

arXiv:2503.06991 sums up with three scores (AGL, AGR, H-LR) whose formulas were not found. This one has another name,
and its formula stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from expunge.audit import intervals
from expunge.audit.representation import cka_forget, cka_test
from expunge.audit.subject import Model, Reading, Subject
from expunge.audit.transfer import knn_forgotten, probe_forgotten
from expunge.registry import measure

Ends = tuple[float, float, float]
Measured = Callable[[Subject], Reading | None]


def harmonic(outputs: float, representations: float) -> float:
    """2 a b / (a + b), for agreements in [0, 1]: near 0 as soon as either is."""
    total = outputs + representations
    return 2 * outputs * representations / total if total > 0 else 0.0


@measure(asked=True)
def retraining_agreement(subject: Subject) -> Reading | None:
    """Harmonic mean of the agreement with retrained models in outputs and in representations; 1 is complete. Ours.

    Outputs: mean over forget, retain, test and forgotten-class accuracy of 1 - |accuracy - retrained mean|.
    Representations: mean of the CKA on forget and test data over its floor, at most 1, and of 1 - |probe - retrained
    mean| and the same of the nearest neighbours, where those apply. The ends are those of the parts taken together, so
    that the interval is wide; it is over examples. The reference: each retrained model against the others, upwards.

    None without two retrained models, or for a task without labels.
    """
    if len(subject.retrained) < 2 or subject.outputs("forget").correct is None:
        return None
    floors = {cka: _floor(subject, cka) for cka in (cka_forget, cka_test)}
    found = _agreement(subject, floors)
    if found is None:
        return None
    (value, low, high), detail = found
    alone = [_agreement(subject.held_out(number), floors) for number in range(len(subject.retrained))]
    values = [one[0][0] for one in alone if one is not None]
    if len(values) < 2:
        return Reading("retraining_agreement", value, low, high, len(subject.outputs("forget")), "", "higher")
    limit = intervals.next_interval(values)[0] if len(values) > 2 else min(values)
    verdict = "within" if high >= limit else "outside"
    return Reading(
        "retraining_agreement",
        value,
        low,
        high,
        len(subject.outputs("forget")),
        "",
        "higher",
        (max(0.0, limit), 1.0),
        verdict,
        {**detail, "floor": float(np.mean(values))},
    )


def _floor(subject: Subject, cka: Measured) -> float:
    """What the retrained models have among themselves: one number for the model and for each of them, held out."""
    reading = cka(subject)
    return 1.0 if reading is None else reading.detail.get("floor", 1.0)


def _agreement(subject: Subject, floors: Mapping[Measured, float]) -> tuple[Ends, dict[str, float]] | None:
    names = [name for name in ("forget", "retain", "test", "test_forgotten") if subject.has(name)]
    outputs = [_near(_accuracy(subject, name, subject.after), _mean(subject, name)) for name in names]
    inside = [part for part in (_over_floor(subject, *one) for one in floors.items()) if part is not None]
    for measured in (probe_forgotten, knn_forgotten):
        mine = _share(subject, subject.after, measured)
        theirs = [_share(subject, model, measured) for model in subject.retrained]
        if mine is not None:
            inside.append(_near(mine, float(np.mean([share[0] for share in theirs if share is not None]))))
    if not outputs or not inside:
        return None
    both = [tuple(float(np.mean([part[end] for part in parts])) for end in range(3)) for parts in (outputs, inside)]
    value, low, high = (harmonic(both[0][end], both[1][end]) for end in range(3))
    return (value, low, high), {"outputs": both[0][0], "representations": both[1][0]}


def _near(share: Ends, target: float) -> Ends:
    """1 - |share - target|, and its ends over the interval of the share."""
    value, low, high = share
    ends = (abs(low - target), abs(high - target))
    return 1 - abs(value - target), 1 - max(ends), 1 - (0.0 if low <= target <= high else min(ends))


def _accuracy(subject: Subject, name: str, model: Model) -> Ends:
    correct = subject.outputs(name, model).correct
    right, n = (0, 1) if correct is None else (int(correct.sum()), len(correct))
    low, high = intervals.wilson(right, n)
    return right / n, float(low), float(high)


def _mean(subject: Subject, name: str) -> float:
    return float(np.mean([_accuracy(subject, name, model)[0] for model in subject.retrained]))


def _over_floor(subject: Subject, cka: Measured, floor: float) -> Ends | None:
    reading = cka(subject)
    if reading is None:
        return None
    value, low, high = (
        min(1.0, max(0.0, end / max(floor, 1e-12))) for end in (reading.value, reading.low, reading.high)
    )
    return value, low, high


def _share(subject: Subject, model: Model, measured: Measured) -> Ends | None:
    """A share in [0, 1] of one model, whoever it is judged against: fitted once."""
    reading = subject.cache.get(model, f"agreement {measured.__name__}", lambda: measured(subject.judging(model)))
    return None if reading is None else (reading.value / 100, reading.low / 100, reading.high / 100)
