"""Needle (Hong et al., EMNLP 2025): noise on the one value vector that holds a concept, and training of that one only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from expunge.combine import Weighted
from expunge.core import Case, Data, Objective, Refused, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, SimNPO
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method
from expunge.scope import Scope, edit
from expunge.value_vectors import at, disturbed, down_projections, find, output_embedding

ROWS = "steps * (min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))"


@method(
    paper="arXiv:2406.11614",
    tasks=("causal_lm",),
    needs=(),
    dose="noise",
    reason="published for language models of billions of parameters, which do not run here; found vectors and their "
    "noise are held to the published rule",
    cost={"forward": ROWS, "backward": ROWS},
    departures={
        "noise": "relative to the vector by default; 0.1 whatever the vector's length in the published runs",
        "vector": "found by projection on the vocabulary where none is named; the benchmark names it, after people and a "
        "language model have looked at the top tokens",
        "training": "only the vector moves; in the release weight decay shrinks the rest of its matrix, and the embedding, "
        "beside it",
        "forget": "SimNPO by default, which needs no second model; the paper trains with ascent, NPO and DPO",
    },
)
def concept_ablation(
    *,
    layer: Annotated[int | None, Range(0)] = None,
    index: Annotated[int | None, Range(0)] = None,
    noise: NonNegative = 5.0,
    unit: Literal["relative", "absolute"] = "relative",
    forget: Objective = SimNPO(),
    retain_weight: NonNegative = 1.0,
    lr: Positive = 0.01,
    steps: Count = 0,
    batch: AtLeastOne = 32,
) -> Stage:
    """Disturb one value vector of a language model with Gaussian noise, and then, if asked to, train it and nothing else.

    The vector is column `index` of the down projection of block `layer`. Where none is named, it is the one of whose top
    tokens most are in the answers to forget and not in those to keep. A vector out of scope is left alone. It does not
    promise that the concept is stored there and nowhere else, nor that nothing else is: disturb it and look.

    Formula: v <- v + e, e ~ N(0, s^2 I), s = noise |v| / sqrt(d) (relative) or noise (absolute); then `steps` steps on
    mean over D_f of `forget` + retain_weight mean over D_r of NLL, in v alone.

    Args:
        layer: block, from 0; with `index`, or neither. ``benchmarks.concept_vectors`` reads the published ones.
        index: value vector in that block, from 0.
        noise: dose, >= 0; 1 relative is noise as long as the vector. 0 and no steps change nothing.
        unit: "relative" to the vector's own size, or "absolute".
        forget: per-example objective of the training, minimised.
        retain_weight: of the retain loss in the training, >= 0; without retain data there is no such term.
        lr: learning rate of Adam, > 0; published 0.1 to 0.5.
        steps: of training after the noise, >= 0.
        batch: forget examples, and as many retain examples, per step, >= 1.
    """
    if (layer is None) != (index is None):
        raise Refused(f"concept_ablation needs layer and index, or neither, found layer={layer}, index={index}")
    train = Descend(forget=forget, optimizer=Adam(lr), steps=steps, batch=batch, guard=Guard())
    return _Ablate(None if layer is None or index is None else (layer, index), noise, unit, retain_weight, train)


@dataclass(frozen=True)
class _Ablate:
    """Choose the vector, disturb it, train it; the Case's own scope comes back."""

    place: tuple[int, int] | None
    noise: float
    unit: str
    retain_weight: float
    train: Descend

    def __call__(self, case: Case) -> Case:
        if self.noise == 0 and not self.train.steps:
            return case
        key, rng = case.rng.take()
        projections = down_projections(case.model)
        layer, index = self.place or _by_answers(case)
        chosen = at(projections, layer, index)
        case.meter.note(f"value vector {index} of block {layer}, in {chosen.name}")
        vector = disturbed(chosen.vector(index), self.noise, self.unit == "relative", key)
        edit(case, {chosen.name: chosen.replaced(index, vector)})
        narrow = case.scope & Scope({chosen.name: chosen.mask(index)}, case.scope.universe)
        if not self.train.steps or not narrow.masks:
            return replace(case, rng=rng)
        stage = self.train
        if self.retain_weight and case.request.retain is not None:
            stage = replace(stage, retain=NLL(), combine=Weighted({"retain": self.retain_weight}))
        return replace(stage(replace(case, scope=narrow, rng=rng)), scope=case.scope)


def _by_answers(case: Case) -> tuple[int, int]:
    """The vector that speaks most of the tokens of the answers to forget, less those of the answers to keep."""
    task: Any = case.task
    forget, request = _tokens(task, case.request.data("forget")), case.request
    kept = forget[:0] if request.retain is None else _tokens(task, request.retain)
    own = forget[~torch.isin(forget, kept)]
    embedding = output_embedding(case.model)
    top = min(200, max(1, len(embedding) // 10))
    best = find(down_projections(case.model), embedding, own if len(own) else forget, top=top, most=1)[0]
    return best.layer, best.index


def _tokens(task: Any, data: Data) -> Tensor:
    """The distinct answer tokens."""
    labels = [task.labels(batch).flatten() for batch in data.batches(256)]
    found = torch.unique(torch.cat(labels))
    return found[found >= 0]
