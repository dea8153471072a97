"""A sparse dictionary of what a layer computes: the TopK autoencoder, and the latents that belong to a class.

Architecture as in "Suppression or Deletion" (arXiv:2602.18505), after Gao et al. 2024: pre-bias, encoder without bias
and a latent bias, TopK followed by ReLU, decoder directions of norm 1, encoder starting as their transpose. Its loss,
optimiser and steps were not released; those here are ours. Dead latents are left dead: no auxiliary loss.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core import Case, Key, Refused, Request
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import Adam, Cosine
from expunge.scope import Scope
from expunge.tasks.regression import Regression


class TopKSAE(nn.Module):
    """h ~ scale (ReLU(TopK_k(E (h / scale - b) + c)) D + b), each row of D of norm 1 by construction.

    Args:
        centre: [d], where the pre-bias starts. scale: > 0, the size of what is encoded, fixed.
        latents: m, rows of the dictionary. k: latents that a token may use, 1 .. m.
        key: of the directions at the start.
    """

    scale: Tensor

    def __init__(self, centre: Tensor, scale: float, latents: int, k: int, key: Key):
        super().__init__()
        if not 1 <= k <= latents:
            raise Refused(f"a TopK autoencoder of {latents} latents needs k in [1, {latents}], found {k}")
        self.k = k
        start = nn.functional.normalize(torch.randn(latents, len(centre), generator=key.generator()), dim=1)
        self.directions = nn.Parameter(start)  # of any length: what is used is their unit vectors
        self.encoder = nn.Parameter(start.clone())
        self.latent_bias = nn.Parameter(torch.zeros(latents))
        self.pre_bias = nn.Parameter(centre.clone() / scale)
        self.register_buffer("scale", torch.tensor(float(scale)))

    @property
    def dictionary(self) -> Tensor:
        """[m, d] the decoder's directions, of norm 1."""
        return nn.functional.normalize(self.directions, dim=1)

    def linear(self, tokens: Tensor) -> Tensor:
        """[..., m] E (h / scale - b): what the published attack takes for the code."""
        return (tokens / self.scale - self.pre_bias) @ self.encoder.T

    def encode(self, tokens: Tensor) -> Tensor:
        """[..., m] at most k of them above 0."""
        found = self.linear(tokens) + self.latent_bias
        best = found.topk(self.k, dim=-1)
        return torch.zeros_like(found).scatter(-1, best.indices, best.values.relu())

    def decode(self, codes: Tensor) -> Tensor:
        """[..., d] the activations that codes [..., m] stand for."""
        return (codes @ self.dictionary + self.pre_bias) * self.scale

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., d] the reconstruction."""
        return self.decode(self.encode(tokens))


def train_sae(
    tokens: np.ndarray,
    *,
    latents: int,
    k: int,
    steps: int = 1000,
    batch: int = 256,
    lr: float = 3e-3,
    key: Key = Key(0),
    device: torch.device | str = "cpu",
) -> TopKSAE:
    """Train an autoencoder on activations: squared error, Adam, a cosine schedule. The same arguments, the same bits.

    It does not promise that latents mean anything, nor that few are dead: see ``explained``.

    Args:
        tokens: [n, d] activations, one row per example, pixel or token; they must vary.
        latents: size of the dictionary, >= k. k: latents that a token may use.
        steps: of the descent. batch: tokens per step. lr: of Adam. key: of the start and of every batch.

    Raises:
        Refused: for activations that are not finite or do not vary.
    """
    found = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.float32))
    if found.ndim != 2 or len(found) < 2 or not bool(torch.isfinite(found).all()):
        raise Refused(f"an autoencoder learns from finite activations [n, d], n >= 2, found shape {tuple(found.shape)}")
    centre = found.double().mean(0)
    size = float((found.double() - centre).square().sum(1).mean().sqrt())
    if size <= 1e-7 * float(centre.norm()) or size == 0:
        raise Refused("an autoencoder cannot learn from activations that do not vary: choose another layer")
    sae = TopKSAE(centre.float(), size, latents, k, key.at("start")).to(device)
    task = Regression(scale=size, variance=size**2)
    data = as_data({"x": found, "y": found})
    case = Case(sae, Request(retain=data), task, Scope.all(sae), rng=key.at("train"))
    Descend(retain=NLL(), optimizer=Adam(lr), schedule=Cosine(warmup=0.05), steps=steps, batch=batch)(case)
    return sae.eval().requires_grad_(False)


def explained(sae: TopKSAE, tokens: np.ndarray) -> float:
    """Share of the variance of activations [n, d] that the reconstruction keeps: 1 - |h - h'|^2 / |h - mean|^2."""
    device = sae.pre_bias.device
    with torch.no_grad():
        parts = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.float32)).split(4096)
        missed = sum(float((part - sae(part.to(device)).cpu()).double().square().sum()) for part in parts)
    whole = float(np.square(tokens - tokens.mean(0, dtype=np.float64)).sum())
    return 1 - missed / max(whole, 1e-30)


def pooled_codes(sae: TopKSAE, tokens: np.ndarray) -> np.ndarray:
    """[n, m] the codes of activations [n, positions, d], averaged over positions."""
    device = sae.pre_bias.device
    with torch.no_grad():
        parts = torch.from_numpy(tokens).split(max(1, 16384 // tokens.shape[1]))
        return np.concatenate([sae.encode(part.to(device)).mean(1).cpu().numpy() for part in parts])


def class_latents(codes: np.ndarray, labels: np.ndarray, target: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """([e] latents of a class, [e] their scores), e <= count, highest first. Derived: the paper's rule was not found.

    Score = (mean over the class - mean over the rest) / pooled standard deviation, of codes averaged over positions;
    only latents above 0 are taken, so there may be fewer.

    Args:
        codes: [n, m]. labels: [n]. target: a label that occurs, and is not the only one.
    """
    inside = labels == target
    if not inside.any() or inside.all():
        raise Refused(
            f"class {target} has {int(inside.sum())} of {len(labels)} examples: expected some, and some others"
        )
    ours, rest = codes[inside].astype(np.float64), codes[~inside].astype(np.float64)
    pooled = (len(ours) * ours.var(0) + len(rest) * rest.var(0)) / len(codes)
    spread = np.sqrt(pooled)
    scores = np.divide(ours.mean(0) - rest.mean(0), spread, out=np.zeros_like(spread), where=spread > 0)
    order = np.argsort(-scores, kind="stable")[:count]
    order = order[scores[order] > 0]
    return order, scores[order]
