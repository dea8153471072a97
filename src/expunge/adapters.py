"""Carriers: what a method may train in place of the weights themselves. Settings only; ``wrap.in_adapter`` runs them.

Each leaves the model's function as it is until it is trained, and is a change of the weight that can be merged.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, get_type_hints

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.adapter_layers import Change, Pairs, able_layers, chosen, matrix_of, quantised, replace_layers
from expunge.core import Key, Refused, require
from expunge.registry import check_setting, did_you_mean, find, need_extra
from expunge.scope import Scope
from expunge.spectral_adapters import SST, SVFit, WeLore

ADAPTER = "default"
"""What peft calls the adapter that it attaches."""


class Carrier(Protocol):
    """What ``in_adapter`` asks of a carrier.

    Attributes:
        as_peft: whether what it learns can be written as peft writes adapters.
        targets: names or patterns of layers; empty for all that are able.
    """

    as_peft: ClassVar[bool]

    @property
    def targets(self) -> tuple[str, ...]: ...

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer to adapt."""

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Put adapted layers in place of these; returns peft's tuner, or None where they are our own."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv:2106.09685): weight + (alpha / rank) B A, A drawn from the run's key, B zero at first.

    The one carrier that can stand on a quantised layer too (QLoRA), which is never read or written.

    Args:
        rank: of the change of each weight, >= 1.
        alpha: scale of the change, > 0; the factor is alpha / rank.
        targets: names or shell-style patterns of layers, matched against the whole name or its end ("q_proj"). By
            default every linear and convolution layer whose weight is in scope and is used in one place only; in a
            model with quantised layers, those, which no scope can name.
        stabilised: the factor is alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).

    Raises:
        Refused: for a rank or scale out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    stabilised: bool = False
    as_peft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "at least 1")
        require(self.alpha > 0, self, "alpha", "a positive number")

    def __repr__(self) -> str:
        told = ", stabilised=True" if self.stabilised else ""
        return f"LoRA(rank={self.rank}, alpha={self.alpha}, targets={self.targets}{told})"

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer to adapt. A tied or shared weight is left out: its adapter would act in one place only."""
        fixed = {n: layer for n, layer in model.named_modules() if n and quantised(layer)}
        plain = able_layers(model, scope, beside_quantised=True)
        return chosen(self, fixed if fixed and not self.targets else {**plain, **fixed})

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Through peft; on quantised layers, which peft knows only from some libraries, by layers of our own."""
        if any(quantised(layer) for layer in own.values()):
            replace_layers(model, own, lambda name, layer: _thin(layer, self.rank, self.scale(), key.at(name)))
            return None
        peft = need_extra("peft", "llm", "in_adapter")
        tuner = _by_peft(model, own, peft.LoraModel, lambda names: self.config(peft, names))
        for name in own:
            _begin(model.get_submodule(name), key.at(name))
        return tuner

    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.stabilised else self.rank)

    def config(self, peft: Any, names: str | list[str], **told: Any) -> Any:
        """peft's settings."""
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            bias="none",
            use_rslora=self.stabilised,
            target_modules=names,
            **told,
        )


@dataclass(frozen=True)
class RandLoRA:
    """Full-rank change from fixed random bases (arXiv:2502.00987): weight + (alpha / rank) sum_j B_j L_j A G_j.

    A and the B_j are drawn once from the run's key and shared by all layers; the diagonals L_j (zero at first) and G_j
    are trained. A larger rank means fewer bases, so fewer numbers to train. The bases cost a product as large as the
    weight at every forward pass. Convolutions are left out: peft, whose layers these are, has none for them.

    peft pairs columns of the B_j with rows of A in an order of its own: another draw of the same law.

    Args:
        rank: of each basis, >= 1. alpha: scale, > 0; peft advises 20 times the rank.
        targets: as for ``LoRA``.
    """

    rank: int = 32
    alpha: float = 640.0
    targets: tuple[str, ...] = ()
    as_peft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "at least 1")
        require(self.alpha > 0, self, "alpha", "a positive number")

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> linear layer to adapt."""
        able = {name: layer for name, layer in able_layers(model, scope).items() if type(layer) is not nn.Conv2d}
        return chosen(self, able)

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Through peft, whose generator of the bases is seeded from the key."""
        peft = need_extra("peft", "llm", "in_adapter")
        seed = key.at("bases").seed % 2**53  # a number that every reader of JSON gives back whole
        return _by_peft(
            model, own, peft.RandLoraModel, lambda names: self.config(peft, names, projection_prng_key=seed)
        )

    def config(self, peft: Any, names: str | list[str], **told: Any) -> Any:
        """peft's settings."""
        return peft.RandLoraConfig(
            r=self.rank,
            randlora_alpha=self.alpha,
            randlora_dropout=0.0,
            bias="none",
            target_modules=names,
            **told,
        )


