"""Does what was forgotten come back when the input is disturbed? Noise on the input, or other text before the prompt.

Forgetting that hangs on the exact input (a decision surface bent round the forget examples) gives way when that input
moves a little: the model is then right again where a retrained one is not. Not from one paper: the reading is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.attacks.recovery import retrained_band
from expunge.audit import intervals
from expunge.audit.language import is_language
from expunge.audit.subject import Curve, Model, Reading, Subject, classifies
from expunge.core import Batch, Key, Refused, lent_stream, map_tensors, only_looked_at, rows_of
from expunge.oracle import take
from expunge.registry import measure

NOISE = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Standard deviations of the noise, as shares of the spread of the inputs."""
PREFIX = (0, 4, 8, 16, 32)
"""Tokens put before the prompt."""
_KNOWN = 1024  # examples that the spread and the tokens of a prefix are taken from
_DRAWN = 256  # examples whose disturbance is drawn together, whatever the size of a pass


@measure(asked=True)
def input_perturbation(subject: Subject) -> Reading | None:
    """Largest lead over the retrained mean on forget examples, over strengths of a disturbance of the input.

    max over strengths s of (metric of the model at s - mean over retrained models of theirs at s): accuracy in points;
    minus the loss per unit where there are no labels. Inputs of numbers get Gaussian noise, not clipped, the same for
    every model and, but for its size, at every strength; prompts get the first tokens of text to be kept before them.
    Strength 0, the input as it is, is among them. A random search, not an adversarial one: it can miss a way back.

    The interval is over examples: value -+ the 95 % quantile of the largest resampled error over strengths, which holds
    for the maximum too; where no label differs at any strength, Wilson's upper end of 0 of n. None without retrained
    models, and for tasks whose inputs are neither.
    """
    strengths = _strengths(subject)
    if strengths is None or not subject.retrained:
        return None
    after, units = _outcomes(subject, subject.after)
    others = np.stack([_outcomes(subject, model)[0] for model in subject.retrained])
    scale, unit = (100.0, "points") if classifies(subject.task) else (1.0, subject.task.unit)
    lead = scale * (after - others.mean(0))
    value, place = worst(lead, units)
    half = _half_width(lead, units, subject.draws, subject.key.at("resample", "forget"))
    if half < 1e-9 and classifies(subject.task):  # no example differs at any strength: that is no certainty
        half = scale * float(intervals.wilson(0, len(units))[1])
    before = _outcomes(subject, subject.before)[0]
    curves = _curves(strengths, scale, units, {"unlearned": after, "original": before}, others)
    detail = {"strength": float(strengths[place]), "undisturbed": float(np.average(lead[0], weights=units))}
    x = "tokens before the prompt" if is_language(subject.task) else "noise, in spreads of the input"
    y = "forget accuracy, %" if scale == 100.0 else f"minus the forget loss, {unit}"
    return Reading(
        "input_perturbation",
        value,
        value - half,
        value + half,
        len(units),
        unit,
        detail=detail,
        curves=curves,
        axes=(x, y),
    )


