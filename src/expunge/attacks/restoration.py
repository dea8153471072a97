"""Was a class deleted or suppressed? Put the original model's features of it back at one layer, and look at the answer.

After "Suppression or Deletion" (arXiv:2602.18505), in two forms that are not to be mixed:

``restoration``, a corrected protocol, derived. The steering knows of the original model only the average code of the
class, from other examples than those that are judged; it is applied to every input, so that it may fail by turning other
classes into the forgotten one; controls tell what any push of that size does.

``restoration_as_published``: the codes of the original model for the very input are spliced in, in examples of the
class only. What is high there shows that the layers above still read the original's code, not that the model holds the
information: it came from the original.

Both are asked for by name: they train an autoencoder on the original model once, and pass the judged examples through
each model some 20 times per class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from expunge.attacks.steering import Plan, Splice, Steering, Target, original_tokens, plan_of
from expunge.audit import intervals
from expunge.audit.layers import Layer, changed
from expunge.audit.subject import Model, Reading, Subject, run
from expunge.audit.transfer import has_layer
from expunge.core import Data
from expunge.registry import measure

STRENGTHS, RANDOM = (1.0, 5.0, 10.0), 5


@measure(asked=True)
def restoration(subject: Subject) -> Reading | None:
    """Accuracy on the forgotten classes after steering, as a share of the original model's on the same examples.

    At a layer three quarters up, the codes h -> Enc(h) of the class's latents are set to their average in the original
    model over forget examples, h' = h + sum over experts of alpha (mean_j - code_j) d_j, and the model goes on from
    there. Examples: unseen ones of the forgotten classes where there are any, else half of the forget examples (the
    averages are then from the other half). Average at each pixel or token, where all examples have as many.

    Value: at alpha = 1, the natural reading of "restoration rate", whose closed form the paper does not give. The
    interval is Wilson's over the judged examples, divided by the original's accuracy as if that were known. Detail:
    "before", without steering; "alpha_5" and "alpha_10"; "false", share of examples of kept classes that the steering
    turns into the class, less those that were called so before ("net" is the value less this); "random", the rate of a
    push of the same length along random latents; "other_class", that of steering towards kept classes; "explained" of
    the autoencoder. The fourth control is a retrained model: the reference. A model that knows nothing
    may still be "restored", since a strong push brings the class to any input: that is what "false" shows. A class
    that was lost above the layer, in the head alone, is for ``prototype_forgotten`` to see.

    None where no whole class is forgotten, nothing is kept, there are no examples to judge, the original is never right
    on them, or the model lacks the layer.
    """
    plan = _plan(subject)
    if plan is None:
        return None
    counts = [_corrected(subject, plan, target) for target in plan.targets]
    n = sum(count["n"] for count in counts)
    original = sum(count["original"] for count in counts) / n
    if original == 0:
        return None

    def rate(name: str) -> float:
        return sum(count[name] for count in counts) / n / original

    false = [float(np.mean([count[f"false_{strength:g}"] for count in counts])) for strength in STRENGTHS]
    detail = {name: rate(name) for name in ("before", "alpha_5", "alpha_10", "random", "other_class")}
    detail |= {"false": false[0], "net": rate("alpha_1") - false[0]}
    detail |= {"explained": plan.explained, "layer": plan.number}
    low, high = (float(end) / original for end in intervals.wilson(sum(c["alpha_1"] for c in counts), n))
    along = (0.0, *STRENGTHS)
    restored = (detail["before"], rate("alpha_1"), detail["alpha_5"], detail["alpha_10"])
    curves = {"restored": (along, restored), "false": (along, (0.0, *false))}
    return Reading(
        "restoration",
        rate("alpha_1"),
        low,
        high,
        int(n),
        detail=detail,
        curves=curves,
        axes=("strength of steering", "accuracy over the original's; share of kept examples turned"),
    )


@measure(asked=True)
def restoration_as_published(subject: Subject) -> Reading | None:
    """The same rate when the original model's own codes for each example are spliced in, as the released code does.

    Only examples of the class are touched, by their true label, so that kept classes cannot suffer. For tokens
    [b, t, d] the first is taken for a class token: h + alpha (h_original - h), all of it, without autoencoder. The other
    tokens, every pixel of a map and the one vector of a dense layer: s + alpha (s_original - s) on the class's latents,
    the other codes as they are, then decoded whole, so that the reconstruction's error comes in. The code is E(h - b)
    without bias, ReLU or TopK, as in the release. alpha = 1 is the value, 5 and 10 are in the detail; intervals,
    examples and None as ``restoration``. The paper's control, retraining, is restored as well where the layers above
    are alike: read it against the retrained models.

    Departures: the latents of a class are chosen by ``class_latents`` and the autoencoder is trained by ``train_sae``,
    since neither list nor training was released.
    """
    plan = _plan(subject)
    if plan is None:
        return None
    n = original = 0
    after = subject.opened(subject.after)
    right = dict.fromkeys((0.0, *STRENGTHS), 0)
    with torch.no_grad():
        for target in plan.targets:
            n += len(target.judge)
            original += int((_said(subject, subject.before, target.judge) == target.label).sum())
            given = torch.from_numpy(original_tokens(subject, target.judge, plan.layer))
            for strength in right:
                splice = Splice(plan, target, given, strength)
                found = _said(subject, after, target.judge, plan.layer, splice if strength else None)
                right[strength] += int((found == target.label).sum())
    if original == 0:
        return None
    rates = {strength: count / original for strength, count in right.items()}
    low, high = (float(end) * n / original for end in intervals.wilson(right[1.0], n))
    detail = {"before": rates[0.0], "alpha_5": rates[5.0], "alpha_10": rates[10.0], "layer": plan.number}
    return Reading(
        "restoration_as_published",
        rates[1.0],
        low,
        high,
        n,
        detail=detail,
        curves={"restored": (tuple(rates), tuple(rates.values()))},
        axes=("strength of splicing", "accuracy of the forgotten classes over the original's"),
    )


def _plan(subject: Subject) -> Plan | None:
    """As ``plan_of``; None too where the judged model has no such layer."""
    plan = plan_of(subject)
    return plan if plan is not None and has_layer(subject, subject.after, plan.layer) else None


def _corrected(subject: Subject, plan: Plan, target: Target) -> dict[str, float]:
    """Counts of judged examples that are called the class, by what was done to them; "false_*" are shares."""
    steer = partial(Steering, plan.sae, plan.layer)
    said = partial(_said, subject, subject.opened(subject.after))

    def hits(data: Data, change: Callable[[Tensor], Tensor] | None = None) -> float:
        return float((said(data, plan.layer, change) == target.label).sum())

    with torch.no_grad():
        found = {"n": float(len(target.judge)), "before": hits(target.judge)}
        found["original"] = float((_said(subject, subject.before, target.judge) == target.label).sum())
        for strength in STRENGTHS:
            found[f"alpha_{strength:g}"] = hits(target.judge, steer(target.experts, target.level, strength))
        pushes = [_random(subject, plan, target, number) for number in range(RANDOM)]
        random = [hits(target.judge, steer(target.experts, target.level, 1.0, along)) for along in pushes]
        others = [hits(target.judge, steer(experts, level)) for experts, level in plan.others]
        found["random"] = float(np.mean(random))
        found["other_class"] = float(np.mean(others)) if others else math.nan
        called = hits(plan.kept)
        for strength in STRENGTHS:
            turned = hits(plan.kept, steer(target.experts, target.level, strength)) - called
            found[f"false_{strength:g}"] = turned / len(plan.kept)
        return found


def _random(subject: Subject, plan: Plan, target: Target, number: int) -> tuple[Tensor, Tensor]:
    """As many latents that are not of the class, and positive weights."""
    generator = subject.key.at("restoration", "random", target.label, number).generator()
    device = plan.sae.pre_bias.device
    free = torch.ones(len(plan.sae.latent_bias), dtype=torch.bool)
    if len(target.experts) < len(free):
        free[target.experts] = False
    pool = torch.nonzero(free).flatten()
    picked = pool[torch.randperm(len(pool), generator=generator)[: max(1, len(target.experts))]]
    return picked.to(device), torch.rand(len(picked), generator=generator).to(device)


def _said(
    subject: Subject,
    model: Model,
    data: Data,
    layer: Layer | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """[n] the class that a model names, steered or not."""
    opened, key = subject.opened(model), subject.key.at("restoration", "run")
    if layer is None or change is None:
        return run(opened, subject.task, data, subject.batch, key)["logits"].argmax(1)
    with changed(opened, layer, change):
        return run(opened, subject.task, data, subject.batch, key)["logits"].argmax(1)
