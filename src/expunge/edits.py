"""Edits of a model that need no descent: pure formulas on tensors, and a freshly initialised model.

Nothing here writes into a Case's model: a method hands the values to ``scope.edit``, which obeys the scope.
"""

from __future__ import annotations

import contextlib
import copy as copying
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from expunge.core import Grads, Key, Refused, own_streams


def dampen(
    weights: Mapping[str, Tensor],
    forget_importance: Grads,
    all_importance: Grads,
    threshold: float,
    strength: float = 1.0,
    exponent: float = 1.0,
) -> Grads:
    """Shrink the weights that matter more to the forget data than to all data (SSD, arXiv:2308.07707, eq. 4 to 6).

    Where ``I_f > threshold * I_D``: ``w <- w * min((strength * I_D / I_f) ** exponent, 1)``; elsewhere w, to the bit.
    The inequality is strict, so an importance of zero for the forget data is never selected; a weight that matters to
    it and to nothing else (I_D = 0) becomes 0. `exponent` 0 is the identity.

    Args:
        weights: name -> Tensor.
        forget_importance, all_importance: name -> non-negative Tensor of the weight's shape, each a mean per example.
            Names that either lacks are left out of the result.
        threshold: alpha, >= 0.
        strength: lambda, >= 0; below it a selected weight keeps the share ``strength * I_D / I_f``.
        exponent: >= 0; 1 in the paper.
    """
    dampened: Grads = {}
    for name, weight in weights.items():
        if name not in forget_importance or name not in all_importance:
            continue
        forget, whole = forget_importance[name], all_importance[name]
        selected = forget > threshold * whole
        ratio = strength * whole / torch.where(selected, forget, torch.ones_like(forget))
        factor = ratio.pow(exponent).clamp_max(1.0).to(weight.dtype)
        dampened[name] = torch.where(selected, weight.detach() * factor, weight.detach())
    return dampened


def selected(forget_importance: Grads, all_importance: Grads, threshold: float) -> int:
    """How many weights ``dampen`` selects at this threshold."""
    return sum(
        int((forget > threshold * all_importance[name]).sum())
        for name, forget in forget_importance.items()
        if name in all_importance
    )


def extrapolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], dose: float) -> Grads:
    """``start + dose (end - start)``, name by name: 1 is `end`, a negative dose goes the other way (arXiv:2212.04089).

    Computed in float32 at least and rounded once, since in half precision the difference of two nearby weights keeps
    few digits. A dose of 0, and an entry that did not change, give `start` to the bit. Weights of whole numbers have no
    direction and are left out. Name a tied weight once: ``Module.named_parameters`` does.

    Args:
        start, end: name -> Tensor. A name that `end` lacks is left out of the result.
        dose: any finite number.
    """
    moved: Grads = {}
    for name, weight in start.items():
        if name in end and weight.is_floating_point():
            wide = torch.promote_types(weight.dtype, torch.float32)
            origin = weight.detach().to(wide)
            moved[name] = (origin + dose * (end[name].detach().to(wide) - origin)).to(weight.dtype)
    return moved


def reinitialise(model: nn.Module, key: Key, make: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A deep copy of `model` with fresh weights: the model as it was before anything was learnt.

    With `make`, its result. Else a model with a ``.config`` that its class can be built from (Hugging Face) is built
    anew, and any other has ``reset_parameters`` called on every module that owns parameters. Running statistics are
    reset with their module; other buffers are constants and stay. Every parameter is checked to have been set anew.
    Device, dtype, flags (``requires_grad``) and modes (``training``) are the model's; frozen weights are fresh too.

    The draws come from `key`: the global random states of torch, numpy and Python are left as they were. It does not
    promise the distribution that the user's own constructor draws from, where that does more than torch's defaults:
    give `make` then.

    Args:
        model: left untouched.
        key: of the draws; the same key gives the same weights.
        make: builds the model, untrained.

    Raises:
        Refused: when a module cannot be reset, or `make` builds another model; the message names what.
    """
    with _streams(key.seed, model if make is None else None):
        fresh = _made(model, make) if make is not None else _rebuilt(model) or _reset(model)
    return _like(fresh, model)


@contextlib.contextmanager
def _streams(seed: int, model: nn.Module | None) -> Iterator[None]:
    """Every global random stream at a start that depends on `seed`, and put back afterwards.

    Resetting happens on the CPU, so accelerators matter only to a user's own constructor.
    """
    devices = list(range(torch.cuda.device_count())) if model is None and torch.cuda.is_available() else []
    with own_streams(seed, devices):
        yield


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _made(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    fresh = make()
    if not isinstance(fresh, nn.Module):
        raise Refused(f"make returned a {type(fresh).__name__}: expected an untrained model like the one given")
    shared = {id(p) for p in model.parameters()} & {id(p) for p in fresh.parameters()}
    if shared:
        raise Refused("make returned the trained model itself, or one that shares its weights: expected a new one")
    old, new = _shapes(model), _shapes(fresh)
    if old != new:
        name = next(n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n))
        raise Refused(
            f"make returned another model: {name!r} is {_shape(new, name)} there, {_shape(old, name)} in the "
            f"trained one; expected the same names and shapes"
        )
    return fresh


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "absent"


def _rebuilt(model: nn.Module) -> nn.Module | None:
    """``type(model)(model.config)`` where that gives the same names and shapes; None otherwise."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    try:
        fresh = type(model)(copying.deepcopy(config))
    except Exception:  # a `.config` of the user's own may mean anything: resetting module by module is next
        return None
    return fresh if _shapes(fresh) == _shapes(model) else None


def _reset(model: nn.Module) -> nn.Module:
    """A copy on the CPU, every module's own ``reset_parameters`` called, children first as constructors do.

    Parameters are filled with NaN before, so that one which no module sets anew is found out.
    """
    fresh = copying.deepcopy(model).cpu()
    modules = list(fresh.named_modules())
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
        for name, module in reversed(modules):
            owned = [p for p in module.parameters(recurse=False)]
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset) and (owned or module._buffers):
                reset()
            elif owned:
                raise Refused(_cannot(model, name, module, "owns parameters and has no reset_parameters()"))
    for name, module in modules:
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                why = f"does not set its parameter {own!r} anew in reset_parameters()"
                raise Refused(_cannot(model, name, module, why))
    return fresh


def _cannot(model: nn.Module, name: str, module: nn.Module, why: str) -> str:
    where = f"module {name!r} ({type(module).__name__})" if name else f"the model itself ({type(model).__name__})"
    return f"cannot make a fresh copy of the model: {where} {why}; pass make=, which builds the model untrained"


def _like(fresh: nn.Module, model: nn.Module) -> nn.Module:
    """Give `fresh` the devices, dtypes, flags and modes of `model`."""
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in (*fresh.named_parameters(), *fresh.named_buffers()):
        if name in old:
            value.data = value.data.to(device=old[name].device, dtype=old[name].dtype)
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(old[name].requires_grad)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in fresh.named_modules():
        module.training = modes.get(name, module.training)
    return fresh