def worst(lead: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
    """(largest weighted mean over examples, its row): over strengths.

    Args:
        lead: [strengths, n]. weights: [n], units per example.
    """
    means = np.average(lead, axis=1, weights=weights)
    return float(means.max()), int(means.argmax())


def noisy(batch: Batch, inputs: str, spreads: Any, strength: float, key: Key) -> Batch:
    """The batch with Gaussian noise on every floating tensor of its input column.

    Args:
        spreads: of the input column, in the same nest: what `strength` is a share of. key: draws the same noise at
            every strength.
    """
    return {**batch, inputs: _with_noise(batch[inputs], spreads, strength, key)}


def prefixed(batch: Batch, task: Any, pool: Tensor, length: int, key: Key) -> Batch:
    """Prompts with `length` tokens of the pool before them, from a place drawn for each example; labels stay.

    A label on the first token, which cannot be predicted without a prefix, does not count with one either.

    Args:
        pool: [N] token ids. length: tokens, >= 0.
    """
    aligned = task.aligned(batch)
    ids, mask, labels = aligned["input_ids"], aligned["attention_mask"], aligned["labels"].clone()
    labels[:, 0] = -100
    start = torch.randint(len(pool), (len(ids), 1), generator=key.generator())
    prefix = pool[(start + torch.arange(length)) % len(pool)].to(ids)
    columns = {
        "input_ids": torch.cat([prefix, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(prefix), mask], 1),
        "labels": torch.cat([torch.full_like(prefix, -100), labels], 1),
    }
    return {**batch, **columns}


def _strengths(subject: Subject) -> tuple[float, ...] | None:
    """The strengths that suit the task; None where none do."""
    if is_language(subject.task) and hasattr(subject.task, "aligned"):
        return PREFIX if subject.has("retain") else None
    inputs = getattr(subject.task, "inputs", None)
    if inputs is None or subject.task.stochastic:
        return None
    return NOISE if any(True for _ in _floating(_known(subject, "forget")[inputs])) else None


def _known(subject: Subject, name: str) -> Batch:
    data = subject.request.data(name)
    return data.batch(torch.arange(min(_KNOWN, len(data))))


def _floating(tree: Any) -> Iterator[Tensor]:
    """The floating tensors of a nest."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return (tensor for tensor in found if tensor.is_floating_point())


def _spread(tensor: Tensor) -> Tensor:
    """Of each feature of a table, of all pixels of an image together: many a pixel never changes."""
    if not tensor.is_floating_point():
        return torch.zeros(())
    values = tensor.double()
    return values.std(0, correction=0) if values.ndim == 2 else values.std(correction=0)


def _with_noise(value: Any, spreads: Any, strength: float, key: Key) -> Any:
    if isinstance(value, dict):
        return {name: _with_noise(part, spreads[name], strength, key.at(name)) for name, part in value.items()}
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    draw = torch.randn(value.shape, generator=key.generator(), dtype=torch.float64)
    return value + (strength * draw * spreads).to(value)


def _disturbances(subject: Subject) -> Callable[[Batch, float, Key], Batch]:
    """(batch, strength, key) -> the batch disturbed."""
    task: Any = subject.task
    if is_language(task):
        aligned = task.aligned(_known(subject, "retain"))
        pool = aligned["input_ids"][aligned["attention_mask"] != 0]
        return lambda batch, strength, key: prefixed(batch, task, pool, int(strength), key)
    known = _known(subject, "retain" if subject.has("retain") else "forget")
    spreads = map_tensors(_spread, known[task.inputs])
    return lambda batch, strength, key: noisy(batch, task.inputs, spreads, strength, key)


def _outcomes(subject: Subject, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """[strengths, n] what each forget example scores, and [n] its units; once per model and audit."""
    return subject.cache.get(model, "disturbed", lambda: _run(subject, subject.opened(model)))


def _run(subject: Subject, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    strengths, disturb = _strengths(subject) or (), _disturbances(subject)
    key, device = subject.key.at("perturbation"), runtime.device_of(model)
    rows, units = [], []
    with torch.no_grad(), only_looked_at(model), lent_stream(key):
        for number, batch in enumerate(subject.request.data("forget").batches(_DRAWN)):
            now, found = key.at("batch", number), []
            batch = subject.task.prepare(batch, now.at("prepare"))
            for strength in strengths:
                disturbed = disturb(batch, strength, now)
                pieces = torch.arange(rows_of(batch)).split(subject.batch)
                parts = (runtime.to_device(take(disturbed, piece), device) for piece in pieces)
                found.append(np.concatenate([_scored(subject.task, model, part) for part in parts]))
            rows.append(np.stack(found))
            units.append(subject.task.units(disturb(batch, 0, now)).double().cpu().numpy())
    return np.concatenate(rows, axis=1), np.concatenate(units)


def _scored(task: Any, model: nn.Module, batch: Batch) -> np.ndarray:
    """[b] whether the label is right, or minus the loss per unit."""
    try:
        if classifies(task):
            return (task.logits(model, batch).argmax(1) == task.labels(batch)).double().cpu().numpy()
        return -(task.nll(model, batch).double() / task.units(batch)).cpu().numpy()
    except (IndexError, RuntimeError) as error:
        raise Refused(
            f"the model cannot be called on disturbed inputs ({str(error).splitlines()[0][:120]}): a language model "
            f"must take {max(PREFIX)} tokens more than its longest example"
        ) from error


def _half_width(lead: np.ndarray, units: np.ndarray, draws: int, key: Key) -> float:
    """The 95 % quantile over resamples of the largest error over strengths: |max a - max b| <= max |a - b|."""
    means = np.average(lead, axis=1, weights=units)
    errors = [
        np.abs(intervals.resampled_ratio(row * units, units, draws, key) - mean)
        for row, mean in zip(lead, means, strict=True)
    ]
    return float(np.quantile(np.max(errors, axis=0), 0.95))


def _curves(
    strengths: tuple[float, ...], scale: float, units: np.ndarray, lines: dict[str, np.ndarray], others: np.ndarray
) -> dict[str, Curve]:
    """A line for each model, and the retrained mean between the least and the most of them."""

    def mean(table: np.ndarray) -> np.ndarray:
        return scale * np.average(table, axis=-1, weights=units)

    each = mean(others)
    x = tuple(float(strength) for strength in strengths)
    found: dict[str, Curve] = {name: (x, tuple(mean(table).tolist())) for name, table in lines.items()}
    found["retrained"] = retrained_band(x, each)
    return found
