"""KLoM: per example, how far the margins over unlearned models are from those over retrained ones.

Each unlearned model comes from an original of its own. Three estimators of one comparison: the released one, binned (its
floor is large: about 5.6 for 10 models and 0.34 for 100, where the truth is 0); a fit of two normal distributions, whose
floor is small and known, at the price of a shape; and the energy distance, without either.

Paper: Attribute-to-Delete, arXiv:2410.23232; EasyDUB, arXiv:2602.16400.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expunge.audit import populations
from expunge.audit.subject import Reading, Subject
from expunge.registry import measure

BINS, FLOOR, CLIP = 20, 1e-5, 100.0
LEAST, ENOUGH = 4, 50  # models a side: for any reading, and for the binned estimator
_SMALLEST = 1e-3  # standard deviation of a margin below which models count as equal
_CELLS = 1 << 22


@measure
def klom_forget(subject: Subject) -> Reading | None:
    """KLoM over forget examples: KL(unlearned || retrained) of the margins, mean over examples, in nats.

    None without ``unlearned``, with fewer than 4 of them, or with fewer than 8 retrained models. The number is at h
    models a side, where h is at most half of the retrained, averaged over random halves; its reference is the same
    number between two halves of the retrained. From h = 50 on it is the released estimator, below that the Gaussian
    fit; both are in the detail, as are the released number with the arguments swapped (the published tables have it
    so), the originals in place of the unlearned (``do_nothing``), and all models at once, which has no floor.
    A small value does not prove that each model forgot: it is about the population that the method makes.
    """
    return _reading(subject, "klom_forget", "forget")


@measure
def klom_retain(subject: Subject) -> Reading | None:
    """The same over retain examples: did the method move what it should not have touched?"""
    return _reading(subject, "klom_retain", "retain")


@measure
def klom_test(subject: Subject) -> Reading | None:
    """The same over test examples."""
    return _reading(subject, "klom_test", "test")


def released(unlearned: np.ndarray, retrained: np.ndarray, renormalise: bool = False) -> np.ndarray:
    """[n] KL(unlearned || retrained) over 20 bins, with the released rules.

    Margins are clipped to [-100, 100]; 20 bins of equal width reach from the least to the largest value of both (one
    unit from the least where all are equal); they are half-open, so that the largest value is in none and is dropped;
    what is left is normalised, q is at least 1e-5 where p > 0, and KL = sum over p > 0 of p log(p / q).

    Args:
        unlearned: [N, n] margins, the first argument of KL. Swapped, ``released(retrained, unlearned)`` is what the
            released benchmark driver prints.
        retrained: [M, n] margins.
        renormalise: divide q by its sum, as the estimator that calls a library's entropy does; else as EasyDUB does.

    Returns:
        0 where every value of p is dropped (all equal to the largest), as EasyDUB has it; NaN with `renormalise`.
    """
    p, q = populations.checked(unlearned, retrained)
    parts = np.array_split(np.arange(p.shape[1]), max(1, (len(p) + len(q)) * p.shape[1] // _CELLS))
    return np.concatenate([_binned(p[:, part], q[:, part], renormalise) for part in parts])


def gaussian(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """[n] KL(unlearned || retrained) of two normal distributions fitted to the margins.

    KL = log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2, with variances over N - 1. For equal normal
    populations of N models a side its mean is ((N-1)/(N-3) (1 + 2/N) - 1) / 2: the floor.

    Args:
        unlearned, retrained: [N, n] and [M, n] margins, 2 models or more, clipped to [-100, 100].
    """
    p, q = (np.clip(table, -CLIP, CLIP) for table in populations.checked(unlearned, retrained, least=2))
    above, below = (np.maximum(table.var(0, ddof=1), _SMALLEST**2) for table in (p, q))
    return (np.log(below / above) + (above + (p.mean(0) - q.mean(0)) ** 2) / below - 1) / 2


def energy(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """[n] energy distance 2 E|p - q| - E|p - p'| - E|q - q'| over different models: 0 on average for equal populations.

    In units of margin; unbiased for any number of models from 2 on, so it may be below 0. For small populations.
    """
    p, q = (np.clip(table, -CLIP, CLIP) for table in populations.checked(unlearned, retrained, least=2))
    inside_p, inside_q = _pairs(p), _pairs(q)
    across = _pairs(np.concatenate([p, q])) - inside_p - inside_q
    count_p, count_q = len(p), len(q)
    return (
        2 * across / (count_p * count_q)
        - 2 * inside_p / (count_p * (count_p - 1))
        - 2 * inside_q / (count_q * (count_q - 1))
    )


def _pairs(values: np.ndarray) -> np.ndarray:
    """[n] sum of |a - b| over unordered pairs of rows, from ranks."""
    count = len(values)
    return (2 * np.arange(count) - count + 1) @ np.sort(values, axis=0)


def _binned(p: np.ndarray, q: np.ndarray, renormalise: bool) -> np.ndarray:
    p, q = np.clip(p, -CLIP, CLIP), np.clip(q, -CLIP, CLIP)
    start, end = np.minimum(p.min(0), q.min(0)), np.maximum(p.max(0), q.max(0))
    end = np.where(start >= end, start + 1, end)
    edges = np.linspace(start, end, BINS + 1)
    shares = []
    for values in (p, q):
        counts = _counts(values, start, end, edges)
        shares.append(counts / np.maximum(counts.sum(0), 1))
    ours, theirs = shares
    theirs = np.where(ours > 0, np.maximum(theirs, FLOOR), theirs)
    ratio = np.divide(ours, theirs, out=np.ones_like(ours), where=ours > 0)
    found = (ours * np.log(ratio)).sum(0)
    if not renormalise:
        return found
    with np.errstate(divide="ignore"):
        return np.where(ours.sum(0) > 0, found + np.log(theirs.sum(0)), np.nan)


def _counts(values: np.ndarray, start: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[20, n] how many values lie in edges[i] <= value < edges[i + 1]: the bin by division, put right by the edges."""
    column = np.arange(values.shape[1])
    place = np.clip((values - start) * (BINS / (end - start)), 0, BINS).astype(np.int64)
    place -= values < edges[place, column]
    place += (place < BINS) & (values >= edges[np.minimum(place + 1, BINS), column])
    flat = np.bincount((place * len(column) + column).ravel(), minlength=(BINS + 1) * len(column))
    return flat.reshape(BINS + 1, -1)[:BINS].astype(np.float64)


