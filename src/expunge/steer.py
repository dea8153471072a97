"""Losses on the hidden states of one block of a language model (RMU, arXiv:2403.03218), and how a block is found.

These objectives need the name of a module of the model at hand, which no default can know: they are therefore not among
the parts that are discovered, and the method ``rmu`` builds them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Case, Key, Refused, only_looked_at, require
from expunge.tasks.causal_lm import IGNORED

Tokens = Literal["attended", "answer"]
"""Which positions count: every real token, as in the paper, or those of the answer."""


@dataclass(frozen=True)
class Misdirect:
    """Push the hidden states of a block to one random vector: mean squared error per example, over tokens and width.

    The vector is `scale` times a direction with independent entries drawn from U[0, 1) and brought to unit length, so
    all of its coordinates are positive. It is a function of `seed` and the width alone: the same in every step, piece
    and process, drawn in float32 on the CPU whatever the model's precision. Padding does not count: the authors' code
    averages over it too.

    Formula: mean over the tokens t of an example, and coordinates j, of (h_tj - scale u_j)^2; weighted by tokens.

    Args:
        layer: name of the module whose output h is [b, T, d], or a tuple that begins with it.
        scale: c of the paper, >= 0, of the order of the norm of h, which differs by model and depth.
        seed: of the direction.
        tokens: "attended" or "answer".
    """

    layer: str
    scale: float = 6.5
    seed: int = 0
    tokens: Tokens = "attended"

    def __post_init__(self) -> None:
        require(self.scale >= 0, self, "scale", "at least 0")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        states = hidden(case, case.model, batch, self.layer)
        target = self.scale * direction(states.shape[-1], self.seed).to(states)
        return _mean_square(states - target, counted(case, batch, self.tokens))

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example."""
        return counted(case, batch, self.tokens).sum(1)


@dataclass(frozen=True)
class HoldStates:
    """Keep the hidden states of a block as a teacher has them: mean squared error per example, over tokens and width.

    Formula: mean over the tokens t of an example, and coordinates j, of (h_tj - h_tj of the teacher)^2; weighted by
    tokens. The teacher is passed once per step, in ``draw``.

    Args:
        layer: name of the module, as in ``Misdirect``.
        tokens: "attended" or "answer".
        teacher: name of the reference model.
    """

    layer: str
    tokens: Tokens = "attended"
    teacher: str = "original"

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the teacher's hidden states [b, T, d]."""
        with case.teacher(self.teacher) as model:
            return {**batch, "states": hidden(case, model, batch, self.layer)}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        states = hidden(case, case.model, batch, self.layer)
        return _mean_square(states - batch["states"].to(states.dtype), counted(case, batch, self.tokens))

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Tokens per example."""
        return counted(case, batch, self.tokens).sum(1)


def _mean_square(difference: Tensor, mask: Tensor) -> Tensor:
    """[b], the mean over counted tokens and over the width; the others may hold anything."""
    each = difference.square().mean(2)
    return torch.where(mask, each, torch.zeros_like(each)).sum(1) / mask.sum(1).clamp_min(1)


def direction(width: int, seed: int) -> Tensor:
    """[width] float32 of unit length, all entries positive."""
    drawn = torch.rand(width, generator=Key(seed).at("direction").generator())
    return drawn / drawn.norm()


def counted(case: Case, batch: Batch, tokens: Tokens) -> Tensor:
    """[b, T] bool, which positions of the hidden states count; rows begin with their first real token."""
    task: Any = case.task
    if not hasattr(task, "aligned"):
        raise Refused(f"hidden states by token need a language model, found task {task.name!r}: use task causal_lm")
    aligned = task.aligned(batch)
    return aligned["attention_mask"] != 0 if tokens == "attended" else aligned["labels"] != IGNORED


def mean_norm(case: Case, layer: str, tokens: Tokens, most: int = 64) -> float:
    """Mean Euclidean norm of the layer's hidden states over the tokens of up to `most` forget examples; a check."""
    data = case.request.data("forget")
    total = count = 0.0
    with torch.no_grad(), only_looked_at(case.model), case.meter.checking(), case.meter.watch(case.model):
        for batch in data.select(torch.arange(min(most, len(data)))).batches(16):
            batch = case.task.prepare(runtime.to_device(batch, runtime.device_of(case.model)), Key(0))
            mask = counted(case, batch, tokens)
            total += float(hidden(case, case.model, batch, layer).norm(dim=2)[mask].double().sum())
            count += float(mask.sum())
    return total / max(count, 1.0)


