"""O3 (Gao et al., ICLR 2025): an adapter that gives other answers, opened by a detector of the forgotten questions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from expunge import gate
from expunge.combine import Weighted
from expunge.core import Case, Refused, Stage
from expunge.descend import Descend
from expunge.gated_layers import Orthogonal, adapted, adapters, opened
from expunge.objectives import RandomLabel
from expunge.optim import AdamW
from expunge.registry import AtLeastOne, Count, Finite, NonNegative, Positive, Range, method
from expunge.steer import blocks
from expunge.wrap import LoRA

KEPT = "adapters and detectors stay beside the untouched weights, since the gate differs from question to question"


@method(
    paper="arXiv:2407.10223",
    tasks=("causal_lm",),
    needs={"forget"},
    dose="steps",
    reason="published for models of billions of parameters; parts are held to the authors' numbers",
    cost={
        "forward": "steps * min(batch, n_forget) + (steps > 0) * n_forget",
        "backward": "steps * min(batch, n_forget)",
    },
    departures={
        "encoder": "the model's own states by default; the paper tunes a RoBERTa-large per request, by a masked-language "
        "and an entropy loss. Give such a module as encoder=",
        "cosine": "added, so that both terms of a layer's score are higher for what is like the forget data; subtracted "
        "in the paper and its code",
        "pooling": "over the question's tokens; the authors' code averages over padding too",
        "covariance": "shrunk (Ledoit and Wolf); the authors' empirical one has no inverse for few examples",
        "held": "a share of the forget examples; the authors have a test set",
        "gate": "the paper's soft weight; the released inference replaces it by steps",
        "answers": "the loss is of the wrong answer's tokens; the authors' of the question's too, with dropout",
        "contract:kind": KEPT,
        "contract:saved": f"{KEPT}; gate.load_gated reads it back to the same predictions",
        "contract:adapter": "it puts a gate over the model, and a bracket merges its adapter into the model that it opened",
        "contract:scope": f"no weight of the model moves, in scope or out of it; {KEPT}",
    },
)
def o3(
    *,
    rank: AtLeastOne = 8,
    alpha: Positive = 16.0,
    targets: str | None = None,
    orthogonality: NonNegative = 0.1,
    held: Annotated[float, Range(0, 0.8, open_low=True)] = 0.2,
    offset: Finite = 2.0,
    encoder: nn.Module | None = None,
    lr: Positive = 5e-3,
    steps: Count = 60,
    batch: AtLeastOne = 16,
) -> Stage:
    """Teach an adapter wrong answers to the forget questions, and open it only for questions like these. No retain data.

    It does not promise erasure: nothing is taken out of the weights, and whoever holds them can leave the gate out. Nor
    that a paraphrase opens it, nor that other questions leave it shut: at the published offset they keep 0.119 of the
    adapter. The model that comes back is a ``gate.GatedModel``; given to this method again, with another request, its
    one adapter is trained on, away from where the earlier requests had it, and a further detector is added.

    Formula: min over A, B of mean over D_f of NLL of wrong answers + orthogonality / blocks sum over layers and earlier
    requests of |A_earlier A^T|_F^2. Afterwards h = W x + w (alpha / rank) B A x, w the largest over requests of the
    detector's soft weight of the question (``detector.soft_weight``).

    Args:
        rank, alpha: of the adapter, >= 1 and > 0. Those of the first request stay.
        targets: names or shell-style patterns of layers, between commas; None takes every linear layer of the blocks
            whose weight is in scope. Those of the first request stay.
        orthogonality: weight of the penalty, >= 0; the first request has none.
        held: share of the forget examples that the detector is not fitted to, whose scores shape the gate, in (0, 0.8].
        offset: of the gate: w = sigmoid(10 c - offset), c in (0, 1]; at 5, what is far out keeps 0.007.
        encoder: module ``(input_ids, mask) -> (states, mask)`` that the detector reads; None: the model itself.
        lr: learning rate of AdamW, without weight decay, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing and gates nothing.
        batch: forget examples per step, >= 1.

    Raises:
        Refused: for fewer than five forget examples, or a rank or an encoder other than those of the earlier requests.

    Published setting (ScienceQA, Llama-2-7b): rank 8, alpha 16, dropout 0.05, weight 0.1, lr 3e-4, 128 a step, 15 epochs.
    """
    patterns = () if targets is None else tuple(part.strip() for part in targets.split(","))
    descend = Descend(forget=RandomLabel(), optimizer=AdamW(lr), steps=steps, batch=batch)
    return _O3(LoRA(rank, alpha, patterns), orthogonality, held, offset, descend, encoder)


@dataclass(frozen=True)
class _O3:
    """Fit the detector, attach or take up the adapters, train them wide open, and put the gate over the model."""

    lora: LoRA
    orthogonality: float
    held: float
    offset: float
    descend: Descend
    encoder: nn.Module | None = field(repr=False)

    def __call__(self, case: Case) -> Case:
        if self.descend.steps == 0:
            return case
        key, rng = case.rng.take()
        before = case.model if isinstance(case.model, gate.GatedModel) else None
        if before is not None and not gate.alike(before.encoder, self.encoder):
            raise Refused(
                f"o3: the detectors of the earlier requests read {'the model itself' if before.encoder is None else 'an encoder'}, "
                f"not the encoder= that is given: give the same, or begin anew from the model under the gate"
            )
        inner = case if before is None else replace(case, model=before.model, scope=gate.inner_scope(case.scope))
        found = blocks(inner)
        layers = [] if self.encoder is not None else list(before.layers) if before is not None else found
        data = case.request.data("forget")
        detector = gate.fitted(inner, data, layers, self.encoder, key.at("detector"), self.held, self.offset)
        with adapted(inner, self.lora, found, key.at("adapter")) as scope, opened(inner.model, torch.ones(())):
            done = self._plan(inner, max(1, len(found)))(replace(inner, scope=scope, rng=rng))
        own = copy.deepcopy(self.encoder)  # the caller's stays the caller's, whatever becomes of the model
        model = gate.GatedModel(inner.model, [*gate.detectors(case.model), detector], layers, own)
        return replace(done, model=model, scope=gate.outer_scope(case.scope) if before is None else case.scope)

    def _plan(self, case: Case, blocks: int) -> Descend:
        earlier = any(len(adapter.get_buffer("earlier")) for adapter in adapters(case.model).values())
        if not earlier or self.orthogonality == 0:
            return self.descend
        others = {"orthogonal": Orthogonal(blocks)}
        return replace(self.descend, others=others, combine=Weighted({"orthogonal": self.orthogonality}))

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this stage leaves `model` in, for saved `weights` to be read into."""
        return gate.rebuilt(model, weights, copy.deepcopy(self.encoder))
