"""Boundary Shrink (Chen et al., CVPR 2023): teach each forget example the wrong class across its nearest boundary."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch

from expunge.boundary import nearest_wrong
from expunge.combine import Weighted
from expunge.core import Case, Refused, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import by_name, schedule_by_name
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method

_ROWS = "steps * (min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))"


@method(
    paper="arXiv:2303.11570",
    tasks=("classification",),
    needs={"forget"},
    dose="steps",
    status="reproduced",
    cost={
        "forward": f"(steps > 0) * (1 + (bound > 0)) * n_forget + {_ROWS}",
        "backward": f"(steps > 0) * (bound > 0) * n_forget + {_ROWS}",
    },
    departures={
        "search": "the nearest class is searched once, before the first step: it is that of the model as it was, which "
        "does not change; the authors search anew for every batch of every epoch, and find the same",
        "failed": "where the step crosses no boundary the wrong class with the largest logit is taught; the authors "
        "teach the true one, which is the setting failed='true'",
        "units": "the bound is in units of the input as the model gets it; the authors undo their channels' "
        "normalisation, clip to [0, 1] and round to 1/255",
        "enhanced": "the variants with curvature regularisation and with weights per example are not here",
        "retain": "no retain data are trained on by default, as published; retain_weight adds their loss, without which "
        "forgetting single records costs much of what is kept",
        "stopping": "stopped when the loss on retain or validation data leaves its bound, where there are any",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def boundary_shrink(
    *,
    bound: NonNegative = 0.1,
    low: Annotated[float | None, Range()] = None,
    high: Annotated[float | None, Range()] = None,
    failed: Literal["runner_up", "true"] = "runner_up",
    retain_weight: NonNegative = 0.0,
    optimizer: Literal["sgd", "adam"] = "sgd",
    schedule: Literal["constant", "cosine"] = "constant",
    lr: Positive = 3e-3,
    momentum: NonNegative = 0.9,
    steps: Count = 30,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Move the decision boundaries over the forget examples: each is trained, unchanged, as its nearest wrong class.

    Published without retain data, which only the guard then reads, and for whole classes: examples of a class that is
    kept are taught wrong answers next to right ones. For single records give a `retain_weight`. It does not promise
    utility, nor that a forgotten example is as uncertain as an unseen one.

    Formula: x' = clip(x + bound sign grad_x NLL(theta_o; x, y)), y' = argmax over k != y of f_{theta_o}(x')_k;
    min_theta mean over D_f of NLL(theta; x, y') + retain_weight mean over D_r of NLL(theta; x, y).

    Args:
        bound: length of the search's one step in every coordinate, in units of the input, >= 0; 0 looks at the example
            itself, and costs no backward pass.
        low, high: the least and the largest value of an input, to clip to; None does not clip on that side.
        failed: what to teach where the step crosses no boundary: the "runner_up" among the classes, or the "true" class.
        retain_weight: of the loss on the retain data, >= 0; 0 reads none, and any other needs them.
        optimizer: "sgd" or "adam".
        schedule: the learning rate is "constant", or falls along half a "cosine" to 0.
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; "adam" does not read it.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples per step, and as many retain examples where they are read, >= 1; the search takes as many
            at once.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (CIFAR-10, AllCNN): bound 0.1 in pixels of [0, 1], SGD, lr 1e-5, momentum 0.9, batch 64, 10 epochs.
    """
    if low is not None and high is not None and not low < high:
        raise Refused(f"boundary_shrink: low must be below high, found low {low!r} and high {high!r}")
    clip = (low, high) if low is not None or high is not None else None
    kept = retain_weight > 0
    descend = Descend(
        forget=NLL(),
        retain=NLL() if kept else None,
        combine=Weighted({"retain": retain_weight} if kept else {}),
        optimizer=by_name(optimizer, lr, momentum, 0.0),
        schedule=schedule_by_name(schedule),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )

    def shrink(case: Case) -> Case:
        key, rng = case.rng.take()
        if steps == 0:
            return replace(case, rng=rng)
        data = case.request.data("forget")
        if kept:
            case.request.data("retain")  # refused here where there are none, not after the search
        nearest, reached = nearest_wrong(case, data, bound, clip, batch, key)
        case.meter.history.append({"reached": float(reached.double().mean())})
        label = case.task.label  # type: ignore[attr-defined]
        if failed == "true":
            true = torch.cat([case.task.labels(part) for part in data.batches(1024)])  # type: ignore[attr-defined]
            nearest = torch.where(reached, nearest, true)
        taught = replace(case.request, forget=data.annotate(label, nearest))
        return replace(descend(replace(case, request=taught, rng=rng)), request=case.request)

    return shrink
