"""ModHiFi-P (Kashyap et al., NeurIPS 2025): keep the input channels that make up the layers' outputs, and rescale them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from expunge.core import Case, Grads, Stage
from expunge.data.joined import joined
from expunge.fidelity import Contributions, between, contributions, factors, ranked, sample, weights_of
from expunge.guarded import guarded_edit
from expunge.registry import AtLeastOne, Range, Share, method
from expunge.scope import Scope, edit

_ALL = "min(samples, n_forget + n_retain) if on == 'all' else min(samples, n_retain)"


@method(
    paper="arXiv:2511.19566",
    tasks=("classification", "regression"),
    needs={"forget", "retain"},
    dose="lost",
    reason="the code that its authors announce could not be had, nor a number of theirs; held to its formulas",
    cost={"forward": f"(lost > 0) * ({_ALL})", "backward": "0"},
    departures={
        "source": "after the abstract and the definition of fidelity: neither the paper's shares nor its code could be read",
        "zero": "channels are set to 0 and stay in the model, so that it keeps its shape and is no faster",
        "ends": "the first and the last layer are left alone by default, without which small networks collapse",
        "guard": "the fidelity lost is lowered until the retain loss keeps its bound, which reads labels; rise=None has none",
        "contract:adapter_moves": "it scales channels of the model's own layers, which an adapter leaves as they are",
    },
)
def modhifi_p(
    *,
    lost: Share = 0.05,
    on: Literal["all", "retain"] = "all",
    rescale: bool = True,
    ends: bool = False,
    samples: AtLeastOne = 512,
    rise: Annotated[float | None, Range(0, 1)] = 0.15,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Keep, in every linear and convolutional layer, the fewest input channels that still make up its output; set the rest to 0.

    The twin of modhifi_u: forward passes alone, no gradient, no loss, and no label, except by the guard. What is pruned is
    out of scope from then on, so that a method that follows leaves it at 0 to the bit. All layers are measured on the
    model as it was. It does not promise that anything is forgotten: that is so as far as only the forget data needed what
    went; run a method after it, ``chain(modhifi_p(), finetune())``.

    Formula: S is the shortest beginning with F(S) >= 1 - lost of the channels, highest F({c}) first (F as in modhifi_u);
    W_c <- delta_c W_c for c in S with delta = argmin E|Y - sum_{c in S} delta_c A_c|^2, and 0 elsewhere.

    Args:
        lost: dose, the share of a layer's output that may go, in [0, 1]; 0 changes nothing.
        on: what the output must be kept on: "all" data, forget included, as in the paper, or the "retain" data, so that
            what only the forget data need goes too.
        rescale: whether to make up for what went by delta; else what is kept is as it was, to the bit.
        ends: whether the first and the last layer that the model calls are edited too.
        samples: examples looked at, at most, >= 1.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1]; None does not look.
        chunk: examples per pass, >= 1; the result does not depend on it, to rounding.

    Raises:
        Refused: where no layer is left to edit.
    """
    return _Keep(float(lost), on, rescale, ends, samples, rise, chunk)


@dataclass(frozen=True)
class _Keep:
    lost: float
    on: Literal["all", "retain"]
    rescale: bool
    ends: bool
    samples: int
    rise: float | None
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.lost == 0:
            return replace(case, rng=rng)
        data = case.request.data("retain")
        data = joined(case.request.data("forget"), data) if self.on == "all" else data
        found = contributions(case, sample(data, self.samples, key.at("data")), self.chunk, key.at("passes"))
        layers = between(found, self.ends)
        weights = weights_of(case, layers)
        if self.rise is None:
            edit(case, self._at(layers, weights)(self.lost))
            taken = self.lost
        else:
            taken = guarded_edit(case, self._at(layers, weights), self.lost, key, name="lost", rise=self.rise)
        kept = {name: self._kept(one, taken) for name, one in layers.items()}
        count, whole = sum(map(len, kept.values())), sum(len(one.gram) for one in layers.values())
        case.meter.history.append({"channels": float(whole - count), "of": float(whole)})
        return replace(case, rng=rng, scope=case.scope & _left(case, layers, kept))

    def _at(self, layers: dict[str, Contributions], weights: dict[str, Tensor]) -> Callable[[float], Grads]:
        """share lost -> new weights."""

        def at(lost: float) -> Grads:
            found = {}
            for name, one in layers.items():
                chosen = self._kept(one, lost)
                if len(chosen) == len(one.gram):
                    continue
                values: Tensor | float = one.compensation(chosen) if self.rescale else 1.0
                found[name] = one.times(weights[name], factors(len(one.gram), chosen, values, 0.0))
            return found

        return at

    def _kept(self, one: Contributions, lost: float) -> Tensor:
        """The channels that stay; all of them where nothing may be lost, or the layer says nothing at all."""
        everything = torch.arange(len(one.gram), device=one.gram.device)
        order = ranked(one.alone, -1.0)
        return one.smallest(order, 1.0 - lost) if lost > 0 and float(one.gram.sum()) > 0 else everything


def _left(case: Case, layers: dict[str, Contributions], kept: dict[str, Tensor]) -> Scope:
    """All but the weights that read a channel that went."""
    cut: dict[str, bool | Tensor] = dict.fromkeys(case.scope.masks, True)
    for name, weight in weights_of(case, layers).items():
        one = layers[name]
        if len(kept[name]) < len(one.gram):
            cut[name] = one.times(torch.ones_like(weight), factors(len(one.gram), kept[name], 1.0, 0.0)) > 0
    return Scope(cut, case.scope.universe)
