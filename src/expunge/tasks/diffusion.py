"""Diffusion: class-conditional denoisers that predict the noise, and a small sampler to judge them by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core import Batch, Case, Data, Key, Refused, eval_mode
from expunge.registry import task
from expunge.tasks.classification import check_finite
from expunge.tasks.regression import CACHED


@dataclass(frozen=True)
class LinearBetas:
    """Variances that rise linearly (Ho et al. 2020): beta_0 = `start`, beta_{T-1} = `end`, both in (0, 1)."""

    start: float = 1e-4
    end: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.start <= self.end < 1:
            raise Refused(f"LinearBetas: expected 0 < start <= end < 1, found start={self.start}, end={self.end}")

    def signal(self, steps: int) -> Tensor:
        """[T] float64: abar_t, the share of the image's variance that is left at step t."""
        return (1 - torch.linspace(self.start, self.end, steps, dtype=torch.float64)).cumprod(0)


@dataclass(frozen=True)
class Cosine:
    """abar_t = cos^2 of an angle that rises linearly (Nichol and Dhariwal 2021), with beta_t at most 0.999."""

    offset: float = 0.008

    def signal(self, steps: int) -> Tensor:
        """[T] float64: abar_t, the share of the image's variance that is left at step t."""
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + self.offset) / (1 + self.offset)
        level = torch.cos(angle * math.pi / 2).square()
        return (level[1:] / level[:-1]).clamp_min(1e-3).cumprod(0)


