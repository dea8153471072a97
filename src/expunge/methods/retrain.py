"""Retraining: a fresh model, trained on the retain data alone. What every other method is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from torch import nn

from expunge import runtime
from expunge.core import Case, Stage
from expunge.descend import Descend
from expunge.edits import reinitialise
from expunge.objectives import NLL
from expunge.optim import Constant, Cosine, Linear, Optimizer, Schedule, by_name
from expunge.registry import AtLeastOne, NonNegative, Positive, Range, method
from expunge.scope import edit

_ROWS = "ceil(epochs * ceil(n_retain / min(batch, n_retain))) * min(batch, n_retain)"


@method(
    paper="arXiv:1912.03817",
    needs={"retain"},
    dose=None,
    reason="it is what the others are measured against: equal to training anew, to the bit",
    promise="exact",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "dose": "there is none: the model starts afresh, so that zero epochs give an untrained model",
        "contract:adapter:causal_lm": "a model is made anew as a whole, and layers with an adapter cannot be",
        "contract:processes": "it trains with live normalisation and dropout, which several processes cannot share",
    },
)
def retrain(
    *,
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    lr: Positive = 1e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    epochs: Annotated[float, Range(0)] = 40.0,
    batch: AtLeastOne = 64,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Train a freshly initialised model on the retain data; give the recipe that the model was trained with.

    The result is a function of the retain data, the recipe and the seed: the forget data has no influence on it, to
    the bit. That is all it promises: not the accuracy of the model given (the defaults suit a small classifier, not
    yours), nor that the recipe itself was chosen without the forget data. One seed is one draw: compare with several.

    What is out of scope, or frozen (``requires_grad`` False), keeps its values and all that they learnt, which is
    noted; then running statistics stay too and dropout is off. With everything in scope, both are as in training.

    Args:
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; the others do not read it.
        weight_decay: >= 0.
        epochs: passes over the retain data, >= 0.
        batch: examples per step, >= 1.
        schedule: of the learning rate, over the run: "constant", "linear" or "cosine" decay to 0.
        make: builds the model untrained; None resets every module of a copy by its own ``reset_parameters``.
    """
    schedules: dict[str, Schedule] = {"constant": Constant(), "linear": Linear(), "cosine": Cosine()}
    return _Retrain(by_name(optimizer, lr, momentum, weight_decay), schedules[schedule], float(epochs), batch, make)


@dataclass(frozen=True)
class _Retrain:
    optimizer: Optimizer
    schedule: Schedule
    epochs: float
    batch: int
    make: Callable[[], nn.Module] | None = field(repr=False)

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        fresh = reinitialise(case.model, key.at("weights"), self.make)
        kept = _kept(case)
        edit(case, {name: value.detach() for name, value in fresh.named_parameters() if name in case.scope})
        if kept:
            case.meter.note(
                f"{kept} of the model's weights are out of scope or frozen and keep what they learnt, from "
                f"the forget data too: this is retraining of the others only"
            )
        else:
            _copy_buffers(fresh, case.model)
        train = Descend(
            retain=NLL(),
            optimizer=self.optimizer,
            schedule=self.schedule,
            epochs=self.epochs,
            batch=self.batch,
            norm_stats="frozen" if kept else "live",
        )
        return train(replace(case, rng=rng))


def _kept(case: Case) -> int:
    """How many floating weights will not be trained anew."""
    whole = sum(p.numel() for p in case.model.parameters() if p.is_floating_point())
    return whole - case.scope.count(case.model)


def _copy_buffers(fresh: nn.Module, model: nn.Module) -> None:
    """Running statistics are learnt too."""
    values = dict(fresh.named_buffers())
    for name, buffer in model.named_buffers():
        if name in values:
            runtime.local(buffer).copy_(runtime.local(values[name]))
