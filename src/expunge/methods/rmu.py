"""RMU (Li et al., ICML 2024): turn the hidden states of the forget data into noise, hold those of the retain data."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.optim import AdamW
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method
from expunge.scope import Scope
from expunge.steer import HoldStates, Misdirect, Tokens, blocks, chosen_layer, mean_norm

STEPS = "steps * (min(batch, n_forget) + {} * (retain_weight > 0) * min(batch, n_retain))"
MATRICES = ("*down_proj*weight", "*mlp.c_proj*weight", "*dense_4h_to_h*weight", "*fc2*weight")
"""The last matrix of a block's perceptron, as the usual models call it, adapters included."""


@method(
    paper="arXiv:2403.03218",
    tasks=("causal_lm",),
    needs={"forget", "retain", "teacher:original"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss is held to the "
    "benchmark's own code",
    cost={"forward": STEPS.format(2), "backward": STEPS.format(1)},
    departures={
        "padding": "does not count in either mean; the authors' code averages over it",
        "layer": "the middle block by default; the published ones are the 8th of 32 and the 6th of 16",
        "retain_weight": "10 by default, on one's own retain data; 1200 in the release recipe, 1 in the benchmark's",
        "scale": "twice the mean norm of the hidden states by default; the published numbers (2 to 20) belong to their "
        "models",
        "topics": "one forget set and one control vector; the authors alternate between topics, each with its own",
        "optimizer": "AdamW without weight decay",
    },
)
def rmu(
    *,
    layer: str | None = None,
    train: str | None = None,
    scale: Annotated[float | None, Range(0, open_low=True)] = None,
    retain_weight: NonNegative = 10.0,
    tokens: Literal["attended", "answer"] = "attended",
    lr: Positive = 5e-3,
    steps: Count = 60,
    batch: AtLeastOne = 16,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Push the hidden states of the forget text at one block to a random vector, and hold those of the retain text.

    The network is run up to that block only. It does not promise that the knowledge is gone: the blocks below still
    carry it, and a short fine-tuning brings it back; nor that the answers become those of a model that never saw it.

    Formula: mean over D_f of |h - scale u|^2 / d + retain_weight mean over D_r of |h - h_0|^2 / d, h the output of the
    block at each token, h_0 that of the original model, u a random unit vector with positive entries, fixed for the
    run. Means are over tokens.

    Args:
        layer: name, or shell-style pattern, of the one module to steer; None takes the middle block, found by running
            the model on one example.
        train: shell-style patterns, between commas, of the parameters that may move; None takes the last matrix of the
            perceptron of that block and of the two below it, or, where none is in scope, all of the blocks up to it.
        scale: length of the target vector, c of the paper, > 0; None takes twice the mean norm of the hidden states over
            up to 64 forget examples, which it must be compared with.
        retain_weight: alpha of the paper, >= 0.
        tokens: "attended" (all real tokens) or "answer" (the tokens of the answer).
        lr: learning rate of AdamW, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published settings: WMDP, Zephyr-7b, 8th block of 32, scale 6.5, weight 1200, lr 5e-5, 150 steps of 4 examples; in
    the benchmark on TOFU scale 2, weight 1, all parameters, lr 1e-5.
    """
    return _Rmu(
        layer,
        () if train is None else tuple(pattern.strip() for pattern in train.split(",")),
        scale,
        tokens,
        Descend(
            combine=Weighted({"retain": retain_weight}),
            optimizer=AdamW(lr),
            steps=steps,
            batch=batch,
            norm_stats=norm_stats,
            guard=Guard(),
        ),
    )


@dataclass(frozen=True)
class _Rmu:
    """Find the block, narrow the scope, descend; the Case's own scope comes back."""

    layer: str | None
    train: tuple[str, ...]
    scale: float | None
    tokens: Tokens
    descend: Descend

    def __call__(self, case: Case) -> Case:
        if self.descend.steps == 0:
            return case
        key, rng = case.rng.take()
        found = blocks(case)
        layer = chosen_layer(case, self.layer, found)
        if self.train:
            narrow = case.scope & Scope.match(case.model, *self.train)
        else:
            narrow = case.scope & _usual(case.scope, _up_to(found, layer))
        scale = 2 * mean_norm(case, layer, self.tokens) if self.scale is None else float(self.scale)
        forget = Misdirect(layer, scale, key.at("control").seed, self.tokens)
        stage = replace(self.descend, forget=forget, retain=HoldStates(layer, self.tokens))
        done = stage(replace(case, scope=narrow, rng=rng))
        return replace(done, scope=case.scope)


def _up_to(found: Sequence[str], layer: str) -> list[str]:
    """The blocks from the first to the one that is, or holds, the layer; none where it is in no block."""
    at = next((i for i, name in enumerate(found) if layer == name or layer.startswith(f"{name}.")), -1)
    return list(found[: at + 1])


def _usual(scope: Scope, up_to: Sequence[str]) -> Scope:
    """The paper's few matrices where they are in scope; else all of these blocks; else the scope as it is."""
    inside = [name for name in scope.masks if any(name.startswith(f"{block}.") for block in up_to)]
    last = tuple(f"{block}." for block in up_to[-3:])
    few = [n for n in inside if n.startswith(last) and any(fnmatch.fnmatchcase(n, p) for p in MATRICES)]
    return Scope(dict.fromkeys(few or inside or scope.masks, True), scope.universe)
