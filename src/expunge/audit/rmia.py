"""RMIA: how much likelier does a model make an example, compared with the same for examples nobody was trained on?

Each example x is set against many population examples z: score(x) is the share of z that x beats. Pure functions on
arrays first, then the measure. Needs only one reference model; a few are enough.

Paper: Zarifzadeh, Liu and Shokri 2024, arXiv 2312.03262. Counts come from sorting the population once, with the same
result as all pairs at a cost of (n + z) log z.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit import intervals
from expunge.audit.roc import separation
from expunge.audit.subject import Model, Reading, Subject
from expunge.core import Refused
from expunge.registry import measure

LEAST_POPULATION = 10
GRID = tuple(step / 10 for step in range(11))


def offline_evidence(outside: ArrayLike, a: float) -> np.ndarray:
    """p(x) = ((1 + a) mean OUT p(x | model) + 1 - a) / 2, where no model was trained on x.

    Args:
        outside: [n] mean probability of the true class over reference models without x.
        a: in [0, 1]; the line by which IN probabilities follow from OUT ones. 0 takes IN models as certain, up to the
            half that they count; 1 takes them as the OUT models. See ``tuned``.
    """
    if not 0 <= a <= 1:
        raise Refused(f"a of RMIA must lie in [0, 1], found {a!r}")
    return ((1 + a) * _probabilities(outside, "reference") + (1 - a)) / 2


def online_evidence(inside: ArrayLike, outside: ArrayLike) -> np.ndarray:
    """p(x) = (mean IN p(x | model) + mean OUT p(x | model)) / 2, [n] each."""
    first, second = _probabilities(inside, "IN"), _probabilities(outside, "OUT")
    if first.shape != second.shape:
        raise Refused(f"expected as many IN as OUT probabilities, found {first.shape} and {second.shape}")
    return (first + second) / 2


def scores(
    target: ArrayLike,
    evidence: ArrayLike,
    population: ArrayLike,
    population_evidence: ArrayLike,
    *,
    gamma: float = 1.0,
    strict: bool = True,
) -> np.ndarray:
    """[n] share of the population z with [p(x | model) / p(x)] / [p(z | model) / p(z)] above `gamma`; large for members.

    Args:
        target: [n] p(x | attacked model), probability of the true class. evidence: [n] p(x), above 0, of
            ``offline_evidence`` or ``online_evidence``.
        population: [z] the same of population examples, which no model was trained on. population_evidence: [z]
            ``offline_evidence`` of them with the same a; online, where no model had them, their mean over the models.
        gamma: > 0. strict: above gamma, as the released code has it; otherwise at least gamma, as the paper writes it.
    """
    if not gamma > 0:
        raise Refused(f"gamma of RMIA must be above 0, found {gamma!r}")
    ratio = _ratio(target, evidence, "attacked")
    others = np.sort(gamma * _ratio(population, population_evidence, "population"))
    return np.searchsorted(others, ratio, "left" if strict else "right") / len(others)


def tuned(
    target: ArrayLike, members: ArrayLike, outside: ArrayLike, population: ArrayLike, population_outside: ArrayLike
) -> float:
    """The a in 0, 0.1 .. 1 by which a model whose members are known is attacked best; the smallest of equal ones.

    Args:
        target: [n] p(x | paired reference model). members: [n] bool. outside: [n], population: [z],
            population_outside: [z] as above.
    """
    chosen = np.asarray(members, bool)
    if chosen.all() or not chosen.any():
        raise Refused("tuning a of RMIA needs a model with known members and non-members: one of them is missing")
    areas = []
    for a in GRID:
        evidence = (offline_evidence(outside, a), offline_evidence(population_outside, a))
        found = scores(target, evidence[0], population, evidence[1])
        areas.append(intervals.auc(found[chosen], found[~chosen]))
    return GRID[int(np.argmax(areas))]


def _probabilities(values: ArrayLike, name: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not bool(((found >= 0) & (found <= 1)).all()):
        raise Refused(f"{name} probabilities: expected [n] numbers in [0, 1], found shape {found.shape} or others")
    return found


def _ratio(values: ArrayLike, evidence: ArrayLike, name: str) -> np.ndarray:
    above, below = _probabilities(values, name), np.asarray(evidence, np.float64)
    if above.shape != below.shape or not bool((below > 0).all()):
        raise Refused(f"{name} examples: expected p(x) above 0 for each of {len(above)}, found shape {below.shape}")
    return above / below


@measure
def rmia(subject: Subject) -> Reading | None:
    """Area under the ROC curve of forget against unseen examples, by offline RMIA; DeLong interval over examples.

    The retrained models are the reference models. Of the unseen examples one half, drawn by key, is the population and
    the other the non-members. a is tuned on the original model, which is known to have had the forget examples: where
    that model is itself judged and no other original was given, its own value is the best of eleven. A held-out
    retrained model stands near 0.5. The interval does not hold the choice of reference models, which the band of
    retrained models does.

    None where ``why_not`` gives a reason. Departure from the released code, which drops reference models with the
    smallest probabilities where more were OUT than asked for: the mean is over all of them.
    """
    if why_not(subject):
        return None
    drawn, others = _split(subject)
    references = [_said(subject, model, drawn, others) for model in subject.retrained]
    outside, population_outside = (np.mean(part, axis=0) for part in zip(*references, strict=True))
    members = np.arange(len(outside)) < len(subject.outputs("forget"))
    paired, paired_population = _said(subject, _paired(subject), drawn, others)
    a = tuned(paired, members, outside, paired_population, population_outside)
    target, population = _said(subject, subject.after, drawn, others)
    found = scores(target, offline_evidence(outside, a), population, offline_evidence(population_outside, a))
    return separation("rmia", found[members], found[~members], a=a, population=float(len(population)))


def why_not(subject: Subject) -> str:
    """Why ``rmia`` does not apply; "" where it does."""
    if not subject.retrained:
        return "RMIA needs a retrained model as its reference: none was given"
    if not subject.has("test"):
        return "RMIA needs test data: none was given"
    if subject.outputs("forget").probabilities is None:
        return "RMIA needs the probability of the true class: this task has no classes"
    if min(map(len, _split(subject))) < LEAST_POPULATION:
        return (
            f"too few examples for RMIA: expected {LEAST_POPULATION} unseen ones for the population and as many others"
        )
    return ""


def _split(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Positions among the unseen examples: of the population, and of the non-members."""
    size = len(subject.unseen())
    order = np.random.Generator(np.random.PCG64(subject.key.at("rmia", "population").seed)).permutation(size)
    return np.sort(order[: size // 2]), np.sort(order[size // 2 :])


def _said(subject: Subject, model: Model, drawn: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the true class, exp(-loss): of forget examples and non-members together, and of the population.

    Above 0, also where it underflows: a reference that rules the true class out must not end the audit.
    """
    forget, unseen = (
        np.clip(np.exp(-part.loss), np.finfo(np.float64).tiny, 1.0)
        for part in (subject.outputs("forget", model), subject.unseen(model))
    )
    return np.concatenate([forget, unseen[others]]), unseen[drawn]


def _paired(subject: Subject) -> Model:
    """A model known to be trained on the forget examples; another one than the judged, where there is one."""
    return next((model for model in (subject.before, *subject.originals) if model is not subject.after), subject.before)
