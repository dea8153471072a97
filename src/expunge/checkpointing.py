"""A bracket that keeps only the inputs of a model's blocks and computes the blocks again when it differentiates."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from expunge.core import Case, Refused, Stage
from expunge.registry import did_you_mean


def with_checkpointing(inner: Stage, blocks: tuple[str, ...] = ()) -> WithCheckpointing:
    """Trade time for memory around any stage: ``with_checkpointing(in_adapter(LoRA(8), npo()))``."""
    return WithCheckpointing(inner, blocks)


@dataclass(frozen=True)
class WithCheckpointing:
    """Run a stage with gradient checkpointing: activations inside a block live only while it is differentiated.

    The same gradients to rounding, for about one more forward pass of the blocks. It works in eval mode, where the
    switch of transformers does nothing (and where ``Descend`` trains by default), and with adapters in blocks whose
    inputs need no gradient, because the embeddings are frozen: the reentrant form, which finds no gradient there, is
    not used. Nothing of the model changes but its speed. Rows that the meter counts are rows that enter the model, so
    they stay the same. Not for an objective that differentiates a gradient.

    Args:
        inner: what to run.
        blocks: names or shell-style patterns of modules. By default what stands in the model's lists of modules, the
            outermost of them: the layers of a transformer.

    Raises:
        Refused: where there is no such block.
    """

    inner: Stage
    blocks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """That of the inner stage: the weights come out the same."""
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    def __call__(self, case: Case) -> Case:
        with _recomputed(self.find(case.model)):
            return self.inner(case)

    def find(self, model: nn.Module) -> list[nn.Module]:
        """The modules to compute twice."""
        named = dict(model.named_modules())
        if not self.blocks:
            found = _listed(named)
            if not found:
                raise Refused("the model has no list of blocks to checkpoint: name them with blocks=")
            return found
        hits: dict[str, nn.Module] = {}
        for pattern in self.blocks:
            more = {name: m for name, m in named.items() if name and fnmatch.fnmatchcase(name, pattern)}
            if not more:
                raise Refused(f"no module of the model is called {pattern!r}{did_you_mean(pattern, named)}")
            hits.update(more)
        return _outermost(hits)


def _listed(named: dict[str, nn.Module]) -> list[nn.Module]:
    lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return _outermost({name: m for name, m in named.items() if name.rpartition(".")[0] in lists and "." in name})


def _outermost(named: dict[str, nn.Module]) -> list[nn.Module]:
    """Each once, and none that stands inside another."""
    inside = {id(part) for module in named.values() for part in module.modules() if part is not module}
    return list({id(module): module for module in named.values() if id(module) not in inside}.values())


@contextlib.contextmanager
def _recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """The blocks as a subclass of what they are. (A patched attribute would still point here in a copy of the model.)"""
    kinds: list[Any] = [type(block) for block in blocks]
    try:
        for block, kind in zip(blocks, kinds, strict=True):
            block.__class__ = _recomputing(kind)
        yield
    finally:
        for block, kind in zip(blocks, kinds, strict=True):
            block.__class__ = kind


@functools.cache
def _recomputing(kind: Any) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        for cache in ("past_key_values", "layer_past"):  # the second pass would append to it again
            if kwargs.get(cache) is not None:
                kwargs[cache] = None
        run = functools.partial(kind.forward, self, **kwargs)
        return checkpoint(run, *args, use_reentrant=False)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})
