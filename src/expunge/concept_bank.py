"""Concepts as directions among a classifier's representations, a bottleneck of them, and what drives a class in it.

All here is numbers on cached representations, in float64 on the CPU: least squares, clusters, and a sparse head whose
gradients in its inputs are its weights, so that integrated gradients need no integral.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expunge.core import Case, Data, Key, Refused
from expunge.likeness import representations
from expunge.oracle import prepared

PREFIX = "concept:"
RIDGE = 1e-2  # of a concept's direction, in units of the mean variance of a representation's coordinates
ROUNDS = 50  # of clustering, at most


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A linear head on concept scores s_c = <phi, v_c> / |v_c|^2: logits = W s + b.

    Attributes:
        vectors: [k, d] concept directions v.
        weights: [C, k] W. bias: [C] b.
        baseline: [k], the mean scores that attributions are taken from.
    """

    vectors: Tensor = field(repr=False)
    weights: Tensor
    bias: Tensor
    baseline: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """[n, k]; of representations [n, d]."""
        return concept_scores(features, self.vectors)

    def logits(self, features: Tensor) -> Tensor:
        """[n, C]."""
        return self.scores(features) @ self.weights.T + self.bias

    def attributions(self, features: Tensor, labels: Tensor) -> Tensor:
        """[n, k] integrated gradients of each example's logit of its label, from the baseline: W_yc (s_c - baseline_c).

        They sum to the logit at the example less that at the baseline: the gradient of a linear head is the same all the way.
        """
        return self.weights[labels] * (self.scores(features) - self.baseline)


def concept_scores(features: Tensor, vectors: Tensor) -> Tensor:
    """[n, k] <phi, v_c> / |v_c|^2; 0 for a direction of no length."""
    square = vectors.square().sum(1)
    return torch.where(square > 0, features @ vectors.T / torch.where(square > 0, square, 1.0), 0.0)


