"""Bad teacher (Chundawat et al., AAAI 2023): imitate a random network on the forget data, the original on the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from torch import nn

from expunge.combine import Weighted
from expunge.core import Case, Stage
from expunge.descend import Descend, Guard
from expunge.edits import reinitialise
from expunge.objectives import Distill
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method
from expunge.told import told

FORGET, RETAIN = "steps * min(batch, n_forget)", "steps * min(batch, n_retain)"
TWICE = "min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain)"


@method(
    labels=False,
    paper="arXiv:2205.08096",
    needs={"forget", "retain", "teacher:original"},
    dose="steps",
    status="reproduced",
    cost={
        "forward": f"steps * ({TWICE}) + (min({FORGET}, n_forget) + (retain_weight > 0) * min({RETAIN}, n_retain) "
        f"if kept_outputs else steps * ({TWICE}))",
        "backward": f"steps * ({TWICE})",
    },
    departures={
        "reduction": "KL is summed over classes and averaged over examples; authors' code also divides by the "
        "number of classes, so their learning rate is that many times smaller",
        "batches": "one forget and one retain batch of their own in every step, each with its own mean; the "
        "paper shuffles the forget set with 30 % of the retain set",
        "temperature": "the loss is times the temperature squared (the same at the paper's temperature of 1)",
        "contract:adapter:causal_lm": "the bad teacher is a model made anew, and layers with an adapter cannot be: give make",
    },
)
def bad_teacher(
    *,
    temperature: Positive = 1.0,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 1e-3,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Pull the model towards an untrained network on the forget data and towards the original on the retain data.

    No labels are read. An untrained network answers alike on everything, which is not what a retrained model answers
    on unseen data: it does not promise to look retrained, and calibration may suffer.

    Formula: min_theta mean over D_f of KL(p_random || p_theta) + retain_weight mean over D_r of
    KL(p_original || p_theta).

    Args:
        temperature: of all softmaxes, > 0.
        retain_weight: of the retain term, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout of the student; teachers are
            always in eval mode.
        make: builds the untrained network; None resets every module of a copy by its own ``reset_parameters``.

    Raises:
        Refused: without `make`, when the model has a module whose parameters cannot be drawn anew.

    The published setting (CIFAR-100, ResNet-18): temperature 1, Adam, lr 1e-4, batch 256, 1 epoch, 30 % of the retain
    set, live statistics.
    """
    away, near = Distill("untrained", temperature), Distill("original", temperature)
    descend = Descend(
        forget=away,
        retain=near,
        combine=Weighted({"retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )

    def between_two_teachers(case: Case) -> Case:
        key, rng = case.rng.take()
        untrained = reinitialise(case.model, key.at("untrained"), make)
        case_of = replace(case, rng=rng, teachers={**case.teachers, "untrained": untrained})
        read = {name: steps * min(batch, len(case.request.data(name))) for name in ("forget", "retain")}
        asked = {"forget": (away, read["forget"])}
        if retain_weight > 0:
            asked["retain"] = (near, read["retain"])
        return replace(descend(told(case_of, asked)), teachers=case.teachers, request=case.request)

    return between_two_teachers
