"""Datamodel matching (Georgiev et al., ICLR 2025): fine-tune to the outputs that a retrained model is predicted to give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from expunge.attribution import COLUMN, TRAK, Attribution, Influence, MatchOutputs, predicted, sampled
from expunge.combine import Weighted
from expunge.core import Case, Data, Grads, Key, Stage
from expunge.descend import Descend, Guard
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Share, method

_KEPT = "min(multiple * n_forget, n_retain)"
_STEPS = f"steps * (min(batch, n_forget) + min(batch, {_KEPT}))"
_SAMPLES = "min(samples, n_retain)"


@method(
    paper="arXiv:2410.23232",
    tasks=("classification", "regression"),
    needs={"forget", "retain"},
    dose="steps",
    reason="the released code lacks the routine, and no number of theirs could be had; reaches a ridge regression in closed form",
    cost={
        "forward": f"(steps > 0) * (2 * n_forget + {_KEPT} + (2 * iterations * {_SAMPLES} if by == 'influence' else n_forget + {_SAMPLES})) + {_STEPS}",
        "backward": f"(steps > 0) * (n_forget + (iterations * {_SAMPLES} if by == 'influence' else n_forget + {_SAMPLES})) + {_STEPS}",
    },
    departures={
        "attribution": "estimated from the one model that is given; the paper regresses the outputs of thousands of "
        "models on what they were trained on",
        "batches": "forget and retain examples apart in every step, weighed by `share`; the paper mixes them",
        "lr": "larger by default than published, for fewer steps of smaller batches",
        "guard": "the state before the retain loss leaves its bound is kept; the authors have no guard",
    },
)
def dmm(
    *,
    by: Literal["influence", "trak"] = "influence",
    scale: NonNegative = 1.0,
    damping: Positive = 0.1,
    samples: AtLeastOne = 1000,
    iterations: AtLeastOne = 20,
    dimensions: AtLeastOne = 512,
    multiple: AtLeastOne = 20,
    share: Share = 0.2,
    lr: Positive = 1e-3,
    steps: Count = 75,
    batch: AtLeastOne = 64,
    chunk: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Predict what a model without the forget data would say of them and of some retain data, and fine-tune to that.

    Labels are read for the prediction only. It does not promise that the prediction is good: the attribution is linear,
    and worse the more is removed at once. With outputs of a truly retrained model as column ``predicted`` of the data,
    ``Descend(forget=MatchOutputs(), retain=MatchOutputs(), ...)`` is the paper's oracle matching, its upper bound.

    Formula: min over theta of share mean over D_f + (1 - share) mean over S of |f(x) - f_r(x)|^2 / outputs, S drawn from
    D_r, f_r(x) = f_o(x) + scale J(x) s, with s as in ``attribution``.

    Args:
        by: the attribution: "influence" (Gauss-Newton) or "trak" (features of log-odds in a random projection).
        scale: multiplier of the predicted change, >= 0; 1 in the paper.
        damping: of the curvature, > 0.
        samples: retain examples that the curvature is taken from, >= 1; all of them where there are fewer.
        iterations: of conjugate gradients, with "influence", >= 1.
        dimensions: of the random projection, with "trak", >= 1.
        multiple: retain examples in S, as a multiple of the forget examples, >= 1; all where there are fewer.
        share: weight of the forget examples, in [0, 1].
        lr: learning rate of Adam, > 0.
        steps: dose, optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many of S, per step, >= 1.
        chunk: examples per pass of the attribution, >= 1; the result does not depend on it, to rounding.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout, in the steps.

    Raises:
        RunFailed: for a model with an operation that has no forward derivative.

    Published setting (CIFAR-10, ResNet-9): multiple 20, 5 times the forget examples (a share of 0.2), 4 epochs, Adam 1e-4,
    batch 512.
    """
    how = Influence(damping, samples, iterations) if by == "influence" else TRAK(dimensions, damping, samples)
    descend = Descend(
        forget=MatchOutputs(),
        retain=MatchOutputs(),
        combine=Weighted({"forget": share, "retain": 1.0 - share}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
    return _Matching(how, float(scale), multiple, chunk, descend)


@dataclass(frozen=True)
class _Matching:
    attribution: Attribution
    scale: float
    multiple: int
    chunk: int
    descend: Descend

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.descend.steps == 0:
            return replace(case, rng=rng)
        request = case.request
        forget, retain = request.data("forget"), request.data("retain")
        kept = sampled(retain, self.multiple * len(forget), key.at("kept"))
        step = self.attribution.step(case, self.chunk, key)
        told = replace(request, forget=self._told(case, forget, step, key), retain=self._told(case, kept, step, key))
        done = self.descend(replace(case, request=told, rng=rng))
        return replace(done, request=request)

    def _told(self, case: Case, data: Data, step: Grads, key: Key) -> Data:
        """The data with what a retrained model is predicted to say of them."""
        return data.annotate(COLUMN, predicted(case, data, step, self.scale, self.chunk, key.at("predicted")))
