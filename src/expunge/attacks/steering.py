"""What steering needs to know of the original model, learnt once, and the two pushes that can be given to another.

Where: the layer three quarters up; in a network of blocks, the output of a block. Along what: latents of a class in an
autoencoder of the original's activations. How far: their average code over examples that are not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from expunge.attacks.sae import TopKSAE, class_latents, explained, pooled_codes, train_sae
from expunge.audit.layers import Layer, activations, as_tokens, find_layers, from_tokens, sample, shuffled, trunk
from expunge.audit.subject import Subject, classifies
from expunge.audit.transfer import labels_of
from expunge.core import Data, Key
from expunge.runtime import device_of

DEPTH = 0.75  # of the layers: the published default is block 9 of 12
EXPANSION, ACTIVE, EXPERTS = 1, 16, 16  # latents per feature (published), TopK (published, CIFAR-10), per class (ours)
LEARNT, JUDGED, CLASSES, OTHERS = 2000, 500, 5, 5  # examples, examples per group, classes at most, of the control
BYTES = 1 << 28  # activations of the original model that are held to train on


@dataclass(frozen=True)
class Target:
    """A forgotten class: its label, the examples that are judged, its latents and their average code.

    experts: [e] int64. level: [positions or 1, e].
    """

    label: int
    judge: Data
    experts: Tensor
    level: Tensor


@dataclass(frozen=True)
class Plan:
    """What is learnt of the original model once: where to steer, along what, and how far.

    others: label -> (latents, average code) of kept classes, for the control. kept: examples of kept classes.
    """

    layer: Layer
    number: float
    sae: TopKSAE
    explained: float
    targets: tuple[Target, ...]
    others: tuple[tuple[Tensor, Tensor], ...]
    kept: Data


@dataclass(frozen=True)
class Steering:
    """h -> h + sum over latents j of strength (level_j - code_j) d_j, at every position.

    Args:
        sae: the dictionary. layer: where. experts: [e]. level: [positions or 1, e]. strength: 0 is the identity.
        along: [e', d] directions to push along instead, by the same length at each position, with weights [e'].
    """

    sae: TopKSAE
    layer: Layer
    experts: Tensor
    level: Tensor
    strength: float = 1.0
    along: tuple[Tensor, Tensor] | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The activation that the model goes on with, of the same shape."""
        tokens = as_tokens(value, self.layer)
        codes = self.sae.encode(tokens.float())[..., self.experts]
        push = self.strength * (self.level - codes) @ self.sae.dictionary[self.experts] * self.sae.scale
        if self.along is not None:
            latents, weights = self.along
            way = torch.nn.functional.normalize(weights @ self.sae.dictionary[latents], dim=0)
            push = push.norm(dim=-1, keepdim=True) * way
        return from_tokens(tokens + push.to(tokens.dtype), value, self.layer)


class Splice:
    """The released hook, batch after batch: `given` holds the original's activations of the same examples, in order."""

    def __init__(self, plan: Plan, target: Target, given: Tensor, strength: float):
        self.plan, self.target, self.given, self.strength, self.start = plan, target, given, strength, 0

    def __call__(self, value: Tensor) -> Tensor:
        sae, layer, experts = self.plan.sae, self.plan.layer, self.target.experts
        tokens = as_tokens(value, layer).float()
        theirs = self.given[self.start : self.start + len(tokens)].to(tokens.device)
        self.start += len(tokens)
        codes = sae.linear(tokens)
        codes[..., experts] += self.strength * (sae.linear(theirs)[..., experts] - codes[..., experts])
        found = sae.decode(codes)
        if value.ndim == 3 and layer.channels == -1:
            found[:, 0] = tokens[:, 0] + self.strength * (theirs[:, 0] - tokens[:, 0])
        return from_tokens(found, value, layer)


