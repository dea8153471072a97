"""Printable settings of optimizers and schedules. ``build`` makes the torch optimizer; nothing here holds state."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from expunge.core import Refused, require


def groups_of(parameters: Mapping[str, nn.Parameter], lr: float, patterns: Mapping[str, float]) -> list[dict[str, Any]]:
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


def check_eps(eps: float, parameters: Mapping[str, nn.Parameter]) -> None:
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
            groups_of(parameters, self.lr, self.groups),
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
        check_eps(self.eps, parameters)
        return torch.optim.Adam(
            groups_of(parameters, self.lr, self.groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
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
        check_eps(self.eps, parameters)
        return torch.optim.AdamW(
            groups_of(parameters, self.lr, self.groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class Sophia:
    """Sophia-G as SOUL runs it (arXiv:2404.18239, arXiv:2305.14342): momentum over a curvature of squared gradients.

    Every step reads one gradient g of the loss at hand, whatever the loss: no labels are resampled for the curvature
    and it is refreshed at each step, as in the authors' code. Nothing is corrected for the zero start of m and h.
    No coordinate moves by more than lr in a step; where |m| exceeds rho * scale * h the step is plain sign descent,
    which at the published settings is wherever |g| is below 1 / (rho * scale) = 0.005.

    Formula: m <- b1 m + (1 - b1) g; h <- b2 h + (1 - b2) g^2; theta <- (1 - lr weight_decay) theta;
    theta <- theta - lr sign(m) min(|m| / (rho scale h + 1e-15), 1).

    Departure: the released code moves m twice in a step, which makes it b1^2 m + (1 - b1^2) g; here it moves once, as
    in the paper. ``betas=(0.81, 0.95)`` gives the released update of 0.9. Weight decay is on every parameter in scope;
    the authors exempt biases and normalisation.

    Args:
        lr: the most that a coordinate moves in a step.
        betas: (b1, b2), of the momentum and of the curvature, each in [0, 1).
        rho: > 0; scale: the authors' constant B, > 0. Only their product matters.
        weight_decay: decoupled, >= 0.
        groups: name pattern -> its own learning rate.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    rho: float = 0.04
    scale: float = 5120.0
    weight_decay: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "two numbers in [0, 1)")
        require(self.rho > 0, self, "rho", "above 0")
        require(self.scale > 0, self, "scale", "above 0")
        require(self.weight_decay >= 0, self, "weight_decay", "at least 0")

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""
        settings = {"betas": self.betas, "curvature": self.rho * self.scale, "weight_decay": self.weight_decay}
        return _Sophia(groups_of(parameters, self.lr, self.groups), settings)


class _Sophia(torch.optim.Optimizer):
    """The update of ``Sophia``; m and h are kept in the weight's own precision, as torch's Adam keeps its moments."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that the parameters carry; one without a gradient is left alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _sophia_step(parameter, self.state[parameter], group)


def _sophia_step(parameter: nn.Parameter, state: dict[str, torch.Tensor], group: Mapping[str, Any]) -> None:
    if not state:
        state["m"], state["h"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    grad, (first, second) = parameter.grad, group["betas"]
    assert grad is not None
    state["m"].lerp_(grad, 1 - first)
    state["h"].mul_(second).addcmul_(grad, grad, value=1 - second)
    wide = torch.promote_types(parameter.dtype, torch.float32)  # 1e-15 is 0 in half precision
    m, h = state["m"].to(wide), state["h"].to(wide)
    ratio = (m.abs() / (group["curvature"] * h + 1e-15)).clamp_max(1.0)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_((group["lr"] * m.sign() * ratio).to(parameter.dtype))


@dataclass(frozen=True)
class Averaged:
    """Any optimizer, and at its last step the mean of the weights after each of the last `count` steps.

    Weight averaging, which arXiv:2502.05374 tries among its ways to a flatter place. The steps themselves are the inner
    optimizer's. A run that a guard stops before its last step is not averaged.

    Args:
        inner: the optimizer that steps. steps: how many there will be, >= 1: at that one the mean is written.
        count: how many of the last steps are averaged, 1 (nothing changes) to `steps`.
    """

    inner: Optimizer
    steps: int
    count: int

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "at least 1")
        require(1 <= self.count <= self.steps, self, "count", f"from 1 to the {self.steps} steps")

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters; the means are kept in its groups, and so in checkpoints."""
        optimizer = self.inner.build(parameters)
        for group in optimizer.param_groups:
            group.update(taken=0, means=[])
        optimizer.register_step_post_hook(self._after)
        return optimizer

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _settings: Any) -> None:
        for group in optimizer.param_groups:
            group["taken"] += 1
            number = group["taken"] - (self.steps - self.count)
            if not 1 <= number <= self.count:
                continue
            wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in group["params"]]
            if number == 1:
                group["means"] = [value.clone() for value in wide]
            for mean, value in zip(group["means"], wide, strict=True):
                mean.add_(value - mean, alpha=1 / number)
            if number == self.count:
                for parameter, mean in zip(group["params"], group["means"], strict=True):
                    parameter.copy_(mean)
                group["means"] = []


class Optimizer(Protocol):
    """Printable settings of an optimizer: one of this module, ``lean.DCTAdamW``, or a user's own frozen dataclass."""

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""


def by_name(kind: str, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """ "adam", "adamw" or "sgd" with these settings; the first two do not read the momentum."""
    found: dict[str, Optimizer] = {
        "adam": Adam(lr, weight_decay=weight_decay),
        "adamw": AdamW(lr, weight_decay=weight_decay),
        "sgd": SGD(lr, momentum, weight_decay),
    }
    return found[kind]


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


@dataclass(frozen=True)
class Exponential:
    """The learning rate falls by equal factors, from 1 at the start to `end` at the end of the run: end^progress.

    An exponential decay by a factor per epoch is ``end=factor**epochs``, here spread over the steps.

    Args:
        end: > 0; 1 keeps the rate.
    """

    end: float = 0.01

    def __post_init__(self) -> None:
        require(self.end > 0, self, "end", "above 0")

    def factor(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress` (0 .. 1)."""
        return self.end**progress


@dataclass(frozen=True)
class Restarts:
    """Half cosines from 1 towards `end`, each twice as long as the one before; the last one ends the run (arXiv:1608.03983).

    The run is cut into 2^cycles - 1 equal parts of one rate each, and the cycles have 1, 2, 4, ... of them. Over that many
    epochs the rate changes once per epoch, as it is usual; a cycle restarts before it reaches `end`. One cycle is a constant
    rate.

    Formula: with part e = floor(progress (2^cycles - 1)), cycle i = floor(log2(e + 1)) and t = (e + 1 - 2^i) / 2^i:
    end + (1 - end) (1 + cos(pi t)) / 2.

    Args:
        cycles: from 1 to 30. end: in [0, 1].
    """

    cycles: int = 4
    end: float = 0.05

    def __post_init__(self) -> None:
        require(1 <= self.cycles <= 30, self, "cycles", "from 1 to 30")
        require(0 <= self.end <= 1, self, "end", "in [0, 1]")

    def factor(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress` (0 .. 1)."""
        parts = 2**self.cycles - 1
        part = min(
            math.floor(progress * parts + 1e-9), parts - 1
        )  # a step / steps may fall short of its part by a rounding
        length = 1 << ((part + 1).bit_length() - 1)
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * (part + 1 - length) / length))


Schedule = Constant | Linear | Cosine | Milestones | Exponential | Restarts


def schedule_by_name(kind: str) -> Schedule:
    """ "constant", or "cosine": half a cosine down to 0, without warm-up."""
    return Cosine() if kind == "cosine" else Constant()
