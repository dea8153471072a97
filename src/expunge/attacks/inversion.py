"""Gradient inversion of an update: does the difference between two published models show the deleted records?

Whoever has the model from before and from after can take the difference for a gradient of the deleted records, and look
for inputs that have that gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.attacks.matching import Inversion, match
from expunge.attacks.recovery import copied
from expunge.audit import intervals
from expunge.audit.subject import Reading, Subject, classifies
from expunge.core import Batch, Data, Refused
from expunge.data.sources import collect
from expunge.registry import measure

ROWS = 64  # of the first dense layer, those with the largest change of their bias
_TINY = 1e-12


@measure(asked=True)
def inversion(subject: Subject) -> Reading | None:
    """How much more reconstructions from the update resemble deleted records than unseen ones of the same class: an AUC.

    See ``inversion_of``. None for a task without classes, inputs that are not one floating tensor, models of different
    structure, or no unseen example of any class that was forgotten from.
    """
    return inversion_of(subject) if _pairs(subject, Inversion()) is not None else None


def inversion_of(subject: Subject, settings: Inversion = Inversion()) -> Reading:
    """Reconstruct inputs from after - before, and compare them with what was deleted and with what was never seen.

    Two attacks, whose reconstructions are pooled. (1) The rows of the first dense layer on the raw input, where there is
    one with a bias (``first_dense_inputs``): exact for one record. (2) Inputs x and dropout masks m that minimise
    1 - s cos(gradient of the NLL at `before` in x, m; after - before) + total variation + (mean m - keep)^2, for both
    signs s (+1: the records were ascended on), the better one kept. Labels come from the change of the last layer
    (``deduced_labels``). Masks of ``nn.Dropout`` and its kin are continuous in (0, 1) and optimised together with the
    inputs; dropout that is called as a function cannot be reached.

    Similarity is the correlation over the input's entries, the best over reconstructions. The value is the AUC of
    deleted records against unseen ones of the same classes, with DeLong's interval; retrained models give the band: what
    another seed's difference shows. Detail: the paired difference of the similarities with its interval (over deleted
    records), PSNR of the best reconstruction in dB, each attack's own AUC, the final distance, the share of deduced
    labels that the forget set has.

    It does not promise that a longer or better informed attack would not do better, and many small updates hide a
    gradient more than one step does. Cost per model: 2 x iterations second derivatives of `records` rows.

    Raises:
        Refused: for a task or models that it does not apply to.

    Paper: Hu et al., unlearning inversion (arXiv:2404.03233), with the cosine of Geiping et al. (arXiv:2003.14053), labels
    as in Zhao et al. (arXiv:2001.02610), and masks reconstructed with the inputs as in the dropout inversion attack of
    Scheliga et al. (arXiv:2208.06163). The sigmoid of the masks and the square that holds their mean, Adam on the gradient
    itself, both signs, and the comparison with unseen records are derived here.
    """
    pairs = _pairs(subject, settings)
    if pairs is None:
        raise Refused(
            "inversion needs a classifier of one floating input, unseen test examples of the forgotten classes, and two "
            "models of one structure: this audit lacks one of them"
        )
    deleted, unseen, labels, classes = pairs
    found = subject.cache.get(subject.after, f"inversion {settings}", lambda: _attacked(subject, settings))
    ours, others = (similarity(found.every(), part) for part in (deleted, unseen))
    low, high = intervals.auc_interval(ours, others)
    margins = ours - np.array([others[classes == label].mean() for label in labels])
    span = float(unseen.max() - unseen.min())
    ends = intervals.percentile(intervals.resampled_mean(margins, subject.draws, subject.key.at("inversion", "pairs")))
    detail = {
        "similarity": float(ours.mean()),
        "similarity_unseen": float(others.mean()),
        "paired_difference": float(margins.mean()),
        "paired_difference_low": ends[0],
        "paired_difference_high": ends[1],
        "psnr_best": float(psnr(found.every(), deleted, span).max()),
        "psnr_best_unseen": float(psnr(found.every(), unseen, span).max()),
        "distance": found.distance,
        "sign": float(found.sign),
        "labels_right": float(found.right.mean()),
        "auc_matching": intervals.auc(similarity(found.matched, deleted), similarity(found.matched, unseen)),
    }
    if len(found.rows):
        detail["auc_first_layer"] = intervals.auc(similarity(found.rows, deleted), similarity(found.rows, unseen))
    return Reading("inversion", intervals.auc(ours, others), low, high, len(ours) + len(others), detail=detail)


def first_dense_inputs(weight: np.ndarray, bias: np.ndarray, least: float = 1e-4) -> np.ndarray:
    """[k, inputs] what the change of a dense layer says of its input: row i of the weight's change over the bias's.

    The gradient of unit i is d_i x for the weight and d_i for the bias, so that for one record every row is the input
    itself, whatever the loss, the sign and the step; for several each row is their mean weighted by d_i. Rows with a
    bias change below `least` of the largest are left out, since rounding decides them. Weight decay adds an error.

    Args:
        weight: [units, inputs] change. bias: [units] change.
    """
    change, scale = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    if change.ndim != 2 or scale.shape != change.shape[:1]:
        raise Refused(f"expected changes [units, inputs] and [units], found {change.shape} and {scale.shape}")
    size = np.abs(scale)
    good = (size > least * size.max(initial=0.0)) & (size > 0)
    order = np.flatnonzero(good)[np.argsort(-size[good], kind="stable")][:ROWS]
    return change[order] / scale[order, None]


def deduced_labels(change: np.ndarray, count: int, sign: int) -> np.ndarray:
    """[count] labels, from the change [C] of the last layer's bias (or the sums over its weight's rows).

    The gradient of the cross-entropy in the bias is p_c - [c = y]: negative for the true class alone. A change of
    sign x gradient therefore points at classes where -sign x change is positive, which share the count by size.
    """
    share = np.maximum(-sign * np.asarray(change, np.float64), 0.0)
    if share.sum() <= 0:
        share = np.ones_like(share)
    wanted = count * share / share.sum()
    whole = np.floor(wanted + 1e-9).astype(int)
    for place in np.argsort(-(wanted - whole), kind="stable")[: count - whole.sum()]:
        whole[place] += 1
    return np.repeat(np.arange(len(share)), whole)


def similarity(reconstructions: np.ndarray, records: np.ndarray) -> np.ndarray:
    """[n] the largest correlation of each record with any reconstruction; 0 where one of them is constant.

    Args:
        reconstructions: [r, d], r >= 1. records: [n, d].
    """
    return (_unit(records) @ _unit(reconstructions).T).max(1)


def _unit(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > _TINY)


def psnr(reconstructions: np.ndarray, records: np.ndarray, span: float) -> np.ndarray:
    """[n] peak signal-to-noise ratio in dB of the nearest reconstruction: 10 log10(span^2 / mean squared error).

    Args:
        reconstructions: [r, d]. records: [n, d]. span: of the inputs, largest less smallest.
    """
    nearest = np.stack([((records - one) ** 2).mean(1) for one in reconstructions]).min(0)
    return 10 * np.log10(max(span, _TINY) ** 2 / np.maximum(nearest, _TINY * max(span, _TINY) ** 2))


@dataclass(frozen=True)
class _Found:
    """Reconstructions [., d]: of the first layer's rows and of gradient matching, with what else was found out."""

    rows: np.ndarray
    matched: np.ndarray
    distance: float
    sign: int
    right: np.ndarray

    def every(self) -> np.ndarray:
        return np.concatenate([self.rows, self.matched])