def plan_of(subject: Subject) -> Plan | None:
    """Once per original model, whoever is judged."""
    if not classifies(subject.task) or not subject.forgotten_classes():
        return None
    return subject.cache.get(subject.before, "restoration plan", lambda: _made(subject))


def _made(subject: Subject) -> Plan | None:
    key, opened = subject.key.at("restoration"), subject.opened(subject.before)
    forget, retain = subject.data("forget"), subject.data("retain")
    layers = trunk(opened, find_layers(opened, subject.task, forget, key=key))
    if not layers:
        return None
    number = math.ceil(DEPTH * len(layers))
    layer = layers[number - 1]
    each = {label: _groups(subject, label, key) for label in subject.forgotten_classes()[:CLASSES]}
    groups = {label: group for label, group in each.items() if group is not None}
    if not groups:
        return None
    shape = original_tokens(subject, forget.select([0]), layer).shape
    most = max(2, min(LEARNT, BYTES // (4 * shape[1] * shape[2])))
    known = [sample(learn, most // (2 * len(groups)) + 1, key.at("learn")) for learn, _ in groups.values()]
    known.append(sample(retain, max(2, most - sum(map(len, known))), key.at("retain")))
    tokens = np.concatenate([original_tokens(subject, data, layer) for data in known])
    labels = np.concatenate([labels_of(subject.task, data) for data in known])
    latents = EXPANSION * shape[2]
    flat = tokens.reshape(-1, shape[2])
    sae = train_sae(
        flat, latents=latents, k=min(ACTIVE, max(1, latents // 4)), key=key.at("sae"), device=device_of(opened)
    )
    codes, level = pooled_codes(sae, tokens), partial(_level, sae, tokens, labels)
    experts = {label: class_latents(codes, labels, label, EXPERTS)[0] for label in np.unique(labels).tolist()}
    targets = tuple(
        Target(label, judge, torch.from_numpy(experts[label]), level(label, experts[label]))
        for label, (_, judge) in groups.items()
    )
    gone = subject.forgotten_classes()
    kept = [label for label in experts if label not in gone][:OTHERS]
    others = tuple((torch.from_numpy(experts[label]), level(label, experts[label])) for label in kept)
    unseen = subject.data("test") if subject.has("test") else retain
    judged = sample(unseen, JUDGED, key.at("kept"))
    return Plan(layer, float(number), sae, explained(sae, flat), targets, others, judged)


def _groups(subject: Subject, label: int, key: Key) -> tuple[Data, Data] | None:
    """Examples of a forgotten class to learn from, and others to judge on; None where one example is all there is."""
    forget = subject.data("forget")
    known = forget.select(np.flatnonzero(labels_of(subject.task, forget) == label))
    if subject.has("test_forgotten"):
        unseen = subject.data("test_forgotten")
        mine = unseen.select(np.flatnonzero(labels_of(subject.task, unseen) == label))
        if len(mine):
            return known, sample(mine, JUDGED, key.at("judge"))
    if len(known) < 2:
        return None
    order = shuffled(len(known), key.at("halves"))
    half = len(known) // 2
    return known.select(np.sort(order[:half])), sample(known.select(np.sort(order[half:])), JUDGED, key.at("judge"))


def _level(sae: TopKSAE, tokens: np.ndarray, labels: np.ndarray, label: int, experts: np.ndarray) -> Tensor:
    """[positions, e] the average code of a class at each position."""
    found = torch.from_numpy(tokens[labels == label]).to(sae.pre_bias.device)
    with torch.no_grad():
        parts = [sae.encode(part)[..., experts].sum(0) for part in found.split(max(1, 16384 // tokens.shape[1]))]
    return torch.stack(parts).sum(0) / len(found)


def original_tokens(subject: Subject, data: Data, layer: Layer) -> np.ndarray:
    """[n, positions, d] of the original model."""
    key = subject.key.at("restoration", "run")
    opened = subject.opened(subject.before)
    return activations(opened, subject.task, data, [layer], size=subject.batch, key=key, pool="none")[0]