@dataclass(frozen=True)
class SLTrain:
    """A low-rank change and a sparse one on a support drawn once (arXiv:2406.02214): weight + (alpha / rank) B A + S.

    int(density x entries) coordinates of each weight, drawn from the run's key, are S; A is drawn, B and S are zero at
    first. The whole change is not of low rank, so peft has no form for it and it can only be merged. S is made dense
    at each forward pass.

    Departure: the paper trains B A + S from nothing, in place of a weight, with S drawn; its layer cannot be put on a
    trained one. Here the sum stands beside the frozen weight and S starts at zero.

    Args:
        rank: of B A, >= 1. alpha: scale, > 0; the factor is alpha / rank. The authors' 60M run: 128 and 32.
        density: share of the entries in S, in (0, 1).
        targets: as for ``LoRA``.
    """

    rank: int = 8
    alpha: float = 16.0
    density: float = 0.03
    targets: tuple[str, ...] = ()
    as_peft: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "at least 1")
        require(self.alpha > 0, self, "alpha", "a positive number")
        require(0 < self.density < 1, self, "density", "in (0, 1)")

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer to adapt."""
        return chosen(self, able_layers(model, scope))

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Draw A and the support of each layer from the key."""
        replace_layers(model, own, lambda name, layer: self._change(layer, key.at(name)))

    def _change(self, layer: Any, key: Key) -> Change:
        matrix = matrix_of(layer)
        entries = matrix.numel()
        drawn = torch.randperm(entries, generator=key.at("support").generator())[: int(self.density * entries)]
        support = drawn.sort().values.to(matrix.device)
        thin = _thin(layer, self.rank, self.alpha / self.rank, key)
        trained = {**dict(thin.named_parameters()), "entries": matrix.new_zeros(len(support))}
        return Change(_thin_and_sparse, trained, {**dict(thin.named_buffers()), "support": support})


def _thin_and_sparse(t: Mapping[str, Tensor]) -> Pairs:
    shape = len(t["left"]), t["right"].shape[1]
    empty = t["entries"].new_zeros(shape[0] * shape[1])
    return [(t["left"] * t["scale"], t["right"]), (empty.index_copy(0, t["support"], t["entries"]).view(shape), None)]


def _by_scale(t: Mapping[str, Tensor]) -> Pairs:
    return [(t["left"] * t["scale"], t["right"])]


def _thin(layer: Any, rank: int, scale: float, key: Key) -> Change:
    """scale B A with A uniform on +-1/sqrt(fan-in) and B zero; float32, beside any layer, quantised or not."""
    if quantised(layer):
        rows, columns, device = layer.out_features, layer.in_features, layer.weight.device
        dtype = torch.float32
    else:
        matrix = matrix_of(layer)
        (rows, columns), device, dtype = matrix.shape, matrix.device, matrix.dtype
    bound = columns**-0.5
    right = torch.empty(rank, columns).uniform_(-bound, bound, generator=key.generator())
    trained = {"left": torch.zeros(rows, rank, dtype=dtype, device=device), "right": right.to(device, dtype)}
    return Change(_by_scale, trained, {"scale": torch.tensor(scale, dtype=dtype, device=device)})


def _begin(layer: Any, key: Key) -> None:
    """B = 0 and A uniform on +-1/sqrt(fan-in), a function of the run's key: peft draws from the global stream."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    bound = down[0].numel() ** -0.5
    with torch.no_grad():
        down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=key.generator()))
        up.zero_()


def _by_peft(model: nn.Module, own: Mapping[str, Any], tuner: Any, config: Callable[[str | list[str]], Any]) -> Any:
    """Let peft put its layers in place of these; its draws do not move the global streams."""
    device = runtime.device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft corrects the orientation of a Conv1D and says so
        return tuner(model, config("|".join(re.escape(name) for name in own)), ADAPTER)


def carriers() -> dict[str, type]:
    """Command-line name -> carrier."""
    return {kind.__name__.lower(): kind for kind in (LoRA, RandLoRA, SVFit, WeLore, SLTrain, SST)}


def carrier(name: str, **settings: Any) -> Carrier:
    """The carrier called `name`, with these settings: ``carrier("lora", rank=8)``.

    Args:
        name: one of ``carriers()``.
        settings: of that carrier; ``targets`` may be one name or a list.

    Raises:
        Refused: for an unknown name or setting, with the nearest one, or a value of another type or out of range.
    """
    kind = find("adapter", name.lower(), carriers())
    known = inspect.signature(kind).parameters
    for setting, value in settings.items():
        if setting not in known:
            raise Refused(
                f"adapter {name} has no setting {setting!r}{did_you_mean(setting, known)}; it has {', '.join(known)}"
            )
        check_setting(f"adapter {name}", setting, value, get_type_hints(kind)[setting])
    if "targets" in settings:
        settings["targets"] = _names(name, settings["targets"])
    return kind(**settings)


def _names(name: str, targets: Any) -> tuple[str, ...]:
    listed = (targets,) if isinstance(targets, str) else targets
    if not isinstance(listed, (list, tuple)) or not all(isinstance(target, str) for target in listed):
        raise Refused(f"adapter {name}: targets must be names of layers, found {targets!r}")
    return tuple(listed)
