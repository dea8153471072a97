"""Gradient matching: inputs, and dropout masks, whose gradient at a model points along a given change of its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from expunge.core import Batch, Case, Grads, Key, Request, eval_mode, require
from expunge.descend import Descend
from expunge.optim import Adam, Cosine
from expunge.oracle import Diverged, On, gradient_graph
from expunge.scope import Scope

_TINY = 1e-12
_KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Inversion:
    """What the attacker spends.

    Args:
        records: inputs reconstructed at once, 1 .. 8.
        iterations: steps of Adam for each of the two signs, >= 1. rate: its learning rate, > 0.
        smoothness: weight of the total variation of images, >= 0.
        dropout: whether the masks of dropout layers are reconstructed too.
        compared: deleted records, and unseen ones, that reconstructions are held beside, >= 1 each.
    """

    records: int = 8
    iterations: int = 100
    rate: float = 0.1
    smoothness: float = 1e-3
    dropout: bool = True
    compared: int = 64

    def __post_init__(self) -> None:
        require(1 <= self.records <= 8, self, "records", "in 1 .. 8")
        require(self.iterations >= 1 and self.compared >= 1, self, "iterations", "at least 1, as compared")
        require(self.rate > 0, self, "rate", "a positive number")
        require(self.smoothness >= 0, self, "smoothness", "at least 0")


def match(
    victim: nn.Module, task: Any, batch: Batch, change: Grads, sign: int, settings: Inversion, key: Key
) -> tuple[Tensor, float]:
    """Inputs [r, ...] whose mean gradient at `victim` points along sign x change, and the distance 1 - cosine reached.

    They start as noise with the batch's mean and spread. Where nothing changed, or the loss stops being finite, the
    inputs of that moment come back, with the distance 1.

    Args:
        victim: in eval mode, every parameter requiring a gradient; its weights stay. batch: r rows: the labels to take,
            and inputs of which only shape, mean and spread are used.
        change: name -> difference of the weights. sign: +1 or -1.
    """
    public = batch[task.inputs]
    noise = torch.randn(public.shape, generator=key.at("noise").generator()).to(public)
    layers = _dropouts(victim, task, batch) if settings.dropout else []
    guess = _Guess(public.mean() + public.std() * noise, layers, key)
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in change.values()))
    if norm == 0:
        return guess.inputs.detach(), 1.0
    target = {name: sign * part / norm for name, part in change.items()}
    objective = _Matching(victim, task, batch, target, settings.smoothness, tuple(module for module, _ in layers))
    case = Case(guess, Request(), task, Scope.all(guess), rng=key.at("descend"))
    plan = Descend(
        others={"match": On(None, objective)},
        optimizer=Adam(settings.rate),
        schedule=Cosine(),
        steps=settings.iterations,
    )
    with contextlib.suppress(Diverged):
        plan(case)
        return guess.inputs.detach(), float(objective.distance(guess).detach())
    return guess.inputs.detach(), 1.0


class _Guess(nn.Module):
    """What is looked for: inputs, and the logits of a mask per dropout layer, which start near its keeping rate."""

    def __init__(self, start: Tensor, layers: Sequence[tuple[_DropoutNd, torch.Size]], key: Key):
        super().__init__()
        self.inputs = nn.Parameter(start)
        self.masks = nn.ParameterList()
        for number, (layer, shape) in enumerate(layers):
            noise = torch.randn(shape, generator=key.at("mask", number).generator()).to(start)
            self.masks.append(nn.Parameter(0.5 * noise + math.log((1 - layer.p) / layer.p)))


def _dropouts(model: nn.Module, task: Any, batch: Batch) -> list[tuple[_DropoutNd, torch.Size]]:
    """The dropout layers that are used once in a pass, with the shape of their masks (of channels, for images')."""
    found: list[tuple[_DropoutNd, torch.Size]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _DropoutNd)
        shape, whole = args[0].shape, isinstance(module, nn.Dropout)
        found.append((module, shape if whole else torch.Size([*shape[:2], *[1] * (len(shape) - 2)])))

    able = [m for m in model.modules() if isinstance(m, _KINDS) and 0 < m.p < 1]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in able:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        task.nll(model, batch)
    return [(module, shape) for module, shape in found if sum(other is module for other, _ in found) == 1]


@contextlib.contextmanager
def masked(layers: Sequence[_DropoutNd], masks: Sequence[Tensor]) -> Iterator[None]:
    """Each dropout layer multiplies by its mask / keeping rate, in place of what it draws by itself."""
    with contextlib.ExitStack() as stack:
        for layer, mask in zip(layers, masks, strict=True):

            def replace(
                _module: nn.Module, args: tuple[Tensor, ...], _output: Tensor, m: Tensor = mask, p: float = layer.p
            ) -> Tensor:
                return args[0] * m / (1 - p)

            stack.callback(layer.register_forward_hook(replace).remove)
        yield


@dataclass(frozen=True, eq=False)
class _Matching:
    """1 - cos(gradient, target) + smoothness x total variation + (mean mask - keeping rate)^2. Reads the guess alone."""

    victim: nn.Module = field(repr=False)
    task: Any
    batch: Batch = field(repr=False)
    target: Grads = field(repr=False)
    smoothness: float
    layers: tuple[_DropoutNd, ...] = ()
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        guess: Any = case.model
        loss = self.distance(guess) + self.smoothness * total_variation(guess.inputs)
        for layer, mask in zip(self.layers, guess.masks, strict=True):
            loss = loss + (torch.sigmoid(mask).mean() - (1 - layer.p)).square()
        return loss.reshape(1)

    def distance(self, guess: Any) -> Tensor:
        """1 - cosine, in 0 .. 2."""
        parameters = {name: p for name, p in self.victim.named_parameters() if name in self.target}
        batch = {**self.batch, self.task.inputs: guess.inputs}
        with eval_mode(self.victim), masked(self.layers, [torch.sigmoid(mask) for mask in guess.masks]):
            grads = gradient_graph(lambda: self.task.nll(self.victim, batch).mean(), parameters)
        zero = guess.inputs.new_zeros(())
        inner = sum(((grad * self.target[name]).sum() for name, grad in grads.items()), start=zero)
        square = sum((grad.square().sum() for grad in grads.values()), start=zero)
        return 1 - inner / (square + _TINY).sqrt()


def total_variation(inputs: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of images [b, c, h, w], down and across; 0 for other inputs."""
    if inputs.ndim != 4 or min(inputs.shape[2:]) < 2:
        return inputs.new_zeros(())
    return inputs.diff(dim=2).abs().mean() + inputs.diff(dim=3).abs().mean()
