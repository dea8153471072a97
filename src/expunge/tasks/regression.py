"""Regression: real targets, judged by squared error, from any model that gives one number per target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expunge.core import Batch, Data, Key, Refused
from expunge.registry import task
from expunge.tasks.classification import call_model, check_finite

CACHED = ("reference", "reference_tokens", "teacher", "teacher_tokens", "refusal_references")
"""Columns that belong to the true answer: a wrong answer must not carry them."""


@task
@dataclass(frozen=True)
class Regression:
    """Squared error as a Gaussian negative log-likelihood; unit: one target of the k of an example.

    nll = sum_j (f_j - y_j)^2 / (2 scale^2): that of a Gaussian of standard deviation `scale`, without its constant, so
    0 is a perfect prediction and scale = 1 is half the squared error.

    Args:
        scale: standard deviation of the noise, in units of the target, > 0. The spread of the targets is a good one.
        inputs: column with the model's input (a Tensor, or a mapping that is passed as keyword arguments).
        target: column with the targets, [b] or [b, k].
        variance: of the targets, in squared units of the target, for ``chance``; that of each batch by default.
        apart: how far a wrong target lies from the true one at least: root mean square over k, in `scale`, > 0.
        call: ``(model, batch) -> predictions [b], [b, 1] or [b, k]`` for a model of another shape.

    Raises:
        Refused: for a scale, a variance or a distance that is not positive.
    """

    scale: float = 1.0
    inputs: str = "x"
    target: str = "y"
    variance: float | None = None
    apart: float = 0.5
    call: Callable[[nn.Module, Batch], Tensor] | None = None
    name: str = field(default="regression", init=False)
    unit: str = field(default="nats per target", init=False)
    stochastic: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name in ("scale", "variance", "apart"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise Refused(f"Regression: {name} must be a positive number, found {value}")

    def check(self, data: Data, name: str) -> None:
        """Refuse targets that are missing, not finite or of another shape, and inputs that are not finite."""
        for batch in data.batches(1024):
            for column in (self.inputs, self.target):
                if column not in batch:
                    raise Refused(
                        f"{name} data has no column {column!r}: it has {', '.join(batch)}; name the columns in "
                        f"Regression(inputs=..., target=...)"
                    )
            check_finite(batch[self.inputs], batch["id"], name)
            value = batch[self.target]
            if value.ndim not in (1, 2) or value.is_complex() or value.dtype == torch.bool or value.numel() == 0:
                raise Refused(
                    f"{name} targets are {value.dtype} of shape {tuple(value.shape)}: expected real numbers, one per "
                    f"example or [examples, k]"
                )
            bad = ~torch.isfinite(value.double().reshape(len(value), -1)).all(1)
            if bool(bad.any()):
                raise Refused(
                    f"{name} data has NaN or infinite targets, first at id {int(batch['id'][bad][0])} "
                    f"({int(bad.sum())} examples): clean or drop them"
                )

    def prepare(self, batch: Batch, rng: Key) -> Batch:
        """Nothing is random."""
        return batch

    def targets(self, batch: Batch) -> Tensor:
        """[b, k]."""
        value = batch[self.target]
        return value.reshape(len(value), -1)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, k] predictions. A prediction of another shape is refused, never broadcast against the targets."""
        found, wanted = call_model(model, batch, self.inputs, self.call), self.targets(batch)
        if found.shape != wanted.shape and found.shape != batch[self.target].shape:
            raise Refused(
                f"the model returned predictions of shape {tuple(found.shape)}: expected {tuple(wanted.shape)}"
            )
        return found.reshape(wanted.shape)

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b] squared error over 2 scale^2, summed over the targets."""
        return self._error(self.outputs(model, batch), self.targets(batch))

    def units(self, batch: Batch) -> Tensor:
        """[b] k each."""
        targets = self.targets(batch)
        return torch.full((len(targets),), float(targets.shape[1]), device=targets.device)

    def chance(self, batch: Batch) -> float:
        """Loss per target of always predicting the mean: variance / (2 scale^2).

        Without `variance` it is that of the batch's targets about their mean: for one example 0, which is no scale.
        """
        if self.variance is not None:
            return self.variance / (2 * self.scale**2)
        return float(self.targets(batch).double().var(0, correction=0).mean()) / (2 * self.scale**2)

    def divergence(self, model: nn.Module, batch: Batch, target: Tensor, temperature: float = 1.0) -> Tensor:
        """[b] KL between the Gaussians of teacher and model, nats.

        The temperature widens both Gaussians and the customary factor T^2 undoes it: the value does not depend on it.
        """
        return self._error(self.outputs(model, batch), target)

    def _error(self, found: Tensor, wanted: Tensor) -> Tensor:
        return ((found - wanted.to(found.dtype)) / self.scale).square().sum(1) / 2

    def relabel(self, batch: Batch, rng: Key) -> Batch:
        """The target of another example of the batch, drawn among those at least `apart` from the true one.

        Where no other example is that far, the true target shifted by `apart`, each of the k by a drawn sign.
        """
        true = self.targets(batch).double().cpu()
        generator = rng.generator()
        least = self.apart * self.scale
        far = torch.cdist(true, true, compute_mode="donot_use_mm_for_euclid_dist") / true.shape[1] ** 0.5 >= least
        found = far.any(1, keepdim=True)
        other = torch.multinomial(torch.where(found, far, True).double(), 1, generator=generator).squeeze(1)
        sign = torch.randint(0, 2, true.shape, generator=generator, dtype=torch.float64) * 2 - 1
        wrong = torch.where(found, true[other], true + sign * least)
        value = batch[self.target]
        dtype = value.dtype if value.is_floating_point() else torch.float32
        kept = {name: column for name, column in batch.items() if name not in CACHED}
        return {**kept, self.target: wrong.reshape(value.shape).to(value.device, dtype)}
