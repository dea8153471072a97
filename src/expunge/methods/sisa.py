"""SISA (Bourtoule et al. 2021): sharded, isolated, sliced and aggregated training, so that deletion retrains a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from expunge.core import Case, Key, Stage, described
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import Constant, Cosine, Linear, Optimizer, Schedule, by_name
from expunge.registry import AtLeastOne, NonNegative, Positive, Range, method
from expunge.shards import RULES, TrainShards, rule_for

_SHARDED = "what comes back is the sharded model: shards x slices of such networks, called as one of them is"
_WHOLE = "a part of the weights cannot be made anew exactly: a scope that leaves some out is refused"


@method(
    paper="arXiv:1912.03817",
    status="reproduced",
    tasks=("classification", "regression"),
    needs={"retain"},
    dose=None,
    promise="exact",
    cost={"forward": "epochs * n_retain", "backward": "epochs * n_retain"},
    departures={
        "dose": "there is none: a shard is what its data make it",
        "placement": "by a hash of the id; the paper places at random, where the loss of one example may move others",
        "votes": "one vote more is spread over the classes, so that a class without votes has a finite loss",
        "single": "a shard does not train on a single example, and does not serve with one",
        "contract:cost": "rows depend on the ids that fall in each slice; declared is the whole training, about",
        "contract:kind": _SHARDED,
        "contract:saved": f"{_SHARDED}; its weights are read into such a one",
        "contract:odd": f"{_SHARDED}, and each of them keeps what is odd in it",
        "contract:scope": _WHOLE,
        "contract:adapter": "what comes back is a sharded model, and a bracket merges its adapter into the model that it opened",
        "contract:pruned": _WHOLE,
        "contract:salient": _WHOLE,
    },
)
def sisa(
    *,
    shards: AtLeastOne = 3,
    slices: AtLeastOne = 4,
    together: Literal["by task", "probabilities", "outputs", "votes"] = "by task",
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    lr: Positive = 1e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    epochs: Annotated[float, Range(0)] = 40.0,
    batch: AtLeastOne = 16,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Train a sharded model on the retain data, or, given one, retrain the shards that held what is to be forgotten.

    Shard s is trained on its slices 0, then 0 and 1, and so on, and its state after each is kept. To forget, it goes
    back to the last slice that never saw a deleted id and trains on from there; other shards are not touched. The
    result equals, to the bit on the same machine, sharded training on the retain data alone: it is a function of the
    retain data, these settings and the seed that the sharded model was first trained with. With other settings than
    then, every shard is trained anew. Data that are read from files are recognised by their ids and 64 of them.

    It does not promise the accuracy of one network trained on all data (each shard sees 1 / shards of them), nor that
    the settings were chosen without the forget data. To have shards to go back to, the model must have been trained by
    this method before (``shards.train_shards``): an ordinary model gives its architecture only. Frozen weights keep what they learnt, which is
    noted; then running statistics stay too and dropout is off.

    Epochs per slice, so that each example is seen `epochs` times in all where slices are even: 2 epochs / (slices + 1).

    Args:
        shards: independent networks, >= 1.
        slices: of each shard, >= 1; memory is shards x slices networks.
        together: how the shards' answers become one: "probabilities" (log of the mean softmax), "outputs" (mean),
            "votes" (of the class put first), or "by task": probabilities for classes, outputs otherwise.
        optimizer: "adam", "adamw" or "sgd", anew at each slice.
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; the others do not read it.
        weight_decay: >= 0.
        epochs: passes over each example, >= 0.
        batch: examples per step, >= 1; a shard has few, so a small one keeps the number of steps.
        schedule: of the learning rate, over each slice: "constant", "linear" or "cosine" decay to 0.
        make: builds the network untrained, the same one at every call; None resets every module of a copy by its own
            ``reset_parameters``.
    """
    schedules: dict[str, Schedule] = {"constant": Constant(), "linear": Linear(), "cosine": Cosine()}
    share = 2 * float(epochs) / (slices + 1)
    rate = by_name(optimizer, lr, momentum, weight_decay)
    return _Sisa(shards, slices, together, rate, schedules[schedule], share, batch, make)


@dataclass(frozen=True)
class _Sisa:
    shards: int
    slices: int
    together: str
    optimizer: Optimizer
    schedule: Schedule
    epochs: float
    batch: int
    make: Callable[[], nn.Module] | None = field(repr=False)

    def __call__(self, case: Case) -> Case:
        rule = rule_for(case.task, self.together)
        return self._plan(rule, any(not p.requires_grad for p in case.model.parameters()), described(case.task))(case)

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that the weights of a finished run are read into."""
        return self._plan(RULES[0], False, "").structure(model, Key(0))

    def _plan(self, rule: str, frozen: bool, task: str) -> TrainShards:
        train = Descend(
            retain=NLL(),
            optimizer=self.optimizer,
            schedule=self.schedule,
            epochs=self.epochs,
            batch=self.batch,
            norm_stats="frozen" if frozen else "live",
        )
        recipe: list[Any] = [train, task, self.shards, self.slices, self.make]
        return TrainShards(self.shards, self.slices, rule, train, described(recipe), self.make)
