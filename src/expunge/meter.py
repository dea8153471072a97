"""What a run has cost and recorded: rows forward, rows differentiated, seconds, peak memory, history, notes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Meter:
    """Counts the rows that enter any watched module (model and teachers), wherever the call comes from.

    Pairs, samplers, teachers and inner attacks are therefore counted without anyone declaring them.

    Attributes:
        forward: rows that entered a watched module.
        backward: rows whose graph was differentiated (a second derivative counts twice).
        checks: rows forwarded to watch the run (guards, realised change), not to change the model.
        history: one mapping per step.
        notes: sentences that a person should read.
        predicted: what each loop was expected to take, by ``predict``; None where nobody asked.
    """

    def __init__(self) -> None:
        self.forward = self.backward = self.checks = 0
        self.seconds = 0.0
        self._since: float | None = None
        self.history: list[dict[str, float]] = []
        self.notes: list[str] = []
        self.predicted: list[dict[str, Any]] | None = None
        self._graph_rows = 0
        self._checking = False
        self._watched: set[int] = set()

    @contextlib.contextmanager
    def watch(self, *models: nn.Module) -> Iterator[None]:
        """Count the rows that enter these modules inside the context, each once however often it is watched.

        A module that wraps a watched one (an input vector) is not counted again: its rows go through the inner one.
        """
        new = {id(model): model for model in models if self._watched.isdisjoint(map(id, model.modules()))}
        hooks = [model.register_forward_pre_hook(self._count, with_kwargs=True) for model in new.values()]
        self._watched |= new.keys()
        try:
            yield
        finally:
            self._watched -= new.keys()
            for hook in hooks:
                hook.remove()

    def _count(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = first_tensor(args)
        tensor = first_tensor(kwargs) if tensor is None else tensor
        rows = 0 if tensor is None or tensor.ndim == 0 else len(tensor)
        if self._checking:
            self.checks += rows
            return
        self.forward += rows
        if torch.is_grad_enabled():
            self._graph_rows += rows

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Count what happens inside as watching, not as work."""
        before, self._checking = self._checking, True
        try:
            yield
        finally:
            self._checking = before

    def forget_graph(self) -> None:
        """A graph is about to be built: rows of graphs that were never differentiated do not count."""
        self._graph_rows = 0

    def differentiated(self, times: int = 1) -> None:
        """The graph built since ``forget_graph`` was differentiated this many times."""
        self.backward += times * self._graph_rows

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall-clock seconds spent inside."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds, self._since = self._elapsed(), None

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def note(self, sentence: str) -> None:
        """Keep a sentence for the record, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON)."""
        names = ("forward", "backward", "checks", "history", "notes", "predicted")
        return {**{name: getattr(self, name) for name in names}, "seconds": self._elapsed()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
        if self._since is not None:
            self._since = time.perf_counter()  # the seconds up to here are in the state


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor in a nest of mappings and sequences: its length is the number of rows."""
    if isinstance(tree, Tensor):
        return tree
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    for value in values:
        found = first_tensor(value)
        if found is not None:
            return found
    return None


def peak_bytes() -> int:
    """Peak memory of this process in bytes: of the accelerator where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on every operating system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
