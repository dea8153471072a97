"""UNSIR (Tarun et al., TNNLS 2023): noise that the model cannot bear under the class's name, learnt, and repaired."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from expunge.boundary import only_whole_classes
from expunge.combine import Weighted
from expunge.core import Case, Stage
from expunge.descend import Descend
from expunge.learnt_inputs import AgainstClass, learnt, on_inputs
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.oracle import On
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method

_IMPAIR = "steps * ((share > 0) * min(batch, noise) + (share < 1) * min(batch, n_retain))"
_ROWS = f"(steps > 0) * (noise_steps * noise + repair_steps * min(batch, n_retain)) + {_IMPAIR}"


@method(
    status="reproduced",
    paper="arXiv:2111.08947",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "labels": "noise has the label of the class that it was learnt for; the released notebook labels all of it 0",
        "images": "all of the noise is trained on; the notebook counts an image's channels where it means a batch's images, so "
        "that of 256 it uses the first 3",
        "mode": "the noise is learnt against the model in eval mode; the notebook's is in the mode that it was left in",
        "batches": "noise and retain examples apart in every step, weighed by `share`; the notebook shuffles 20 copies of "
        "the noise into a subset of the retain data",
        "norm_stats": "frozen by default; the published runs train with live batch statistics",
    },
)
def unsir(
    *,
    noise: AtLeastOne = 64,
    noise_lr: Positive = 0.1,
    noise_steps: Count = 40,
    penalty: NonNegative = 0.1,
    share: Share = 0.4,
    lr: Positive = 0.02,
    steps: Count = 20,
    repair_lr: Positive = 0.01,
    repair_steps: Count = 20,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Learn noise images with the largest loss for the forgotten classes, train on them, then repair on retain data.

    For whole classes only. Of the forget data nothing but the labels is read: which classes there are. What noise under a
    class's name does to the images of that class is not controlled, and the damage to the others is left to the repair: it
    promises neither forgetting nor utility.

    Formula: v = argmin -NLL(theta_o; v, c) + penalty |v|^2, each class c; then ("impair") min_theta share mean of
    NLL(v, c) + (1 - share) mean over D_r of NLL; then ("repair") min_theta mean over D_r of NLL.

    Args:
        noise: number of noise examples, dealt out to the classes in turn, >= 1 for each class.
        noise_lr: learning rate of Adam on the noise, > 0.
        noise_steps: steps on the noise, >= 0; 0 trains on normal noise.
        penalty: lambda, on the mean squared length of the noise of a class, >= 0.
        share: weight of the noise in the impairing steps, in [0, 1].
        lr: learning rate of Adam in the impairing steps, > 0.
        steps: impairing steps, >= 0; 0 changes nothing, and leaves nothing to repair.
        repair_lr: learning rate of Adam in the repairing steps, > 0.
        repair_steps: repairing steps, >= 0.
        batch: noise examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, when impairing and repairing.

    Raises:
        Refused: where examples of a class are to be forgotten and others of it kept, or inputs are not floating.

    Published settings (CIFAR-10, ResNet-18): 256 noise images per class, 40 steps at 0.1, penalty 0.1, one epoch of
    impairing at 0.02 and one of repairing at 0.01 with 1,000 retain images per class, batch 256, live statistics.
    """
    learn = Descend(others={"noise": AgainstClass(penalty)}, optimizer=Adam(noise_lr), steps=noise_steps)
    impair = Descend(
        retain=NLL(),
        others={"noise": On("noise", NLL())},
        combine=Weighted({"noise": share, "retain": 1.0 - share}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
    )
    repair = Descend(retain=NLL(), optimizer=Adam(repair_lr), steps=repair_steps, batch=batch, norm_stats=norm_stats)

    def forget(case: Case) -> Case:
        if steps == 0:
            return case
        classes = only_whole_classes(case)
        key, rng = case.rng.take()
        made = learn(on_inputs(replace(case, rng=rng), classes, noise, key.at("noise")))
        request = replace(case.request, extra={**case.request.extra, "noise": learnt(made)})
        done = repair(impair(replace(case, request=request, rng=made.rng)))
        return replace(done, request=case.request)

    return forget
