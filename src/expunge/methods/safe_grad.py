"""SafeGrad (Yi et al. 2025): learn a user's data without losing alignment, by one-sided gradient surgery."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from expunge.constrained import SafeGrad
from expunge.core import Case, Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Distill
from expunge.optim import Adam
from expunge.oracle import On
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

TASK = "task"


@method(
    paper="arXiv:2508.07172",
    needs={"retain", "teacher:original"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; the projection is held "
    "to a computation by hand",
    cost={
        "forward": "steps * (min(batch, n_forget) + 2 * min(batch, n_retain))",
        "backward": "steps * (min(batch, n_forget) + min(batch, n_retain))",
    },
    departures={
        "settings": "rho, the direction of the divergence, the rate and the scope of the inner product are not given in what "
        "could be read of the paper: they are settings, and the defaults are ours",
        "guard": "stops where the loss on the alignment data leaves its bound",
        "contract:forgets": "it learns the data that it is given",
    },
)
def safe_grad(
    *,
    learn: Objective = NLL(),
    rho: NonNegative = 1.0,
    inner_product: Literal["global", "per_tensor"] = "global",
    direction: Literal["forward", "reverse"] = "forward",
    lr: Positive = 5e-4,
    steps: Count = 50,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Fine-tune on a user's data, less whatever in that opposes staying what the aligned model was.

    The user's data are ``request.extra["task"]``; where there are none, the forget slot is read (on the command line:
    ``--forget`` then names the data to learn). ``request.retain`` is the alignment set, of prompts and what the aligned
    model should keep answering; the frozen aligned model is the model as given. With ``learn=RandomLabel()`` or another
    forgetting objective it is one-sided surgery with a pull to the original: then it forgets.

    It does not promise alignment beyond the alignment set, nor beyond first order, nor after Adam has scaled the step.

    Formula: g_u of `learn` on the user's data, g_a of KL(aligned || model) on the alignment set, per unit; where
    <g_u, g_a> < 0, g_u <- g_u - (<g_u, g_a> / |g_a|^2) g_a; a step along g_u + rho g_a.

    Args:
        learn: per-example objective on the user's data, minimised; the declared cost is that of the default.
        rho: weight of the alignment gradient, >= 0; 0 only projects.
        inner_product: "global" over all coordinates in scope, or "per_tensor", each tensor for itself.
        direction: "forward" KL(aligned || model), or "reverse".
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples of the user, and as many of the alignment set, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
    """
    descend = Descend(
        retain=Distill(reverse=direction == "reverse"),
        combine=SafeGrad(rho, per_tensor=inner_product == "per_tensor"),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
    return _Learn(descend, learn)


@dataclass(frozen=True)
class _Learn:
    """Look which data there are to learn, then descend."""

    descend: Descend
    learn: Objective

    def __call__(self, case: Case) -> Case:
        source = TASK if TASK in case.request.extra else "forget"
        case.request.data(source)  # refused before the first step where there are none
        if source != TASK and isinstance(self.learn, NLL):
            case.meter.note(
                "safe_grad learnt the data that it was given to forget: it forgets with another learn= only"
            )
        return replace(self.descend, others={TASK: On(source, self.learn)})(case)
