"""Task-vector negation (Ilharco et al., ICLR 2023): learn the forget data better still, then step the other way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from expunge.core import Case, Stage
from expunge.descend import Descend
from expunge.edits import extrapolate
from expunge.guarded import guarded_edit
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method
from expunge.scope import edit


@method(
    paper="arXiv:2212.04089",
    needs={"forget"},
    dose="alpha",
    reason="published for models that were fine-tuned from a pretrained one, and none of these is here; held to "
    "closed forms",
    cost={side: "(alpha > 0) * steps * min(batch, n_forget)" for side in ("forward", "backward")},
    departures={
        "optimizer": "Adam without weight decay, whose shrinking of every weight would be part of the task vector; "
        "AdamW with a schedule in the published runs",
        "guard": "alpha is lowered until the retain loss keeps its bound, where there are data to watch; the authors "
        "choose it on validation data over a grid",
    },
)
def task_vector(
    *,
    alpha: NonNegative = 2.0,
    lr: Positive = 1e-3,
    steps: Count = 40,
    batch: AtLeastOne = 32,
    rise: Share = 0.05,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Fine-tune on the forget data, and subtract `alpha` times what that changed from the original weights.

    Only forget data are trained on; retain (or validation) data are looked at, where there are any, to keep `alpha`
    below the cliff where utility falls. It does not promise that the change is about the forget data alone: whatever
    fine-tuning on them moves is moved the other way, and a model that fits them already gives hardly a vector at all.

    Formula: theta <- theta_0 - alpha (theta_ft - theta_0), theta_ft = theta_0 after `steps` steps on mean over D_f of
    NLL. In float32 at least, each tied weight once, buffers as they were.

    Args:
        alpha: dose, >= 0; 0 changes nothing and costs nothing.
        lr: learning rate of Adam while fine-tuning, > 0.
        steps: fine-tuning steps, >= 0; 0 changes nothing.
        batch: forget examples per step, >= 1.
        rise: how far the retain loss may rise, as a share of the way to chance, in [0, 1].
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout while fine-tuning; running
            statistics are put back in either case.

    Published setting (MUSE, 7B models): 10 epochs, lr 1e-5, 32 examples a step, alpha 5.
    """
    tune = Descend(forget=NLL(), optimizer=Adam(lr), steps=steps, batch=batch, norm_stats=norm_stats)
    return _Negate(tune, alpha, rise)


@dataclass(frozen=True)
class _Negate:
    """Run `tune`, then extrapolate away from where it went; a run killed in between tunes on from its checkpoint."""

    tune: Descend
    alpha: float
    rise: float

    def __call__(self, case: Case) -> Case:
        if self.alpha == 0:
            return case
        key, rng = case.rng.take()
        weights = case.scope.parameters(case.model)
        before = {name: p.detach().clone() for name, p in weights.items()}
        buffers = {name: b.detach().clone() for name, b in case.model.named_buffers()}
        self.tune(case)
        after = {name: p.detach().clone() for name, p in weights.items()}
        with torch.no_grad():
            for name, buffer in case.model.named_buffers():
                buffer.copy_(buffers[name])
        edit(case, before)
        guarded_edit(
            case,
            lambda dose: extrapolate(before, after, -dose),
            self.alpha,
            key.at("guard"),
            name="alpha",
            rise=self.rise,
        )
        return replace(case, rng=rng)
