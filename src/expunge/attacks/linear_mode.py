"""Linear mode connectivity: is there a barrier between a model and the original, or do both lie in one basin?

Unlearning that stays near the original can be undone by a step back along a straight line. A retrained model, from
other weights, usually lies behind a barrier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from expunge import runtime
from expunge.attacks.recovery import copied, drawn, retrained_band
from expunge.audit import intervals
from expunge.audit.subject import Curve, Model, Outputs, Reading, Subject, run
from expunge.core import Data, Refused
from expunge.registry import measure

POINTS, PROBE = 11, 1000


@measure(asked=True)
def linear_mode(subject: Subject) -> Reading | None:
    """Height of the loss barrier between the model and the original on retain data. See ``linear_mode_of``.

    None for a model of another structure than the original's: there is no straight line.
    """
    shapes = [_shapes(subject.opened(model)) for model in (subject.after, subject.before)]
    return linear_mode_of(subject) if shapes[0] == shapes[1] else None


def linear_mode_of(subject: Subject, points: int = POINTS, probe: int = PROBE) -> Reading:
    """The loss on the straight line (1 - a) model + a original, a = 0 .. 1, less the line between its ends.

    barrier = max over a of L(a) - (1 - a) L(0) - a L(1), at least 0, on up to `probe` retain examples (forget examples
    where there are none to retain). Curves: the model, and the mean, lowest and highest of the retrained models. Detail:
    where the barrier is, the same barrier in accuracy and on the forget data, and whether statistics were recomputed.

    Running statistics of BatchNorm mean nothing between two models: they are recomputed at every point, the ends
    included, on the retain probe; without retain data they are interpolated as the weights are. Other floating buffers
    are interpolated, whole-number ones are the model's.

    Permuted units are not aligned: a barrier does not show that nothing of the original is left. The interval resamples
    examples at the point of the barrier, which is held fixed. Cost per model: `points` passes over both probes (twice
    over the retain probe with BatchNorm); kept per model.

    Raises:
        Refused: for fewer than three points, or models of different structure.

    Paper: Frankle et al., linear mode connectivity (arXiv:1912.05671); recomputed statistics as in Jordan et al., REPAIR
    (arXiv:2211.08403). The definition of the barrier against the line between the ends is Entezari et al.'s
    (arXiv:2110.06296).
    """
    if points < 3:
        raise Refused(f"linear_mode: points must be at least 3, found {points}")
    kind = "retain" if subject.has("retain") else "forget"
    found = _line(subject, subject.after, points, probe)
    steps = np.linspace(0, 1, points)
    loss = found[kind][0]
    height, place = barrier(loss.mean(1))
    samples = intervals.resampled_mean(_excess(loss)[place], subject.draws, subject.key.at("linear_mode"))
    low, high = intervals.percentile(samples)
    detail = {"at": float(steps[place]), "statistics_recomputed": float(found["recomputed"][0][0, 0])}
    for name in ("retain", "forget"):
        if name in found and len(found[name]) == 2:
            detail[f"{name}_accuracy_barrier"] = 100 * barrier(-found[name][1].mean(1))[0]
    detail["forget_barrier"] = barrier(found["forget"][0].mean(1))[0]
    x = tuple(steps.tolist())
    curves: dict[str, Curve] = {"unlearned": (x, tuple(loss.mean(1).tolist()))}
    theirs = [_line(subject, model, points, probe)[kind][0].mean(1) for model in subject.retrained]
    if theirs:
        each = np.stack(theirs)
        curves["retrained"] = retrained_band(x, each)
        detail["barrier_retrained"] = float(np.mean([barrier(line)[0] for line in each]))
    return Reading(
        "linear_mode",
        height,
        max(0.0, min(low, height)),
        max(high, height),
        loss.shape[1],
        subject.task.unit,
        detail=detail,
        curves=curves,
        axes=("share of the original", f"loss on {kind} examples, {subject.task.unit}"),
    )


def barrier(losses: np.ndarray) -> tuple[float, int]:
    """(height, point): the most that losses [points] on a straight line lie above the line between the two ends."""
    above = _excess(np.asarray(losses, np.float64)[:, None])[:, 0]
    place = int(above.argmax())
    return max(0.0, float(above[place])), place


def _excess(losses: np.ndarray) -> np.ndarray:
    """[points, n] less the straight line between the first and the last row."""
    share = np.linspace(0, 1, len(losses))[:, None]
    above = (losses - losses[0]) - share * (losses[-1] - losses[0])
    above[[0, -1]] = 0.0
    return above


def _line(subject: Subject, model: Model, points: int, probe: int) -> dict[str, tuple[np.ndarray, ...]]:
    """data name -> (loss [points, n], correct [points, n] where there are labels); kept per model."""

    def compute() -> dict[str, tuple[np.ndarray, ...]]:
        ends = subject.opened(model), subject.opened(subject.before)
        key = subject.key.at("linear_mode")
        data = {
            name: drawn(subject.data(name), probe, key.at(name)) for name in ("retain", "forget") if subject.has(name)
        }
        rows: dict[str, list[Outputs]] = {name: [] for name in data}
        for share in np.linspace(0, 1, points):
            middle = between(*ends, float(share))
            if "retain" in data:
                recompute_statistics(subject, middle, data["retain"])
            for name, part in data.items():
                rows[name].append(Outputs.of(run(middle, subject.task, part, subject.batch, key.at("look", name))))
        normed = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in ends[0].modules())
        recomputed = np.full((1, 1), float(normed and "retain" in data))
        return {"recomputed": (recomputed,), **{name: _tables(found) for name, found in rows.items()}}

    return subject.cache.get(model, f"linear_mode {points} {probe}", compute)


def _tables(found: list[Outputs]) -> tuple[np.ndarray, ...]:
    losses = np.stack([outputs.loss for outputs in found])
    if found[0].correct is None:
        return (losses,)
    return losses, np.stack([outputs.correct for outputs in found if outputs.correct is not None]).astype(np.float64)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in (*model.named_parameters(), *model.named_buffers())}


def between(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """A copy of `first` in eval mode with (1 - share) first + share second in every floating parameter and buffer.

    The ends are exact: share 0 is `first` and share 1 has the values of `second`, to the bit.

    Raises:
        Refused: for modules of different structure.
    """
    if _shapes(first) != _shapes(second):
        raise Refused("there is no straight line between two models of different structure: expected the same shapes")
    middle = copied(first)
    others = {**dict(second.named_parameters()), **dict(second.named_buffers())}
    with torch.no_grad():
        for name, value in (*middle.named_parameters(), *middle.named_buffers()):
            if value.is_floating_point():
                other = others[name].to(value)
                value.copy_(other if share == 1 else value.lerp(other, share))  # exact where both are equal
    return middle


def recompute_statistics(subject: Subject, model: nn.Module, data: Data) -> None:
    """Set the running statistics of every BatchNorm, in place, to the means over batches of `data`.

    Only these modules are in train mode meanwhile, so that dropout stays off. Does nothing where there is none.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    key = subject.key.at("linear_mode", "statistics")
    count = -(
        -len(data) // subject.batch
    )  # of nearly equal size, or a last small one would weigh as much as the others
    with torch.no_grad(), _recounting(norms):
        for number, rows in enumerate(torch.arange(len(data)).tensor_split(count)):
            batch = runtime.to_device(data.batch(rows), runtime.device_of(model))
            subject.task.nll(model, subject.task.prepare(batch, key.at(number)))


@contextlib.contextmanager
def _recounting(norms: list[_BatchNorm]) -> Iterator[None]:
    """The modules in train mode, averaging over all batches alike; their own momentum afterwards."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
