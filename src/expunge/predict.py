"""What a run will take, before its first step: peak memory and seconds per step, from one step that changes nothing."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expunge.core import Refused
from expunge.meter import peak_bytes


@dataclass(frozen=True)
class Prediction:
    """What a loop was expected to take.

    Attributes:
        steps: at most; a guard may stop earlier.
        step_seconds: of one step, the optimizer's share included; checks, checkpoints and looks come on top.
        peak_bytes: of this process (of the accelerator where there is one), to be compared with ``cost.peak_bytes``.
        weights, gradients, moments, work: bytes of tensors: the model and its teachers; one gradient of what is in scope;
            the optimizer's state; the most that is alive besides during a step (activations, gradients, temporaries).
    """

    steps: int
    step_seconds: float
    peak_bytes: int
    weights: int
    gradients: int
    moments: int
    work: int

    def sentence(self) -> str:
        """For people."""
        whole = self.steps * self.step_seconds
        return (
            f"predicted: peak memory {shown(self.peak_bytes)} (weights {shown(self.weights)}, optimizer "
            f"{shown(self.moments)}, one step {shown(self.work)}), {self.step_seconds:.3g} s a step, {whole:.3g} s for "
            f"{self.steps} steps"
        )

    def describe(self) -> dict[str, Any]:
        """JSON for the record."""
        return asdict(self)


def shown(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that come to be inside and are alive, and the most of them at one time.

    Not counted: what kernels use inside and give back before they return, what the allocator keeps for later, and
    memory that is no tensor's. A view shares the memory of what it looks at.

    Args:
        known: tensors that were there before and do not count.
        shapes: count tensors on the device "meta", which have no memory, as if they had it.
    """

    def __init__(self, known: Iterable[Tensor] = (), shapes: bool = False):
        super().__init__()
        self.shapes = shapes
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._see(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what comes out."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (self.shapes or not value.is_meta):
                self._see(value)
        return out

    def _see(self, tensor: Tensor, counts: bool = True) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor without memory of its own, as a shard's wrapper
            return
        place = storage._cdata
        if place in self._alive:
            return
        size = storage.nbytes() if counts else 0

        def gone(_reference: Any) -> None:
            self.now -= size
            del self._alive[place]

        self._alive[place] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, shared memory once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.to_local().untyped_storage() if hasattr(tensor, "to_local") else tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def predict(
    steps: int,
    models: Iterable[nn.Module],
    scope: Mapping[str, nn.Parameter],
    build: Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer],
    probe: Callable[[], object],
) -> Prediction:
    """Predict a loop from two trial steps that take gradients and write nothing.

    The peak is what the process holds now (interpreter, data, model, teachers, a guard's copy), and on top of it the
    optimizer's state and the tensors of one step. It does not count what kernels use inside, what an allocator keeps of
    freed memory, batches longer than the first, looks and checks between steps that are larger than one, other stages of
    the run, nor what other processes on the same accelerator hold.

    Args:
        steps: that the loop may take.
        models: that are held: the one that changes and its teachers.
        scope: name -> parameter that changes.
        build: makes the optimizer, as ``optim``'s settings do.
        probe: takes the gradients of one step, and drops them.
    """
    held = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    before = resident()
    with Live(held) as live:
        probe()
    start = time.perf_counter()
    probe()
    seconds = time.perf_counter() - start + _update_seconds(scope, build)
    gradients = sum(p.numel() * p.element_size() for p in scope.values())
    moments, update = _optimizer_bytes(scope, build)
    work = max(live.peak, gradients + update)
    peak = max(peak_bytes(), before + moments + work)
    return Prediction(steps, seconds, peak, size_of(held), gradients, moments, work)


def resident() -> int:
    """Bytes that this process holds now: of the accelerator's where there is one; the peak where nothing else is known."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not sys.platform.startswith("linux") or not status.exists():
        return peak_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _optimizer_bytes(
    scope: Mapping[str, nn.Parameter], build: Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
) -> tuple[int, int]:
    """The optimizer's state, and the most that it needs besides while it updates: from a step on tensors without memory.

    An optimizer that looks at values cannot take such a step: two moments and one temporary are then assumed.
    """
    shapes = {name: nn.Parameter(torch.empty_like(p, device="meta")) for name, p in scope.items()}
    for parameter in shapes.values():
        parameter.grad = torch.empty_like(parameter)
    optimizer = build(shapes)
    given = [*shapes.values(), *(p.grad for p in shapes.values() if p.grad is not None)]
    try:
        with Live(given, shapes=True) as live:
            optimizer.step()
    except (RuntimeError, NotImplementedError, Refused):
        largest = max(p.numel() * p.element_size() for p in scope.values())
        return 2 * sum(p.numel() * p.element_size() for p in scope.values()), largest
    return live.now, live.peak - live.now


def _update_seconds(
    scope: Mapping[str, nn.Parameter], build: Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
) -> float:
    """Seconds of an update: that of a copy of the largest parameter, times how many of it the scope is."""
    name, largest = max(scope.items(), key=lambda item: item[1].numel())
    copy = nn.Parameter(largest.detach().clone())
    copy.grad = torch.zeros_like(copy)
    try:
        optimizer = build({name: copy})
    except Refused:  # a group that names another parameter
        return 0.0
    optimizer.step()
    start = time.perf_counter()
    optimizer.step()
    share = sum(p.numel() for p in scope.values()) / largest.numel()
    return share * (time.perf_counter() - start)
