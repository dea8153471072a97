"""Does the network still compute what a retrained one computes, layer by layer?

Two measures of different kinds, since the first can be moved without any change of function (Davari et al. 2023):
linear CKA, debiased, and the orthogonal Procrustes distance. Each is read beside the same measure between retrained
models. All of these readings are asked for by name: they open the weights of every model for one pass over at most
``EXAMPLES`` examples of one data set, which an audit of what a store holds otherwise never does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expunge.audit import intervals
from expunge.audit.layers import Layer, activations, find_layers, sample
from expunge.audit.similarity import (
    centred,
    cka_without_each,
    jackknife,
    narrow,
    procrustes_without_each,
    released_cka,
)
from expunge.audit.subject import Better, Curve, Model, Reading, Subject
from expunge.registry import measure

EXAMPLES, LAYERS, FEWEST = 512, 8, 8


@measure(asked=True)
def cka_forget(subject: Subject) -> Reading | None:
    """Debiased linear CKA to the retrained models on forget examples, averaged over them and over layers.

    The mean over up to ``LAYERS`` layers, evenly spaced, the penultimate features always; not the worst layer, which
    would be the one that chance or the seed moves most, picked after the fact. It stands in the detail, as the layer
    furthest below what retrained models have among themselves. The reference is the floor: each retrained model to
    the others, upwards to 1, since being nearer to them than they are to each other is no failure here. The interval
    is a jackknife over examples: a bootstrap repeats examples, each repetition is alike to itself, and the debiased
    estimator, which leaves out only the diagonal, would be biased again. It says nothing of the spread over models.

    Curves: layer number x CKA of this model (with its interval), of retrained models, of the original. None without
    retrained models, fewer than 8 examples, or a layer that all models have by name.

    Paper: arXiv:2503.06991 (per batch of 512, biased, one layer: ``released_cka``; in the detail "as_released").
    """
    return _reading(subject, "cka_forget", "forget", "higher", _cka_table)


@measure(asked=True)
def cka_test(subject: Subject) -> Reading | None:
    """The same on test examples: what else changed."""
    return _reading(subject, "cka_test", "test", "higher", _cka_table)


@measure(asked=True)
def procrustes_forget(subject: Subject) -> Reading | None:
    """Orthogonal Procrustes distance to the retrained models on forget examples, over layers as ``cka_forget``.

    0 for the same features up to a rotation and a scale, 2 for features without anything in common. It shrinks with
    the number of features beside few examples, for retrained models alike: read it against the floor only. The
    interval is a jackknife over examples, each left out to first order.
    """
    return _reading(subject, "procrustes_forget", "forget", "lower", _procrustes_table)


@measure(asked=True)
def procrustes_test(subject: Subject) -> Reading | None:
    """The same on test examples: what else changed."""
    return _reading(subject, "procrustes_test", "test", "lower", _procrustes_table)


Table = Callable[[Subject, str, Model, Model], dict[str, np.ndarray]]


def _cka_table(subject: Subject, data: str, one: Model, other: Model) -> dict[str, np.ndarray]:
    """layer -> [1 + n]."""
    return _paired(subject, data, one, other, "cka", cka_without_each)


def _procrustes_table(subject: Subject, data: str, one: Model, other: Model) -> dict[str, np.ndarray]:
    """layer -> [1 + n]."""
    return _paired(subject, data, one, other, "procrustes", procrustes_without_each)


def _paired(
    subject: Subject,
    data: str,
    one: Model,
    other: Model,
    name: str,
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Both measures are symmetric, so a pair is compared once, whichever of the two is judged."""
    first, second = sorted((one, other), key=id)

    def compute() -> tuple[Model, dict[str, np.ndarray]]:  # holds the second model: its identity is in the name
        ours, theirs = (_features(subject, data, model) for model in (first, second))
        return second, {layer: compare(ours[layer], theirs[layer]) for layer in ours if layer in theirs}

    return subject.cache.get(first, f"{name} {data} {id(second)}", compute)[1]


def _layers(subject: Subject) -> list[Layer]:
    """Where to look: chosen on the original model, the same names for all."""
    return subject.cache.get(
        subject.before,
        "layers",
        lambda: find_layers(
            subject.opened(subject.before), subject.task, subject.data("forget"), most=LAYERS, key=subject.key
        ),
    )


