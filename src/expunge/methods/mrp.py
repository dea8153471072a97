"""MRP (Wu et al. 2025): take trained directions out of the hidden states of a few blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from expunge import projection
from expunge.combine import Weighted
from expunge.core import Case, Key, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method
from expunge.scope import Scope
from expunge.states import chosen_layers, second_moments

RETAIN = "(retain_weight > 0) * min(batch, n_retain)"
SAMPLES = "(steps > 0) * (min(sample, n_forget) + min(sample, n_retain))"
KEPT = "the projection stays a module with its directions: a block's residual path has no weight to fold into"


@method(
    paper="arXiv:2508.15449",
    tasks=("causal_lm",),
    needs={"forget", "retain"},
    dose="steps",
    reason="published for models of billions of parameters; parts are held to the release's numbers",
    cost={
        "forward": f"steps * (min(batch, n_forget) + {RETAIN}) + {SAMPLES}",
        "backward": f"steps * (min(batch, n_forget) + {RETAIN})",
    },
    departures={
        "initialisation": "PCA of the forget states outside of the retain span, as the paper says; the release calls it "
        "with the two sets exchanged",
        "span": "the leading directions that carry a share of the retain states; the release takes the span of all "
        "tokens, which is the whole space once there are as many as dimensions",
        "earlier": "none for the first request; the release starts with a row of zeros, for which QR takes out an axis",
        "states": "outputs of the projected modules at real tokens; the release reads their inputs, padding included",
        "precision": "directions and QR in float32; bfloat16 in the release",
        "optimizer": "a learning rate for models of this size",
        "stopping": "stopped when the retain loss leaves its bound, counted from the start with the first directions out",
        "contract:kind": KEPT,
        "contract:saved": f"{KEPT}; projection.load_projected reads it back to the same predictions",
        "contract:scope": f"no weight of the model moves, in scope or out of it; {KEPT}",
    },
)
def mrp(
    *,
    layers: str | None = None,
    rank: AtLeastOne = 2,
    retain_weight: NonNegative = 1.2,
    span: Share = 0.9,
    tokens: Literal["attended", "answer"] = "attended",
    sample: AtLeastOne = 512,
    lr: Positive = 0.3,
    steps: Count = 40,
    batch: AtLeastOne = 16,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Replace the output of chosen modules by its part outside of a few trained directions; no weight changes.

    Several requests one after the other: directions of earlier ones stay out, and new ones are trained beside them, at
    the same modules. It does not promise erasure: what other modules know is left, and whoever holds the model can
    remove the projection, unless it was folded into a linear layer with ``projection.fold``.

    Formula: h <- h (I - Q^T Q), rows of Q orthonormal, Q = QR([W_old; W]); min over W (rank x d per module) of
    retain_weight mean over D_r of NLL - mean over D_f of NLL. W starts as the uncentred PCA of the forget states outside
    of the leading directions of the retain states.

    Args:
        layers: names or shell-style patterns, between commas, of the modules whose output is projected; None takes those
            projected already, else draws two blocks, not the last. ``"*.mlp.down_proj"`` is the paper's place, after the
            perceptron, and can be folded.
        rank: directions per module and request, k of the paper, >= 1.
        retain_weight: rho of the paper, >= 0.
        span: share of the retain states' squared norm that the protected span carries at the start, in [0, 1].
        tokens: states for the PCA: "attended" (all real tokens) or "answer" (the tokens of the answer).
        sample: examples of either set that are read for the PCA, >= 1.
        lr: learning rate of plain gradient descent on W, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing and projects nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting: Llama-2-7b-chat, two blocks of the first 31 drawn at random, rank 2, weight 1.2, gradient descent
    at 2e-4, 5 examples a step, 2 epochs of 5000 examples.
    """
    descend = Descend(
        forget=Ascent(),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=SGD(lr, momentum=0.0),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
    return _Mrp(layers, rank, span, tokens, sample, descend)


@dataclass(frozen=True)
class _Mrp:
    """Find the modules, attach and start the projections, descend on their rows alone, and make these permanent."""

    layers: str | None
    rank: int
    span: float
    tokens: Literal["attended", "answer"]
    sample: int
    descend: Descend

    def __call__(self, case: Case) -> Case:
        if self.descend.steps == 0:
            return case
        key, rng = case.rng.take()
        before = list(projection.projections(case.model))
        names = before if before and self.layers is None else chosen_layers(case, self.layers, key.at("layers"), 2)
        names = projection.outside(case.model, names)
        with projection.trained(case.model, self._rows(case, names, key)) as rows:
            scope = Scope(dict.fromkeys(rows, True), rows)
            done = self.descend(replace(case, scope=scope, rng=rng))
        return replace(done, scope=case.scope)

    def _rows(self, case: Case, names: list[str], key: Key) -> dict[str, Tensor]:
        """Module -> where its new directions start."""
        forget, retain = (
            second_moments(case, data.select(range(min(self.sample, len(data)))), names, key.at(part), self.tokens)
            for part, data in ((part, case.request.data(part)) for part in ("forget", "retain"))
        )
        made = projection.projections(case.model)
        kept = {n: made[n].basis() if n in made else projection.empty(case.model, len(forget[n])) for n in names}
        return {n: projection.initial_rows(forget[n], retain[n], kept[n], self.rank, self.span) for n in names}

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this stage leaves `model` in, for saved `weights` to be read into."""
        return projection.rebuilt(model, weights)
