"""Which coordinates of a model may change, and nothing else may.

A Scope maps a canonical parameter name to ``True`` (all of it) or a boolean mask. An absent name is frozen.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Case, Refused

Mask = bool | Tensor


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every trainable floating parameter -> its canonical name (tied weights have several names)."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    return {
        name: canonical[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad and p.is_floating_point()
    }


@dataclass(frozen=True, eq=False)
class Scope:
    """An algebra of coordinates: ``&``, ``|``, ``~``.

    Attributes:
        masks: canonical name -> True or a boolean mask of the parameter's shape; an absent name is frozen.
        universe: every name that may be in a scope of this model, for ``~``.
    """

    masks: Mapping[str, Mask]
    universe: tuple[str, ...]

    @staticmethod
    def all(model: nn.Module) -> Scope:
        """Every floating parameter that the user left trainable."""
        names = tuple(dict.fromkeys(aliases(model).values()))
        return Scope(dict.fromkeys(names, True), names)

    @staticmethod
    def match(model: nn.Module, *patterns: str) -> Scope:
        """The parameters whose name, or any alias of it, matches one of the shell-style patterns.

        Raises:
            Refused: for a pattern that matches nothing; freezing silently would be a run that does nothing.
        """
        names = aliases(model)
        found: dict[str, Mask] = {}
        for pattern in patterns:
            hits = [canonical for alias, canonical in names.items() if fnmatch.fnmatchcase(alias, pattern)]
            if not hits:
                near = difflib.get_close_matches(pattern, names, 1)
                raise Refused(
                    f"scope pattern {pattern!r} matches no trainable parameter"
                    + (
                        f" (did you mean {near[0]!r}?)"
                        if near
                        else f"; names look like {next(iter(names), 'nothing')!r}"
                    )
                )
            found.update(dict.fromkeys(hits, True))
        return Scope(found, tuple(dict.fromkeys(names.values())))

    @staticmethod
    def top(scores: Mapping[str, Tensor], keep: float, universe: tuple[str, ...]) -> Scope:
        """The share `keep` of entries with the largest scores, ranked over all tensors at once (ties are kept)."""
        level = runtime.threshold(scores, keep)
        return Scope({name: score >= level for name, score in scores.items()}, universe)

    def __and__(self, other: Scope) -> Scope:
        masks = {name: _and(mask, other.masks[name]) for name, mask in self.masks.items() if name in other.masks}
        return Scope(masks, self.universe)

    def __or__(self, other: Scope) -> Scope:
        masks: dict[str, Mask] = dict(self.masks)
        for name, mask in other.masks.items():
            masks[name] = _or(masks[name], mask) if name in masks else mask
        return Scope(masks, self.universe)

    def __invert__(self) -> Scope:
        masks: dict[str, Mask] = {}
        for name in self.universe:
            mask = self.masks.get(name)
            if mask is None:
                masks[name] = True
            elif not isinstance(mask, bool):
                masks[name] = ~mask
        return Scope(masks, self.universe)

    def __contains__(self, name: str) -> bool:
        return name in self.masks

    def __repr__(self) -> str:
        masked = sum(not isinstance(mask, bool) for mask in self.masks.values())
        return f"Scope({len(self.masks)} of {len(self.universe)} parameters, {masked} masked)"

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that have any coordinate in scope, by canonical name."""
        return self.among(dict(model.named_parameters()))

    def among(self, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of a model's named parameters: a walk over its modules less, for who asks at every step."""
        found = {name: p for name, p in named.items() if name in self.masks}
        missing = set(self.masks) - set(found)
        if missing:
            raise Refused(f"the scope names parameters that the model does not have: {', '.join(sorted(missing)[:3])}")
        return found

    def mask(self, name: str, like: Tensor) -> Tensor | None:
        """The boolean mask of a parameter, cut and placed as the parameter is; None where all of it is in scope."""
        mask = self.masks[name]
        return None if isinstance(mask, bool) else runtime.shard_like(mask.to(like.device), like)

    def cut(self, grads: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Zero the coordinates out of scope, in place, so that conflict is measured on what will be updated."""
        for name in list(grads):
            if name not in self.masks:
                del grads[name]
                continue
            mask = self.mask(name, grads[name])
            if mask is not None:
                grads[name].mul_(mask.to(grads[name].dtype))
        return grads

    def count(self, model: nn.Module) -> int:
        """How many coordinates are in scope."""
        masks = ((p, self.masks[n]) for n, p in self.parameters(model).items())
        return sum(p.numel() if isinstance(mask, bool) else int(runtime.whole(mask).sum()) for p, mask in masks)


def _and(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool) or isinstance(b, bool):
        return b if isinstance(a, bool) else a
    a, b = _alike(a, b)
    return a & b


def _or(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool) or isinstance(b, bool):
        return True
    a, b = _alike(a, b)
    return a | b


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both masks on one device, and both cut as the one that is cut."""
    a = a.to(b.device)
    return runtime.shard_like(a, b), runtime.shard_like(b, a)


class Guarded:
    """Enforces a scope exactly over many optimizer steps, for any optimizer, with momentum and weight decay.

    Parameters out of scope are not given to the optimizer. Of a masked parameter one copy is kept, and the
    coordinates out of scope are put back after each step, so they are equal to the bit.
    """

    def __init__(self, scope: Scope, model: nn.Module):
        self.parameters = scope.parameters(model)
        self._masks = {name: mask for name, p in self.parameters.items() if (mask := scope.mask(name, p)) is not None}
        self._anchors = {name: self.parameters[name].detach().clone() for name in self._masks}

    def restore(self) -> None:
        """Put back what is out of scope."""
        for name, mask in self._masks.items():
            runtime.where(~mask, self._anchors[name], self.parameters[name].data)


def edit(case: Case, values: Mapping[str, Tensor]) -> Case:
    """Set parameters to new values, inside the Case's scope only. The one way for a method without descent to write.

    Args:
        case: its model is changed in place.
        values: canonical name -> new value, of the parameter's shape. A name out of scope is left as it is.

    Raises:
        Refused: for an unknown name, another shape, or a value that is not finite; nothing is then changed.
    """
    parameters = dict(case.model.named_parameters())
    for name, value in values.items():
        if name not in parameters:
            raise Refused(f"cannot edit {name!r}: the model has no such parameter")
        if value.shape != parameters[name].shape:
            raise Refused(
                f"cannot edit {name!r}: expected shape {tuple(parameters[name].shape)}, found {tuple(value.shape)}"
            )
        if not runtime.finite([value]):
            raise Refused(f"cannot edit {name!r}: the new value has entries that are not finite")
    with torch.no_grad():
        for name, value in values.items():
            if name in case.scope:
                parameter = parameters[name]
                value = runtime.shard_like(value, parameter)
                mask = case.scope.mask(name, parameter)
                if mask is None:
                    runtime.local(parameter.data).copy_(runtime.local(value))
                else:
                    runtime.where(mask, value, parameter.data)
    return case
