"""FLAT (Wang et al., ICLR 2025): forget data only, by the f-divergence between template and forget answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from expunge.combine import OfMeans
from expunge.confidence import AnswerProbability
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.optim import Adam
from expunge.oracle import On
from expunge.registry import AtLeastOne, Count, Positive, method

# (g*(v), f*(g*(v))) of each divergence, v a mean probability: activation and Fenchel conjugate of f-GAN's table 6
# (Nowozin et al. 2016). The last three carry exp(-v) where the release has exp(v), which turned their signs around.
FORMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "total_variation": lambda v: (torch.tanh(v) / 2, torch.tanh(v) / 2),
    "kl": lambda v: (v, torch.exp(v - 1)),
    "jensen_shannon": lambda v: (torch.log(2 / (1 + torch.exp(-v))), v + torch.log((1 + torch.exp(-v)) / 2)),
    "pearson": lambda v: (v, v.square() / 4 + v),
    "jeffrey": lambda v: (v, v + v.square() / 4 + v**3 / 16),
    "reverse_kl": lambda v: (-torch.exp(-v), v - 1),
    "squared_hellinger": lambda v: (1 - torch.exp(-v), torch.exp(v) - 1),
    "neyman": lambda v: (1 - torch.exp(-v), 2 - 2 * torch.exp(-v / 2)),
}


def divergence_loss(divergence: str, template: Tensor, forget: Tensor) -> Tensor:
    """-g*(P_e) + f*(g*(P_f)): falls with the template's mean probability and rises with the forget answer's."""
    form = FORMS[divergence]
    return form(forget)[1] - form(template)[0]


@method(
    paper="arXiv:2410.11143",
    tasks=("classification", "causal_lm"),
    needs={"forget"},
    dose="steps",
    reason="published for language models of billions of parameters, which do not run here; its divergences are "
    "held to the released numbers",
    cost={side: "steps * 2 * min(batch, n_forget)" for side in ("forward", "backward")},
    departures={
        "signs": "reverse KL, squared Hellinger and Neyman with f-GAN's activations, exp(-v) for the release's exp(v): as "
        "released they push the template answer down, or the forget answer up",
        "normalise": "the mean is over answer tokens by default; the release's is over the padded length",
        "template": "drawn anew at every step, never the true answer; the release has one template per prompt",
        "optimizer": "Adam at a constant rate without weight decay; the published runs use AdamW with weight decay 0.01 and "
        "warm-up",
        "stopping": "stopped when the loss on retain or validation data leaves its bound, where there are any",
        "norm_stats": "frozen by default; the published runs train with dropout where the model has it",
    },
)
def flat(
    *,
    divergence: Literal[
        "total_variation",
        "kl",
        "jensen_shannon",
        "pearson",
        "jeffrey",
        "reverse_kl",
        "squared_hellinger",
        "neyman",
    ] = "total_variation",
    padded_length: Count = 0,
    lr: Positive = 5e-4,
    steps: Count = 20,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Raise the probability of a template answer and lower that of the forget answer; no retain data, no second model.

    The two are tied by an f-divergence, which sets their balance. Nothing holds the retain data but the guard, where
    there is data for it: it does not promise utility. Gradients vanish where probabilities are near 0 or 1.

    Formula: min_theta -g*(P_e) + f*(g*(P_f)), P the mean probability of the answer tokens of a batch, P_e of template
    answers (a refusal, another label) and P_f of the forget answers; g* and f* as in ``FORMS``. "jeffrey" is the release's
    series of f*, which has no closed form.

    Args:
        divergence: which f. "reverse_kl", "squared_hellinger" and "neyman" are corrected, not as released.
        padded_length: 0 for a mean over answer tokens; T, >= 2, for the release's mean over the T - 1 places of an example
            padded to T tokens, which makes P and the gradient that much smaller.
        lr: learning rate of Adam, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.

    Published setting (Harry Potter, Llama-2-7b): total variation, AdamW, lr 2e-7, 32 examples per step, 5 epochs.
    """
    return Descend(
        forget=AnswerProbability("answer", padded_length),
        others={"template": On("forget", AnswerProbability("template", padded_length))},
        combine=OfMeans(lambda means: divergence_loss(divergence, means["template"], means["forget"])),
        optimizer=Adam(lr),
        steps=steps,
        batch=batch,
        norm_stats=norm_stats,
        guard=Guard(),
    )
