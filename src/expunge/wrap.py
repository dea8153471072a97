"""Brackets around an inner stage: in an adapter that is merged at the end, or through one vector added to the input.

A bracket opens the model, runs the inner stage in a scope of its own, closes the model and restores the outer scope.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapter_files import save_adapter
from expunge.adapter_layers import Adapted, quantised
from expunge.adapters import ADAPTER, Carrier, LoRA, carrier, carriers
from expunge.core import Case, Key, Refused, Stage
from expunge.scope import Scope, edit

__all__ = ["AdapterOff", "InAdapter", "InputVector", "LoRA", "WithInputVector", "carrier", "carriers", "in_adapter"]
__all__ += ["with_input_vector"]


def in_adapter(adapter: Carrier, inner: Stage, *, merge: bool = True, save: str | Path | None = None) -> InAdapter:
    """Any method in an adapter: ``in_adapter(LoRA(8), npo(beta=0.1))``. See ``InAdapter``."""
    return InAdapter(adapter, inner, merge, None if save is None else Path(save))


@dataclass(frozen=True)
class InAdapter:
    """Run a stage on adapter weights only, then merge them into the weights they adapt.

    Inside, the scope is the adapter; names of adapted layers change (``fc.weight`` is ``fc.base_layer.weight``), so an
    inner stage should not name weights. Afterwards scope, module structure, names and flags are the outer ones, and the
    merge obeys the outer scope to the bit: where that is masked, the adapter acts through the mask from the start, so
    merging does not change the function beyond rounding (a weight in half precision is rounded once, to its own dtype).
    Weights that no adapter covers (biases, norms, tied layers) do not move.

    With ``copy=False`` the teacher "original" is this model with its adapter off, to the bit: the model as the bracket
    found it, so after other stages no longer the caller's. It does not promise that a low-rank change can forget.

    Args:
        adapter: which carrier, from ``adapters`` or ``spectral_adapters``.
        inner: what to run.
        merge: False leaves the adapter attached: the only way on a quantised model, whose weights cannot be written.
            The names of adapted layers then stay as they are inside. Whoever holds the model can switch it off.
        save: a folder to write the adapter to as peft does, before it is merged.

    Raises:
        Refused: where no layer can be adapted, the model has adapters already, a quantised layer would have to be
            merged, or what is to be saved has no form that peft reads.
        MissingExtra: where peft is needed and not installed.
    """

    adapter: Carrier
    inner: Stage
    merge: bool = True
    save: Path | None = field(default=None, repr=False)
    provides: tuple[str, ...] = field(default=("teacher:original",), init=False, repr=False)

    @property
    def name(self) -> str:
        """What a record calls it: the inner stage, and in which adapter."""
        inner = getattr(self.inner, "name", type(self.inner).__name__)
        return f"{inner} in {type(self.adapter).__name__}"

    def __post_init__(self) -> None:
        if self.save is not None and not self.adapter.as_peft:
            raise Refused(
                f"peft has no form for an adapter of {type(self.adapter).__name__}, so it cannot be saved: leave save "
                f"out and keep the merged model"
            )

    def __repr__(self) -> str:
        kept = "" if self.merge else ", merge=False"
        return f"InAdapter(adapter={self.adapter!r}, inner={self.inner!r}{kept})"

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        with _attached(self.adapter, case, key.at("adapter")) as attached:
            self._check(attached)
            layers, off = attached.layers, AdapterOff(case.model, tuple(attached.layers.values()))
            if "original" not in case.teachers and case.meter.forward:
                case.meter.note(
                    "the teacher 'original' inside the adapter is the model as earlier stages left it: copy=False "
                    "kept no other"
                )
            teachers = {"original": off, **case.teachers}
            done = self.inner(replace(case, scope=_adapter_scope(case.model, layers), teachers=teachers, rng=rng))
            if done.model is not case.model:
                raise Refused(
                    "a stage inside in_adapter replaced the model: the adapter cannot be merged; put that stage outside"
                )
            if self.save is not None:
                save_adapter(self.save, case.model, layers, attached.tuner)
            attached.stays = not self.merge
        kept = {name: teacher for name, teacher in done.teachers.items() if teacher is not off}
        scope = case.scope if self.merge else _inside_names(case.scope, layers)
        done = replace(done, scope=scope, teachers=kept)
        for name, layer in layers.items() if self.merge else ():  # one by one: all at once were a copy of the model
            done = edit(done, {f"{name}.weight": _merged(layer)})
        return done

    def _check(self, attached: _Attached) -> None:
        """Refuse, before any work, what could not be finished."""
        fixed = [name for name, layer in attached.layers.items() if quantised(layer.base_layer)]
        if self.merge and fixed:
            raise Refused(
                f"layer {fixed[0]!r} is quantised, so an adapter cannot be merged into it: use merge=False, and save= "
                f"to keep the adapter in a folder"
            )
        if attached.masked and (self.save is not None or not self.merge):
            raise Refused(
                f"the scope masks {attached.masked[0]!r}, and an adapter that is kept apart cannot obey a mask: merge "
                f"it without save=, or put whole weights in scope"
            )

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this bracket leaves `model` in, for saved `weights` to be read into."""
        if not self.merge:
            mark = ".base_layer."
            names = dict.fromkeys(name.partition(mark)[0] for name in weights if mark in name)
            self.adapter.attach(model, {name: model.get_submodule(name) for name in names}, Key(0))
        return model


