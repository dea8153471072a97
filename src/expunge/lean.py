"""Optimizer settings that keep less state than Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Refused, require
from expunge.optim import check_eps, groups_of


@dataclass(frozen=True)
class DCTAdamW:
    """AdamW whose moments live in a few columns of a fixed cosine basis (DCT-AdamW, arXiv:2505.17967).

    Of a weight with sides long x short, the moments are long x rank instead of long x short: rank / short of Adam's
    state, and `rank` column numbers. The basis is one matrix per short side, shared by all weights of that side and
    never saved. What the chosen columns do not hold of a gradient is lost: nothing is carried to the next step.

    Formula: Q[i, j] = sqrt(2 / n) cos(i (2 j + 1) pi / (2 n)), its row 0 times sqrt(1/2), n the short side. S = G Q
    (G on its long side); the columns with the largest norms of S are kept; a = S[:, columns]; m, v and their bias
    corrections are Adam's, of a; weight <- (1 - lr weight_decay) weight - lr u Q[:, columns]^T, u Adam's step.
    When columns change, a column that stays keeps its moments and a new one starts at zero: as Q is orthogonal, this
    is the paper's rotation of the moments by Q_before^T Q_after.

    Departures: chosen columns are kept in rising order (the authors' order is that of the norms, so that without
    rotation a moment may meet another column); no error feedback, which costs a whole weight of state; no table of
    layer shapes that are projected on their long side. As in the authors' code, vectors and weights with a side of
    `whole` or more (embeddings) get plain AdamW; here also those whose short side is not above the rank. A
    convolution, which their code leaves still, is taken as a matrix [out, in * kernel].

    Args:
        lr: learning rate.
        rank: columns kept per weight, >= 1.
        betas: decay of the moments, each in [0, 1). eps: as Adam's.
        weight_decay: decoupled, >= 0.
        refresh: steps between two choices of columns, >= 1.
        rotate: False leaves the moments in place when columns change, as the authors' code does by default.
        norm: 1 or 2, of the columns of S; 2 keeps the most energy of the gradient, 1 is the authors' choice.
        whole: side from which on a weight gets plain AdamW, >= 2.
        groups: name pattern -> its own learning rate.
    """

    lr: float = 1e-3
    rank: int = 128
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    refresh: int = 1
    rotate: bool = True
    norm: int = 1
    whole: int = 32_000
    groups: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "at least 1")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "two numbers in [0, 1)")
        require(self.weight_decay >= 0, self, "weight_decay", "at least 0")
        require(self.refresh >= 1, self, "refresh", "at least 1")
        require(self.norm in (1, 2), self, "norm", "1 or 2")
        require(self.whole >= 2, self, "whole", "at least 2")

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over these named parameters."""
        check_eps(self.eps, parameters)
        for name, parameter in parameters.items():
            if runtime.sharded(parameter):
                raise Refused(f"DCTAdamW needs whole weights and {name!r} is spread over processes: use AdamW there")
        names = ("rank", "betas", "eps", "weight_decay", "refresh", "rotate", "norm", "whole")
        return _DCTAdamW(groups_of(parameters, self.lr, self.groups), {name: getattr(self, name) for name in names})


class _DCTAdamW(torch.optim.Optimizer):
    """The update of ``DCTAdamW``; moments are in the weight's own precision, as torch's Adam keeps them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that the parameters carry; one without a gradient is left alone."""
        bases: dict[Any, Tensor] = self.__dict__.setdefault("_bases", {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if projected(tuple(parameter.shape), group["rank"], group["whole"]):
                    change = _projected_step(parameter, state, group, bases)
                else:
                    change = _adam(parameter.grad, state, group)
                parameter.sub_(change.to(parameter.dtype), alpha=group["lr"])


def projected(shape: tuple[int, ...], rank: int, whole: int) -> bool:
    """Whether a weight of this shape has its moments in the cosine basis."""
    if len(shape) < 2:
        return False
    sides = shape[0], math.prod(shape[1:])
    return min(sides) > rank and max(sides) < whole


def _projected_step(parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any], bases: Any) -> Tensor:
    assert parameter.grad is not None
    matrix = parameter.grad.flatten(1)
    upright = len(matrix) >= matrix.shape[1]
    long = matrix if upright else matrix.T
    wide = torch.promote_types(matrix.dtype, torch.float32)
    place = long.shape[1], wide, matrix.device
    if place not in bases:
        bases[place] = cosine_basis(long.shape[1]).to(matrix.device, wide)
    basis, long = bases[place], long.to(wide)
    if state["step"] == 1 or state["step"] % group["refresh"] == 0:
        similarity = long @ basis
        before = state.get("columns", [])
        norms = similarity.norm(p=group["norm"], dim=0)
        state["columns"] = norms.topk(group["rank"]).indices.sort().values.tolist()
        low = similarity[:, state["columns"]]
        if group["rotate"] and before and before != state["columns"]:
            _carry(state, before)
    else:
        low = long @ basis[:, state["columns"]]
    step = _adam(low.to(parameter.dtype), state, group).to(wide) @ basis[:, state["columns"]].T
    return (step if upright else step.T).reshape(parameter.shape)


def _carry(state: dict[str, Any], before: list[int]) -> None:
    """Move the moments of columns that stay to their new places; those of new columns are zero."""
    at = {column: place for place, column in enumerate(before)}
    stay = [(at[column], place) for place, column in enumerate(state["columns"]) if column in at]
    old, new = [pair[0] for pair in stay], [pair[1] for pair in stay]
    for moment in ("m", "v"):
        moved = torch.zeros_like(state[moment])
        moved[:, new] = state[moment][:, old]
        state[moment] = moved


def _adam(grad: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Adam's step for a learning rate of 1, in float32 or wider."""
    if "m" not in state:
        state["m"], state["v"] = torch.zeros_like(grad), torch.zeros_like(grad)
    first, second = group["betas"]
    state["m"].lerp_(grad, 1 - first)
    state["v"].mul_(second).addcmul_(grad, grad, value=1 - second)
    wide = torch.promote_types(grad.dtype, torch.float32)
    m = state["m"].to(wide) / (1 - first ** state["step"])
    v = state["v"].to(wide) / (1 - second ** state["step"])
    return m / (v.sqrt() + group["eps"])


def cosine_basis(n: int) -> Tensor:
    """[n, n] float64, orthogonal: column j is sqrt(2 / n) cos(i (2 j + 1) pi / (2 n)), its entry 0 times sqrt(1/2)."""
    i = torch.arange(n, dtype=torch.float64)
    basis = math.sqrt(2 / n) * torch.cos(i[:, None] * (2 * i + 1) * math.pi / (2 * n))
    basis[0] *= math.sqrt(0.5)
    return basis
