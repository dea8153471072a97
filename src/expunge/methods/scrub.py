"""SCRUB (Kurmanji et al., NeurIPS 2023): leave the teacher on the forget data, return to it on the retain data."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Literal

from expunge.combine import Weighted
from expunge.compose import Alternate, Turn
from expunge.core import Case, Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent, Distill
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method
from expunge.together import Together
from expunge.told import told

FORGET = "min(epochs, ascent_epochs) * ceil(n_forget / min(forget_batch, n_forget)) * min(forget_batch, n_forget)"
RETAIN = "epochs * min(ceil(n_retain / min(batch, n_retain)), retain_steps) * min(batch, n_retain)"


@method(
    paper="arXiv:2302.09880",
    needs={"forget", "retain", "teacher:original"},
    dose="epochs",
    status="reproduced",
    cost={
        "forward": f"{FORGET} + (min({FORGET}, n_forget) if kept_outputs else {FORGET}) + (label_weight + distill_weight > 0) "
        f"* {RETAIN} + (distill_weight > 0) * (min({RETAIN}, n_retain) if kept_outputs else {RETAIN})",
        "backward": f"{FORGET} + (label_weight + distill_weight > 0) * {RETAIN}",
    },
    departures={
        "retain_steps": "a retain pass is cut short after that many steps, so that the cost does not grow with "
        "the retain set; the paper's pass is over all of it",
        "optimizer": "Adam at a constant rate without weight decay; the paper's rate falls tenfold at fixed epochs",
        "rewind": "SCRUB+R, which picks an epoch by the error on held-out data, is not here; the guard keeps the "
        "last epoch whose retain loss is in bounds",
        "temperature": "1 by default, not 2 or 4: the factor T squared sets the speed of the unbounded term, "
        "which a safe default keeps low",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
        "contract:cuts": "the first forget pass climbs from a divergence of exactly 0, where the gradient is rounding: "
        "which way it sets out differs with the cut of a batch and the number of processes",
    },
)
def scrub(
    *,
    distill_weight: NonNegative = 0.5,
    label_weight: NonNegative = 1.0,
    temperature: Positive = 1.0,
    epochs: Count = 6,
    ascent_epochs: Count = 4,
    lr: Positive = 7e-4,
    forget_batch: AtLeastOne = 32,
    batch: AtLeastOne = 32,
    retain_steps: AtLeastOne = 10,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Alternate passes that leave the original model on the forget data with passes that return to it on retain data.

    In each of the first `ascent_epochs` epochs the forget pass comes first and the retain pass after it; the other
    epochs are retain passes. One optimizer lives through all of them. The first term is unbounded: it does not promise
    that the retain passes mend what the forget passes broke.

    Formula: min_theta distill_weight mean over D_r of KL_T(p_original || p_theta) + label_weight mean over D_r of NLL
    - mean over D_f of KL_T(p_original || p_theta), KL_T at temperature T and times T squared.

    Args:
        distill_weight: alpha of the paper, >= 0.
        label_weight: gamma of the paper, >= 0.
        temperature: of both softmaxes, > 0.
        epochs: rounds, >= 0; 0 changes nothing.
        ascent_epochs: how many of them, from the first, start with a forget pass (msteps of the paper), >= 0.
        lr: learning rate of Adam, > 0.
        forget_batch: forget examples per step, >= 1; small is safer.
        batch: retain examples per step, >= 1.
        retain_steps: at most so many steps in a retain pass, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout of the student; the teacher is
            always in eval mode.

    Published settings: small scale, Adam, lr 5e-4, weight decay 0.1, gamma 1, alpha 0.5, T 2, 3 of 10 epochs ascend;
    CIFAR-10, SGD, momentum 0.9, lr 5e-4, weight decay 5e-4, gamma 0.99, alpha 0.001, T 4, 2 of 3, batches 128 and 32.
    """
    near = Distill("original", temperature)
    terms: list[tuple[Objective, float]] = [(NLL(), label_weight), (near, distill_weight)]
    parts = [(part, weight) for part, weight in terms if weight > 0] or terms[:1]
    retain = Together(tuple(part for part, _ in parts), tuple(float(weight) for _, weight in parts))
    any_weight = Weighted({"retain": float(label_weight + distill_weight > 0)})

    def rounds(case: Case) -> Case:
        if epochs == 0:
            return case
        ascent = Turn(("forget",), _passes(case, "forget", forget_batch))
        mend = Turn(("retain",), min(_passes(case, "retain", batch), retain_steps), combine=any_weight)
        turns = [turn for epoch in range(epochs) for turn in ((ascent, mend) if epoch < ascent_epochs else (mend,))]
        ends = [sum(turn.steps for turn in turns[: i + 1]) for i, turn in enumerate(turns) if turn is mend]
        descend = Descend(
            forget=Ascent(near),
            retain=retain,
            combine=Alternate(tuple(turns)),
            optimizer=Adam(lr),
            steps=ends[-1],
            norm_stats=norm_stats,
            batch={"forget": forget_batch, "retain": batch},
            guard=Guard(checks=tuple(ends)),
        )  # within a round the retain loss is meant to rise first
        asked = {"forget": (near, ascent.steps * _together(case, "forget", forget_batch) * min(epochs, ascent_epochs))}
        if distill_weight > 0:
            asked["retain"] = (near, mend.steps * _together(case, "retain", batch) * epochs)
        return replace(descend(told(case, asked)), request=case.request)

    return rounds


def _passes(case: Case, source: str, batch: int) -> int:
    """Steps in one pass over the data of that name."""
    return ceil(len(case.request.data(source)) / _together(case, source, batch))


def _together(case: Case, source: str, batch: int) -> int:
    """Examples in one step."""
    return min(batch, len(case.request.data(source)))
