"""LiRA: one attacker per example, which knows what models say of it that were trained with it and without it.

For each example the margins of models that had it (IN) and of models that had it not (OUT) are taken as normal; the
score of the attacked model is the likelihood ratio. Pure functions on arrays first, then the measures.

Paper: Carlini et al. 2022. Departures from the released code: the variance of the OUT models comes from the OUT models
also where it is pooled; a pooled variance is the one within examples, not that of all margins together; an example with
more models than another one uses all of them; the offline score is one-sided, as in the paper.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from expunge.audit.gaussian import ENOUGH, LEAST, Variance, fit
from expunge.audit.roc import matched, separation
from expunge.audit.subject import IN, OUT, Model, Reading, Subject
from expunge.core import Refused
from expunge.registry import measure


def online_scores(
    target: ArrayLike, margins: ArrayLike, inside: ArrayLike, outside: ArrayLike, variance: Variance | None = None
) -> np.ndarray:
    """log N(margin; IN) - log N(margin; OUT) of each example, averaged over augmentations: larger for members.

    Args:
        target: what the attacked model says: [n] or [n, a] as one row of `margins`, or [t, n] or [t, n, a].
        margins: [m, n] or [m, n, a] of the shadow models. inside, outside: [m, n] bool.
        variance: as ``fit``; the default is one choice for both arms.
    """
    fewest = min(int(np.min(np.sum(np.asarray(arm, bool), 0), initial=ENOUGH)) for arm in (inside, outside))
    kind = variance or ("each" if fewest >= ENOUGH else "pooled")
    value = _target(target, margins)
    found = fit(margins, inside, kind).log_density(value) - fit(margins, outside, kind).log_density(value)
    return _averaged(found, margins)


def offline_scores(
    target: ArrayLike, margins: ArrayLike, outside: ArrayLike, variance: Variance | None = None
) -> np.ndarray:
    """-log Pr[N(OUT) > margin] of each example, averaged over augmentations: larger for members.

    The order is that of the paper's 1 - Pr[N(OUT) > margin], which is 1 to rounding for margins far above.

    Args:
        target, margins, outside, variance: as ``online_scores``.
    """
    placed = fit(margins, outside, variance).standardised(_target(target, margins))
    return _averaged(-special.log_ndtr(-placed), margins)


def density_scores(
    target: ArrayLike, margins: ArrayLike, outside: ArrayLike, variance: Variance | None = None
) -> np.ndarray:
    """-log N(margin; OUT), what the released code calls offline: also large for margins far *below* those of OUT models.

    For comparison with numbers that were made with it; ``offline_scores`` is the attack of the paper.
    """
    return _averaged(-fit(margins, outside, variance).log_density(_target(target, margins)), margins)


def _target(target: ArrayLike, margins: ArrayLike) -> np.ndarray:
    value, shape = np.asarray(target, np.float64), np.shape(margins)[1:]
    if value.shape != shape and value.shape[1:] != shape:
        raise Refused(
            f"the attacked model's margins must have the shape {shape} of one shadow model's, found {value.shape}"
        )
    if not np.isfinite(value).all():
        raise Refused("margins of the attacked model: expected finite numbers, found NaN or infinity")
    return value


def _averaged(scores: np.ndarray, margins: ArrayLike) -> np.ndarray:
    return scores.mean(-1) if np.ndim(margins) == 3 else scores


@measure
def lira(subject: Subject) -> Reading | None:
    """Area under the ROC curve of forget against unseen examples, by offline LiRA; DeLong interval over examples.

    The retrained models are the OUT models of both: each example is judged against what models say of it that never had
    it, so that a hard example is not taken for an unseen one. A held-out retrained model stands near 0.5. With few
    retrained models the attack is weak, and a value near 0.5 says little. The interval does not hold the choice of the
    retrained models nor the seed of the model; the reference does.
    """
    if len(subject.retrained) < LEAST or not subject.has("test"):
        return None
    unseen = "test_forgotten" if subject.has("test_forgotten") else "test"
    margins = np.concatenate([subject.margins(name) for name in ("forget", unseen)], axis=1)
    target = np.concatenate([subject.outputs(name).membership for name in ("forget", unseen)])
    scores = offline_scores(target, margins, np.ones(margins.shape, bool))
    return separation("lira", *np.split(scores, [len(subject.outputs("forget"))]))


@measure
def lira_online(subject: Subject) -> Reading | None:
    """Area between the model and retrained models on the same forget examples, by online LiRA; needs shadow models.

    The shadow models say what training with and without each forget example leaves; the score of the model on it is
    held against the scores of the retrained models on it. None where ``why_not_online`` gives a reason. A held-out
    retrained model stands near 0.5. The interval is over examples, all scores of one example together.
    """
    if why_not_online(subject):
        return None
    margins, inside, outside = online_arms(subject)
    usable = (inside.sum(0) >= LEAST) & (outside.sum(0) >= LEAST)
    target = np.stack([subject.outputs("forget").membership, *subject.margins("forget")])[:, usable]
    scores = online_scores(target, margins[:, usable], inside[:, usable], outside[:, usable])
    return matched("lira_online", scores[0], scores[1:], models=float(len(margins)))


def why_not_online(subject: Subject) -> str:
    """Why ``lira_online`` does not apply; "" where it does."""
    if subject.shadows is None:
        return "online LiRA needs shadow models: none were given"
    if not subject.retrained:
        return "online LiRA needs a retrained model for comparison: none was given"
    inside, outside = (arm.sum(0) for arm in _states(subject, shadows_apart(subject)))
    if ((inside >= LEAST) & (outside >= LEAST)).sum() < 2:
        return (
            f"online LiRA needs two forget examples that at least {LEAST} shadow models were trained on and {LEAST} were "
            f"not: there are fewer"
        )
    return ""


def shadows_apart(subject: Subject) -> list[int]:
    """Numbers of the shadow models that are neither judged nor compared with: none is scored by itself."""
    taken: list[Model] = [subject.after, *subject.retrained]
    models = () if subject.shadows is None else subject.shadows.models
    return [number for number, model in enumerate(models) if model not in taken]


def _states(subject: Subject, numbers: list[int], name: str = "forget") -> tuple[np.ndarray, np.ndarray]:
    shadows = subject.shadows
    if shadows is None:
        raise Refused("this audit has no shadow models: give Subject(shadows=...)")
    states = shadows.of(subject.ids(name))[numbers]
    return states == IN, states == OUT


def online_arms(subject: Subject, name: str = "forget") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins [m, n] of the shadow models on forget or retain data, and which were trained with and without it."""
    numbers = shadows_apart(subject)
    inside, outside = _states(subject, numbers, name)
    models = subject.shadows.models if subject.shadows is not None else ()
    return subject.margins(name, [models[number] for number in numbers]), inside, outside
