"""SOUL (Jia et al., EMNLP 2024): an unlearning objective descended with a clipped second-order optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.combine import Weighted
from expunge.core import Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import Sophia
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method


@method(
    paper="arXiv:2404.18239",
    needs={"forget", "retain"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; its optimizer is held "
    "to the authors' code",
    cost={
        side: "steps * ((forget_weight > 0) * min(batch, n_forget) + (retain_weight > 0) * min(batch, n_retain))"
        for side in ("forward", "backward")
    },
    departures={
        "momentum": "moved once in a step, as in the paper; the released code moves it twice",
        "curvature": "the square of the gradient of the whole step, every step and without resampled labels, as in the "
        "released code; Sophia's own paper refreshes it now and then, from labels drawn from the model",
        "clipping": "no clip of the gradient's norm, which in a trainer would come before; no warm-up",
        "weight_decay": "none; 0.1 on language models in the published runs",
        "weights": "the forget weight is 0.05 by default, not 1: with equal weights a memorised forget set takes "
        "the retain set down with it",
        "stopping": "gives back the last state whose loss on retain data had risen by at most a twentieth of the "
        "way to chance; the authors stop after a fixed number of epochs",
    },
)
def soul(
    *,
    forget: Objective = Ascent(),
    forget_weight: NonNegative = 0.05,
    retain_weight: NonNegative = 1.0,
    lr: Positive = 1e-3,
    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9,
    decay: Annotated[float, Range(0, 1, open_high=True)] = 0.95,
    rho: Positive = 0.04,
    scale: Positive = 5120.0,
    steps: Count = 30,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Descend on a forget and a retain loss with Sophia, whose step is the momentum over the curvature, clipped at lr.

    The default objective is gradient difference; ``soul(forget=RandomLabel())`` is the published preference variant,
    and any other objective fits. No coordinate moves by more than lr in a step, so that a loss which is unbounded still
    makes bounded steps. It does not promise second-order convergence: where gradients are small, which is everywhere in
    a large model, the step is that of sign descent.

    Formula: g = grad(forget_weight mean over D_f of `forget` + retain_weight mean over D_r of NLL);
    m <- momentum m + (1 - momentum) g; h <- decay h + (1 - decay) g^2;
    theta <- theta - lr sign(m) min(|m| / (rho scale h + 1e-15), 1).

    Args:
        forget: per-example objective on the forget data, minimised. The declared cost is that of the default: a
            teacher's forward passes come on top.
        forget_weight, retain_weight: of the two losses, >= 0.
        lr: the most that a weight moves in a step, > 0.
        momentum, decay: the averages of the gradient and of its square, in [0, 1).
        rho, scale: of the curvature, > 0; only their product matters.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (TOFU, Llama-2-7b-chat): gradient difference, forget weight 1, retain weight 2, lr 5e-6, 4
    examples a step, 5 epochs.
    """
    return Descend(
        forget=forget,
        retain=NLL(),
        combine=Weighted({"forget": forget_weight, "retain": retain_weight}),
        optimizer=Sophia(lr, (momentum, decay), rho, scale),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(rise=0.05, checks=15, patience=15, share=None),
    )
