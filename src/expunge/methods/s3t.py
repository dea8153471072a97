"""S3T (Basu Roy Chowdhury et al. 2025): slices learnt in several orders, so that deletion only switches stages off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from expunge.core import Case, Key, Refused, Stage, described
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import Optimizer, by_name
from expunge.orders import matched
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method
from expunge.sequences import TrainSequences
from expunge.shards import RULES, rule_for
from expunge.wrap import LoRA, in_adapter

_ROWS = "epochs * n_retain * budget * (slices + 1) / 2"
_MANY = "what comes back is shards x orders x slices of such networks, called as one of them is"
_WHOLE = "a part of the weights cannot be made anew exactly: a scope that leaves some out is refused"


@method(
    paper="arXiv:2406.16257",
    status="reproduced",
    tasks=("classification", "regression"),
    needs={"retain"},
    dose=None,
    promise="exact",
    cost={"forward": _ROWS, "backward": _ROWS},
    departures={
        "dose": "there is none: a stage is in service or not",
        "layers": "a stage trains the weights of its layers by default; the paper adapters (LoRA), which is rank=",
        "adapters": "merged after each stage, and on the last layer too, which the paper trains whole; no dropout",
        "orders": "of those that matching builds, one per slice, the best are taken; conditional sampling is not there",
        "placement": "by a hash of the id, so that nobody has to remember where an example went",
        "contract:cost": "rows depend on the ids that fall in each slice; declared is the whole training, about",
        "contract:kind": _MANY,
        "contract:saved": f"{_MANY}; the weights are read into such a one",
        "contract:odd": f"{_MANY}, and each of them keeps what is odd in it",
        "contract:scope": _WHOLE,
        "contract:adapter": "what comes back is many models in one, and a bracket merges its adapter into the model that it opened",
        "contract:pruned": _WHOLE,
        "contract:salient": _WHOLE,
    },
)
def s3t(
    *,
    shards: AtLeastOne = 2,
    slices: AtLeastOne = 3,
    budget: AtLeastOne = 2,
    risks: tuple[float, ...] | None = None,
    rank: Count = 0,
    start: Literal["fresh", "given"] = "fresh",
    together: Literal["by task", "probabilities", "outputs", "votes"] = "by task",
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    lr: Positive = 2e-3,
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    epochs: Annotated[float, Range(0)] = 60.0,
    batch: AtLeastOne = 16,
    make: Callable[[], nn.Module] | None = None,
) -> Stage:
    """Train sequences of slices on the retain data, or, given trained ones, switch off the stages that saw the request.

    Stage k of an order starts from stage k - 1 and trains its own share of the layers, the top ones first, and the last
    layer, on the order's slices 0 .. k. Given trained sequences, every stage that saw a slice of which an example is
    forgotten is switched off and erased, in each of the `budget` orders; nothing is trained. The stage that serves is
    the last of the longest prefix left, and equals to the bit the one that training on the retain data gives.

    It does not promise accuracy: with every request fewer slices serve, none ever comes back, and once no shard can
    answer the request is refused and all must be trained anew (after shards x slices x H(shards x budget) uniform
    requests on average, H the harmonic number). Nor that the settings were chosen without the forget data. The model
    must have been trained by this method before (``shards.train_shards``): an ordinary one gives its
    architecture, or with start="given" its weights too, which then must never have seen the data.

    Args:
        shards: independent networks, >= 1.
        slices: of each shard, >= 1.
        budget: orders of the slices per shard, 1 to `slices`; training and memory grow with it.
        risks: probability of deletion of each slice, at least 0 with a sum of at most 1, for orders by bipartite matching;
            None for cyclic ones, best where all are alike. Slices of unlike risk need a column ``slice`` in the data.
        rank: of the adapters that a stage trains on its layers, with start="given"; 0 trains their weights.
        start: "fresh" weights, or "given" for those of a network trained on other data; exact only if it was.
        together: how the shards' answers become one: "probabilities" (log of the mean softmax), "outputs" (mean),
            "votes" (of the class put first), or "by task": probabilities for classes, outputs otherwise.
        optimizer: "adam", "adamw" or "sgd", anew at each stage.
        lr: learning rate, > 0.
        momentum: of "sgd", >= 0; the others do not read it.
        weight_decay: >= 0.
        epochs: passes of each stage over what it sees, >= 0.
        batch: examples per step, >= 1.
        make: builds the network untrained, the same one at every call; None resets every module of a copy by its own
            ``reset_parameters``.
    """
    if risks is not None and len(risks) != slices:
        raise Refused(f"s3t: risks has {len(risks)} numbers for {slices} slices; give one per slice")
    if risks is not None:
        matched(risks, budget)
    rate = by_name(optimizer, lr, momentum, weight_decay)
    return _S3T(shards, slices, budget, start, together, rate, float(epochs), batch, make, risks, rank)


@dataclass(frozen=True)
class _S3T:
    shards: int
    slices: int
    budget: int
    start: str
    together: str
    optimizer: Optimizer
    epochs: float
    batch: int
    make: Callable[[], nn.Module] | None = field(repr=False)
    risks: tuple[float, ...] | None = None
    rank: int = 0

    def __call__(self, case: Case) -> Case:
        rule = rule_for(case.task, self.together)
        return self._plan(rule, any(not p.requires_grad for p in case.model.parameters()), described(case.task))(case)

    def rebuilt(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """The structure that the weights of a finished run are read into."""
        return self._plan(RULES[0], False, "").structure(model, Key(0))

    def _plan(self, rule: str, frozen: bool, task: str) -> TrainSequences:
        norm: Literal["frozen", "live"] = "frozen" if frozen else "live"
        descend = Descend(retain=NLL(), optimizer=self.optimizer, epochs=self.epochs, batch=self.batch, norm_stats=norm)
        lora = LoRA(max(1, self.rank), float(max(1, self.rank)), stabilised=True)
        train: Stage = in_adapter(lora, descend) if self.rank else descend
        recipe: list[Any] = [train, task, rule, self.start, self.make, self.risks]
        sizes = (self.shards, self.slices, self.budget)
        return TrainSequences(*sizes, rule, train, described(recipe), self.start, self.make, self.risks)
