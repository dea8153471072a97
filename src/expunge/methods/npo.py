"""NPO, negative preference optimisation (Zhang et al., COLM 2024): gradient ascent that slows down by itself."""

from __future__ import annotations

from typing import Literal

from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, NPO
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

RETAIN = "(retain_weight > 0) * min(batch, n_retain)"


@method(
    paper="arXiv:2404.05868",
    needs={"forget", "retain", "teacher:original|column:reference"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the loss is held to the "
    "benchmark's own code",
    cost={
        "forward": f"steps * (2 * min(batch, n_forget) + {RETAIN})",
        "backward": f"steps * (min(batch, n_forget) + {RETAIN})",
    },
    departures={
        "optimizer": "Adam at a constant rate without weight decay; the paper uses AdamW with weight decay 0.01, "
        "one epoch of warm-up and a linear decay",
        "weights": "beta 1 and retain weight 5 by default, for one label per example; the paper has 0.1 and 1 "
        "for answers of many tokens",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def npo(
    *,
    beta: Positive = 1.0,
    retain_weight: NonNegative = 5.0,
    lr: Positive = 5e-4,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Make the forget answers less likely than under the original model, while minimising the loss on the retain data.

    The pull fades as an answer becomes unlikely, so it collapses later than gradient ascent. It does not promise to
    stop at the loss of a model that never saw the data.

    Formula: min_theta -(2 / beta) mean over D_f of log sigmoid(beta (S - S_ref)) + retain_weight mean over D_r of NLL,
    S the summed NLL of an example, S_ref that of the original model. S_ref is read from the forget data's column
    ``reference`` where there is one: ``chain(CacheReference(), npo())`` needs no second model.

    Args:
        beta: inverse temperature, > 0; gradient ascent as it tends to 0.
        retain_weight: of the retain loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    The declared cost is with a teacher; with a cached reference the forget data are passed once a step, not twice.
    Published setting (TOFU, Llama-2-7b-chat): beta 0.1, AdamW, lr 1e-5, 32 examples a step, 10 epochs, weight 1.
    """
    return Descend(
        forget=NPO(beta),
        retain=NLL(),
        combine=Weighted({"retain": retain_weight}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
