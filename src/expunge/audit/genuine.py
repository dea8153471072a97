"""Are the references what they are said to be? Models that saw the forget data give themselves away by their membership.

A reference that was trained on the wrong split makes a model that forgot nothing look as if it had forgotten: an audit
asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from expunge.audit import intervals
from expunge.audit.subject import Model, Subject
from expunge.core import Key, Refused

LEVEL = 0.998  # of each interval: one genuine model in a thousand at most may be accused by chance
SIGMAS = float(ndtri(0.5 + LEVEL / 2))
FEWEST = 10  # examples of each kind from which anything is said
MOST = 2000  # examples of each kind that are resampled: more only cost time
DRAWS = 200
LIMIT = 5.0  # margins beyond it say nothing more: the probability is within 0.7 % of 0 or 1
PEERS = 4  # retrained models from which one of them can be told to be another kind


@dataclass(frozen=True)
class Lost:
    """How much of a member's advantage examples have lost.

    Attributes:
        share: lost / advantage: 0 like members, 1 like examples that were never seen. low, high: interval.
        advantage: what members of this difficulty are ahead of unseen examples, in margin. told: whether it is above 0
            beyond chance; where it is not, nothing can be said.
    """

    share: float
    low: float
    high: float
    advantage: float
    told: bool


def lost_advantage(
    before: np.ndarray,
    after: np.ndarray,
    members: np.ndarray,
    unseen: np.ndarray,
    unseen_after: np.ndarray,
    key: Key,
    limit: float = np.inf,
) -> Lost:
    """Of the advantage that being trained on gives examples, how much a second model does without.

    With m the margin of examples in models that were trained on them, a in the model in question, M and U the margins of
    members and of unseen examples in those same models, and V of the unseen ones in the model in question:

        lost = mean(m - a) - mean(U - V)        advantage = mean(m - Q_U(F_M(m)))

    F_M is the rank among members and Q_U the quantile of unseen examples: the margin that an example as easy as this
    would have unseen. So easy examples, which training does not change, have no advantage to lose, and are not expected
    to. This holds where members and unseen examples are drawn alike, and where training leaves easy examples ahead of hard
    ones. Differences are of margins within -limit .. limit; ranks are not. The interval resamples examples.

    Args:
        before, after: [n] margins of the same examples, in models trained on them and in the model in question.
        members: [p], unseen: [q] in the former; unseen_after: [q] in the model in question, of the same examples.
        key: of the draws. limit: beyond which margins say nothing.

    Derived here; no paper.
    """
    rng = np.random.Generator(np.random.PCG64(key.seed))
    before, after = _some(rng, before, after)
    (members,) = _some(rng, members)
    unseen, unseen_after = _some(rng, unseen, unseen_after)
    drop, shift = (
        np.clip(a, -limit, limit) - np.clip(b, -limit, limit) for a, b in ((before, after), (unseen, unseen_after))
    )
    lost, gain = np.empty(DRAWS + 1), np.empty(DRAWS + 1)
    lost[0], gain[0] = drop.mean() - shift.mean(), _advantage(before, members, unseen, limit)
    for number in range(1, DRAWS + 1):
        rows = [rng.integers(0, len(part), len(part)) for part in (before, members, unseen)]
        lost[number] = drop[rows[0]].mean() - shift[rows[2]].mean()
        gain[number] = _advantage(before[rows[0]], members[rows[1]], unseen[rows[2]], limit)
    floor = _normal(gain)[0]
    told = min(len(before), len(members), len(unseen)) >= FEWEST and floor > 0
    if not told:
        return Lost(float("nan"), float("-inf"), float("inf"), float(gain[0]), False)
    ratio = lost / np.maximum(gain, floor)  # a resampled advantage near 0 would send the ratio anywhere
    low, high = _normal(ratio)
    return Lost(float(lost[0] / gain[0]), low, high, float(gain[0]), True)


def _some(rng: np.random.Generator, *parts: np.ndarray) -> tuple[np.ndarray, ...]:
    """At most ``MOST`` examples, the same of each part."""
    size = len(parts[0])
    rows = np.arange(size) if size <= MOST else rng.choice(size, MOST, replace=False)
    return tuple(np.asarray(part, np.float64)[rows] for part in parts)


def _advantage(margins: np.ndarray, members: np.ndarray, unseen: np.ndarray, limit: float) -> float:
    ordered = np.sort(members)
    rank = (np.searchsorted(ordered, margins, "left") + np.searchsorted(ordered, margins, "right")) / (2 * len(ordered))
    return float((np.clip(margins, -limit, limit) - np.clip(np.quantile(unseen, rank), -limit, limit)).mean())


def _normal(samples: np.ndarray) -> tuple[float, float]:
    """Interval around the first value with the spread of the others: a far quantile needs thousands of draws."""
    half = SIGMAS * float(samples[1:].std())
    return float(samples[0] - half), float(samples[0] + half)


def check_references(subject: Subject) -> None:
    """Refuse retrained models that were trained on the forget data, or were not trained on the retain data.

    Each is asked by its own membership, see ``lost_advantage``: of the advantage that training gave the forget examples
    in the original models (``originals``, or ``before``), a retrained model must have lost more than half, or something for
    sure (it loses all, but the advantage of hard examples is less than their rank says); of that of the retain examples less than a quarter; where
    whole classes are forgotten it must not be sure of them; and of four or more it must not be the one that kept what all
    the others lost.

    It says nothing where the original models themselves cannot be told to have seen the forget data (easy examples, a
    small network, too few of them), so passing is no proof. Test examples must be drawn like the training data.

    Raises:
        Refused: naming the first such model.
    """
    if not subject.has("test"):
        return
    known = subject.originals or (subject.before,)
    found = []
    for number, model in enumerate(subject.retrained):
        _recognised(subject, model, known, number)
        found.append(_trained_on(subject, model, known, number))
    odd = odd_one(np.array(found))
    if odd is not None:
        raise Refused(
            f"{_named(subject, odd)} was trained on the wrong data: the others have lost what training gave the forget "
            f"examples, and this one has not; train it on the retain data alone"
        )


def odd_one(lost: np.ndarray) -> int | None:
    """The model that kept what all the others lost: below their prediction interval, and less than half their mean.

    Args:
        lost: [K] mean margin that forget examples lost in each model; None is returned for fewer than ``PEERS`` models.
    """
    for number in np.argsort(lost)[:1] if len(lost) >= PEERS else ():
        others = np.delete(lost, number)
        if 0 < intervals.next_interval(others, LEVEL)[0] > lost[number] < others.mean() / 2:
            return int(number)
    return None


def _named(subject: Subject, number: int) -> str:
    return f"retrained model {number + 1} of {len(subject.retrained)}"


def _recognised(subject: Subject, model: Model, known: Sequence[Model], number: int) -> None:
    """Refuse a model that is as sure of unseen examples of forgotten classes as the originals are.

    A small model may recognise a class that it never saw, where its outputs go on beyond its data, but not surely: with
    margins counted from those of a uniform guess, one that keeps three quarters of them was trained on the class.
    """
    classes = subject.outputs("forget").logits
    if not subject.has("test_forgotten") or classes is None:
        return
    mine, usual = (np.clip(_margins(subject, "test_forgotten", some), -LIMIT, LIMIT) for some in ([model], list(known)))
    gain = float(usual.mean()) + float(np.log(max(1, classes.shape[1] - 1)))
    half = SIGMAS * float((usual - mine).std()) / np.sqrt(len(mine))
    if len(mine) >= FEWEST and gain > 1 and float((usual - mine).mean()) + half < gain / 4:
        right = subject.outputs("test_forgotten", model).correct
        share = 0.0 if right is None else float(right.mean())
        raise Refused(
            f"{_named(subject, number)} was trained on the wrong data: it is as sure of unseen examples of the forgotten "
            f"classes as the original (and right on {_percent(share)} of them), which a model that never saw those classes "
            f"cannot be; train it on the retain data alone"
        )


def _trained_on(subject: Subject, model: Model, known: Sequence[Model], number: int) -> float:
    """Refuse by the membership of forget and of retain examples; the mean margin that the forget examples lost."""
    before = {name: _margins(subject, name, known) for name in ("forget", "retain", "test") if subject.has(name)}
    after = {name: _margins(subject, name, [model]) for name in before}
    members, key = before.get("retain", before["forget"]), subject.key.at("genuine", number)
    limit = LIMIT if subject.outputs("forget").margin is not None else np.inf  # for losses there is none that is known
    found = lost_advantage(before["forget"], after["forget"], members, before["test"], after["test"], key, limit)
    if found.told and found.low <= 0 and found.high < 0.5:
        raise Refused(
            f"{_named(subject, number)} was trained on the wrong data: of the advantage that training gave the forget "
            f"examples in the original it has lost {_percent(found.share)} (at most {_percent(found.high)}), as its own "
            f"training data would; train it on the retain data alone"
        )
    if "retain" in before:
        key = key.at("retain")
        kept = lost_advantage(members, after["retain"], members, before["test"], after["test"], key, limit)
        if kept.told and kept.low > 0.25:
            raise Refused(
                f"{_named(subject, number)} was trained on the wrong data: of the advantage that training gave the retain "
                f"examples in the original it lacks {_percent(kept.share)} (at least {_percent(kept.low)}), as if it had "
                f"not seen them; train it on all the retain data by the same recipe"
            )
    level = {
        name: (np.clip(before[name], -limit, limit) - np.clip(after[name], -limit, limit)).mean() for name in before
    }
    return float(level["forget"] - level["test"])


def _percent(share: float) -> str:
    return f"{100 * max(0.0, share):.0f}%"


def _margins(subject: Subject, name: str, models: Sequence[Model]) -> np.ndarray:
    """[n] mean over models."""
    return subject.margins(name, models).mean(0)
