"""Brackets around an inner stage: in an adapter that is merged at the end, or through one vector added to the input.

A bracket opens the model, runs the inner stage in a scope of its own, closes the model and restores the outer scope.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Case, Key, Refused, Stage
from expunge.registry import did_you_mean, need_extra
from expunge.scope import Scope, edit

ADAPTER = "default"
"""What peft calls the adapter that it attaches."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv:2106.09685): weight + (alpha / rank) B A, A drawn from the run's key, B zero at first.

    Args:
        rank: of the change of each weight, >= 1.
        alpha: scale of the change, > 0; the factor is alpha / rank.
        targets: names or shell-style patterns of layers, matched against the whole name or its end ("q_proj"). By
            default every linear and convolution layer whose weight is in scope and is used in one place only.

    Raises:
        Refused: for a rank or scale out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise Refused(f"LoRA: rank must be at least 1, found {self.rank}")
        if not self.alpha > 0:
            raise Refused(f"LoRA: alpha must be a positive number, found {self.alpha}")

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer to adapt. A tied or shared weight is left out: its adapter would act in one place only."""
        places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        able = {
            name: layer
            for name, layer in model.named_modules()
            if name and _adaptable(layer) and places[id(layer.weight)] == 1 and f"{name}.weight" in scope
        }
        found = dict(able) if not self.targets else {}
        for pattern in self.targets:
            hits = {
                n: layer
                for n, layer in able.items()
                if any(fnmatch.fnmatchcase(n, p) for p in (pattern, f"*.{pattern}"))
            }
            if not hits:
                raise Refused(
                    f"LoRA target {pattern!r} matches no linear or convolution layer in scope that is used in one "
                    f"place only{did_you_mean(pattern, able)}; there are {', '.join(list(able)[:5]) or 'none'}"
                )
            found.update(hits)
        if not found:
            raise Refused(
                "the model has no linear or convolution layer in scope that is used in one place only: an adapter has "
                "nothing to attach to"
            )
        return found


def _adaptable(layer: Any) -> bool:
    """Exact types: a subclass may use its weight in a way of its own, as the output of MultiheadAttention does."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1
    return type(layer) is nn.Linear or (
        type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers")
    )


def in_adapter(adapter: LoRA, inner: Stage) -> InAdapter:
    """Any method in an adapter: ``in_adapter(LoRA(8), npo(beta=0.1))``. See ``InAdapter``."""
    return InAdapter(adapter, inner)


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
        adapter: which adapter, from ``LoRA``.
        inner: what to run.

    Raises:
        Refused: where no layer can be adapted, or the model has adapters already.
        MissingExtra: where peft is not installed.
    """

    adapter: LoRA
    inner: Stage
    provides: tuple[str, ...] = field(default=("teacher:original",), init=False, repr=False)

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        with _attached(self.adapter, case, key.at("adapter")) as layers:
            off = AdapterOff(case.model, tuple(layers.values()))
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
            merged = {f"{name}.weight": _merged(layer) for name, layer in layers.items()}
        kept = {name: teacher for name, teacher in done.teachers.items() if teacher is not off}
        return edit(replace(done, scope=case.scope, teachers=kept), merged)


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
def _attached(adapter: LoRA, case: Case, key: Key) -> Iterator[dict[str, Any]]:
    """name -> peft's layer, in place of the model's own; structure, attributes and flags are restored."""
    peft = need_extra("peft", "llm", "in_adapter")
    model = case.model
    if hasattr(model, "peft_config"):
        raise Refused("the model has adapters already: merge or remove them before in_adapter")
    own = adapter.layers(model, case.scope)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="|".join(re.escape(name) for name in own),
    )
    device = runtime.device_of(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft corrects the orientation of a Conv1D and says so
            peft.inject_adapter_in_model(config, model, ADAPTER)
        layers = {name: model.get_submodule(name) for name in own}
        for name, layer in layers.items():
            _begin(layer, key.at(name))
            mask = case.scope.mask(f"{name}.weight", own[name].weight)
            if mask is not None:
                _act_through(layer, mask)
        yield layers
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
        if hasattr(model, "peft_config"):
            del model.peft_config
        _restore_flags(flags)


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _begin(layer: Any, key: Key) -> None:
    """B = 0 and A uniform on +-1/sqrt(fan-in), a function of the run's key: peft draws from the global stream."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    bound = down[0].numel() ** -0.5
    with torch.no_grad():
        down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=key.generator()))
        up.zero_()


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
    adapters = {id(p) for layer in layers.values() for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
    names = tuple(name for name, p in model.named_parameters() if id(p) in adapters)
    return Scope(dict.fromkeys(names, True), names)


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
