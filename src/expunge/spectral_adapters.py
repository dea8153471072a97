"""Carriers made from the singular value decomposition of each weight. Settings only, as in ``adapters``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.adapter_layers import Change, Pairs, able_layers, chosen, decomposed, matrix_of, replace_layers
from expunge.core import Key, Refused, require
from expunge.scope import Scope


@dataclass(frozen=True)
class SVFit:
    """Train the largest singular values of each weight and nothing else (arXiv:2409.05926).

    weight = U diag(s) V^T; the first `rank` entries of s are trained, U, V and the rest stay. The decomposition is in
    float32. A trained value may become negative; nothing holds it back. Weight decay pulls the values to 0, so use none
    unless that is wanted. A rate larger than LoRA's is usual: a step moves a singular value, not a weight.

    Departures: the paper picks the rank by the share of the weight's information (above 99 %) and how it measures that
    share was not found; here it is a number. The rest of the weight is not stored apart: the change is U diag(s - s_0)
    V^T beside the untouched weight, which is the same function.

    Args:
        rank: singular values trained per weight, >= 1; all of them where there are fewer.
        targets: as for ``LoRA``.
    """

    rank: int = 64
    targets: tuple[str, ...] = ()
    as_peft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "at least 1")

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer to adapt."""
        return chosen(self, able_layers(model, scope))

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Decompose each layer's weight; nothing is drawn."""
        replace_layers(model, own, lambda name, layer: self._change(layer))

    def _change(self, layer: Any) -> Change:
        u, values, vt = decomposed(layer)
        kept = {"left": u[:, : self.rank], "right": vt[: self.rank], "start": values[: self.rank]}
        return Change(_by_values, {"values": values[: self.rank]}, kept)


def _by_values(t: Mapping[str, Tensor]) -> Pairs:
    return [(t["left"] * (t["values"] - t["start"]), t["right"])]


@dataclass(frozen=True)
class WeLore:
    """Train the weights that are nearly of low rank, as two factors, and freeze the others (arXiv:2407.11239).

    The singular values of each weight are scaled to (s - min) / (max - min); the rank kept is the number at or above
    `threshold`, and a weight is trained when more than `reduction` of its values fall below it. Its factors are
    U sqrt(s) and sqrt(s) V^T over the rank kept.

    Departure: the authors throw the small values away, which compresses the model and changes what it says; here they
    stay, frozen, so that the model is the one given until it is trained. No memory is saved on the weights.

    Args:
        threshold: share of the range of singular values, in (0, 1); the authors' values for Llama-2-7b run from
            0.0225 (10 % fewer) to 0.21 (70 % fewer), 0.135 for half.
        reduction: share of a weight's rank that must be below the threshold, in [0, 1); the authors fine-tune at 0.5.
        targets: as for ``LoRA``, among the weights of low rank.
    """

    threshold: float = 0.135
    reduction: float = 0.5
    targets: tuple[str, ...] = ()
    as_peft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.threshold < 1, self, "threshold", "in (0, 1)")
        require(0 <= self.reduction < 1, self, "reduction", "in [0, 1)")

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer whose weight is nearly of low rank."""
        able = {
            name: layer
            for name, layer in able_layers(model, scope).items()
            if 0 < self.rank(values := torch.linalg.svdvals(matrix_of(layer))) < (1 - self.reduction) * len(values)
        }
        if not able:
            raise Refused(
                f"no layer in scope has more than {self.reduction:g} of its singular values below {self.threshold:g} of "
                f"their range: raise WeLore's threshold, or lower its reduction"
            )
        return chosen(self, able)

    def rank(self, values: Tensor) -> int:
        """How many singular values are kept."""
        low, high = values.min(), values.max()
        return int((((values - low) / (high - low)) >= self.threshold).sum())

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Factor each layer's weight; nothing is drawn."""
        replace_layers(model, own, lambda name, layer: self._change(layer))

    def _change(self, layer: Any) -> Change:
        u, values, vt = decomposed(layer)
        rank = self.rank(values)
        root = values[:rank].sqrt()
        left, right = u[:, :rank] * root, vt[:rank] * root[:, None]
        return Change(_by_factors, {"left": left, "right": right}, {"minus_left": -left, "first_right": right})


def _by_factors(t: Mapping[str, Tensor]) -> Pairs:
    return [(t["left"], t["right"]), (t["minus_left"], t["first_right"])]


@dataclass(frozen=True)
class SST:
    """Train every singular value and a drawn few of the singular vectors (Sparse Spectral Training, arXiv:2405.15481).

    weight = U diag(s) V^T; all of s is trained, and the columns of U and V of `rank` indices that are drawn without
    replacement with probability proportional to s. One bracket is one draw from one decomposition: the paper's rounds
    are brackets in a chain, ``chain(in_adapter(SST(8), part), in_adapter(SST(8), part))``, each of which decomposes
    and draws anew. U and V whole are kept beside the weight, so it saves optimizer state and gradients, not weights.

    Taken from the paper's abstract: what is trained, the draw, the repeated decomposition. Its gradient of U and V
    without s, and whether vectors are brought back to length 1 along the way, were not found as formulas and are left
    out: the gradients here are the plain ones, and the next bracket's decomposition brings the lengths back.

    Args:
        rank: pairs of vectors trained per weight, >= 1; all of them where there are fewer.
        targets: as for ``LoRA``.
    """

    rank: int = 8
    targets: tuple[str, ...] = ()
    as_peft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "at least 1")

    def layers(self, model: nn.Module, scope: Scope) -> dict[str, Any]:
        """name -> layer to adapt."""
        return chosen(self, able_layers(model, scope))

    def attach(self, model: nn.Module, own: Mapping[str, Any], key: Key) -> Any:
        """Decompose each layer's weight and draw its vectors from the key."""
        replace_layers(model, own, lambda name, layer: self._change(layer, key.at(name)))

    def _change(self, layer: Any, key: Key) -> Change:
        u, values, vt = decomposed(layer)
        drawn = _drawn(values, min(self.rank, len(values)), key)
        rest = torch.ones(len(values), dtype=torch.bool, device=values.device)
        rest[drawn] = False
        left, right = u[:, drawn], vt[drawn]
        kept = {"u": u[:, rest], "vt": vt[rest], "start": values[rest], "rest": rest, "drawn": drawn}
        first = {"minus_left": -(left * values[drawn]), "first_right": right}
        return Change(_by_spectrum, {"values": values, "left": left, "right": right}, {**kept, **first})


def _drawn(values: Tensor, rank: int, key: Key) -> Tensor:
    """`rank` indices in rising order, without replacement, in proportion to the values."""
    weights = values.cpu().clamp_min(float(values.max()) * 1e-12 + 1e-30)  # a weight of rank below `rank` still fills
    return torch.multinomial(weights, rank, generator=key.generator()).sort().values.to(values.device)


def _by_spectrum(t: Mapping[str, Tensor]) -> Pairs:
    moved = (t["u"] * (t["values"][t["rest"]] - t["start"]), t["vt"])
    return [moved, (t["left"] * t["values"][t["drawn"]], t["right"]), (t["minus_left"], t["first_right"])]
