"""Which layers of a model come last, in the order in which it calls them; what comes before them, computed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.core import Batch, Case, Data, Key, Objective, Refused, only_looked_at
from expunge.objectives import NLL
from expunge.oracle import prepared
from expunge.scope import Scope


def last_layers(case: Case, count: int) -> Scope:
    """The part of the Case's scope that lies in the last `count` of the layers that it has anything of.

    A layer is a module with a weight of two dimensions or more (linear, convolution, embedding); normalisation and what
    else is called after it, up to the next, belongs to it. The order is that of the calls of one forward pass on one
    example. A module that is called several times stands where it is called first, and so does a weight with several
    owners (an output layer tied to its embedding is no layer of its own), so that what comes before the last layers
    computes the same whatever they do. A part that is never called stands where the nearest part around it does, for that
    may read its weights; where that is the model itself, it is in no layer.

    Args:
        case: its scope bounds the result.
        count: >= 1.

    Raises:
        Refused: where the scope has fewer layers.
    """
    place = {name: number for name, number in _places(case).items() if name in case.scope}
    shape = {name: p.ndim for name, p in case.model.named_parameters()}
    layers = sorted({number for name, number in place.items() if shape[name] > 1})
    if count > len(layers):
        raise Refused(
            f"the last {count} layers are asked for, and {len(layers)} with a weight of their own are called and in scope: "
            f"expected at most that"
        )
    inside = {name: mask for name, mask in case.scope.masks.items() if place.get(name, -1) >= layers[-count]}
    return Scope(inside, case.scope.universe)


def _places(case: Case) -> dict[str, int]:
    """canonical parameter name -> when its owner is called first; absent where it is not."""
    order = _calls(case)
    names = {id(p): name for name, p in case.model.named_parameters()}
    found: dict[str, int] = {}
    for path, module in case.model.named_modules(remove_duplicate=False):
        called = _called(case.model, path, order)
        if called is None:
            continue
        for parameter in module.parameters(recurse=False):
            name = names[id(parameter)]
            found[name] = min(found.get(name, called), called)
    return found


def _called(model: nn.Module, path: str, order: dict[int, int]) -> int | None:
    """When the module at `path` is called, or the nearest one around it that is (it may read its parts' weights)."""
    while True:
        module = model.get_submodule(path)
        if id(module) in order:
            return order[id(module)]
        path = path.rpartition(".")[0]
        if not path:
            return None


def _calls(case: Case) -> dict[int, int]:
    """id of a module -> its place among the first calls of a forward pass."""
    order: dict[int, int] = {}

    def seen(module: nn.Module, _args: Any) -> None:
        order.setdefault(id(module), len(order))

    hooks: list[Any] = [module.register_forward_pre_hook(seen) for module in case.model.modules()]
    try:
        with torch.no_grad(), only_looked_at(case.model):
            case.task.nll(case.model, next(prepared(case, _example(case), 1, Key(0))))
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _example(case: Case) -> Data:
    data = case.request.retain or case.request.forget
    if data is None:
        raise Refused("the order of a model's layers is read off a forward pass, and the request has no data for one")
    return data.select([0])


COLUMN = "expunge row"
MOST_BYTES = 1 << 28
_PLAIN = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Flatten, nn.Identity, nn.Sequential, nn.LayerNorm, nn.GroupNorm),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
_PLAIN_IN_EVAL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def retain_nll(case: Case, norm_stats: Literal["frozen", "live"]) -> tuple[Case, Objective]:
    """The NLL on the retain data, and the Case to descend on it in: what only frozen layers compute is computed once.

    Of a plain ``nn.Sequential``, the layers before the first in scope say the same of an example at every step: they run
    where a batch has an example that is not known yet, and what they said is kept (256 MiB at most) for later epochs. It
    is what the whole model would have said, to rounding, as it came from another batch. Any other model runs whole; so does a
    run on data that are not in memory, which may be augmented anew at every reading, and a run that keeps checkpoints, since
    one that is resumed is to end in the same bits.

    Args:
        norm_stats: of the descent; "live" normalisation and dropout among those layers are run at every step.
    """
    plain = _PLAIN if norm_stats == "live" else (*_PLAIN, *_PLAIN_IN_EVAL)
    first = _first_in_scope(case)
    if (
        type(case.model) is not nn.Sequential
        or not 0 < first < len(case.model)
        or case.journal is not None
        or case.request.retain is None
        or not getattr(case.request.retain.source, "in_memory", False)
        or getattr(case.task, "stochastic", True)
        or getattr(case.task, "call", True) is not None
        or _listened_to(case)
        or not all(_known(module, plain) for module in case.model[:first].modules())
    ):
        return case, NLL()
    data = case.request.retain.annotate(COLUMN, torch.arange(len(case.request.retain)))
    model = _Continued(case.model[:first], case.model[first:], len(data))
    return replace(case, request=replace(case.request, retain=data)), _FromKept(model)


def _first_in_scope(case: Case) -> int:
    """Which of the model's children is the first that has anything of the scope."""
    inside = {id(p) for name, p in case.model.named_parameters() if name in case.scope}
    children = list(case.model.children())
    return next((n for n, child in enumerate(children) if any(id(p) in inside for p in child.parameters())), 0)


def _listened_to(case: Case) -> bool:
    """Whether anybody but the run, which counts rows, listens to the model as a whole."""
    hooks = (*case.model._forward_hooks.values(), *case.model._forward_pre_hooks.values())
    return any(getattr(hook, "__self__", None) is not case.meter for hook in hooks)


def _known(module: nn.Module, plain: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module gives the same for the same input, and nobody listens to it."""
    return type(module) in plain and not module._forward_hooks and not module._forward_pre_hooks


class _Continued(nn.Module):
    """A model in two parts; what the first said of a row is kept."""

    def __init__(self, before: nn.Module, after: nn.Module, count: int):
        super().__init__()
        self.before, self.after = before, after
        self.known, self.kept = torch.zeros(count, dtype=torch.bool), torch.empty(0)
        self.rows = torch.empty(0, dtype=torch.int64)

    def forward(self, input: Tensor) -> Tensor:  # named as a Sequential names it
        """The model's output of the examples in ``rows``, which are the input's."""
        rows = self.rows.cpu()
        if bool(self.known[rows].all()):
            return self.after(self.kept[self.rows])
        with torch.no_grad():
            said = self.before(input)
        size = len(self.known) * said[0].numel() * said.element_size()
        if len(said) == len(rows) and size <= MOST_BYTES:
            if not len(self.kept):
                self.kept = said.new_empty(len(self.known), *said.shape[1:])
            self.kept[self.rows], self.known[rows] = said, True
        return self.after(said)


@dataclass(frozen=True)
class _FromKept:
    """``NLL`` of a model of which a part is remembered; the rows count as the model's."""

    model: _Continued

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        self.model.rows = batch[COLUMN]
        with case.meter.watch(self.model):
            return case.task.nll(self.model, batch) / case.task.units(batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)
