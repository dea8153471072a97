"""Device, processes and memory: the only place that knows whether there is one process or many.

Six functions are each the only way to do their thing, so that a run of several processes equals a run of one:
``gradient``, ``dot``, ``batch_sum``, ``pieces``, ``threshold``, ``shard_like``.

Data parallel needs no wrapper: every process draws the same logical batch, works on its own rows, and the gradients
are summed. Under FSDP2 the parameters are sharded tensors, whose gradients arrive reduced through ``backward``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expunge.core import Grads, RunFailed, map_tensors

T = TypeVar("T")
MESSAGE = 1 << 20
"""Gradient entries sent together at most."""


def world() -> int:
    """Processes that work on this run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 for a single one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one shard of a larger one (a DTensor)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The entire tensor, gathered where it is sharded (differentiable). Every process must call it."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> nn.Module:
    """Have sharded modules free their gathered weights after every look, those that keep them for a backward pass too.

    FSDP2 leaves the outermost gathered until a backward pass, and with ``reshard_after_forward=False`` all of them (what
    DeepSpeed calls ZeRO-2); after a look without gradient the model would then show plain tensors instead of shards, and
    the next forward pass would not see what was written to the shards.
    """
    if any(hasattr(module, "set_reshard_after_forward") for module in model.modules()):
        if _let_go not in model._forward_hooks.values():
            model.register_forward_hook(_let_go, always_call=True)
        _free(model)
    return model


def _let_go(model: nn.Module, _args: Any, _output: Any) -> None:
    """A forward hook: no backward pass will follow a look without gradient."""
    if not torch.is_grad_enabled():
        _free(model)


def _free(model: nn.Module) -> None:
    shards: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    for module in shards:
        module.reshard()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are (CPU for a model without any)."""
    for module in model.modules():  # as model.parameters() does, which takes its time for asking at every step
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter.device
    return torch.device("cpu")


def to_device(batch: dict, device: torch.device) -> dict:
    """Move every tensor of a batch; tensors already there are not copied."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), batch)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a plain tensor over processes."""
    if world() == 1:
        return tensor
    there = tensor.clone() if dist.get_backend() == "gloo" else tensor.to("cuda")  # NCCL knows no CPU tensors
    dist.all_reduce(there)
    return there.to(tensor.device)


class _AllSum(torch.autograd.Function):
    """A sum over processes whose gradient goes to each of them: what is computed from it is the same on all."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return all_sum(value)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def total(tensor: Tensor) -> Tensor:
    """Sum of every entry over all shards, differentiable with respect to the shards; of half precision in float32."""
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    if not sharded(tensor):
        return tensor.sum(dtype=wide)
    return _AllSum.apply(local(tensor).sum(dtype=wide) / _copies(tensor))


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a sharded tensor (more than 1 where shards are replicated too)."""
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return world() // math.prod(mesh.size(i) for i, place in enumerate(placements) if place.is_shard())


def same(value: object) -> bool:
    """Whether every process holds an equal value (anything that pickles). Every process must call it."""
    if world() == 1:
        return True
    values: list[object] = [None] * world()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def batch_sum(values: Tensor) -> float:
    """Sum of a [b] tensor over the logical batch (all processes), in float64."""
    return float(all_sum(values.detach().double().sum().reshape(1)))


def on_first(work: Callable[[], T]) -> T:
    """Do something on the first process only; its answer, or its error, is every process's."""
    if world() == 1:
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except Exception as error:  # handed to the others, or they would wait for ever
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gradient(parameters: Mapping[str, nn.Parameter]) -> Grads:
    """Take the gradients that ``backward`` left behind, summed over processes; the buffers are handed over, not copied.

    Raises:
        RunFailed: when no parameter received a gradient. A missing gradient is never turned into zeros: under sharded
            parameters that would be a run that silently trains nothing.
    """
    anywhere = [parameter.grad is not None for parameter in parameters.values()]
    if world() > 1:  # processes must agree on the names, or their collectives would not meet
        anywhere = (all_sum(torch.tensor(anywhere, dtype=torch.float64)) > 0).tolist()
    grads: Grads = {}
    for (name, parameter), some in zip(parameters.items(), anywhere, strict=True):
        if some:
            grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
    if not grads:
        raise RunFailed(
            f"no gradient reached any of the {len(parameters)} parameters in scope: expected a loss that "
            f"depends on them; widen the scope, or check that the model does not detach its output"
        )
    if world() > 1:
        for grad in grads.values():
            if sharded(grad):
                local(grad).mul_(world())  # FSDP averages over processes, a sum is wanted
        _sum_plain(grads)
    return grads


