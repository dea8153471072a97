"""Gaussian amnesiac unlearning (Tarun et al., ICML 2023): forget examples get targets drawn from all targets' Gaussian."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.core import Case, Data, Key, Refused, Stage
from expunge.data.joined import joined
from expunge.descend import Descend, Guard
from expunge.deviation import TargetError
from expunge.optim import Adam
from expunge.oracle import On
from expunge.registry import AtLeastOne, Count, Positive, method

_ROWS = "steps * min(batch, n_forget + n_retain)"


@method(
    paper="arXiv:2210.08196",
    status="reproduced",
    tasks=("regression",),
    needs={"forget", "retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "steps": "a number of steps, so that the cost does not grow with the data; published runs are of 1 and 5 epochs",
        "targets": "several targets of an example are drawn independently, each with its own mean and deviation; the paper has "
        "one target",
        "selection": "the last step is the result; the authors' STS-B notebook keeps the epoch of the best validation loss",
        "guard": "stops where the retain loss leaves its bound; the authors have none",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def gaussian_amnesiac(
    *,
    distance: Literal["absolute", "squared"] = "absolute",
    lr: Positive = 1e-3,
    steps: Count = 100,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Give each forget example one random target, once, and train on forget and retain data shuffled together.

    The targets come from the Gaussian with the mean and the standard deviation of all training targets, so they may lie
    where no target can (an age below 0), and may fall near the true one. They are drawn before the first step and stay:
    long training memorises them. It does not promise to look like a retrained model.

    Formula: y'_i ~ N(mean(y), std(y)) for each i in D_f, y over D_f and D_r, std with n - 1; min_theta mean over D_f (with
    y') and D_r (with y) together of |f - y| / scale, or of its square.

    Args:
        distance: "absolute" or "squared".
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples of both kinds per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Raises:
        Refused: for fewer than two training examples, which have no standard deviation.

    Published settings: Adam, lr 1e-3, batch 256, live statistics; absolute, 1 epoch (AgeDB, a convolutional network of 32
    pixels); squared, 5 epochs (STS-B, an LSTM).
    """
    descend = Descend(
        others={"redrawn": On("redrawn", TargetError(distance))},
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )

    def forget(case: Case) -> Case:
        key, rng = case.rng.take()
        request, task = case.request, _with_targets(case)
        drawn = _drawn(task, request.data("forget"), request.data("retain"), key.at("targets"))
        both = joined(request.data("forget").annotate(task.target, drawn), request.data("retain"))
        extra = {**request.extra, "redrawn": both}
        return replace(descend(replace(case, request=replace(request, extra=extra), rng=rng)), request=request)

    return forget


def _drawn(task: Any, forget: Data, retain: Data, key: Key) -> Tensor:
    """One target per forget example, of the shape and kind of the true ones."""
    true = [batch[task.target] for data in (forget, retain) for batch in data.batches(1024)]
    every = torch.cat([part.double().reshape(len(part), -1) for part in true])
    if len(every) < 2:
        raise Refused(f"gaussian_amnesiac: {len(every)} training example has no deviation: expected at least two")
    noise = torch.randn(len(forget), every.shape[1], generator=key.generator(), dtype=torch.float64)
    dtype = true[0].dtype if true[0].is_floating_point() else torch.float32
    return (every.mean(0) + every.std(0) * noise).to(dtype).reshape(len(forget), *true[0].shape[1:])


def _with_targets(case: Case) -> Any:
    if not hasattr(case.task, "target"):
        raise Refused(f"gaussian_amnesiac draws real targets, which task {case.task.name!r} does not have")
    return case.task