@task
@dataclass(frozen=True)
class Diffusion:
    """Squared error of the predicted noise; unit: one pixel (one number of the image or latent).

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; nll = ||eps - model(x_t, t, c)||^2, the SUM over pixels. It is the
    usual surrogate of the likelihood, not nats. Authors' code often weighs a pixel sum against a pixel mean: objectives
    here are all per unit, hence per pixel. The timestep and noise are drawn in ``prepare``, so every reader of a step
    sees the same, and nothing per example can be cached.

    Args:
        classes: number of class conditions C, >= 2. Condition C is the empty one, where the model was trained with it.
        shape: of one image, such as (1, 8, 8).
        steps: T, >= 2; timesteps are 0 .. T-1.
        schedule: how much signal is left at each timestep.
        inputs: column with clean images or latents [b, *shape], scaled as in training.
        label: column with int64 conditions, 0 .. C-1.
        call: ``(model, x_t, t, c) -> noise`` for a model of another shape, such as one of diffusers:
            ``lambda model, x, t, c: model(x, t, class_labels=c).sample``.

    Raises:
        Refused: for settings out of range.
    """

    classes: int
    shape: tuple[int, ...]
    steps: int = 1000
    schedule: LinearBetas | Cosine = LinearBetas()
    inputs: str = "x"
    label: str = "y"
    call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None
    name: str = field(default="diffusion", init=False)
    unit: str = field(default="squared error per pixel", init=False)
    stochastic: bool = field(default=True, init=False)
    relabel_rows: ClassVar[int] = 1  # a wrong answer is what the model says of another condition

    def __post_init__(self) -> None:
        for name, value in (("classes", self.classes), ("steps", self.steps)):
            if value < 2:
                raise Refused(f"Diffusion: {name} must be at least 2, found {value}")

    def check(self, data: Data, name: str) -> None:
        """Refuse images of another shape or with NaN, and conditions outside the classes."""
        for batch in data.batches(1024):
            for column in (self.inputs, self.label):
                if column not in batch:
                    raise Refused(
                        f"{name} data has no column {column!r}: it has {', '.join(batch)}; name the columns in "
                        f"Diffusion(inputs=..., label=...)"
                    )
            images, labels = batch[self.inputs], batch[self.label]
            if tuple(images.shape[1:]) != tuple(self.shape) or not images.is_floating_point():
                raise Refused(
                    f"{name} images are {images.dtype} of shape {tuple(images.shape[1:])}: expected floating numbers "
                    f"of shape {tuple(self.shape)}, scaled as in training"
                )
            check_finite(images, batch["id"], name)
            outside = torch.nonzero((labels < 0) | (labels >= self.classes)).flatten()
            if labels.ndim != 1 or labels.is_floating_point() or len(outside):
                which = f", first at id {int(batch['id'][outside[0]])}" if labels.ndim == 1 and len(outside) else ""
                raise Refused(
                    f"{name} conditions are {labels.dtype} of shape {tuple(labels.shape)}{which}: expected one whole "
                    f"number of 0 to {self.classes - 1} per example"
                )

    def prepare(self, batch: Batch, rng: Key) -> Batch:
        """Columns ``t`` [b], uniform on 0 .. T-1, and ``noise`` [b, *shape], standard normal; alike on any device."""
        images, generator = batch[self.inputs], rng.generator()
        time = torch.randint(self.steps, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        return {**batch, "t": time.to(images.device), "noise": noise.to(images.device, images.dtype)}

    def noised(self, batch: Batch) -> Tensor:
        """[b, *shape], x_t of a prepared batch."""
        if "noise" not in batch or "t" not in batch:
            raise Refused("a batch of task diffusion has no timestep and noise yet: pass it through task.prepare first")
        images = batch[self.inputs]
        signal = self.schedule.signal(self.steps).to(images.device)[batch["t"]].reshape(-1, *[1] * (images.ndim - 1))
        return signal.sqrt().to(images.dtype) * images + (1 - signal).sqrt().to(images.dtype) * batch["noise"]

    def predict(self, model: nn.Module, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """[b, *shape], the noise that the model sees in `images` at timesteps `time` under conditions `labels`."""
        found = model(images, time, labels) if self.call is None else self.call(model, images, time, labels)
        if not isinstance(found, Tensor) or found.shape != images.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Refused(
                f"the model returned {what} for noised images of shape {tuple(images.shape)}: expected noise of that "
                f"shape; say how to read it with Diffusion(call=lambda model, x, t, c: ...)"
            )
        return found

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, *shape], the predicted noise."""
        return self.predict(model, self.noised(batch), batch["t"], batch[self.label].long())

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b], squared error summed over pixels, from the noise, or from the column ``wanted`` of ``wrong_target``."""
        return _squared(self.outputs(model, batch), batch["wanted" if "wanted" in batch else "noise"])

    def units(self, batch: Batch) -> Tensor:
        """[b], pixels of an image."""
        images = batch[self.inputs]
        return torch.full((len(images),), float(images[0].numel()), device=images.device)

    def chance(self, batch: Batch) -> float:
        """1: always predicting no noise."""
        return 1.0

    def divergence(self, model: nn.Module, batch: Batch, target: Tensor, temperature: float = 1.0) -> Tensor:
        """[b], squared error from the teacher's predicted noise, summed over pixels.

        A Gaussian's temperature and the customary factor T^2 cancel: the value does not depend on it.
        """
        return _squared(self.outputs(model, batch), target)

    def relabel(self, batch: Batch, rng: Key) -> Batch:
        """The same noised images under another class condition, uniform over the others.

        Descending on the nll of this batch would teach the other class to draw the forgotten images, which forgets
        nothing: ``wrong_target`` is what RandomLabel uses.
        """
        labels = batch[self.label].long()
        step = torch.randint(1, self.classes, labels.shape, generator=rng.generator()).to(labels.device)
        kept = {name: column for name, column in batch.items() if name not in (*CACHED, "wanted")}
        return {**kept, self.label: (labels + step) % self.classes}

    def wrong_target(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the column ``wanted``: what the model itself predicts under another condition.

        The nll is then SalUn's ||eps(x_t, t, c) - sg[eps(x_t, t, c')]||^2 (arXiv:2310.12508), per example; the
        column of conditions stays true. The answer to (x_t, t, c) is a noise, which only the model knows: hence a
        capability beside ``relabel``. c' is drawn, where the authors' code takes the next class. It costs one forward
        pass of the batch, and is redrawn with it.
        """
        with torch.no_grad(), eval_mode(case.model):
            wanted = self.outputs(case.model, self.relabel(batch, rng))
        return {**{name: column for name, column in batch.items() if name not in CACHED}, "wanted": wanted.detach()}

    @torch.no_grad()
    def sample(self, model: nn.Module, labels: Tensor, key: Key, steps: int = 50, guidance: float = 1.0) -> Tensor:
        """[n, *shape] images of conditions `labels` [n] by DDIM without noise (Song et al. 2021), in eval mode.

        Args:
            model: the denoiser.
            labels: int64 [n], 0 .. C-1.
            key: of the starting noise: the same key and count give the same images.
            steps: timesteps visited, evenly spaced, 1 .. T.
            guidance: w of eps = eps(empty) + w (eps(c) - eps(empty)); 1 is the condition alone, one call.
        """
        if not 1 <= steps <= self.steps:
            raise Refused(f"sample: steps must lie in [1, {self.steps}], found {steps}")
        parameter = next(model.parameters())
        labels = labels.to(parameter.device).long()
        images = torch.randn(len(labels), *self.shape, generator=key.generator()).to(parameter.device, parameter.dtype)
        visited = torch.linspace(self.steps - 1, 0, steps).round().long().tolist()
        levels = [*self.schedule.signal(self.steps)[visited].tolist(), 1.0]
        with eval_mode(model):
            for time, level, after in zip(visited, levels[:-1], levels[1:], strict=True):
                noise = self._guided(model, images, torch.full_like(labels, time), labels, guidance)
                clean = (images - math.sqrt(1 - level) * noise) / math.sqrt(level)
                images = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
        return images

    def _guided(self, model: nn.Module, images: Tensor, time: Tensor, labels: Tensor, guidance: float) -> Tensor:
        under = self.predict(model, images, time, labels)
        if guidance == 1.0:
            return under
        empty = self.predict(model, images, time, torch.full_like(labels, self.classes))
        return empty + guidance * (under - empty)


def _squared(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().flatten(1).sum(1)
