"""Concept inference and data poisoning (Chang et al. 2024): forget a class by teaching it the label of its nearest kin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from expunge.combine import Weighted
from expunge.concept_bank import any_retained, concept_bottleneck, features_of, nearest_profiles, need_others
from expunge.core import Case, Key, Stage
from expunge.descend import Descend, Guard
from expunge.fidelity import sample
from expunge.likeness import head_name
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, method

_STEPS = "steps * (min(batch, n_forget) + min(batch, n_retain))"
TOP = 3  # concepts whose attribution is recorded before and after


@method(
    paper="arXiv:2405.15662",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    reason="no code of its authors and no number of its paper was found; held to its formulas",
    cost={
        "forward": f"(steps > 0) * (poison == 'targeted') * (n_forget + min(samples, n_retain)) + {_STEPS}",
        "backward": _STEPS,
    },
    departures={
        "source": "after the paper's abstract: no code was found and its settings could not be read",
        "bank": "concepts are the request's data called concept:NAME; where there are none, groups of like representations "
        "are taken for concepts, which nobody named. Examples of named concepts cost a forward row each on top",
        "directions": "by ridge regression; concept activation vectors are usually those of a linear support vector machine",
        "target": "by the nearest concept profile, example by example; how the paper chooses is not known",
    },
)
def concept_poison(
    *,
    poison: Literal["targeted", "random"] = "targeted",
    concepts: AtLeastOne = 10,
    sparsity: NonNegative = 1e-3,
    forget_weight: NonNegative = 1.0,
    lr: Positive = 1e-3,
    steps: Count = 60,
    batch: AtLeastOne = 32,
    samples: AtLeastOne = 1024,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Find the concepts that drive the forget data's class, and fine-tune on them under labels of other, retained classes.

    A bottleneck of concepts on the representations, with a sparse linear head, says by integrated gradients which concepts
    speak for a class; each forget example is given the label whose profile of concepts is most like its own. Its label is
    chosen once. It does not promise that the concepts mean anything to a person, nor that the class's representations
    are gone: what is taught is another name for them. Recorded: the attribution of the class's top concepts before and after.

    Formula: s_c = <phi(x), v_c> / |v_c|^2; W, b = argmin mean over a sample of CE(W s + b) + elastic net;
    IG_c(x, y) = W_yc (s_c - mean over D_r of s_c); y' = argmax_k cos(IG(x, y), mean over D_r of class k of IG(., k));
    min_theta mean over D_r of NLL + forget_weight mean over D_f of NLL(y').

    Args:
        poison: "targeted", as above, or "random": any retained class but the true one, and then no concept is looked for.
        concepts: groups at most, where the request has no data called concept:NAME, >= 1.
        sparsity: of the head, >= 0.
        forget_weight: of the poisoned loss, >= 0.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        samples: retain examples that concepts and profiles are found on, at most, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Raises:
        Refused: where the retain data have no other class, a named concept has no examples, or, if targeted, no linear
            layer gives the logits.
    """
    descend = Descend(
        forget=NLL(),
        retain=NLL(),
        combine=Weighted({"forget": float(forget_weight)}),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
    return _Poison(poison, concepts, float(sparsity), samples, descend)


@dataclass(frozen=True)
class _Poison:
    poison: Literal["targeted", "random"]
    concepts: int
    sparsity: float
    samples: int
    descend: Descend

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.descend.steps == 0:
            return replace(case, rng=rng)
        data = case.request.data("forget")
        if self.poison == "random":
            return self._taught(case, any_retained(case, key.at("poison")), rng)
        with case.meter.checking():
            head = head_name(case)
        retain = features_of(case, sample(case.request.data("retain"), self.samples, key.at("sample")), head, key)
        forget = features_of(case, data, head, key)
        need_others(forget[1], torch.unique(retain[1]))
        net = concept_bottleneck(case, forget, retain, head, self.concepts, self.sparsity, key)
        before = net.attributions(*forget).mean(0)
        top = before.topk(min(TOP, len(before))).indices
        done = self._taught(case, nearest_profiles(net, forget, retain, torch.unique(retain[1])), rng)
        with case.meter.checking():
            after = net.attributions(*features_of(done, data, head, key)).mean(0)
        right = (net.logits(retain[0]).argmax(1) == retain[1]).double().mean()
        found = {"concepts": float(len(before)), "bottleneck_accuracy": float(right)}
        found |= {"attribution": float(before[top].sum()), "attribution_left": float(after[top].sum())}
        case.meter.history.append(found)
        return done

    def _taught(self, case: Case, wrong: Tensor, rng: Key) -> Case:
        """The Case after the descent on the poisoned labels, its request as it was."""
        label = case.task.label  # type: ignore[attr-defined]
        taught = replace(case.request, forget=case.request.data("forget").annotate(label, wrong))
        return replace(self.descend(replace(case, request=taught, rng=rng)), request=case.request)
