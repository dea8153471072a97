"""Feature reuse: what a module gave of the same input need not be computed again while its weights are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module: what went in, by which weights, what came out, and how often in and out had been written to."""

    inputs: Any
    weights: tuple[Tensor, ...]
    output: Any
    versions: tuple[int, ...]

    def by(self, module: nn.Module) -> bool:
        """Whether the module's weights are those of the call: a caller may lend it others (``functional_call``)."""
        now = tuple(module.parameters())
        return len(now) == len(self.weights) and all(a is b for a, b in zip(now, self.weights, strict=True))


class Reuse:
    """The calls of every module of a model in one forward pass, for later passes in which few parameters differ.

    A call is answered from memory where no parameter of the module, or of a module inside it, has changed, its inputs
    equal those of the same call before, to the bit, and neither they nor its output have been written to since. So a
    pass with one changed parameter computes only what stands after it. A module is called as ever where that cannot be
    told: one in train mode, one that is given an object other than tensors and plain values, or one with hooks inside.
    It holds every module's output in memory. It is right for any module that is a function of its inputs, its own
    parameters and its buffers: one that reads another module's weights must contain that module. One that is lent other
    weights for a call (an adapter that acts through a mask) is called as ever.

    Args:
        model: whose modules are watched, while recording and replaying only.
    """

    def __init__(self, model: nn.Module):
        self.modules = [m for m in model.modules() if m is not model and not isinstance(m, torch.jit.ScriptModule)]
        self.calls: dict[int, list[_Call | None]] = {}
        self.spared = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep every call made inside."""
        self.calls = {id(module): [] for module in self.modules}

        def keep(module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            inputs = (args, tuple(sorted(kwargs.items())))
            tensors, weights = _tensors(inputs), tuple(module.parameters())
            output = run(*args, **kwargs)
            after = None if tensors is None else _tensors(output)
            made = None
            if tensors is not None and after is not None:
                made = _Call(inputs, weights, output, tuple(t._version for t in (*tensors, *after)))
            self.calls[id(module)].append(made)
            return output

        with self._around(keep):
            yield

    @contextlib.contextmanager
    def replaying(self, *changed: Tensor) -> Iterator[None]:
        """Answer the calls made inside from memory, where these parameters have no part in them."""
        gone = {id(parameter) for parameter in changed}
        touched = {id(m) for m in self.modules if any(id(p) in gone for p in m.parameters())}
        count: dict[int, int] = {}

        def answer(module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            number = count[id(module)] = count.get(id(module), -1) + 1
            made = self.calls.get(id(module), [])
            call = made[number] if number < len(made) else None
            if call is None or id(module) in touched or not _quiet(module) or not self._fresh(call):
                return run(*args, **kwargs)
            if not call.by(module) or not _equal(call.inputs, (args, tuple(sorted(kwargs.items())))):
                return run(*args, **kwargs)
            self.spared += 1
            for inner in module.modules():  # their calls are not made, and those to come must keep their numbers
                if inner is not module:
                    count[id(inner)] = count.get(id(inner), -1) + self._inside(module, inner, number)
            return call.output

        with self._around(answer):
            yield

    def _inside(self, module: nn.Module, inner: nn.Module, number: int) -> int:
        """How often `inner` was called by one call of `module`; by all calls alike, or numbers would only mismatch."""
        outer = len(self.calls[id(module)])
        return len(self.calls.get(id(inner), [])) // outer if outer else 0

    @staticmethod
    def _fresh(call: _Call) -> bool:
        tensors = (*(_tensors(call.inputs) or ()), *(_tensors(call.output) or ()))
        return tuple(t._version for t in tensors) == call.versions

    @contextlib.contextmanager
    def _around(self, call: Callable[..., Any]) -> Iterator[None]:
        """Every module's forward through `call`; what they had of their own is put back."""
        own = [(module, module.__dict__.get("forward")) for module in self.modules]
        for module in self.modules:
            module.__dict__["forward"] = _through(call, module, module.forward)
        try:
            yield
        finally:
            for module, before in own:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before


def _through(call: Callable[..., Any], module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(module, run, args, kwargs)


def _quiet(module: nn.Module) -> bool:
    """In eval mode, with no hook inside that would not be called."""
    inside = (m for m in module.modules() if m is not module)
    return not any(m.training for m in module.modules()) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in inside
    )


def _tensors(tree: Any) -> list[Tensor] | None:
    """The tensors of a nest of plain values; None where there is anything else."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, PLAIN):
        return []
    if not isinstance(tree, (tuple, list, Mapping)):
        return None
    found: list[Tensor] = []
    for value in tree.values() if isinstance(tree, Mapping) else tree:
        inner = _tensors(value)
        if inner is None:
            return None
        found += inner
    return found


def _equal(a: Any, b: Any) -> bool:
    """Whether two nests hold the same values, to the bit."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _same(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, PLAIN) and a == b


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    try:
        return bool(torch.equal(a, b))
    except RuntimeError:  # one of a batched pass, whose numbers cannot be looked at
        return False
