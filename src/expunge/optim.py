"""Printable settings of optimizers and schedules. ``build`` makes the torch optimizer; nothing here holds state."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from expunge.core import Refused


def _groups(parameters: Mapping[str, nn.Parameter], lr: float, patterns: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups by name pattern -> learning rate; the first pattern that matches wins."""
    rates = {
        name: next((rate for pattern, rate in patterns.items() if fnmatch.fnmatchcase(name, pattern)), lr)
        for name in parameters
    }
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
            raise Refused(f"optimizer group {pattern!r} matches no parameter in scope")
    return [
        {"params": [parameters[n] for n in parameters if rates[n] == rate], "lr": rate}
        for rate in dict.fromkeys(rates.values())
    ]


def _check_eps(eps: float, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an eps that is 0 in the weights' own precision: Adam would divide by zero at its first step."""
    for name, p in parameters.items():
        if not float(torch.tensor(eps, dtype=p.dtype)) > 0:
            raise Refused(
                f"Adam cannot train {name!r} in {p.dtype}, where its eps of {eps:g} is 0: give the model in float32 or "
                f"bfloat16, or use SGD"
            )


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent. `groups` maps a name pattern to its own learning rate."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    groups: Mapping[str, float] = field(default_factory=dict)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""
        return torch.optim.SGD(
            _groups(parameters, self.lr, self.groups),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class Adam:
    """Adam; weight decay is added to the gradient (coupled)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""
        _check_eps(self.eps, parameters)
        return torch.optim.Adam(
            _groups(parameters, self.lr, self.groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""
        _check_eps(self.eps, parameters)
        return torch.optim.AdamW(
            _groups(parameters, self.lr, self.groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


Optimizer = SGD | Adam | AdamW


@dataclass(frozen=True)
class Constant:
    """The learning rate as given."""

    def factor(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress` (0 .. 1)."""
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Linear warm-up over the share `warmup` of the run, then linear decay to `end`."""

    warmup: float = 0.0
    end: float = 0.0

    def factor(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress` (0 .. 1)."""
        if progress < self.warmup:
            return progress / self.warmup
        return 1.0 + (self.end - 1.0) * (progress - self.warmup) / max(1e-12, 1.0 - self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up over the share `warmup` of the run, then half a cosine down to `end`."""

    warmup: float = 0.0
    end: float = 0.0

    def factor(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress` (0 .. 1)."""
        if progress < self.warmup:
            return progress / self.warmup
        along = (progress - self.warmup) / max(1e-12, 1.0 - self.warmup)
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * along))


@dataclass(frozen=True)
class Milestones:
    """The learning rate times `gamma` at each of the `at` shares of the run (each 0 .. 1)."""

    at: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def factor(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress` (0 .. 1)."""
        return self.gamma ** sum(progress >= share for share in self.at)


Schedule = Constant | Linear | Cosine | Milestones