def _fits(subject: Subject) -> bool:
    """A classifier that names its columns, one floating tensor goes in, and both models have the same parameters."""
    named = all(isinstance(getattr(subject.task, name, None), str) for name in ("inputs", "label"))
    if not (named and classifies(subject.task) and subject.has("test")):
        return False
    column = subject.data("forget").batch(torch.arange(1)).get(subject.task.inputs)  # type: ignore[attr-defined]
    shapes = [
        {name: p.shape for name, p in subject.opened(model).named_parameters()}
        for model in (subject.before, subject.after)
    ]
    return isinstance(column, Tensor) and column.is_floating_point() and shapes[0] == shapes[1]


def _pairs(subject: Subject, settings: Inversion) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Deleted records [n, d], unseen ones of the same classes [m, d], and the labels [n] and [m] of both.

    None where the attack does not apply.
    """
    if not _fits(subject):
        return None
    name = "test_forgotten" if subject.has("test_forgotten") else "test"
    pool, labels = subject.outputs(name).labels, subject.outputs("forget").labels
    if pool is None or labels is None:
        return None
    rng = np.random.Generator(np.random.PCG64(subject.key.at("inversion", "pairs").seed))
    chosen = np.sort(rng.permutation(len(labels))[: settings.compared])
    chosen = chosen[np.isin(labels[chosen], pool)]
    if not len(chosen):
        return None
    each, rows, owner = max(1, settings.compared // len(chosen)), [], []
    for label in np.unique(labels[chosen]):
        places = np.flatnonzero(labels[chosen] == label)
        there = rng.permutation(np.flatnonzero(pool == label))
        rows.append(there[: each * len(places)])  # each once: repeated ones would narrow the interval
        owner.append(np.full(len(rows[-1]), label))
    unseen = subject.data(name).select(np.concatenate(rows))
    deleted = subject.data("forget").select(chosen)
    return _inputs(subject, deleted), _inputs(subject, unseen), labels[chosen], np.concatenate(owner)


def _inputs(subject: Subject, data: Data) -> np.ndarray:
    values = collect(data)[subject.task.inputs]  # type: ignore[attr-defined]
    return values.flatten(1).double().numpy()


def _attacked(subject: Subject, settings: Inversion) -> _Found:
    """Both attacks on the difference between `after` and `before`."""
    victim, after = copied(subject.opened(subject.before)), dict(subject.opened(subject.after).named_parameters())
    change = {
        name: (after[name].detach().to(p.device).double() - p.detach().double()).to(p.dtype)
        for name, p in victim.named_parameters()
        if p.is_floating_point()
    }
    key = subject.key.at("inversion", "attack")
    count = min(settings.records, len(subject.data("forget")))
    template = _template(subject, count, runtime.device_of(victim))
    rows = _rows_of_first_layer(subject, victim, template, change)
    task: Any = subject.task
    there, tries = np.unique(subject.outputs("forget").labels), []  # type: ignore[arg-type]
    for sign in (1, -1):
        labels = deduced_labels(_head_change(victim, change, task.classes), count, sign)
        batch = {**template, task.label: torch.from_numpy(labels).to(runtime.device_of(victim))}
        guess, distance = match(victim, task, batch, change, sign, settings, key)
        tries.append(_Found(rows, guess.flatten(1).double().cpu().numpy(), distance, sign, np.isin(labels, there)))
    return min(tries, key=lambda one: one.distance)


def _template(subject: Subject, count: int, device: torch.device) -> Batch:
    """A batch of public examples, whose inputs and labels are replaced; further columns stay."""
    data = subject.data("test_forgotten" if subject.has("test_forgotten") else "test")
    batch = data.batch(torch.arange(count) % len(data))
    return subject.task.prepare(runtime.to_device(batch, device), subject.key.at("inversion", "template"))


def _head_change(model: nn.Module, change: Mapping[str, Tensor], classes: int) -> np.ndarray:
    """[C] change of the bias of the last dense layer with C outputs, or of its rows' sums; zeros where there is none."""
    found = np.zeros(classes)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == classes:
            prefix = f"{name}." if name else ""
            bias, weight = change.get(f"{prefix}bias"), change.get(f"{prefix}weight")
            part = bias if bias is not None else None if weight is None else weight.sum(1)
            found = found if part is None else part.double().cpu().numpy()
    return found


def _rows_of_first_layer(subject: Subject, model: nn.Module, batch: Batch, change: Mapping[str, Tensor]) -> np.ndarray:
    """[k, d] from the first dense layer that is fed the raw input, flattened or not; [0, d] where there is none."""
    raw = batch[subject.task.inputs].flatten(1)  # type: ignore[attr-defined]
    fed: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args and args[0].shape == raw.shape and torch.equal(args[0], raw):
                fed.append(name)

        return hook

    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in dense.items():
            stack.callback(module.register_forward_pre_hook(look(name)).remove)
        subject.task.nll(model, batch)
    names = [name for name in fed if dense[name].bias is not None]
    if not names:
        return np.zeros((0, raw.shape[1]))
    prefix = f"{names[0]}." if names[0] else ""
    weight, bias = (change[f"{prefix}{part}"].double().cpu().numpy() for part in ("weight", "bias"))
    return first_dense_inputs(weight, bias)
