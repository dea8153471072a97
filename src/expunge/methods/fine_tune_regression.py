"""Fine-tuning of a regressor on the retain set (Tarun et al., ICML 2023, the baseline): forget by not being reminded."""

from __future__ import annotations

from typing import Literal

from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.deviation import TargetError
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, Positive, method

_ROWS = "steps * min(batch, n_retain)"


@method(
    paper="arXiv:2210.08196",
    status="reproduced",
    tasks=("regression",),
    needs={"retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "steps": "a number of steps, so that the cost does not grow with the retain set; published runs are of 5 epochs",
        "selection": "the last step is the result; the authors' STS-B notebook keeps the epoch of the best validation loss",
        "guard": "stops where the retain loss leaves its bound; the authors have none",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def fine_tune_regression(
    *,
    distance: Literal["absolute", "squared"] = "absolute",
    lr: Positive = 1e-3,
    steps: Count = 100,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Minimise the error on the retain data, absolute or squared, with Adam from the trained weights.

    Catastrophic forgetting does the work; it does not promise that anything is forgotten: published, it closes about a
    sixth of the way to the retrained model. It differs from ``finetune`` in its loss and its optimizer.

    Formula: min_theta mean over D_r of |f - y| / scale, or of its square, mean over the targets of an example.

    Args:
        distance: "absolute" or "squared".
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: retain examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published settings: Adam, lr 1e-3, batch 256, 5 epochs, live statistics; absolute (AgeDB, a convolutional network of 32
    pixels), squared (STS-B, an LSTM).
    """
    return Descend(
        retain=TargetError(distance),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
