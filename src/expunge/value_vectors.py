"""The value vectors of a language model's perceptrons: where they are, and what they say of the vocabulary.

A block's perceptron ends in a down projection W [d, m]: its output is the sum over the m hidden units of activation
times a value vector, column j of W. Projected on the output embedding E [V, d], a value vector gives every token a score,
and those of some vectors are of one concept (Geva et al. 2022; ConceptVectors, arXiv:2406.11614). No final norm is applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Key, Refused

NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "ff_out")
"""What the usual models call a down projection; ``c_proj`` and ``fc2`` only inside a perceptron, not in attention."""
_CHUNK = 1 << 24  # scores held at once


@dataclass(frozen=True)
class ValueVectors:
    """The down projection of one block.

    Attributes:
        name: of the parameter. weight: the parameter.
        columns: True where a value vector is a column (nn.Linear), False where it is a row (GPT-2's Conv1D).
    """

    name: str
    weight: Tensor = field(repr=False)
    columns: bool = True

    def __len__(self) -> int:
        return self.weight.shape[1 if self.columns else 0]

    def vector(self, index: int) -> Tensor:
        """[d], a copy without a graph."""
        return self.weight.detach()[self._at(index)].clone()

    def mask(self, index: int) -> Tensor:
        """Bool of the parameter's shape, True on the one vector."""
        mask = torch.zeros(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        mask[self._at(index)] = True
        return mask

    def replaced(self, index: int, vector: Tensor) -> Tensor:
        """The whole parameter, copied, with another vector at `index`."""
        value = self.weight.detach().clone()
        value[self._at(index)] = vector.to(value)
        return value

    def all(self) -> Tensor:
        """[d, m], a view without a graph."""
        return self.weight.detach() if self.columns else self.weight.detach().T

    def _at(self, index: int) -> Any:
        return (slice(None), index) if self.columns else index


@dataclass(frozen=True)
class Found:
    """A value vector that speaks of the tokens asked for.

    Attributes:
        layer, index: block, and value vector in it, both from 0.
        share: of its top tokens that are among those asked for, in [0, 1].
        strength: mean score of the tokens asked for, in standard deviations of its scores over the vocabulary.
        tokens: its top tokens, highest first.
    """

    layer: int
    index: int
    share: float
    strength: float
    tokens: tuple[int, ...] = field(repr=False)


def down_projections(model: nn.Module) -> list[ValueVectors]:
    """One per block, in the order of the blocks.

    Raises:
        Refused: for a model without any, or with several in a block (a mixture of experts), or with weights that are no
            plain matrices (quantised).
    """
    found: dict[str, ValueVectors] = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        *path, last = plain.split(".")
        if last not in NAMES or not any(part.isdigit() for part in path) or (path and "att" in path[-1]):
            continue
        block = re.sub(r"^(.*?\.?\d+)(\..*)?$", r"\1", plain)
        if hasattr(module, "base_layer"):
            continue  # the wrapper of an adapter: its base layer comes next
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not (weight.ndim == 2 and weight.is_floating_point()):
            raise Refused(
                f"{name!r} is a down projection without a plain matrix of floats: load the model without quantisation"
            )
        if block in found:
            raise Refused(
                f"block {block!r} has several down projections ({found[block].name} and {name}): value vectors are found "
                f"in models with one perceptron per block"
            )
        found[block] = ValueVectors(f"{name}.weight", weight, type(module).__name__ != "Conv1D")
    if not found:
        raise Refused(
            f"the model has no down projection: expected blocks with a layer called one of {', '.join(NAMES)}"
        )
    return list(found.values())


def at(projections: list[ValueVectors], layer: int, index: int) -> ValueVectors:
    """The down projection of block `layer`; refuses a layer or an index that the model does not have."""
    if not 0 <= layer < len(projections):
        raise Refused(f"layer is {layer}: expected a block of the model, 0 to {len(projections) - 1}")
    if not 0 <= index < len(projections[layer]):
        raise Refused(f"index is {index}: expected a value vector of block {layer}, 0 to {len(projections[layer]) - 1}")
    return projections[layer]


def output_embedding(model: nn.Module) -> Tensor:
    """[V, d], what hidden states are compared with to predict a token; without a graph."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise Refused(
            f"{type(model).__name__} has no output embedding to project on: expected get_output_embeddings(), as the models "
            f"of transformers have"
        )
    return weight.detach()


def top_tokens(embedding: Tensor, vector: Tensor, top: int = 200) -> Tensor:
    """[top] token ids with the largest scores E v, highest first; ties by id. In float32 at least.

    Args:
        embedding: [V, d]. vector: [d]. top: 1 to V; all of a smaller vocabulary.
    """
    wide = torch.promote_types(embedding.dtype, torch.float32)
    scores = embedding.to(wide) @ vector.to(embedding.device, wide)
    return torch.sort(scores, descending=True, stable=True).indices[:top]


def find(
    projections: list[ValueVectors], embedding: Tensor, wanted: Tensor, *, top: int = 200, most: int = 10
) -> list[Found]:
    """The value vectors whose top tokens hold most of those asked for, best first; ties by strength, then by place.

    That the top tokens speak of a concept does not prove that the model uses the vector for it: disturb it and look.

    Args:
        projections: of the model. embedding: [V, d]. wanted: [n] ids of tokens of the concept, and of nothing else if that
            can be had: a word that every text has finds vectors that every text uses.
        top: how many tokens of each vector are looked at. most: how many vectors are given back.

    Raises:
        Refused: where no token is asked for.
    """
    chosen = torch.unique(wanted).to(embedding.device)
    if not len(chosen):
        raise Refused("no token of the concept was given: expected text of which some token is not also elsewhere")
    inside = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
    inside[chosen] = True
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    top, found = min(top, len(embedding)), list[Found]()
    for layer, projection in enumerate(projections):
        for start, scores in _scores(projection, embedding):
            best = scores.topk(top, dim=0).indices
            share = inside[best].double().mean(0)
            strength = (scores[chosen].mean(0) - scores.mean(0)) / scores.std(0).clamp_min(1e-12)
            ranks = list(zip(share.tolist(), strength.tolist(), strict=True))
            for j in sorted(range(len(ranks)), key=lambda j: ranks[j], reverse=True)[:most]:
                found.append(Found(layer, start + j, *ranks[j], tuple(best[:, j].tolist())))
    return sorted(found, key=lambda one: (-one.share, -one.strength, one.layer, one.index))[:most]


def _scores(projection: ValueVectors, embedding: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first index, [V, some] scores) of all value vectors, some at a time."""
    size, vectors = max(1, _CHUNK // len(embedding)), projection.all()
    for start in range(0, len(projection), size):
        yield start, embedding @ vectors[:, start : start + size].to(embedding)


def disturbed(vector: Tensor, noise: float, relative: bool, key: Key) -> Tensor:
    """v + e, e ~ N(0, s^2) in every coordinate, s = `noise`, or `noise` times |v| / sqrt(d) where `relative`.

    With `relative` 1 the noise is about as long as the vector. Drawn in float32 on the CPU: the same on every device.
    """
    drawn = torch.randn(vector.shape, generator=key.at("value vector").generator())
    wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
    scale = noise * float(wide.norm()) / len(vector) ** 0.5 if relative else noise
    return (wide + scale * drawn.to(wide)).to(vector.dtype)
