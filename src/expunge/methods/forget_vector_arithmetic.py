"""Forget-vector arithmetic (Sun et al., 2024): an unseen class is forgotten by a sum of the vectors of other classes."""

from __future__ import annotations

from typing import Annotated

from expunge.core import Stage
from expunge.forget_vectors import Combine, Shift
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method

_ROWS = "steps * (basis * 2 * min(batch, n_retain) + min(batch, n_forget) + min(batch, n_retain))"
_WRAPPED = "the model that comes back is the caller's with a vector before it, its weights under model.*"


@method(
    paper="arXiv:2412.16780",
    tasks=("classification",),
    needs={"forget", "retain"},
    dose="steps",
    status="reproduced",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "batches": "a forget and a retain batch of their own in every step, weighed by the forget data's share of all; the "
        "authors shuffle both together, which is the same on average",
        "basis": "vectors that the request does not bring are learnt here, of classes of the retain data alone",
        "start": "from coefficients 0, the first of the three starts released",
        "contract:kind": _WRAPPED,
        "contract:saved": f"{_WRAPPED}: its weights are read into InputVector(model, shape)",
        "contract:scope": f"{_WRAPPED}; the scope, which is of weights, says nothing of a vector",
        "contract:odd": "the inputs of the odd model are two: which one is shifted is not for a method to guess",
        "contract:adapter": f"{_WRAPPED}, and a bracket merges its adapter into the model that it opened",
    },
)
def forget_vector_arithmetic(
    *,
    basis: AtLeastOne = 4,
    slack: NonNegative = 1.0,
    forget_weight: NonNegative = 5.0,
    retain_weight: NonNegative = 1.0,
    size_weight: NonNegative = 1.0,
    coefficient_weight: NonNegative = 1.0,
    lr: Positive = 0.2,
    momentum: Annotated[float, Range(0, 1)] = 0.9,
    weight_decay: NonNegative = 5e-4,
    end: Annotated[float, Range(0, 1, open_low=True)] = 0.01,
    steps: Count = 100,
    batch: AtLeastOne = 16,
) -> Stage:
    """Freeze the model and learn how much of each of several classes' forget vectors forgets these examples.

    Only as many numbers are learnt as there are vectors. The vectors are rows of the request's extra data ``vectors``
    (``forget_vectors.bank`` makes them of models that ``forget_vector`` gave back); without them one is learnt for each
    of the most frequent retain classes, none of which has seen what is to be forgotten. It does not promise that any sum
    of them forgets it, and whoever leaves the vector out has the original model.

    Formula: min_w retain_weight n_r/n mean over D_r of CE(f(x + v(w)), y) + forget_weight n_f/n mean over D_f of
    max(f_y(x + v(w)) - max_{k != y} f_k(x + v(w)), -slack) + coefficient_weight |w|_2, v(w) = sum_k w_k v_k, w from 0.

    Args:
        basis: classes to learn a vector of at most, where the request brings none, >= 1.
        slack: tau, logits, >= 0.
        forget_weight: beta, >= 0.
        retain_weight: alpha, >= 0.
        size_weight: lambda of the vectors that are learnt here, >= 0.
        coefficient_weight: lambda of the coefficients, >= 0; not divided by the batch, as released.
        lr: learning rate of SGD at the start, > 0.
        momentum: of SGD, in [0, 1].
        weight_decay: of the coefficients, and of vectors learnt here, >= 0.
        end: factor of the learning rate at the end, reached exponentially, in (0, 1]; 1 keeps it.
        steps: optimizer steps on the coefficients, and as many on each vector that is learnt here, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.

    Raises:
        Refused: for data whose input is not one floating column, or one retain class and no vectors.

    The declared cost is that of a request without vectors, with `basis` retain classes of at least `batch` examples: an
    upper bound otherwise.
    """

    def shift(size: float, per_row: bool) -> Shift:
        return Shift(slack, forget_weight, retain_weight, size, per_row, lr, momentum, weight_decay, end, steps, batch)

    return Combine(shift(coefficient_weight, False), shift(size_weight, True), basis)
