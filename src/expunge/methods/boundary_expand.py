"""Boundary Expand (Chen et al., CVPR 2023): move the forget examples into a class that is then taken away."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from expunge.boundary import ExtraClass, widened
from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

_ROWS = "steps * min(batch, n_forget)"


@method(
    status="reproduced",
    paper="arXiv:2303.11570",
    tasks=("classification",),
    needs={"forget"},
    dose="steps",
    cost={"forward": f"{_ROWS} + (steps > 0)", "backward": _ROWS},
    departures={
        "unit": "always taken away at the end, as in the paper; a port of it evaluates with one output too many",
        "stopping": "stopped when the loss on retain or validation data leaves its bound, where there are any",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def boundary_expand(
    *,
    lr: Positive = 3e-3,
    momentum: NonNegative = 0.9,
    steps: Count = 40,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Add an output unit, train all forget examples as the class of that unit, and drop the unit.

    No label and no retain data is read, but by the guard. What is left of a forget example's prediction is decided by the
    logits of the true classes, which the training moved only as far as the new class needed: it does not promise that the
    true class is no longer the largest of them, nor utility.

    Formula: min over theta, w, b of the mean over D_f of -log softmax([f_theta(x), w h(x) + b])_{C+1}, h the input of the
    last layer; then theta alone is kept.

    Args:
        lr: learning rate of SGD, > 0.
        momentum: of SGD, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Raises:
        Refused: for a model whose logits are not what its last linear layer gives.

    Published setting (CIFAR-10, AllCNN): SGD, lr 1e-5, momentum 0.9, batch 64, 10 epochs.
    """
    descend = Descend(
        forget=ExtraClass(), optimizer=SGD(lr, momentum), steps=steps, batch=batch, norm_stats=norm_stats, guard=Guard()
    )

    def expand(case: Case) -> Case:
        key, rng = case.rng.take()
        if steps == 0:
            return replace(case, rng=rng)
        wide = widened(replace(case, rng=rng), key.at("unit"))
        try:
            done = descend(wide)
        finally:
            wide.model.close()  # type: ignore[operator]
        return replace(done, model=case.model, scope=case.scope)

    return expand
