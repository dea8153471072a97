"""ModHiFi-U (Kashyap et al., NeurIPS 2025): take out the input channels that make up the layers' outputs on a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from expunge.core import Case, Grads, Key, Stage
from expunge.fidelity import Contributions, between, contributions, factors, ranked, sample, weights_of
from expunge.guarded import guarded_edit
from expunge.registry import AtLeastOne, Range, Share, method
from expunge.scope import edit


@method(
    paper="arXiv:2511.19566",
    tasks=("classification", "regression"),
    needs={"forget"},
    dose="strength",
    reason="the code that its authors announce could not be had, nor a number of theirs; held to its formulas",
    cost={
        "forward": "(strength > 0) * (min(samples, n_forget) + contrast * min(samples, n_retain))",
        "backward": "0",
    },
    departures={
        "source": "after the abstract and the definition of fidelity: neither the paper's thresholds nor its code could be read",
        "contrast": "channels are ranked by how much more they say of the forget than of the retain data, where there are "
        "any, so that what every class needs is kept; the paper, as far as read, looks at the forget data alone",
        "ends": "the first and the last layer are left alone by default, without which small networks collapse",
        "guard": "strength is lowered until the retain loss keeps its bound, which reads labels; rise=None has no guard",
        "contract:adapter_moves": "it scales channels of the model's own layers, which an adapter leaves as they are",
    },
)
def modhifi_u(
    *,
    strength: Share = 1.0,
    fidelity: Share = 0.7,
    contrast: bool = True,
    ends: bool = False,
    samples: AtLeastOne = 512,
    rise: Annotated[float | None, Range(0, 1)] = 0.15,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Shrink, in every linear and convolutional layer, the weights that read the input channels which the forget data live on.

    Forward passes alone: no gradient, no loss, and no label, except by the guard. Channels, not weights, go, so what shares
    a channel with the forget data suffers; where classes share all their channels little can be forgotten without harm.
    It does not promise that what is left could not be read from the other channels, which still carry it.

    Formula: Y = sum_c A_c; F(S) = 1 - min_delta E|Y - sum_{c in S} delta_c A_c|^2 / E|Y|^2 on D_f; S is the shortest
    beginning with F(S) >= fidelity of the channels with F_f({c}) - F_r({c}) > 0, highest first; W_c <- (1 - strength) W_c
    for c in S.

    Args:
        strength: dose, in [0, 1]; 0 changes nothing, 1 takes the channels out wholly.
        fidelity: share of a layer's output on the forget data that the channels taken out must make up, in [0, 1].
        contrast: whether to rank by the difference to the retain data, where the request has any.
        ends: whether the first and the last layer that the model calls are edited too.
        samples: forget, and retain, examples looked at, at most, >= 1.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1]; None does not look.
        chunk: examples per pass, >= 1; the result does not depend on it, to rounding.

    Raises:
        Refused: where no layer is left to edit.
    """
    return _Take(float(strength), float(fidelity), contrast, ends, samples, rise, chunk)


@dataclass(frozen=True)
class _Take:
    strength: float
    fidelity: float
    contrast: bool
    ends: bool
    samples: int
    rise: float | None
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.strength == 0:
            return replace(case, rng=rng)
        at = self._edits(case, key)
        if self.rise is None:
            edit(case, at(self.strength))
        else:
            guarded_edit(case, at, self.strength, key, name="strength", rise=self.rise)
        return replace(case, rng=rng)

    def _edits(self, case: Case, key: Key) -> Callable[[float], Grads]:
        """strength -> new weights."""
        layers, taken = self._taken(case, key)
        weights = weights_of(case, layers)
        count = sum(len(chosen) for chosen in taken.values())
        case.meter.history.append({"channels": float(count), "of": float(sum(len(x.gram) for x in layers.values()))})
        if count == 0:
            case.meter.note(
                "no channel was chosen, nothing changed: none says more of the forget than of the retain data"
            )

        def at(strength: float) -> Grads:
            found = {name: factors(len(layers[name].gram), chosen, 1.0 - strength) for name, chosen in taken.items()}
            return {
                name: layers[name].times(weights[name], values) for name, values in found.items() if len(taken[name])
            }

        return at

    def _taken(self, case: Case, key: Key) -> tuple[dict[str, Contributions], dict[str, Tensor]]:
        """(layers that are edited, weight -> the channels to take out)."""
        forget = sample(case.request.data("forget"), self.samples, key.at("forget"))
        layers = between(contributions(case, forget, self.chunk, key.at("passes")), self.ends)
        scores = {name: one.alone for name, one in layers.items()}
        if self.contrast and case.request.retain is not None:
            retain = sample(case.request.retain, self.samples, key.at("retain"))
            kept = contributions(case, retain, self.chunk, key.at("passes"))
            scores = {name: score - kept[name].alone for name, score in scores.items()}
        return layers, {name: one.smallest(ranked(scores[name]), self.fidelity) for name, one in layers.items()}