@dataclass(eq=False)
class _Attached:
    """Adapted layers by name, peft's tuner, names of layers that a mask acts on, and whether they stay."""

    layers: dict[str, Any]
    tuner: Any
    masked: list[str]
    stays: bool = False


@dataclass(frozen=True, eq=False)
class AdapterOff:
    """A teacher that is the model itself with its adapters switched off: no second copy in memory."""

    model: nn.Module
    layers: tuple[Any, ...]

    @contextlib.contextmanager
    def opened(self, case: Case) -> Iterator[nn.Module]:
        """The model with its adapters off; they and their flags are put back afterwards."""
        flags = [(p, p.requires_grad) for layer in self.layers for p in layer.parameters()]
        try:
            for layer in self.layers:
                layer.enable_adapters(False)
            yield self.model
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)
            _restore_flags(flags)


@contextlib.contextmanager
def _attached(adapter: Carrier, case: Case, key: Key) -> Iterator[_Attached]:
    """Adapted layers in place of the model's own; structure, attributes and flags are restored."""
    model = case.model
    if hasattr(model, "peft_config") or any(isinstance(module, Adapted) for module in model.modules()):
        raise Refused("the model has adapters already: merge or remove them before in_adapter")
    own = adapter.layers(model, case.scope)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    attached = None
    hook = _reached_embeddings(model)
    try:
        tuner = adapter.attach(model, own, key)
        attached = _Attached({name: model.get_submodule(name) for name in own}, tuner, [])
        for name, layer in attached.layers.items():
            mask = None if quantised(own[name]) else case.scope.mask(f"{name}.weight", own[name].weight)
            if mask is not None:
                attached.masked.append(name)
                _act_through(layer, mask)
        yield attached
    finally:
        if attached is None or not attached.stays:
            _detach(model, own)
        if hook is not None:
            hook.remove()
        _restore_flags(flags)