def _features(subject: Subject, data: str, model: Model) -> dict[str, np.ndarray]:
    """layer -> [n, d] centred, d <= n, on the same examples for every model."""

    def compute() -> dict[str, np.ndarray]:
        opened, examples = subject.opened(model), subject.data(data)
        names = dict(opened.named_modules())
        layers = [layer for layer in _layers(subject) if layer.module in names]
        key = subject.key.at("look", data)
        found = activations(opened, subject.task, sample(examples, EXAMPLES, key), layers, size=subject.batch, key=key)
        rotated = (narrow(centred(part.astype(np.float64))) for part in found)
        return {str(layer): part.astype(np.float32) for layer, part in zip(layers, rotated, strict=True)}

    return subject.cache.get(model, f"features {data}", compute)


def _to_retrained(subject: Subject, data: str, model: Model, rest: tuple[Model, ...], table: Table) -> np.ndarray:
    """[layers, 1 + n] mean over the retrained models, for the layers that they all have."""
    tables = [table(subject, data, model, other) for other in rest]
    names = [str(layer) for layer in _layers(subject) if all(str(layer) in found for found in tables)]
    return np.array([np.mean([found[name] for found in tables], axis=0) for name in names])


def _reading(subject: Subject, name: str, data: str, better: Better, table: Table) -> Reading | None:
    family = subject.retrained
    if not family or not subject.has(data) or len(subject.data(data)) < FEWEST:
        return None
    mine = _to_retrained(subject, data, subject.after, family, table)
    if not len(mine):
        return None
    value, low, high = jackknife(mine.mean(0))
    low, high = max(low, 0.0) if better == "lower" else low, min(high, 1.0 if better == "higher" else 2.0)
    original = _to_retrained(subject, data, subject.before, family, table)[:, 0]
    detail = {"layers": float(len(mine)), "penultimate": float(mine[-1, 0]), "original": float(original.mean())}
    if better == "higher":
        ours = _features(subject, data, subject.after)
        last = list(ours)[-1]
        pairs = [(ours[last], _features(subject, data, model).get(last)) for model in family]
        detail["as_released"] = float(np.mean([released_cka(x, y) for x, y in pairs if y is not None]))
    curves = {"unlearned": _curve(mine), "original": _line(original)}
    examples = min(EXAMPLES, len(subject.data(data)))
    if len(family) < 2:
        return Reading(
            name, value, low, high, examples, "", better, detail=detail, curves=curves, axes=("layer", _axis(better))
        )
    floor = np.array(
        [_to_retrained(subject, data, model, _but(family, k), table)[:, 0] for k, model in enumerate(family)]
    )
    limits = intervals.one_more(floor.mean(1))
    band = (float(limits[0]), 1.0) if better == "higher" else (0.0, float(limits[1]))
    verdict = "within" if (high >= band[0] if better == "higher" else low <= band[1]) else "outside"
    worse = (floor.mean(0) - mine[:, 0]) * (1 if better == "higher" else -1)
    detail |= {"floor": float(floor.mean()), "worst_layer": float(worse.argmax() + 1), "worst_by": float(worse.max())}
    curves["retrained"] = _band(floor)
    return Reading(
        name, value, low, high, examples, "", better, band, verdict, detail, curves, ("layer", _axis(better))
    )


def _axis(better: Better) -> str:
    return "CKA to retrained models" if better == "higher" else "Procrustes distance to retrained models"


def _but(family: tuple[Model, ...], number: int) -> tuple[Model, ...]:
    return family[:number] + family[number + 1 :]


def _line(values: np.ndarray) -> Curve:
    return tuple(float(number + 1) for number in range(len(values))), tuple(map(float, values))


def _curve(table: np.ndarray) -> Curve:
    value, low, high = zip(*(jackknife(row) for row in table), strict=True)
    return _line(table[:, 0])[0], value, low, high


def _band(floor: np.ndarray) -> Curve:
    """Where one more retrained model is expected at each layer."""
    low, high = zip(*map(intervals.one_more, floor.T), strict=True)
    return *_line(floor.mean(0)), low, high
