"""Linear layers with an adapter beside them that is opened from outside, per example (O3, arXiv:2407.10223).

An adapter is a child of its layer, called ``gated``, and a forward hook that is a plain function, so that the model keeps
its class and names, survives ``copy.deepcopy``, and its adapters travel with its weights. Shut, they change no bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Batch, Case, Key, Refused
from expunge.scope import Scope
from expunge.states import wide
from expunge.wrap import LoRA

CHILD = "gated"
"""Name of the adapter in its layer."""


class Adapter(nn.Module):
    """A low-rank change of a linear layer's output, times the gate: w (alpha / rank) B A x, w one number per example.

    Args:
        down: A [r, in]. up: B [out, r]. scale: alpha / rank.
        earlier: [R, r, in], the A of earlier requests, which a further one is kept orthogonal to.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, earlier: Tensor):
        super().__init__()
        self.down, self.up, self.scale = nn.Parameter(down), nn.Parameter(up), scale
        self.register_buffer("earlier", earlier)
        self.weight: Tensor | None = None

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The layer's output with its change; as it is where the gate is closed."""
        if self.weight is None:
            return output
        change = F.linear(F.linear(inputs.to(self.down.dtype), self.down), self.up) * self.scale
        return output + (_per_row(self.weight, change) * change).to(output.dtype)

    def overlap(self) -> Tensor:
        """Sum over earlier requests of |A_earlier A^T|_F^2, a scalar."""
        return (self.get_buffer("earlier") @ self.down.T).square().sum()


def _per_row(weight: Tensor, like: Tensor) -> Tensor:
    """The weights [b] shaped to multiply [b, ...]; a generator that expanded each row into beams has a multiple of b."""
    if not weight.ndim:
        return weight
    times, rest = divmod(len(like), len(weight))
    if rest or not times:
        raise Refused(
            f"a gated layer was given {len(like)} rows for a batch of {len(weight)}: expected one row, or as many for "
            f"each, per example; layers that mix the examples of a batch cannot be gated"
        )
    return weight.to(like).repeat_interleave(times).view(-1, *[1] * (like.ndim - 1))


def _add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The forward hook of an adapted layer."""
    return module.get_submodule(CHILD)(args[0], output)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Name of the layer -> its adapter."""
    return {n: found for n, m in model.named_modules() if isinstance(found := m._modules.get(CHILD), Adapter)}


def attach(layer: nn.Module, adapter: Adapter) -> None:
    """Let the adapter act on the layer's output. It is a child of the layer, so it is copied and saved with it."""
    adapter.train(layer.training)
    layer.add_module(CHILD, adapter)
    layer.register_forward_hook(_add)


def detach(layer: nn.Module) -> None:
    """Undo ``attach``."""
    del layer._modules[CHILD]
    for number, hook in list(layer._forward_hooks.items()):
        if hook is _add:
            del layer._forward_hooks[number]


def begin(case: Case, lora: LoRA, blocks: Sequence[str], key: Key) -> None:
    """Attach adapters to the layers that `lora` names, or to every linear layer of the blocks: A by the key, B = 0."""
    inside = tuple(f"{block}." for block in blocks)
    for name, layer in lora.layers(case.model, case.scope).items():
        if layer.weight.ndim != 2 or not (lora.targets or not inside or name.startswith(inside)):
            continue
        shape = tuple(layer.weight.shape)
        out, width = shape if isinstance(layer, nn.Linear) else shape[::-1]  # transformers' Conv1D has them exchanged
        like = wide(layer.weight.detach())
        bound = width**-0.5
        down = torch.empty(lora.rank, width).uniform_(-bound, bound, generator=key.at(name).generator()).to(like)
        earlier = down.new_zeros(0, lora.rank, width)
        attach(layer, Adapter(down, down.new_zeros(out, lora.rank), lora.alpha / lora.rank, earlier))
    if not adapters(case.model):
        raise Refused("o3: no linear layer of the model's blocks is in scope: name layers with targets=")


@contextlib.contextmanager
def adapted(case: Case, lora: LoRA, blocks: Sequence[str], key: Key) -> Iterator[Scope]:
    """The scope of the adapters to train: those of earlier requests, their A put by, or new ones.

    Adapters that are there are trained on from where they are. Where what is inside fails, the model is as it was but for
    their values.

    Raises:
        Refused: for a rank other than that of the adapters that are there.
    """
    there = adapters(case.model)
    other = next((adapter.down.shape[0] for adapter in there.values() if adapter.down.shape[0] != lora.rank), None)
    if other is not None:
        raise Refused(f"o3: rank must be {other}, as the adapters of the earlier request have it, found {lora.rank}")
    for adapter in there.values():
        earlier = torch.cat((adapter.get_buffer("earlier"), adapter.down.detach()[None]))
        adapter.register_buffer("earlier", earlier)
    if not there:
        begin(case, lora, blocks, key)
    names = tuple(f"{name}.{CHILD}.{part}" for name in adapters(case.model) for part in ("down", "up"))
    try:
        yield Scope(dict.fromkeys(names, True), names)
    except BaseException:
        for name, adapter in adapters(case.model).items():
            if there:
                adapter.register_buffer("earlier", adapter.get_buffer("earlier")[:-1])
            else:
                detach(case.model.get_submodule(name))
        raise


@contextlib.contextmanager
def opened(model: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """All adapters at this weight ([b], or a scalar; None shuts them) inside, as they were afterwards."""
    found = list(adapters(model).values())
    before = [adapter.weight for adapter in found]
    for adapter in found:
        adapter.weight = weight
    try:
        yield
    finally:
        for adapter, value in zip(found, before, strict=True):
            adapter.weight = value


@dataclass(frozen=True)
class Orthogonal:
    """Keep each adapter's A orthogonal to the A of earlier requests; B is free. One number, read off the parameters.

    Formula: 1 / blocks times the sum over adapted layers and earlier requests of |A_earlier A^T|_F^2.

    Args:
        blocks: of the model, >= 1; the authors divide by them, not by the adapted layers.
    """

    blocks: int
    parameters_only: bool = field(default=True, init=False, repr=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        total = torch.stack([adapter.overlap() for adapter in adapters(case.model).values()]).sum()
        return total[None] / self.blocks