def _sum_plain(grads: Grads) -> None:
    """Sum plain gradients over processes in place of themselves; small ones share a message, which costs more than they do."""
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, grad in grads.items():
        if sharded(grad):
            continue
        if grad.numel() > MESSAGE:
            grads[name] = grad.contiguous()
            dist.all_reduce(grads[name])
        else:
            groups.setdefault((grad.dtype, grad.device), []).append(name)
    for names in groups.values():
        while names:
            together = [names.pop(0)]
            while names and sum(grads[name].numel() for name in (*together, names[0])) <= MESSAGE:
                together.append(names.pop(0))
            flat = torch.cat([grads[name].reshape(-1) for name in together])
            dist.all_reduce(flat)
            for name, part in zip(together, flat.split([grads[name].numel() for name in together]), strict=True):
                grads[name] = part.reshape(grads[name].shape)


def dot(a: Grads, b: Grads) -> float:
    """Inner product over the names that both have, accumulated in float64, over all shards."""
    names = [name for name in a if name in b]
    if not names:
        return 0.0
    total = torch.zeros((), dtype=torch.float64)
    shards = torch.zeros((), dtype=torch.float64)
    for name in names:
        value = _dot(local(a[name]), local(b[name])).cpu()
        if sharded(a[name]):
            shards += value / _copies(a[name])
        else:
            total += value
    if any(sharded(a[name]) for name in names):
        shards = all_sum(shards)
    return float(total + shards)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Float64 inner product without a float64 copy of a large tensor: float32 blocks are summed in float64."""
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    if a.numel() == 0 or a.dtype == torch.float64 or a.numel() <= 4096:
        return (a.double() * b.double()).sum()
    blocks = zip(a.split(1 << 16), b.split(1 << 16), strict=True)
    return torch.stack([x.double() @ y.double() for x, y in blocks]).sum()


def linear(*terms: tuple[float, Grads]) -> Grads:
    """sum_k c_k g_k. The first gradient's buffers are reused: its mapping must not be read afterwards."""
    (scale, total), *rest = terms
    if scale != 1.0:
        for grad in total.values():
            grad.mul_(scale)
    for coefficient, grads in rest:
        if coefficient == 0.0:
            continue
        for name, grad in grads.items():
            if name in total:
                total[name].add_(grad, alpha=coefficient)
            else:
                total[name] = grad * coefficient
    return total


def pieces(rows: int, parts: int) -> list[tuple[Tensor, Tensor]]:
    """This process's share of a logical batch, cut in `parts` pieces: (row indices, 0/1 weights) each.

    Every process gets the same number of pieces, or a collective would hang: where rows run out, a filler row of
    weight zero stands in.
    """
    per_process = math.ceil(rows / world())
    size = math.ceil(per_process / max(1, min(parts, per_process)))
    mine = torch.arange(rank(), rows, world())
    cut = []
    for start in range(0, per_process, size):
        index = mine[start : start + size]
        weight = torch.ones(len(index))
        if len(index) == 0:
            index, weight = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        cut.append((index, weight))
    return cut


def threshold(scores: Mapping[str, Tensor], keep: float) -> float:
    """The score at or above which a share `keep` of all entries lies, over every tensor and every shard.

    Exact where all scores fit on one process (they are gathered); linear-time selection, no full sort.
    """
    flat = torch.cat([whole(s.detach()).flatten() for s in scores.values()])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    count = flat.numel()
    kept = round(keep * count)
    if kept <= 0:
        return math.inf
    return float(flat.kthvalue(count - kept + 1).values)


def shard_like(mask: Tensor, parameter: Tensor) -> Tensor:
    """Cut a plain mask as the parameter is cut, so that the two can meet elementwise."""
    if not sharded(parameter) or sharded(mask):
        return mask
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    mask = mask.to(parameter.device)
    return distribute_tensor(mask, mesh, placements, src_data_rank=None)  # every process has it: nothing is sent


def where(mask: Tensor, new: Tensor, old: Tensor) -> None:
    """old <- new where the mask is set, in place, elsewhere untouched to the bit."""
    with torch.no_grad():
        kept = local(old)
        kept.copy_(torch.where(local(mask), local(new).to(kept.dtype), kept))


def _finite(tensor: Tensor) -> bool:
    """Whether every entry is finite. A finite sum has no other terms, and takes one pass; one that overflowed says nothing."""
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def finite(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> bool:
    """Whether every floating entry is a finite number, on every process."""
    values = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
    good = all(_finite(local(t)) for t in values if t.is_floating_point())
    if any(sharded(t) for t in values):  # one answer, or one process would stop and the others wait for it
        good = float(all_sum(torch.tensor([float(not good)]))) == 0
    return good
