"""DM-Direct (Georgiev et al., ICLR 2025): answer with the outputs that a retrained model is predicted to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from expunge import linearised
from expunge.attribution import TRAK, Attribution, Influence
from expunge.core import Case, Refused, Stage
from expunge.registry import AtLeastOne, NonNegative, Positive, method

KEPT = "the untouched weights and the step along which outputs are moved stay beside each other: no weight is changed"
_SAMPLES = "min(samples, n_retain)"
_ROWS = f"(n_forget + {_SAMPLES})"


@method(
    paper="arXiv:2410.23232",
    tasks=("classification", "regression"),
    needs={"forget", "retain"},
    dose="scale",
    reason="the released code lacks the routine, and no number of theirs could be had; exact on a ridge regression in closed "
    "form",
    cost={
        "forward": f"(scale > 0) * (n_forget + (2 * iterations * {_SAMPLES} if by == 'influence' else {_ROWS}))",
        "backward": f"(scale > 0) * (n_forget + (iterations * {_SAMPLES} if by == 'influence' else {_ROWS}))",
    },
    departures={
        "attribution": "estimated from the one model that is given; the paper regresses the outputs of thousands of "
        "models on what they were trained on",
        "inputs": "any input is answered, since the attribution is a function of it; the paper's table has rows for some",
        "contract:kind": KEPT,
        "contract:saved": f"{KEPT}; linearised.load_linearised reads it back to the same predictions",
        "contract:odd": "the parts of the model are those of ``.model`` of what comes back",
        "contract:adapter": "it puts a step beside the model, and a bracket merges its adapter into the model that it opened",
        "contract:scope": f"no weight of the model moves, in scope or out of it; {KEPT}",
    },
)
def dm_direct(
    *,
    by: Literal["influence", "trak"] = "influence",
    scale: NonNegative = 1.0,
    damping: Positive = 0.1,
    samples: AtLeastOne = 1000,
    iterations: AtLeastOne = 20,
    dimensions: AtLeastOne = 512,
    chunk: AtLeastOne = 64,
) -> Stage:
    """Leave the weights as they are, and add to every output the change that data attribution predicts of removal.

    The model that comes back is a ``linearised.LinearisedModel``: an edit of what comes out, which whoever holds the
    weights can leave out. It does not promise erasure, nor a good prediction: the attribution is linear, and worse the
    more is removed at once and the less the model is at an optimum.

    Formula: x -> f(x) - scale sum over D_f of w_i(x) = f(x) + scale J(x) s, with s as in ``attribution``.

    Args:
        by: the attribution: "influence" (Gauss-Newton) or "trak" (features of log-odds in a random projection).
        scale: dose, multiplier of the predicted change, >= 0; 1 in the paper, 0 changes nothing.
        damping: of the curvature, > 0.
        samples: retain examples that the curvature is taken from, >= 1; all of them where there are fewer.
        iterations: of conjugate gradients, with "influence", >= 1.
        dimensions: of the random projection, with "trak", >= 1.
        chunk: examples per pass, >= 1; the result does not depend on it, to rounding.

    Raises:
        Refused: for a model that this method has given: the predictions of a prediction cost thrice as much each time.
        RunFailed: for a model with an operation that has no forward derivative.
    """
    how = Influence(damping, samples, iterations) if by == "influence" else TRAK(dimensions, damping, samples)
    return _Direct(how, float(scale), chunk)


@dataclass(frozen=True)
class _Direct:
    attribution: Attribution
    scale: float
    chunk: int

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.scale == 0:
            return replace(case, rng=rng)
        if any(isinstance(part, linearised.LinearisedModel) for part in case.model.modules()):
            raise Refused(
                "dm_direct cannot follow dm_direct: the model is already a prediction, which is not at an optimum of "
                "anything; give the trained model, and all that is to be forgotten together"
            )
        step = self.attribution.step(case, self.chunk, key)
        model = linearised.LinearisedModel(case.model, {name: self.scale * value for name, value in step.items()})
        return replace(case, model=model, scope=linearised.outer_scope(case.scope), rng=rng)

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that this stage leaves `model` in, for saved `weights` to be read into."""
        return linearised.rebuilt(model, weights)
