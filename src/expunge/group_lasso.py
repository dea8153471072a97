"""Group lasso: a penalty that switches whole groups of weights off, and which weights make a group (GS-LoRA)."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Case, require

Kind = Literal["block", "layer", "matrix"]


@dataclass(frozen=True)
class GroupLasso:
    """Sum over groups of the Euclidean norm of all weights of the group (arXiv:2403.11530, eq. 7). Reads no data.

    sum over g of sqrt(sum over W in g of |W|_F^2), over whole tensors in scope. Of adapters both factors count, so that
    a group whose B is 0 has a norm. A group at zero has no gradient. It does not promise exact zeros: after Adam, which
    divides by the size of the gradient, groups end near zero.

    Args:
        by: what makes a group: "block", "layer" or "matrix"; see ``grouped``.
    """

    by: Kind = "block"
    parameters_only: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        require(self.by in ("block", "layer", "matrix"), self, "by", "'block', 'layer' or 'matrix'")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        parameters = case.scope.parameters(case.model)
        squares = [
            torch.stack([runtime.total(parameters[name].square()) for name in names]).sum()
            for names in grouped(case.model, parameters, self.by).values()
        ]
        return torch.stack([_root(square) for square in squares]).sum().reshape(1)


def _root(square: Tensor) -> Tensor:
    """Square root, whose slope at 0 is taken as 0."""
    safe = torch.where(square > 0, square, torch.ones_like(square))
    return torch.where(square > 0, torch.sqrt(safe), torch.zeros_like(square))


def group_norms(case: Case, by: Kind) -> dict[str, float]:
    """Name of the group -> Euclidean norm of its weights in scope."""
    parameters = case.scope.parameters(case.model)
    return {
        group: float(sum(runtime.total(parameters[name].detach().double().square()) for name in names)) ** 0.5
        for group, names in grouped(case.model, parameters, by).items()
    }


def grouped(model: nn.Module, parameters: Mapping[str, Any], by: Kind) -> dict[str, list[str]]:
    """Name of the group -> names of the parameters in it, in the model's order.

    "matrix": each parameter by itself. "layer": the parameters of one module, an adapted layer with its adapter taken as
    one. "block": all layers in one member of a ModuleList or Sequential: that with the most members that hold any of
    these parameters, the outermost of several; then the next, for what is left. A layer that is left over is its own
    group. In a transformer a group is a block, in a residual network a residual unit, in a plain Sequential a layer.
    """
    if by == "matrix":
        return {name: [name] for name in parameters}
    adapted = {name for name, module in model.named_modules() if "base_layer" in module._modules}
    layers = {name: _layer(adapted, name) for name in parameters}
    owner = dict(zip(layers, layers.values() if by == "layer" else _blocks(model, list(layers.values())), strict=True))
    found: dict[str, list[str]] = {}
    for name, group in owner.items():
        found.setdefault(group, []).append(name)
    return found


def _layer(adapted: Container[str], name: str) -> str:
    """The module that a parameter belongs to; of an adapter's, the layer that is adapted."""
    parts = name.split(".")[:-1]
    for depth in range(len(parts)):
        above = ".".join(parts[: depth + 1])
        if above in adapted:
            return above
    return ".".join(parts)


def _blocks(model: nn.Module, layers: list[str]) -> list[str]:
    """For each layer the name of its block."""
    lists = [name for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    left, block = dict.fromkeys(layers), dict(zip(layers, layers, strict=True))
    while True:
        held = {name: {member for layer in left if (member := _member(name, layer))} for name in lists}
        best = max(held, key=lambda name: len(held[name]), default=None)
        if best is None or len(held[best]) < 2:
            return [block[layer] for layer in layers]
        for layer in list(left):
            if member := _member(best, layer):
                block[layer] = member
                del left[layer]


def _member(of: str, layer: str) -> str:
    """The member of the list `of` that a layer is or is in; empty where it is in none."""
    start = f"{of}." if of else ""
    return start + layer[len(start) :].partition(".")[0] if layer.startswith(start) and layer != of else ""
