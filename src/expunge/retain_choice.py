"""A small retain set: the hardest examples, by scores of a network early in its training (arXiv:2107.07075)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.afresh import trained_afresh
from expunge.core import Case, Data, Key, Objective, Refused, RunFailed, only_looked_at, require
from expunge.curvature import MEMORY
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.oracle import borrowed, example_gradients, prepared
from expunge.scope import Scope


def _briefly() -> Descend:
    return Descend(retain=NLL(), optimizer=Adam(1e-3), steps=50, norm_stats="live")


@dataclass(frozen=True)
class KeepHardest:
    """Replace the request's retain data by its `examples` hardest, for the stages after this one; no weight changes.

    Hardness is the mean of a score over fresh networks, each trained briefly on the retain data alone: the forget data
    have no influence on the choice. Easy examples, which every network soon gets right, are left out, and so, by `offset`,
    are the very hardest, which may be mislabelled. The order of the data is kept; of equal scores the earlier is harder.

    It promises neither that the classes stay balanced nor that a method does as well with what is kept as with all: the
    paper is on training from nothing, with large shares kept. A method's guard, too, looks at what is kept only.

    Formula: "el2n": |softmax(f(x)) - onehot(y)|_2. "grand": |grad NLL(x, y)|_2, over all trainable parameters.

    Args:
        examples: kept, >= 1.
        by: "el2n" (one label of several classes) or "grand" (any task).
        fresh: networks, >= 0; published 10. 0 scores with the model as it is, which is cheap and another thing: once
            training is over, all that was fitted scores near 0, and what is left tells little.
        train: how each is trained, with a retain objective; where fresh > 0.
        offset: of the very hardest that are left out, >= 0.
        batch: examples per scoring pass; for memory only.
        make: builds a network, untrained; None resets every module of a copy by its own ``reset_parameters``.

    Raises:
        Refused: for fewer retain examples than asked for, a task without what the score needs, or a network that cannot
            be made anew.
        RunFailed: for scores that are not finite.

    Departures: networks are trained for a number of steps and not to epochs 10 to 20 of 200; the paper scores all of the
    training set.
    """

    examples: int
    by: Literal["el2n", "grand"] = "el2n"
    fresh: int = 10
    train: Descend = field(default_factory=_briefly)
    offset: int = 0
    batch: int = 256
    make: Callable[[], nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(self.by in ("el2n", "grand"), self, "by", "'el2n' or 'grand'")
        for name, least in (("examples", 1), ("fresh", 0), ("offset", 0), ("batch", 1)):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, self, name, f"a whole number of at least {least}")

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        data = case.request.data("retain")
        if self.examples + self.offset > len(data):
            raise Refused(
                f"KeepHardest: {self.examples} retain examples are to be kept after the {self.offset} hardest, and there are "
                f"{len(data)}: ask for fewer"
            )
        order = torch.argsort(self.scores(case, key), descending=True, stable=True)
        kept = data.select(order[self.offset : self.offset + self.examples].sort().values)
        case.meter.note(f"{len(kept)} of {len(data)} retain examples were kept, by {self.by}")
        return replace(case, request=replace(case.request, retain=kept), rng=rng)

    def scores(self, case: Case, key: Key) -> Tensor:
        """[n] float64, the mean score of each retain example over the networks."""
        data, total = case.request.data("retain"), torch.zeros(())
        for number in range(max(1, self.fresh)):
            model = case.model
            if self.fresh:
                model = trained_afresh(case, self.train, key.at("network", number), self.make)
            looked = replace(case, model=model, scope=Scope.all(model))
            if self.by == "el2n":
                found = error_norms(looked, data, self.batch, key.at("score"))
            else:
                found = gradient_norms(looked, data, NLL(), self.batch, key.at("score"))
            total = total + found
        if not bool(torch.isfinite(total).all()):
            raise RunFailed(
                f"{int((~torch.isfinite(total)).sum())} scores of retain examples are not finite: lower the learning rate of "
                f"train=, or scale the inputs"
            )
        return total / max(1, self.fresh)


def error_norms(case: Case, data: Data, size: int, key: Key) -> Tensor:
    """[n] float64 |softmax(f(x)) - onehot(y)|_2 of the Case's model, 0 to sqrt 2: EL2N of one network.

    Args:
        data: to be scored. size: examples per pass. key: of what the task draws.
    """
    task: Any = case.task  # labels and logits are capabilities, which not every Task has
    if not all(hasattr(task, name) for name in ("logits", "labels", "classes")):
        raise Refused(
            f"el2n needs one label per example and class logits, which task {task.name!r} does not have: use by='grand'"
        )
    parts = []
    with torch.no_grad(), only_looked_at(case.model), case.meter.watch(case.model):
        for batch in prepared(case, data, size, key):
            errors = task.logits(case.model, batch).double().softmax(1)
            errors = errors - F.one_hot(task.labels(batch), errors.shape[1])
            parts.append(errors.norm(dim=1).cpu())
    return torch.cat(parts)


def gradient_norms(case: Case, data: Data, objective: Objective, size: int, key: Key) -> Tensor:
    """[n] float64 norm of the gradient, in scope, of each example's loss: GraNd of one network.

    Args:
        data: to be scored. objective: the loss. size: examples differentiated together, fewer where memory asks for it.
        key: of what the task and the objective draw.
    """
    width = sum(p.numel() * p.element_size() for p in case.scope.parameters(case.model).values())
    parts = []
    with borrowed(case), case.meter.watch(case.model):
        for batch in prepared(case, data, max(1, min(size, MEMORY // max(1, width))), key, objective):
            grads = example_gradients(case, objective, batch)
            squares = torch.stack([grad.flatten(1).double().square().sum(1) for grad in grads.values()])
            parts.append(squares.sum(0).sqrt().cpu())
    return torch.cat(parts)
