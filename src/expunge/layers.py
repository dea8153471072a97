"""Which layers of a model come last, in the order in which it calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expunge.core import Case, Data, Key, Refused, only_looked_at
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