def _reached_embeddings(model: Any) -> Any:
    """Let frozen embeddings give what needs a gradient where the user switched on transformers' own checkpointing.

    Its reentrant form gives no gradient at all to adapters in a block none of whose inputs needs one.
    """
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return None
    if not hasattr(model, "get_input_embeddings"):
        return None

    def reach(_module: Any, _args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    return model.get_input_embeddings().register_forward_hook(reach)


def _detach(model: nn.Module, own: Mapping[str, Any]) -> None:
    for name, module in own.items():
        model.set_submodule(name, module)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _act_through(layer: Any, mask: Tensor) -> None:
    """Let the adapter of a masked weight act on the coordinates in scope only, as the merge will."""

    def masked(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        if module.disable_adapters:
            return output
        weight = module.base_layer.weight
        weight = weight + (mask * module.get_delta_weight(ADAPTER)).to(weight.dtype)
        return torch.func.functional_call(module.base_layer, {"weight": weight}, args, dict(kwargs))

    layer.register_forward_hook(masked, with_kwargs=True)


def _adapter_scope(model: nn.Module, layers: Mapping[str, Any]) -> Scope:
    """All that the adapted layers have beside the layers themselves, and nothing else."""
    own = {id(p) for layer in layers.values() for p in layer.base_layer.parameters()}
    adapters = {id(p) for layer in layers.values() for p in layer.parameters()} - own
    names = tuple(name for name, p in model.named_parameters() if id(p) in adapters)
    return Scope(dict.fromkeys(names, True), names)


def _inside_names(scope: Scope, layers: Mapping[str, Any]) -> Scope:
    """The scope under the names that weights have while the adapter is attached."""

    def inside(name: str) -> str:
        layer, _, weight = name.rpartition(".")
        return f"{layer}.base_layer.{weight}" if layer in layers else name

    return Scope({inside(n): mask for n, mask in scope.masks.items()}, tuple(map(inside, scope.universe)))


def _merged(layer: Any) -> Tensor:
    weight = layer.base_layer.weight.detach()
    return (weight + layer.get_delta_weight(ADAPTER).detach()).to(weight.dtype)


def with_input_vector(inner: Stage, shape: tuple[int, ...] | None = None) -> WithInputVector:
    """Unlearn by one learnt vector added to every input. See ``WithInputVector``."""
    return WithInputVector(inner, shape)


@dataclass(frozen=True)
class WithInputVector:
    """Freeze the weights, add one learnable vector to the model's input, and run a stage on that vector alone.

    The forget vector of arXiv:2412.16780: ``with_input_vector(Descend(forget=Margin(), retain=NLL(),
    others={"size": Norm()}, steps=100))``. The Case that comes back has an ``InputVector`` for its model, whose
    weights, at ``model.*``, are those of the caller to the bit, and the outer scope under these names. It does not
    promise erasure: whoever holds the weights can leave the vector out.

    With ``copy=False`` the teacher "original" inside is the model without the vector.

    Args:
        inner: what to run; its scope is the vector.
        shape: of the vector, which must broadcast against one example's input; that of the input by default.

    Raises:
        Refused: where the input is not one floating tensor.
    """

    inner: Stage
    shape: tuple[int, ...] | None = None
    provides: tuple[str, ...] = field(default=("teacher:original",), init=False, repr=False)

    def __call__(self, case: Case) -> Case:
        plain = case.model
        wrapped = InputVector(plain, _input_shape(case) if self.shape is None else self.shape)
        names = tuple(f"model.{name}" for name in case.scope.universe)
        without = _Without(plain)
        done = self.inner(
            replace(
                case,
                model=wrapped,
                scope=Scope({"vector": True}, ("vector", *names)),
                teachers={"original": without, **case.teachers},
            )
        )
        kept = {name: teacher for name, teacher in done.teachers.items() if teacher is not without}
        outer = Scope({f"model.{name}": mask for name, mask in case.scope.masks.items()}, names)
        return replace(done, scope=outer, teachers=kept)

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this bracket leaves `model` in, for saved `weights` to be read into."""
        return InputVector(model, tuple(weights["vector"].shape))


@dataclass(frozen=True, eq=False)
class _Without:
    """A teacher that is the model without its input vector."""

    model: nn.Module

    @contextlib.contextmanager
    def opened(self, case: Case) -> Iterator[nn.Module]:
        yield self.model


class InputVector(nn.Module):
    """A model and a vector that is added to its input: the first positional argument, else the first floating one.

    Args:
        model: any module with a floating input [b, ...].
        shape: of the vector, without the batch dimension.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.model = model
        self.vector = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says of the shifted input."""
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return self.model(args[0] + self.vector, *args[1:], **kwargs)
        name = next((n for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
        if args or name is None:
            raise Refused(
                "an input vector needs a floating input to be added to: this model's input is none (token ids?)"
            )
        return self.model(**{**kwargs, name: kwargs[name] + self.vector})


def _input_shape(case: Case) -> tuple[int, ...]:
    data = case.request.forget or case.request.retain
    column = getattr(case.task, "inputs", None)
    value = data.batch(torch.arange(1)).get(column) if data is not None and column is not None else None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise Refused(
            f"with_input_vector cannot tell the shape of the input of task {case.task.name!r}: expected one column "
            f"with a floating tensor; give shape=(...)"
        )
    return tuple(value.shape[1:])
