"""Forget vector (Sun et al., 2024): the weights stand still, one vector added to every input makes a class unknown."""

from __future__ import annotations

from typing import Annotated

from expunge.core import Stage
from expunge.forget_vectors import LearnVector, Shift
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method

_ROWS = "steps * (min(batch, n_forget) + min(batch, n_retain))"
_WRAPPED = "the model that comes back is the caller's with a vector before it, its weights under model.*"


@method(
    paper="arXiv:2412.16780",
    status="reproduced",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "batches": "a forget and a retain batch of their own in every step, weighed by the forget data's share of all; the "
        "authors shuffle both together, which is the same on average",
        "norm": "the Euclidean norm divided by the rows of a step, as released; 0 has no gradient",
        "steps": "numbers of steps, so that the cost does not grow with the retain set, the learning rate falling at every "
        "step; the authors count epochs, and choose one of those saved",
        "contract:kind": _WRAPPED,
        "contract:saved": f"{_WRAPPED}: its weights are read into InputVector(model, shape)",
        "contract:scope": f"{_WRAPPED}; the scope, which is of weights, says nothing of a vector",
        "contract:odd": "the inputs of the odd model are two: which one is shifted is not for a method to guess",
        "contract:adapter": f"{_WRAPPED}, and a bracket merges its adapter into the model that it opened",
    },
)
def forget_vector(
    *,
    slack: NonNegative = 1.0,
    forget_weight: NonNegative = 5.0,
    retain_weight: NonNegative = 1.0,
    size_weight: NonNegative = 1.0,
    lr: Positive = 0.2,
    momentum: Annotated[float, Range(0, 1)] = 0.9,
    weight_decay: NonNegative = 5e-4,
    end: Annotated[float, Range(0, 1, open_low=True)] = 0.01,
    steps: Count = 150,
    batch: AtLeastOne = 32,
) -> Stage:
    """Freeze the model and learn one vector that, added to every input, takes the forget examples from their class.

    The model that comes back is an ``InputVector`` over the caller's weights, which are the same to the bit: whoever
    leaves the vector out has the original model, so this controls access and it does not promise erasure. Shifted inputs
    are not clipped to any range.

    Formula: min_v retain_weight n_r/n mean over D_r of CE(f(x + v), y) + forget_weight n_f/n mean over D_f of
    max(f_y(x + v) - max_{k != y} f_k(x + v), -slack) + size_weight |v|_2 / (rows of a step), n = n_f + n_r, v from 0.

    Args:
        slack: tau, logits below the best other class at which the margin stops counting, >= 0.
        forget_weight: beta, >= 0.
        retain_weight: alpha, >= 0.
        size_weight: lambda, of the norm of the vector, >= 0.
        lr: learning rate of SGD at the start, in units of the input, > 0.
        momentum: of SGD, in [0, 1].
        weight_decay: of the vector, >= 0.
        end: factor of the learning rate at the end, reached exponentially, in (0, 1]; 1 keeps it.
        steps: optimizer steps, >= 0; 0 changes nothing, and puts no vector before the model.
        batch: forget examples, and as many retain examples, per step, >= 1.

    Raises:
        Refused: for data whose input is not one floating column.

    Published settings (a class of CIFAR-10, ResNet-18, pixels in 0 .. 1): slack 1, forget_weight 3 to 10 by class, lr 0.2
    times 0.9 at each of 60 to 190 epochs, batches of 256.
    """
    return LearnVector(
        Shift(
            slack=slack,
            forget_weight=forget_weight,
            retain_weight=retain_weight,
            size_weight=size_weight,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            end=end,
            steps=steps,
            batch=batch,
        )
    )