Estimator = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _reading(subject: Subject, name: str, data: str) -> Reading | None:
    count = min(len(subject.unlearned), len(subject.retrained) // 2)
    if count < LEAST or not subject.has(data):
        return None
    ours, theirs = subject.margins(data, subject.unlearned), subject.margins(data)
    old = subject.margins(data, subject.originals) if len(subject.originals) >= count else theirs[:0]
    splits = populations.halves(len(ours), len(theirs), len(old), subject.key.at("populations"))
    parts = [(ours[s.unlearned], theirs[s.retrained], theirs[s.others], old[s.originals]) for s in splits]
    chosen: Estimator = released if count >= ENOUGH else gaussian
    each = np.stack([chosen(p, q) for p, q, _, _ in parts])
    floors = np.stack([chosen(other, q) for _, q, other, _ in parts])
    low, high = populations.interval(each.mean(1).tolist(), each.mean(0))
    limit = populations.band(floors.mean(1).tolist())[1]
    detail = {
        "models": float(count),
        **_summary("", each),
        **_summary("floor", floors),
        **_others(parts[0]),
        "all_models": float(chosen(ours, theirs).mean()),
        "all_models_released_p95": float(np.quantile(released(ours, theirs), 0.95)),
        "all_models_released_swapped_p95": float(np.quantile(released(theirs, ours), 0.95)),
    }
    if len(old):
        detail["do_nothing"] = float(np.mean([chosen(o, q).mean() for _, q, _, o in parts]))
    value = float(each.mean())
    verdict = "outside" if value > limit else "within"
    return Reading(name, value, max(0.0, low), high, each.shape[1], "nats", "lower", (0.0, limit), verdict, detail)


def _summary(of: str, values: np.ndarray) -> dict[str, float]:
    """Mean, median, P95 and P99 over examples, each averaged over the halves."""
    head = f"{of}_" if of else ""
    cuts = np.quantile(values, [0.5, 0.95, 0.99], axis=1).mean(1)
    found = {f"{head}{name}": float(cut) for name, cut in zip(("median", "p95", "p99"), cuts, strict=True)}
    return {**({of: float(values.mean())} if of else {}), **found}


def _others(part: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Means over examples of every estimator and order, each with its floor, on one pair of halves."""
    p, q, other, _ = part
    kinds: dict[str, Estimator] = {
        "gaussian": gaussian,
        "gaussian_swapped": lambda a, b: gaussian(b, a),
        "released": released,
        "released_swapped": lambda a, b: released(b, a),
        "released_renormalised": lambda a, b: released(a, b, renormalise=True),
        "energy": energy,
    }
    found = {}
    for name, kind in kinds.items():
        found[name], found[f"{name}_floor"] = float(np.nanmean(kind(p, q))), float(np.nanmean(kind(other, q)))
    return found
