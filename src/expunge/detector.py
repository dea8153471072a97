"""Is this input of the kind that was to be forgotten? Distances to its examples, a one-class machine, a soft weight (O3).

Fitted by scikit-learn, kept as tensors: a linear one-class machine is one number per layer. Nothing is pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Key, Refused, own_streams

FEWEST = 5
"""Examples that a detector needs: four to fit, one to hold out."""
COSINE = 1000.0
"""What the largest cosine is multiplied with in a layer's score, as in the authors' code."""


class Likeness(nn.Module):
    """How much a pooled state is like those of a set: -1/2 Mahalanobis distance squared + 1000 largest cosine.

    Both terms are HIGHER for what is like the set. The paper and its release subtract the cosine, so that there one term
    rises and the other falls.

    Args:
        mean: [d]. precision: [d, d], inverse of a shrunk covariance. bank: [n, d], the set's states at unit length.
    """

    def __init__(self, mean: Tensor, precision: Tensor, bank: Tensor):
        super().__init__()
        for name, value in (("mean", mean), ("precision", precision), ("bank", bank)):
            self.register_buffer(name, value.contiguous())

    def forward(self, states: Tensor) -> Tensor:
        """[b] from pooled states [b, d]."""
        mean, precision, bank = (self.get_buffer(name) for name in ("mean", "precision", "bank"))
        states = states.to(mean.dtype)
        away = states - mean
        distance = ((away @ precision) * away).sum(1)
        nearest = (F.normalize(states, dim=1) @ bank.T).amax(1)
        return COSINE * nearest - 0.5 * distance


def likeness(states: Tensor) -> Likeness:
    """Of a set's pooled states [n, d]; the covariance is shrunk (Ledoit and Wolf), so that it has an inverse at any n."""
    from sklearn.covariance import LedoitWolf

    states = states.detach().cpu().double()
    fitted = LedoitWolf().fit(states.numpy())
    shrunk = torch.from_numpy(fitted.covariance_)
    ridge = torch.finfo(torch.float32).eps * float(shrunk.trace()) / len(shrunk)  # for a set without any spread
    precision = torch.linalg.inv(shrunk + max(ridge, 1e-12) * torch.eye(len(shrunk), dtype=shrunk.dtype))
    return Likeness(states.mean(0), precision, F.normalize(states, dim=1))


def soft_weight(score: Tensor, known: Tensor, held: Tensor, spread: Tensor, offset: Tensor) -> Tensor:
    """w in (0, 1) from a one-class score: near 1 about the scores of the known examples, small far from them.

    F is the distribution function of two Gaussians of equal weight with means `known` and `held` and the one standard
    deviation `spread`; x_0 is the middle of the means, and F(2 x_0 - x) = 1 - F(x).

    Formula: c = 1 - max(F(x), F(2 x_0 - x)) + min(F(x), F(2 x_0 - x)); w = sigmoid(10 c - offset).

    It falls on both sides, so an example that scores higher than any known one is let off as well. At the published
    offset of 2 it is 0.9997 in the middle and never below 0.119: even what is nothing like the forget data keeps that
    much of the adapter. The authors' release replaces it by steps (above 0.9 -> 1.2; 0.3 to 0.4 as it is; else 0).
    """
    root = spread * math.sqrt(2)
    tail = 0.25 * (torch.erfc((score - known) / root) + torch.erfc((score - held) / root))
    head = 0.25 * (torch.erfc((known - score) / root) + torch.erfc((held - score) / root))
    return torch.sigmoid(10 * (1 - torch.maximum(head, tail) + torch.minimum(head, tail)) - offset)


class Detector(nn.Module):
    """Pooled states per layer -> a weight per example: likeness per layer, one-class score, soft weight.

    Args:
        layers: one ``Likeness`` per layer.
        direction: [L] float64, the one-class machine's normal; its score is direction . likenesses.
        curve: [4] float64: mean score of the known examples, of those held out, their spread, and the offset.
    """

    def __init__(self, layers: Sequence[Likeness], direction: Tensor, curve: Tensor):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.register_buffer("direction", direction)
        self.register_buffer("curve", curve)

    def likenesses(self, states: Sequence[Tensor]) -> Tensor:
        """[b, L]."""
        return torch.stack([layer(part) for layer, part in zip(self.layers, states, strict=True)], 1)

    def score(self, states: Sequence[Tensor]) -> Tensor:
        """[b], higher for what is like the known examples; what scikit-learn calls ``score_samples``."""
        return self.likenesses(states) @ self.get_buffer("direction")

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """[b], how far the adapters open."""
        known, held, spread, offset = self.get_buffer("curve")
        return soft_weight(self.score(states), known, held, spread, offset)

    @staticmethod
    def shaped(weights: Mapping[str, Tensor], prefix: str) -> Detector:
        """A detector of zeros with the shapes of saved `weights`, to be read into."""
        count = 1 + max(int(n.split(".")[3]) for n in weights if n.startswith(f"{prefix}layers."))
        layers = [
            Likeness(*(torch.zeros_like(weights[f"{prefix}layers.{i}.{n}"]) for n in ("mean", "precision", "bank")))
            for i in range(count)
        ]
        return Detector(layers, *(torch.zeros_like(weights[f"{prefix}{n}"]) for n in ("direction", "curve")))


def fit(states: Sequence[Tensor], key: Key, held: float, nu: float, offset: float) -> Detector:
    """A detector of the examples whose pooled states [n, d], per layer, are given.

    Args:
        states: one [n, d] per layer.
        key: of the choice of the examples held out.
        held: share held out, whose scores make the second Gaussian and the spread of both, in (0, 1).
        nu: share of the known examples that the one-class machine may leave outside, in (0, 1].
        offset: of ``soft_weight``.

    Raises:
        Refused: for fewer than five examples.
    """
    from sklearn.svm import OneClassSVM

    number = len(states[0])
    if number < FEWEST:
        raise Refused(f"a detector needs at least {FEWEST} forget examples, found {number}: give more, or no gate")
    device = states[0].device
    order = torch.randperm(number, generator=key.generator())
    out = min(max(1, round(held * number)), number - 4)
    away, known = order[:out], order[out:]
    rows = [part.detach().cpu() for part in states]
    layers = [likeness(part[known]) for part in rows]
    blank = Detector(layers, torch.zeros(len(layers), dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    table = blank.likenesses([part[known] for part in rows]).numpy()
    with own_streams(key.seed):  # scikit-learn draws a seed from numpy's global stream, which changes nothing here
        machine = OneClassSVM(nu=nu, kernel="linear").fit(table)
    direction = torch.from_numpy(machine.coef_[0].copy())
    done = Detector(layers, direction, blank.get_buffer("curve"))
    first, second = (done.score([part[chosen] for part in rows]) for chosen in (known, away))
    least = 1e-6 * float(first.mean().abs()) + 1e-12  # one example held out, or alike ones, have no spread of their own
    spread = max(float(second.std(correction=0)), float(first.std(correction=0)) if out < 2 else 0.0, least)
    curve = torch.tensor([float(first.mean()), float(second.mean()), spread, offset], dtype=torch.float64)
    return Detector(layers, direction, curve).to(device)
