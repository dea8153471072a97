"""Weight quantisation: does rounding the weights bring back what was forgotten?

Unlearning moves weights a little, and a coarse grid may round them back to where they were.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from expunge.attacks.recovery import copied
from expunge.audit import intervals
from expunge.audit.subject import Model, Outputs, Reading, Subject, run
from expunge.core import Refused
from expunge.registry import measure

BITS = (4, 8)


@measure(asked=True)
def quantised_forget_accuracy_int8(subject: Subject) -> Reading | None:
    """Forget accuracy after rounding the weights to 8 bits; Wilson interval. See ``quantised_reading``."""
    return quantised_reading(subject, 8, labelled=True)


@measure(asked=True)
def quantised_forget_accuracy_int4(subject: Subject) -> Reading | None:
    """Forget accuracy after rounding the weights to 4 bits; Wilson interval. See ``quantised_reading``."""
    return quantised_reading(subject, 4, labelled=True)


@measure(asked=True)
def quantised_forget_loss_int8(subject: Subject) -> Reading | None:
    """Loss per unit on forget examples after rounding the weights to 8 bits, for tasks without labels."""
    return quantised_reading(subject, 8, labelled=False)


@measure(asked=True)
def quantised_forget_loss_int4(subject: Subject) -> Reading | None:
    """Loss per unit on forget examples after rounding the weights to 4 bits, for tasks without labels."""
    return quantised_reading(subject, 4, labelled=False)


def quantised_reading(subject: Subject, bits: int, *, labelled: bool) -> Reading | None:
    """The forget accuracy (or loss) of a copy with rounded weights, beside the same before rounding.

    Every weight of two or more dimensions is rounded by ``quantise``; biases, norms and activations keep their
    precision. Detail: before rounding, the change, the mean change of the retrained models, and the same on test data.
    It does not cover quantisers that calibrate on data. Cost per model: one pass over forget and test.

    Returns:
        None where the task has labels and `labelled` is False, or the other way round.
    """
    before = subject.outputs("forget")
    if (before.correct is not None) != labelled:
        return None
    after = _outputs(subject, subject.after, bits, "forget")
    detail = {"before": _mean(before), "change": _mean(after) - _mean(before)}
    if subject.retrained:
        changes = [
            _mean(_outputs(subject, model, bits, "forget")) - _mean(subject.outputs("forget", model))
            for model in subject.retrained
        ]
        detail["change_retrained"] = float(np.mean(changes))
    if subject.has("test"):
        detail["test"] = _mean(_outputs(subject, subject.after, bits, "test"))
    name = f"quantised_forget_{'accuracy' if labelled else 'loss'}_int{bits}"
    return interval_reading(subject, name, after, detail)


def interval_reading(subject: Subject, name: str, outputs: Outputs, detail: Mapping[str, float]) -> Reading:
    """Accuracy with a Wilson interval, or the loss per unit with a bootstrap interval over examples."""
    if outputs.correct is not None:
        low, high = intervals.wilson(outputs.correct.sum(), len(outputs))
        return Reading(
            name, _mean(outputs), 100 * float(low), 100 * float(high), len(outputs), "%", detail=dict(detail)
        )
    samples = intervals.resampled_ratio(
        outputs.loss * outputs.units, outputs.units, subject.draws, subject.key.at("resample", "forget")
    )
    unit = subject.task.unit
    return Reading(name, _mean(outputs), *intervals.percentile(samples), len(outputs), unit, detail=dict(detail))


def _mean(outputs: Outputs) -> float:
    if outputs.correct is not None:
        return 100 * float(outputs.correct.mean())
    return float(np.average(outputs.loss, weights=outputs.units))


def _outputs(subject: Subject, model: Model, bits: int, name: str) -> Outputs:
    """What the rounded model says; kept per model."""

    def compute() -> dict[str, Outputs]:
        rounded = quantised(subject.opened(model), bits)
        names = [data for data in ("forget", "test") if subject.has(data)]
        return {
            data: Outputs.of(
                run(rounded, subject.task, subject.data(data), subject.batch, subject.key.at("audit", data))
            )
            for data in names
        }

    return subject.cache.get(model, f"quantised to {bits} bits", compute)[name]


def quantise(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """Symmetric rounding to the nearest of 2^bits - 1 levels, one scale per output channel; same shape and dtype.

    scale_c = max |w_c| / (2^(bits - 1) - 1), w -> scale_c round(w / scale_c), halves to the even level. The levels are
    -(2^(bits - 1) - 1) .. 2^(bits - 1) - 1: zero is one of them and the largest weight of a channel keeps its value. A
    channel of zeros stays. Computed in float64.

    Args:
        weight: floating, at least one dimension. bits: 2 .. 16. channel: the dimension of the output channels.

    Raises:
        Refused: for bits out of range, or weights that are not finite floating numbers.
    """
    if not (isinstance(bits, int) and 2 <= bits <= 16):
        raise Refused(f"quantise: bits must be a whole number of 2 to 16, found {bits!r}")
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise Refused(f"quantise: expected finite floating weights, found {weight.dtype} with others among them")
    top = 2 ** (bits - 1) - 1
    wide = weight.detach().double()
    others = [dimension for dimension in range(weight.ndim) if dimension != channel % weight.ndim]
    scale = (wide.abs().amax(others, keepdim=True) if others else wide.abs()) / top
    levels = torch.round(wide / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp_(-top, top)
    return (levels * scale).to(weight.dtype)


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """A copy in eval mode whose weights of two or more dimensions are rounded; tied weights once."""
    copy = copied(model)
    channels = output_channels(copy)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.copy_(quantise(parameter, bits, channels.get(name, 0)))
    return copy


def output_channels(model: nn.Module) -> dict[str, int]:
    """name -> the dimension of the output channels, for the weights where it is not the first."""
    return {
        f"{name}.weight" if name else "weight": 1
        for name, module in model.named_modules()
        if type(module).__name__ in ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
    }
