"""Margin shift: how far one model's margins stand from those of retrained models, in their own standard deviations.

For a single model KLoM is not defined; this is its form for one: a signed z per example, and its mean.
"""

from __future__ import annotations

import numpy as np

from expunge.audit import intervals, populations
from expunge.audit.subject import Reading, Subject
from expunge.core import Refused
from expunge.registry import measure

PRIOR = 4.0  # degrees of freedom that the spread over all examples counts as, in the spread of each
FAR = 3.0
_SMALLEST = 1e-3  # standard deviation of a margin below which retrained models count as equal


@measure
def forget_margin_shift(subject: Subject) -> Reading | None:
    """Mean over forget examples of (margin - retrained median) / retrained deviation, bootstrap over examples.

    Above 0 the examples are still remembered, below 0 they are over-forgotten; a genuine retrained model stands near 0,
    how near, the held-out ones show. None with fewer than 3 retrained models. Single examples may be far from retraining
    in both directions while the mean is 0: see ``mean_size`` (mean |z|, near 0.8 for a retrained model), ``far`` (share
    with |z| > 3) and ``p95`` (of |z|) in the detail. The margin is minus the loss per unit where there are no classes.
    """
    return _reading(subject, "forget_margin_shift", "forget")


@measure
def forget_margin_distance(subject: Subject) -> Reading | None:
    """Mean over forget examples of |z|, z as in ``forget_margin_shift``: how far each is from retraining, on either side.

    Near 0.8 for a genuine retrained model. Averages of the right size, made of answers that are wrong one by one, are seen
    here: each example is held against its own retrained models. Below the band the model is nearer to the middle of
    the retrained ones than they are, which is no failure. Bootstrap over examples.
    """
    return _reading(subject, "forget_margin_distance", "forget", sizes=True)


@measure
def retain_margin_shift(subject: Subject) -> Reading | None:
    """The same over retain examples: below 0 the model is less sure of what it should have kept."""
    return _reading(subject, "retain_margin_shift", "retain")


@measure
def test_margin_shift(subject: Subject) -> Reading | None:
    """The same over test examples."""
    return _reading(subject, "test_margin_shift", "test")


test_margin_shift.__test__ = False  # its name begins as a test's does


def margin_shift(margins: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """[n] z = (margin - median of the retrained) / s, of variance near 1 for one more retrained model.

    s^2 = v (1 + pi / (2 K + pi - 2)), the second factor for the error of a median of K normal values, and v = ((K - 1)
    var + 4 mean of var) / (K + 3): the variance over the retrained models (over K - 1), drawn towards its mean over the
    examples, which counts as 4 degrees of freedom. A few models may agree on an example by chance.

    Args:
        margins: [n] of the model. retrained: [K, n], K >= 2.

    Derived here: no published code has it.
    """
    own = np.asarray(margins, np.float64)
    if own.ndim != 1:
        raise Refused(f"the margins of one model have shape {own.shape}: expected [examples]")
    table, theirs = populations.checked(own[None], np.atleast_2d(retrained))
    count = len(theirs)
    if count < 2:
        raise Refused("the spread of retrained models needs 2 of them or more, found 1")
    variance = theirs.var(0, ddof=1)
    shrunk = ((count - 1) * variance + PRIOR * variance.mean()) / (count - 1 + PRIOR)
    predicted = np.maximum(shrunk, _SMALLEST**2) * (1 + np.pi / (2 * count + np.pi - 2))
    return (table[0] - np.median(theirs, axis=0)) / np.sqrt(predicted)


def _reading(subject: Subject, name: str, data: str, sizes: bool = False) -> Reading | None:
    if len(subject.family) < 3 or len(subject.retrained) < 2 or not subject.has(data):
        return None
    shift = margin_shift(subject.outputs(data).membership, subject.margins(data))
    asked = np.abs(shift) if sizes else shift
    samples = intervals.resampled_mean(asked, subject.draws, subject.key.at("resample", data))
    low, high = intervals.percentile(samples)
    if sizes:
        return Reading(name, float(asked.mean()), low, high, len(asked), "sd")
    far = np.abs(shift)
    detail = {
        "median": float(np.median(shift)),
        "mean_size": float(far.mean()),
        "far": float((far > FAR).mean()),
        "p95": float(np.quantile(far, 0.95)),
    }
    return Reading(name, float(shift.mean()), low, high, len(shift), "sd", detail=detail)
