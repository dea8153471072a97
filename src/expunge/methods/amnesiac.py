"""Amnesiac unlearning (Graves et al., AAAI 2021): each forget example gets one wrong label, then training goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from expunge.core import Case, Refused, Stage
from expunge.data.joined import joined
from expunge.descend import Descend, Guard
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.oracle import On
from expunge.registry import AtLeastOne, Count, Positive, method

_ROWS = "steps * min(batch, n_forget + n_retain)"


@method(
    status="reproduced",
    paper="arXiv:2010.10981",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "rollback": "the paper's other method, which takes back the recorded updates of the batches that held forget data, "
        "is not here: it needs a record of the whole training",
        "steps": "a number of steps, so that the cost does not grow with the retain set; published runs are of 3 epochs",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def amnesiac(
    *,
    lr: Positive = 1e-3,
    steps: Count = 75,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Give each forget example one wrong label, once, and train on forget and retain data shuffled together.

    The wrong labels are drawn before the first step and stay: unlike ``random_label``, whose are drawn anew at every step,
    it is a fit to a fixed wrong answer, which long training memorises. An example of the forget data weighs as much as one
    of the retain data, so that few of them are seen in a step where they are few. It does not promise to look like a
    retrained model: a wrong label that was learnt is as sure as a right one.

    Formula: y'_i uniform over the classes other than y_i, for each i in D_f; min_theta mean over D_f (with y') and D_r
    (with y) together of NLL.

    Args:
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples of both kinds per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Raises:
        Refused: for a task without class labels.

    Published setting (CIFAR-100, ResNet-18): Adam, lr 1e-4, batch 256, 3 epochs, live statistics.
    """
    descend = Descend(
        others={"relabelled": On("relabelled", NLL())},
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )

    def forget(case: Case) -> Case:
        key, rng = case.rng.take()
        if not hasattr(case.task, "label"):
            raise Refused(f"amnesiac gives wrong class labels, which task {case.task.name!r} does not have")
        data, label = case.request.data("forget"), case.task.label
        wrong = [case.task.relabel(part, key.at("label", n))[label] for n, part in enumerate(data.batches(1024))]
        both = joined(data.annotate(label, torch.cat(wrong)), case.request.data("retain"))
        request = replace(case.request, extra={**case.request.extra, "relabelled": both})
        return replace(descend(replace(case, request=request, rng=rng)), request=case.request)

    return forget
