"""A layer and a learnt change of its weight beside it: what the carriers that are our own put into a model.

The layer itself is not touched. It may be quantised: then its weight cannot be read, and only a change that needs no
reading of it (a product of two thin matrices) can stand beside it.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.core import Refused
from expunge.registry import did_you_mean
from expunge.scope import Scope

Pairs = list[tuple[Tensor, Tensor | None]]
"""The change as a sum of products left [out, r] @ right [r, in]; where right is None, left is the whole [out, in]."""


class Adapted(nn.Module):
    """A layer with a change of its weight, which can be switched off; it is called as peft's layers are.

    Args:
        base_layer: a Linear, transformers' Conv1D, a Conv2d, or a quantised layer with in_features and out_features.
        change: of the weight, as a matrix [out, in * kernel].
    """

    def __init__(self, base_layer: nn.Module, change: Change):
        super().__init__()
        self.base_layer, self.change = base_layer, change
        self.disable_adapters = False
        self.training = base_layer.training

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the change on or off."""
        self.disable_adapters = not enabled

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change in the shape of the layer's weight; there is one adapter, whatever its name."""
        return unflattened(self.change.matrix(), self.base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with its weight changed."""
        if self.disable_adapters:
            return self.base_layer(x)
        if type(self.base_layer) is nn.Conv2d:
            weight = self.base_layer.weight
            changed = weight + self.get_delta_weight("").to(weight.dtype)
            return torch.func.functional_call(self.base_layer, {"weight": changed}, (x,))
        output = self.base_layer(x)
        if x.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
            raise Refused(
                f"a {type(self.base_layer).__name__} passes no gradient on to its input, so adapters before it would not "
                f"be trained; bitsandbytes packs 4-bit weights so on some CPUs: set support_avx512bf16_for_cpu=False on "
                f"its layers before their first use"
            )
        return output + self.change(x).to(output.dtype)


class Change(nn.Module):
    """A matrix [out, in] that is a sum of products of what is trained and what is fixed.

    Args:
        form: names -> tensors to ``Pairs``; a function of a module, so that a copy of the model has it too.
        trained: name -> start; becomes a parameter.
        fixed: name -> value; becomes a buffer.
    """

    def __init__(self, form: Callable[[Mapping[str, Tensor]], Pairs], trained: Mapping[str, Tensor], fixed: Any = None):
        super().__init__()
        self.form = form
        self.names = (*trained, *(fixed or {}))
        for name, value in trained.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        for name, value in (fixed or {}).items():
            self.register_buffer(name, value.detach().clone())

    def pairs(self) -> Pairs:
        """The products at the present values."""
        return self.form({name: getattr(self, name) for name in self.names})

    def matrix(self) -> Tensor:
        """The change as one matrix [out, in]."""
        return _total([left if right is None else left @ right for left, right in self.pairs()])

    def forward(self, x: Tensor) -> Tensor:
        """The change times the input, without ever making a thin product whole."""
        pairs = self.pairs()
        x = x.to(pairs[0][0].dtype)
        return _total(
            [
                functional.linear(x, left) if right is None else functional.linear(functional.linear(x, right), left)
                for left, right in pairs
            ]
        )


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def matrix_of(layer: Any) -> Tensor:
    """A layer's weight as a matrix [out, in * kernel], in float32 or wider: an SVD in half precision is noise."""
    weight = layer.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide.T if turned(layer) else wide.flatten(1)


def unflattened(matrix: Tensor, layer: Any) -> Tensor:
    """The inverse of ``matrix_of``."""
    return matrix.T if turned(layer) else matrix.reshape(layer.weight.shape)


def turned(layer: Any) -> bool:
    """Whether the weight is [in, out], as in transformers' Conv1D."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers")


def quantised(layer: Any) -> bool:
    """Whether a linear layer keeps its weight in some other form than floating numbers, as bitsandbytes' do."""
    weight = getattr(layer, "weight", None)
    sized = isinstance(getattr(layer, "in_features", None), int) and isinstance(
        getattr(layer, "out_features", None), int
    )
    return sized and isinstance(weight, Tensor) and not weight.is_floating_point()


def decomposed(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, n], singular values [n] falling, V^T [n, in] of a layer's weight; n is the smaller side."""
    u, values, vt = torch.linalg.svd(matrix_of(layer), full_matrices=False)
    return u.contiguous(), values.contiguous(), vt.contiguous()


def replace_layers(model: nn.Module, own: Mapping[str, Any], change: Callable[[str, Any], Change]) -> None:
    for name, layer in own.items():
        model.set_submodule(name, Adapted(layer, change(name, layer)))


def able_layers(model: nn.Module, scope: Scope, *, beside_quantised: bool = False) -> dict[str, Any]:
    """name -> layer with a floating weight that is in scope and used in one place only.

    Raises:
        Refused: for a model with quantised layers, unless `beside_quantised`: what is left of it is little.
    """
    if not beside_quantised and any(quantised(layer) for layer in model.modules()):
        raise Refused("the model has quantised layers, whose weights cannot be read: only LoRA can stand on them")
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if name and _adaptable(layer) and places[id(layer.weight)] == 1 and f"{name}.weight" in scope
    }


def _adaptable(layer: Any) -> bool:
    """Exact types: a subclass may use its weight in a way of its own, as the output of MultiheadAttention does."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1
    return type(layer) is nn.Linear or turned(layer)


def chosen(adapter: Any, able: dict[str, Any]) -> dict[str, Any]:
    """Those of the able layers that the carrier's targets name; all of them where it names none."""
    found = dict(able) if not adapter.targets else {}
    for pattern in adapter.targets:
        hits = {
            n: layer for n, layer in able.items() if any(fnmatch.fnmatchcase(n, p) for p in (pattern, f"*.{pattern}"))
        }
        if not hits:
            raise Refused(
                f"{type(adapter).__name__} target {pattern!r} matches no linear or convolution layer in scope that is "
                f"used in one place only{did_you_mean(pattern, able)}; there are {', '.join(list(able)[:5]) or 'none'}"
            )
        found.update(hits)
    if not found:
        raise Refused(
            "the model has no linear or convolution layer in scope that is used in one place only: an adapter has "
            "nothing to attach to"
        )
    return found
