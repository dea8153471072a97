"""What a network computes on the way: which layers any ``nn.Module`` has, their activations, and a way to change them.

Everything is done with hooks that are removed again; modes, weights, buffers and the global random state are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from expunge import runtime
from expunge.core import Batch, Data, Key, Refused, Task, lent_stream, map_tensors, only_looked_at
from expunge.meter import first_tensor

LIMIT = 1 << 30  # bytes of activations held at once, unless a caller allows more


@dataclass(frozen=True)
class Layer:
    """A place in a network.

    Attributes:
        module: name as in ``named_modules``.
        reads: the place is what that module is given, not what it returns.
        channels: the dimension of the features: 1 for [b, c, h, w], -1 for [b, d] and [b, t, d].
    """

    module: str
    reads: bool = False
    channels: int = -1

    def __str__(self) -> str:
        return f"input of {self.module}" if self.reads else self.module


@dataclass
class _Trace:
    """What happened in one pass: tensors are held, so that an identity is never that of another."""

    calls: dict[str, int] = field(default_factory=dict)
    made: dict[int, str] = field(default_factory=dict)  # tensor -> the last module that returned it
    read: dict[int, tuple[Tensor, str, nn.Module]] = field(default_factory=dict)  # -> the first reader with weights
    held: list[Tensor] = field(default_factory=list)


def find_layers(model: nn.Module, task: Task, data: Data, *, most: int | None = None, key: Key = Key(0)) -> list[Layer]:
    """The layers of a model, in the order in which they are computed, by one pass over three examples.

    A layer is a tensor with one row per example that a module with a weight matrix or a layer normalisation is given:
    the activations between blocks, after their non-linearity. It is named by the module that returned it, or by the
    module that reads it where a function made it. Left out are the model's own input, what only a BatchNorm reads, and
    modules that are called more than once. The last one is what the head reads: the penultimate features.

    Args:
        model: any module that the task can call; one without inner modules has no layers.
        task, data: how it is called, and on what. key: of what the task draws.
        most: keep so many, evenly spaced, the last one always; all by default.
    """
    trace = _Trace()
    names = {module: name for name, module in model.named_modules() if name}
    if not names:
        return []
    batch = data.batch(torch.arange(min(3, len(data))))
    inputs: set[int] = set()
    with contextlib.ExitStack() as stack:
        given = model.register_forward_pre_hook(
            lambda _module, args, kwargs: inputs.update(_storages({"args": (args, kwargs)})), with_kwargs=True
        )
        stack.callback(given.remove)
        for module, name in names.items():
            stack.callback(module.register_forward_pre_hook(_reading(trace, name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_returning(trace, name)).remove)
        for _ in _passes(model, task, [batch], key):
            pass
    found = []
    for identity, (tensor, reader, module) in trace.read.items():
        if tensor.untyped_storage().data_ptr() in inputs or tensor.shape[:1] != batch["id"].shape:
            continue
        maker = trace.made.get(identity)
        channels = 1 if _channels_first(module) and tensor.ndim > 2 else -1
        if maker is not None and trace.calls[maker] == 1:
            found.append(Layer(maker, False, channels))
        elif trace.calls[reader] == 1:
            found.append(Layer(reader, True, channels))
    return found if most is None else spread(found, most)


def spread(layers: Sequence[Layer], most: int) -> list[Layer]:
    """At most `most` of the layers (>= 1), evenly spaced; the last one always."""
    if len(layers) <= most:
        return list(layers)
    places = np.round(np.linspace(len(layers) - 1, 0, most)).astype(int)[::-1]
    return [layers[place] for place in places]


def trunk(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """The layers that are outputs of blocks (modules of modules), and the last one; all, where there are not two blocks.

    In a network of residual blocks what is pushed there reaches everything above; inside a block it need not.
    """
    modules = dict(model.named_modules())
    blocks = [layer for layer in layers if not layer.reads and next(modules[layer.module].children(), None) is not None]
    return list(layers) if len(blocks) < 2 else [layer for layer in layers if layer in blocks or layer is layers[-1]]


def activations(
    model: nn.Module,
    task: Task,
    data: Data,
    layers: Sequence[Layer],
    *,
    size: int = 256,
    key: Key = Key(0),
    pool: Literal["mean", "none"] = "mean",
    limit: int = LIMIT,
) -> list[np.ndarray]:
    """The activations of some layers on all of the data, in one pass in eval mode.

    Args:
        model, task, data: any model, and what it is called on. key: of what the task draws, alike for every model.
        layers: where to look, from ``find_layers``, or by name.
        size: examples per pass.
        pool: "mean": over positions (pixels, tokens; where the batch has an attention mask, over its tokens), so that
            each layer gives [n, d]. "none": [n, positions, d].
        limit: bytes that may be held; more is refused, not swapped.

    Returns:
        float32, one array per layer, rows in the order of the data.

    Raises:
        Refused: for a layer that the model lacks or does not reach, and for more bytes than the limit.
    """
    modules = dict(model.named_modules())
    kept: list[list[np.ndarray]] = [[] for _ in layers]
    for layer in layers:
        if layer.module not in modules:
            raise Refused(f"the model has no module {layer.module!r}: name one of its named_modules()")
    seen: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(_watched(modules[layer.module], layer, partial(seen.__setitem__, number)))
        for batch in _passes(model, task, data.batches(size), key):
            for number, layer in enumerate(layers):
                if number not in seen:
                    raise Refused(f"the model never reaches layer {layer}: choose one that it calls in eval mode")
                value = as_tokens(seen[number].detach().float(), layer)
                value = _mean(value, batch) if pool == "mean" else value
                kept[number].append(value.cpu().numpy())
            seen.clear()
            _bounded(kept, len(data), limit)
    return [_stacked(parts, layer) for parts, layer in zip(kept, layers, strict=True)]


def shuffled(size: int, key: Key) -> np.ndarray:
    """[size] int64, the numbers 0 .. size - 1 in an order that the key decides."""
    return np.random.Generator(np.random.PCG64(key.seed)).permutation(size)


def sample(data: Data, most: int, key: Key) -> Data:
    """At most so many of the examples, drawn by the key, in the order of the data."""
    return data if len(data) <= most else data.select(np.sort(shuffled(len(data), key)[:most]))


@contextlib.contextmanager
def changed(model: nn.Module, layer: Layer, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the model goes on with ``change(activation)`` at a layer, whoever calls it."""
    modules = dict(model.named_modules())
    if layer.module not in modules:
        raise Refused(f"the model has no module {layer.module!r}: name one of its named_modules()")
    module = modules[layer.module]
    if layer.reads:

        def before(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            return args, {**kwargs, name: change(kwargs[name])}

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def as_tokens(value: Tensor, layer: Layer) -> Tensor:
    """[b, ...] -> [b, positions, d]: the pixels of a map, the tokens of a text, or the one vector of a dense layer."""
    if value.ndim < 3:
        return value.reshape(len(value), 1, -1)
    return value.movedim(layer.channels, -1).flatten(1, -2)


def from_tokens(tokens: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of ``as_tokens``, in the shape and dtype of `like`."""
    if like.ndim < 3:
        return tokens.reshape(like.shape).to(like.dtype)
    moved = like.movedim(layer.channels, -1).shape
    return tokens.reshape(moved).movedim(-1, layer.channels).to(like.dtype)


def _passes(model: nn.Module, task: Task, batches: Any, key: Key) -> Iterator[Batch]:
    """Run the model over batches without gradient in eval mode; the streams it draws from are lent."""
    device = runtime.device_of(model)
    with torch.no_grad(), only_looked_at(model), lent_stream(key):
        for number, batch in enumerate(batches):
            batch = task.prepare(runtime.to_device(batch, device), key.at("prepare", number))
            task.outputs(model, batch)
            aligned = getattr(task, "aligned", None)  # the order of tokens in which the model saw them
            yield batch if aligned is None else {**batch, **aligned(batch)}


def _watched(module: nn.Module, layer: Layer, tell: Callable[[Tensor], Any]) -> contextlib.AbstractContextManager[Any]:
    if layer.reads:
        handle = module.register_forward_pre_hook(
            lambda _module, args, kwargs: _none(tell(_floating((args, kwargs)))), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda _module, _args, output: _none(tell(_floating(output))))
    stack = contextlib.ExitStack()
    stack.callback(handle.remove)
    return stack


def _none(_: object) -> None:
    """A hook that returns nothing changes nothing."""


def _floating(value: Any) -> Tensor:
    found = first_tensor(value)
    if found is None or not found.is_floating_point():
        raise Refused("a layer was named that carries no floating numbers: name one that computes activations")
    return found


def _reading(trace: _Trace, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.calls[name] = trace.calls.get(name, 0) + 1
        tensor = first_tensor((args, kwargs))
        if tensor is not None and tensor.is_floating_point() and tensor.ndim > 1 and _reads(module):
            trace.held.append(tensor)
            trace.read.setdefault(id(tensor), (tensor, name, module))

    return hook


def _returning(trace: _Trace, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else first_tensor(output) if isinstance(output, tuple) else None
        if tensor is not None and id(tensor) not in trace.read:
            trace.held.append(tensor)
            trace.made[id(tensor)] = name

    return hook


def _reads(module: nn.Module) -> bool:
    """Whether a module by itself has a weight matrix, or normalises layers."""
    own = list(module.parameters(recurse=False))
    normalises = "Norm" in type(module).__name__ and not isinstance(module, _BatchNorm)
    return any(parameter.ndim > 1 for parameter in own) or (normalises and bool(own))


def _channels_first(module: nn.Module) -> bool:
    """Whether a reader takes features along dimension 1: convolutions and group normalisations do."""
    return isinstance(module, nn.GroupNorm) or any(p.ndim > 2 for p in module.parameters(recurse=False))


def _storages(batch: Batch) -> set[int]:
    found: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        found.add(tensor.untyped_storage().data_ptr())
        return tensor

    map_tensors(look, batch)
    return found


def _mean(tokens: Tensor, batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and tokens.shape[1] in (mask.shape[1], int(mask.sum(1).max())):
        weight = mask[:, : tokens.shape[1]].to(tokens)[:, :, None]  # columns that are padding in every row are not run
        return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1.0)
    return tokens.mean(1)


def _bounded(kept: list[list[np.ndarray]], examples: int, limit: int) -> None:
    """Refuse, after the first batch already, what would not fit."""
    wanted = sum(parts[0].nbytes // len(parts[0]) for parts in kept) * examples
    if wanted > limit:
        raise Refused(
            f"the activations of {examples} examples take {wanted / 2**20:.0f} MiB, more than the limit of "
            f"{limit / 2**20:.0f}: take fewer examples or layers, or pool them"
        )


def _stacked(parts: list[np.ndarray], layer: Layer) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) != 1:
        raise Refused(f"layer {layer} gives batches of different shapes {sorted(shapes)}: pool them, or pad the data")
    return np.concatenate(parts)
