"""Fisher forgetting (Golatkar et al., CVPR 2020): noise on the weights, the less the more the retain data need one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from expunge.boundary import logits_layer, whole_classes
from expunge.core import Case, Grads, Key, Stage
from expunge.curvature import expected_fisher
from expunge.guarded import guarded_edit
from expunge.overwriting import Spread
from expunge.registry import AtLeastOne, NonNegative, Positive, Share, method

SPREAD = 1e-2  # standard deviation of a row that is drawn anew, as there


@method(
    paper="arXiv:1911.04933",
    status="reproduced",
    tasks=("classification", "regression"),
    needs={"forget", "retain"},
    dose="alpha",
    cost={"forward": "n_retain + (alpha > 0 and reset)", "backward": "n_retain"},
    departures={
        "contract:cost": "that many rows for every class, or target, of the task: their number is no setting",
        "importance": "squared gradients of single examples; a released variant squares the gradient of the mean over 32",
        "last layer": "by default noise as on any other tensor; the released code caps v at 100 there, multiplies it by 10 "
        "(head_cap=100, head=10), and takes for the last layer whatever tensor has as many rows as there are classes",
        "reset": "of the classes that are forgotten wholly; the released code does it where 4,500 examples are forgotten, as "
        "a random tenth of CIFAR-10 is too, which then wipes out a class that nobody named",
        "guard": "alpha is lowered until the retain loss keeps its bound; the authors have no guard",
    },
)
def fisher_forgetting(
    *,
    alpha: NonNegative = 1e-6,
    cap: Positive = 1e3,
    rows: bool = True,
    vectors: Positive = 10.0,
    reset: bool = True,
    head: Positive | None = None,
    head_cap: Positive | None = None,
    rise: Share = 0.15,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Add Gaussian noise of variance alpha / F to every weight, F its Fisher information on the retain data.

    What the retain data do not need is overwritten by noise, whatever it holds; of forget data labels alone are read. It is one pass
    per class over the retain data: as slow as retraining where there are many classes. It does not promise that what the
    forget data left in weights that the retain data need is gone, and noise that forgets much costs utility.

    Formula: theta + sqrt(alpha v) * N(0, 1), v = min(1 / (F + 1e-8), cap), F = mean over D_r of
    sum_y p(y | x) (grad -log p(y | x))^2.

    Args:
        alpha: dose, variance of the noise at F = 1, >= 0; 0 changes nothing.
        cap: largest v, > 0.
        rows: take the mean of v over the second dimension of every tensor that has one, as released; else each weight
            has its own.
        vectors: factor on v of tensors of one dimension (biases, normalisation), > 0; 10 as released.
        reset: draw the last layer's row of every class that is forgotten wholly from N(0, 1e-4), as released: of all that
            this method does to a class, it does the most. Of no meaning for regression, and where every class is kept.
        head: factor on v of the last layer's weights and biases, and on the variance of its new rows, > 0; 10 as released.
            None treats it as any other layer.
        head_cap: largest v there, > 0, before `head`; 100 as released. None takes `cap`.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1].
        chunk: examples differentiated together, >= 1; the result does not depend on it, to rounding.

    Raises:
        Refused: with `reset`, for a classifier whose logits are not what its last linear layer gives; with `head` or
            `head_cap` for any model of which that is so, and for a task without classes.

    Published settings: alpha 1e-9 to 1e-6 (ResNet-18); users report that 1e-9 does nothing.
    """
    return _Fisher(float(alpha), Spread(cap, rows, vectors, head, head_cap), reset, rise, chunk)


@dataclass(frozen=True)
class _Fisher:
    alpha: float
    spread: Spread
    reset: bool
    rise: float
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.alpha == 0:
            return replace(case, rng=rng)
        fisher = expected_fisher(case, case.request.data("retain"), self.chunk, key.at("fisher"))
        weights = {name: p.detach().clone() for name, p in case.scope.parameters(case.model).items()}
        last = _last(case) if self.spread.apart else {}
        noise = {n: self.spread(f, n in last).sqrt() * _drawn(f, key.at("noise", n)) for n, f in fisher.items()}
        rows = self._fresh_rows(case, key.at("rows"))

        def at(alpha: float) -> Grads:
            if alpha == 0:
                return weights
            moved = {name: torch.add(w, noise[name].to(w.dtype), alpha=math.sqrt(alpha)) for name, w in weights.items()}
            for name, values in rows.items():
                for row, value in values.items():
                    moved[name][row] = value
            return moved

        taken = guarded_edit(case, at, self.alpha, key, name="alpha", rise=self.rise)
        case.meter.history.append({"alpha": taken})
        return replace(case, rng=rng)

    def _fresh_rows(self, case: Case, key: Key) -> dict[str, dict[int, torch.Tensor]]:
        """parameter of the last layer -> class -> new row, of the classes that are to be forgotten wholly."""
        forgotten = whole_classes(case) if self.reset and hasattr(case.task, "classes") else []
        if not forgotten:
            return {}
        spread = SPREAD * math.sqrt(1.0 if self.spread.head is None else self.spread.head)
        return {
            name: {row: spread * _drawn(p[row].detach(), key.at(name, row)) for row in forgotten}
            for name, p in _last(case).items()
        }


def _last(case: Case) -> dict[str, torch.nn.Parameter]:
    """The parameters of the layer that gives the logits, in scope."""
    inside = {id(p): name for name, p in case.scope.parameters(case.model).items()}
    return {inside[id(p)]: p for p in logits_layer(case).parameters() if id(p) in inside}


def _drawn(like: torch.Tensor, key: Key) -> torch.Tensor:
    """Standard normal, of the shape, type and device of `like`."""
    return torch.randn(like.shape, generator=key.generator(), dtype=torch.float64).to(like)