def features_of(case: Case, data: Data, head: str, key: Key, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """([n, d] representations in float64, [n] labels), on the CPU; one metered pass. See ``likeness.head_name``."""
    found, labels = [], []
    with torch.no_grad(), case.meter.watch(case.model):
        for batch in prepared(case, data, chunk, key):
            found.append(representations(case, case.model, batch, head).double().cpu())
            labels.append(case.task.labels(batch).cpu())  # type: ignore[attr-defined]
    return torch.cat(found), torch.cat(labels)


def direction(features: Tensor, positive: Tensor, ridge: float = RIDGE) -> Tensor:
    """[d] concept activation vector: ridge regression of +1 (has the concept) and -1, both sides weighing the same.

    Args:
        features: [n, d]. positive: bool [n], some of each.
        ridge: >= 0, times the mean variance of a coordinate.
    """
    count = positive.sum()
    weight = torch.where(positive, 0.5 / count, 0.5 / (len(positive) - count)).to(features.dtype)
    centred = features - weight @ features
    target = torch.where(positive, 1.0, -1.0).to(features.dtype)  # its weighted mean is 0
    second = centred.T @ (centred * weight[:, None])
    damped = second + ridge * second.diagonal().mean() * torch.eye(len(second), dtype=features.dtype)
    return torch.linalg.lstsq(damped, (centred.T @ (weight * target))[:, None], driver="gelsd").solution[:, 0]


def clusters(features: Tensor, count: int, key: Key) -> Tensor:
    """int64 [n], which of at most `count` clusters each row is in: k-means, its first centres drawn far apart.

    Args:
        features: [n, d]. count: >= 1. key: of the first centres.
    """
    generator = key.generator()
    centres = features[torch.randint(len(features), (1,), generator=generator)]
    for _ in range(count - 1):
        far = torch.cdist(features, centres).amin(1).square()
        if float(far.sum()) <= 0:
            break  # fewer different rows than clusters
        centres = torch.cat([centres, features[torch.multinomial(far, 1, generator=generator)]])
    owner = torch.cdist(features, centres).argmin(1)
    for _ in range(ROUNDS):
        centres = torch.stack(
            [features[owner == c].mean(0) if bool((owner == c).any()) else centres[c] for c in range(len(centres))]
        )
        again = torch.cdist(features, centres).argmin(1)
        if torch.equal(again, owner):
            break
        owner = again
    return owner


def directions(features: Tensor, owner: Tensor) -> Tensor:
    """[k, d]: of every cluster against the others; one direction of no length where there is one cluster."""
    present = torch.unique(owner)
    if len(present) < 2:
        return torch.zeros(1, features.shape[1], dtype=features.dtype)
    return torch.stack([direction(features, owner == c) for c in present])


def named_directions(others: Tensor, named: Mapping[str, Tensor]) -> Tensor:
    """[k, d]: of every named concept's examples [n, d] against `others` [m, d]."""
    return torch.stack(
        [direction(torch.cat([own, others]), torch.arange(len(own) + len(others)) < len(own)) for own in named.values()]
    )


def named_data(case: Case) -> dict[str, Data]:
    """concept -> its examples: the data that the request calls "concept:NAME"; empty where there are none.

    Raises:
        Refused: for a concept that the request names and has no such data of.
    """
    found = {n.removeprefix(PREFIX): data for n, data in case.request.extra.items() if n.startswith(PREFIX)}
    for name in case.request.concepts:
        if name not in found:
            raise Refused(
                f"the request names concept {name!r} and has no examples of it: give them as extra={{'{PREFIX}{name}': data}}, "
                f"or name no concepts, and groups of like representations are taken for concepts"
            )
    return found


Seen = tuple[Tensor, Tensor]
"""[n, d] representations and [n] labels."""


def concept_bottleneck(
    case: Case, forget: Seen, retain: Seen, head: str, concepts: int, sparsity: float, key: Key
) -> Bottleneck:
    """A bottleneck of the concepts that the request has data of, or of groups of like representations; baseline D_r.

    Args:
        head: see ``likeness.head_name``. concepts: groups at most. sparsity: see ``bottleneck``. key: of the groups.
    """
    task: Any = case.task
    features, labels = (torch.cat(pair) for pair in zip(forget, retain, strict=True))
    named = {name: features_of(case, data, head, key)[0] for name, data in named_data(case).items()}
    if named:
        vectors = named_directions(retain[0], named)
    else:
        vectors = directions(features, clusters(features, concepts, key.at("clusters")))
    net = bottleneck(vectors, features, labels, task.classes, sparsity)
    return replace(net, baseline=net.scores(retain[0]).mean(0))


def bottleneck(vectors: Tensor, features: Tensor, labels: Tensor, classes: int, sparsity: float) -> Bottleneck:
    """Fit the head: cross-entropy of the labels plus ``sparsity (0.99 |W'|_1 + 0.005 |W'|_2^2)``, by accelerated proximal steps.

    W' are the weights on standardised scores, so that the penalty treats every concept the same; b is free of it.

    Args:
        vectors: [k, d]. features: [n, d]. labels: int64 [n]. classes: C. sparsity: >= 0.
    """
    scores = concept_scores(features, vectors)
    mean, spread = scores.mean(0), scores.std(0, correction=0)
    spread = torch.where(spread > 1e-12 * scores.abs().amax(0), spread, torch.inf)  # a constant score says nothing
    inputs = torch.cat([(scores - mean) / spread, torch.ones(len(scores), 1, dtype=scores.dtype)], 1)
    weights = _sparse(inputs, torch.nn.functional.one_hot(labels, classes).double(), 0.99 * sparsity, 0.01 * sparsity)
    scaled = weights[:, :-1] / spread
    return Bottleneck(vectors, scaled, weights[:, -1] - scaled @ mean, mean)


def _sparse(inputs: Tensor, targets: Tensor, absolute: float, square: float, steps: int = 500) -> Tensor:
    """[C, k + 1] argmin of mean CE + absolute |W|_1 + square / 2 |W|_2^2, the last column free (FISTA, Beck and Teboulle 2009)."""
    free = torch.ones(inputs.shape[1], dtype=inputs.dtype)
    free[-1] = 0.0
    step = 1.0 / (0.5 * float(torch.linalg.matrix_norm(inputs, 2)) ** 2 / len(inputs) + square)
    now = ahead = torch.zeros(targets.shape[1], inputs.shape[1], dtype=inputs.dtype)
    pace = 1.0
    for _ in range(steps):
        slope = (torch.softmax(inputs @ ahead.T, 1) - targets).T @ inputs / len(inputs) + square * free * ahead
        moved = ahead - step * slope
        new = moved.sign() * (moved.abs() - step * absolute * free).clamp_min(0.0)
        faster = 0.5 * (1.0 + (1.0 + 4.0 * pace * pace) ** 0.5)
        ahead, now, pace = new + (pace - 1.0) / faster * (new - now), new, faster
    return now


def nearest_profiles(net: Bottleneck, forget: Seen, retain: Seen, kept: Tensor) -> Tensor:
    """[n] the kept class, other than the true one, whose concept profile is nearest to what drives each forget example.

    The profile of a class is the mean of its retain examples' attributions; nearest by cosine, ties to the first class.

    Args:
        forget, retain: (representations, labels). kept: int64 [m] classes of the retain data.
    """
    given = net.attributions(*retain)
    profiles = torch.stack([given[retain[1] == c].mean(0) for c in kept])
    own = net.attributions(*forget)
    likeness = torch.nn.functional.cosine_similarity(own[:, None], profiles[None], dim=2)
    return kept[torch.where(kept[None] == forget[1][:, None], -torch.inf, likeness).argmax(1)]


def need_others(labels: Tensor, kept: Tensor) -> None:
    """Refuse labels for which no other class is retained.

    Args:
        labels: [n] of the forget data. kept: [m] classes of the retain data.
    """
    if len(kept) < 2 and bool((labels == kept).any()):
        raise Refused(
            f"the retain data have class {int(kept[0])} alone, and forget data have it too: expected another class to give "
            f"them"
        )


def any_retained(case: Case, key: Key) -> Tensor:
    """int64 [n]: for each forget example a class of the retain data, drawn evenly, never its own."""
    task: Any = case.task
    labels, retained = (
        torch.cat([task.labels(batch) for batch in case.request.data(part).batches(1024)])
        for part in ("forget", "retain")
    )
    kept = torch.unique(retained)
    need_others(labels, kept)
    allowed = (kept[None] != labels[:, None]).double()
    return kept[torch.multinomial(allowed, 1, generator=key.generator())[:, 0]]