class _Reached(Exception):
    """The block has answered: what comes after it in the network need not be computed."""


def hidden(case: Case, model: nn.Module, batch: Batch, layer: str) -> Tensor:
    """[b, T, d] output of the module called `layer`, in float32 at least; the network is not run beyond it.

    Where leaving a forward pass half-way could do harm (several processes, gradient checkpointing), all of it is run.
    """
    found: list[Tensor] = []
    again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    whole = runtime.world() > 1 or again

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states = _first(output)
        if states is not None:
            found.append(states)
        if not whole:
            raise _Reached

    handle = _module_of(model, layer).register_forward_hook(keep)
    try:
        case.task.outputs(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    rows, width = counted(case, batch, "attended").shape
    if not found or found[0].ndim != 3 or found[0].shape[0] != rows or found[0].shape[1] > width:
        shape = tuple(found[0].shape) if found else "none"
        raise Refused(
            f"layer {layer!r} gives hidden states of shape {shape}: expected {(rows, width, 'd')}, one vector per token; "
            f"name a block of the model"
        )
    states = F.pad(found[0], (0, 0, 0, width - found[0].shape[1]))  # what is padding in every row reaches no model
    return states if states.dtype == torch.float64 else states.float()


def _first(output: Any) -> Tensor | None:
    """A block's hidden states: its output, or the first of a tuple."""
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    return output if isinstance(output, Tensor) else None


def _module_of(model: nn.Module, layer: str) -> nn.Module:
    """The module of that name; a wrapper (an adapter) that one model has and the other has not may prefix it."""
    names = dict(model.named_modules())
    alike = [n for n in names if n == layer or n.endswith(f".{layer}") or (n and layer.endswith(f".{n}"))]
    if not alike:
        raise Refused(
            f"the model has no layer {layer!r}; its modules are {', '.join(n for n in list(names)[1:6])}, ..."
        )
    return names[layer] if layer in names else names[max(alike, key=len)]


def blocks(case: Case) -> list[str]:
    """Names of the model's blocks in order: the longest ModuleList or Sequential whose members all give [b, T, d].

    Found by running the model on one example, without gradient; metered as a check. Empty where there is none.
    """
    model, given = case.model, set()
    named = {id(module): name for name, module in model.named_modules()}
    device = runtime.device_of(model)
    batch = runtime.to_device(case.request.data("forget").batch(torch.zeros(1, dtype=torch.int64)), device)
    batch = case.task.prepare(batch, Key(0))
    real = counted(case, batch, "attended")
    widths = (real.shape[1], int(real.sum()))  # with its padding, and without, as most models are called

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        states = _first(output)
        if states is not None and states.ndim == 3 and states.shape[0] == 1 and states.shape[1] in widths:
            given.add(id(module))

    lists = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    hooks = [module.register_forward_hook(note) for module in {id(m): m for part in lists for m in part}.values()]
    try:
        with torch.no_grad(), only_looked_at(model), case.meter.checking(), case.meter.watch(model):
            case.task.outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    good = [part for part in lists if all(id(module) in given for module in part)]
    return [named[id(module)] for module in max(good, key=len)] if good else []


def chosen_layer(case: Case, pattern: str | None, found: Sequence[str]) -> str:
    """The one module that a name or shell-style pattern means; the middle one of the `found` blocks where it is None.

    Raises:
        Refused: for a pattern that matches none or several, or no pattern and no blocks.
    """
    names = [name for name, _ in case.model.named_modules() if name]
    if pattern is None:
        if not found:
            raise Refused(
                f"no blocks were found in the model: expected a ModuleList or Sequential whose members give [examples, "
                f"tokens, width]; name the module to steer with layer=, one of {', '.join(names[:5])}, ..."
            )
        return found[len(found) // 2]
    hits = [name for name in names if name == pattern] or [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    if len(hits) != 1:
        some = f"{len(hits)} modules ({', '.join(hits[:3])}, ...)" if hits else "no module"
        like = ", ".join((found or names)[:3])
        raise Refused(f"layer {pattern!r} matches {some}: expected exactly one; names look like {like}")
    return hits[0]
