"""Hidden states of several modules in one pass, and what is summed up of them: moments and pooled vectors.

Positions are those of the real tokens only: padding never enters a sum. A module's state is its OUTPUT, which is where
a forward hook acts; what transformers calls ``hidden_states[i]`` is the input of block i.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Batch, Case, Data, Key, Refused, eval_mode
from expunge.oracle import prepared
from expunge.steer import Tokens, blocks, counted


def first(output: object) -> Tensor | None:
    """A module's hidden states: its output, or the first of a tuple."""
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    return output if isinstance(output, Tensor) else None


@contextlib.contextmanager
def kept_states(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, after each forward pass inside, the last output of every named module; hooks are removed."""
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: object, output: object) -> None:
            states = first(output)
            if states is not None:
                found[name] = states

        return keep

    hooks = [model.get_submodule(name).register_forward_hook(keeping(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def layer_states(case: Case, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """name -> [b, T, d] output of each named module, in the order of ``task.aligned``, in float32 at least.

    Raises:
        Refused: for a module that did not run, or whose output is not one vector per token.
    """
    rows, width = counted(case, batch, "attended").shape
    with kept_states(case.model, names) as found:
        case.task.outputs(case.model, batch)
    for name in names:
        shape = tuple(found[name].shape) if name in found else ()
        if len(shape) != 3 or shape[0] != rows or shape[1] > width:
            raise Refused(
                f"layer {name!r} gives hidden states of shape {shape or 'none'}: expected {(rows, width, 'd')}, one "
                f"vector per token; name a block of the model, or its perceptron"
            )  # a task may leave out columns that are padding in every row: they come back as zeros
    return {name: wide(F.pad(found[name], (0, 0, 0, width - found[name].shape[1]))) for name in names}


def wide(states: Tensor) -> Tensor:
    """At least float32."""
    return states if states.dtype == torch.float64 else states.float()


def second_moments(case: Case, data: Data, names: Sequence[str], key: Key, tokens: Tokens) -> dict[str, Tensor]:
    """name -> [d, d] float64, sum over the counted tokens of `data` of h h^T: all that an uncentred PCA needs.

    One metered pass over the data, without gradient; states are never kept, so memory does not grow with the data.
    """
    total: dict[str, Tensor] = {}
    with torch.no_grad(), eval_mode(case.model), case.meter.watch(case.model):
        for batch in prepared(case, data, 16, key):
            mask = counted(case, batch, tokens)
            for name, states in layer_states(case, batch, names).items():
                rows = states[mask].double()
                moment = rows.T @ rows
                total[name] = total[name] + moment if name in total else moment
    return total


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """[b, d], the mean of a batch's states [b, T, d] over the tokens where `mask` [b, T] holds; others may hold anything."""
    kept = torch.where(mask[..., None], states, torch.zeros((), dtype=states.dtype, device=states.device))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(states.dtype)


def chosen_layers(case: Case, patterns: str | None, key: Key, count: int) -> list[str]:
    """The modules that shell-style patterns between commas mean; `count` blocks drawn by `key` where there are none.

    Drawn among all blocks but the last (the first of a single one), in the model's order.

    Raises:
        Refused: for a pattern that matches no module, or no pattern and no blocks.
    """
    names = [name for name, _ in case.model.named_modules() if name]
    if patterns is None:
        found = blocks(case)
        if not found:
            raise Refused(
                f"no blocks were found in the model: expected a ModuleList or Sequential whose members give [examples, "
                f"tokens, width]; name modules with layers=, of {', '.join(names[:5])}, ..."
            )
        able = found[:-1] or found
        order = torch.randperm(len(able), generator=key.generator())[:count].sort().values
        return [able[place] for place in order.tolist()]
    chosen: dict[str, None] = {}
    for pattern in (part.strip() for part in patterns.split(",")):
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise Refused(f"layers {pattern!r} matches no module of the model; names look like {', '.join(names[:3])}")
        chosen.update(dict.fromkeys(hits))
    return list(chosen)
