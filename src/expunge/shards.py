"""Sharded and sliced training for exact deletion: the model, where each example is placed, and who serves.

Papers: SISA, Bourtoule et al., IEEE S&P 2021 (arXiv:1912.03817); S3T, Basu Roy Chowdhury et al., ICLR 2025
(arXiv:2406.16257). Written from the papers' rules; the authors' code was not used.

An example's shard and slice are a function of its id alone, and every (shard, slice) has a random stream of its own, so
that the deletion of one example moves no other. What each stage was trained on stands in a ledger of hashes inside the
model: training again repeats exactly the stages whose data are no longer what the ledger says, and a deletion is just
that. The ledger travels with the weights, as buffers.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Case, Data, Key, Refused, Request, RunFailed, Stage, Task
from expunge.data.sources import fingerprint
from expunge.edits import reinitialise
from expunge.scope import Scope

RULES = ("probabilities", "outputs", "votes")
FEWEST = 2  # examples to train on: live batch statistics of a single one do not exist


def place(ids: Tensor, shards: int, slices: int) -> Tensor:
    """[n, 2] int64: the shard and the slice of each id, by a hash of the id alone; the counts are only nearly even."""
    drawn = [
        int.from_bytes(hashlib.blake2b(b"shard" + int(i).to_bytes(8, "little", signed=True), digest_size=8).digest())
        for i in ids.tolist()
    ]
    return torch.tensor([(d % shards, d // shards % slices) for d in drawn], dtype=torch.int64).reshape(-1, 2)


class Sharded(nn.Module):
    """Independent copies of one network, one per shard, with the state after each slice; called as one of them is.

    ``members[s][k]`` is shard s after slices 0 .. k; the last of each shard serves. Memory: shards x slices networks.

    Args:
        network: the architecture; copied.
        shards, slices: >= 1.
        rule: how the shards' answers become one: "probabilities", the logarithm of the mean of their softmax over the
            last dimension; "outputs", their mean; "votes", the logarithm of the share of shards that put each class
            first, one vote more being spread over all classes so that no logarithm is infinite.
        seed: of every draw of its training.
    """

    served: Tensor
    ledger: Tensor
    seed: Tensor
    chosen: Tensor

    def __init__(self, network: nn.Module, shards: int, slices: int, rule: str, seed: int):
        super().__init__()
        if rule not in RULES or min(shards, slices) < 1:
            raise Refused(
                f"expected shards and slices of at least 1 and a rule of {', '.join(RULES)}, found {shards}, {slices}, "
                f"{rule!r}"
            )
        rows = (nn.ModuleList(copy.deepcopy(network) for _ in range(slices)) for _ in range(shards))
        self.members = nn.ModuleList(rows)
        self.shards, self.slices = shards, slices
        self.register_buffer("served", torch.zeros(shards, dtype=torch.int64))  # 1 where a shard holds enough examples
        self.register_buffer("ledger", torch.zeros(shards, slices, 2, dtype=torch.int64))
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("chosen", torch.tensor(RULES.index(rule)))
        for module in (self, self.members, *self.members):
            module.training = network.training

    @property
    def rule(self) -> str:
        """How the answers are put together."""
        return RULES[int(self.chosen)]

    def stages(self, shard: int) -> nn.ModuleList:
        """The states of a shard, after each slice."""
        return cast(nn.ModuleList, self.members[shard])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the shards together, in the form of one network's."""
        serving = [shard for shard, on in enumerate(self.served.tolist()) if on]
        if not serving:
            raise RunFailed("no shard of the model holds enough examples to serve: train it, or take fewer shards")
        return merge([self.stages(shard)[-1](*args, **kwargs) for shard in serving], self.rule)


def rule_for(task: Task, together: str) -> str:
    """The rule asked for; "by task": probabilities for classes, outputs otherwise."""
    return together if together != "by task" else "probabilities" if hasattr(task, "logits") else "outputs"


def merge(answers: Sequence[Any], rule: str) -> Any:
    """Tensors, or mappings and tuples of them, one per shard -> one of the same form; see ``Sharded``."""
    first = answers[0]
    if isinstance(first, Mapping):
        return {name: merge([answer[name] for answer in answers], rule) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(merge(parts, rule) for parts in zip(*answers, strict=True))
    if not isinstance(first, Tensor):
        raise Refused(f"a shard's network returned a {type(first).__name__}: expected tensors, to be averaged")
    whole = torch.stack(list(answers))
    wide = whole.to(torch.promote_types(whole.dtype, torch.float32))
    if rule == "outputs":
        return wide.mean(0).to(whole.dtype)
    if rule == "probabilities":
        return (wide.log_softmax(-1).logsumexp(0) - math.log(len(answers))).to(whole.dtype)
    classes = whole.shape[-1]
    votes = F.one_hot(wide.argmax(-1), classes).sum(0).to(wide.dtype)
    return ((votes + 1 / classes) / (len(answers) + 1)).log().to(whole.dtype)


@dataclass(frozen=True)
class TrainShards:
    """Bring a sharded model up to date with the retain data: what they leave as it was is not trained again.

    Given a network, or a sharded model of other numbers, it trains them all; given a sharded model it goes back, shard
    by shard, to the last slice before which nothing changed, and trains on from there. Both end in the same bits, for
    any set of deleted ids, in any number of shards.

    Args:
        shards, slices, rule: see ``Sharded``.
        train: the stage that trains one network on its case's retain data, in the scope of all of it.
        recipe: all that `train` and `make` depend on, in words: with another one every stage is trained again.
        make: builds the network untrained; None resets every module of a copy by its own ``reset_parameters``.
    """

    shards: int
    slices: int
    rule: str
    train: Stage
    recipe: str
    make: Callable[[], nn.Module] | None = None

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if case.scope.count(case.model) != Scope.all(case.model).count(case.model):
            raise Refused(
                "sharded training makes every trainable weight anew, and the scope leaves some out: give no scope, or "
                "freeze those weights (requires_grad False) before the first training"
            )
        model = self.structure(case.model, key)
        again = model is case.model
        model.chosen.fill_(RULES.index(self.rule))
        data = case.request.data("retain")
        places = place(data.ids, self.shards, self.slices)
        trained = [self._shard(case, model, data, places, shard) for shard in range(self.shards)]
        if again:
            case.meter.note(
                f"{sum(map(bool, trained))} of {self.shards} shards changed: {sum(trained)} of "
                f"{self.shards * self.slices} slices were trained again, the others are as they were to the bit"
            )
        if any(not p.requires_grad for p in model.parameters()):
            case.meter.note("frozen weights keep what they learnt before, from whatever data that was")
        return replace(case, model=model, scope=Scope.all(model), rng=rng)

    def structure(self, model: nn.Module, key: Key) -> Sharded:
        """The model itself where it has these numbers of shards and slices, else an untrained one of its network."""
        if isinstance(model, Sharded):
            if (model.shards, model.slices) == (self.shards, self.slices):
                return model
            model = model.stages(0)[-1]
        return Sharded(model, self.shards, self.slices, self.rule, key.seed).to(_device(model))

    def _shard(self, case: Case, model: Sharded, data: Data, places: Tensor, shard: int) -> int:
        """Bring one shard up to date; how many of its slices were trained again."""
        slices = [in_slice(data, places, shard, number) for number in range(self.slices)]
        rows = _chained([data.select(rows) for rows in slices], f"{self.recipe} {int(model.seed)} {shard}")
        known = model.ledger[shard].cpu()
        first = next((k for k in range(self.slices) if not torch.equal(known[k], rows[k])), self.slices)
        stages = model.stages(shard)
        for number in range(first, self.slices):
            key = Key(int(model.seed)).at("shard", shard)
            start = copy.deepcopy(stages[number - 1]) if number else untrained(stages[0], key.at("weights"), self.make)
            seen = data.select(torch.cat(slices[: number + 1]))
            if len(seen) >= FEWEST:
                whole = Scope.all(start)
                request = Request(retain=seen)
                inner = replace(case, model=start, request=request, scope=whole, teachers={}, watch=None)
                self.train(replace(inner, rng=key.at("slice", number)))
            stages[number] = start
        model.ledger[shard] = rows.to(model.ledger.device)
        model.served[shard] = int(sum(map(len, slices)) >= FEWEST)
        return self.slices - first


def train_shards(network: nn.Module, data: Data, task: Task, method: Stage, seed: int = 0) -> nn.Module:
    """The first training of a sharded model, before anything is to be forgotten; the network is left untouched.

    The same bits as ``unlearn`` with that method and seed gives on a request whose retain data are these.

    Args:
        network: the architecture. data: what to learn. task: the modality.
        method: one that trains shards, ``methods.sisa(...)`` or ``methods.s3t(...)``; give the same one to ``unlearn`` later.
        seed: of every draw.
    """
    task.check(data, "training")
    work = copy.deepcopy(network)
    found = method(Case(work, Request(retain=data), task, Scope.all(work), rng=Key(seed))).model
    if not hasattr(found, "ledger"):
        raise Refused(f"the method gives a {type(found).__name__}: expected one that trains shards, such as sisa()")
    return found


def in_slice(data: Data, places: Tensor, shard: int, number: int) -> Tensor:
    """Positions of a slice's examples, by their ids, so that the order of the data given does not matter."""
    rows = torch.nonzero((places[:, 0] == shard) & (places[:, 1] == number)).flatten()
    return rows[data.ids[rows].argsort()]


def _chained(slices: Sequence[Data], recipe: str) -> Tensor:
    """[slices, 2] int64: the hash of all that each stage is trained on, those before it included, and how."""
    found, words = hashlib.blake2b(recipe.encode(), digest_size=16).digest(), []
    for data in slices:
        found = hashlib.blake2b(found + fingerprint(data).encode(), digest_size=16).digest()
        words.append(numbers(found))
    return torch.tensor(words, dtype=torch.int64)


def numbers(digest: bytes) -> list[int]:
    """A hash of 16 bytes as two int64, so that it can stand in a buffer."""
    return [int.from_bytes(half, "little", signed=True) for half in (digest[:8], digest[8:])]


def untrained(network: nn.Module, key: Key, make: Callable[[], nn.Module] | None) -> nn.Module:
    """A fresh network; where some weights are frozen they, and all buffers, are the given one's."""
    fresh = reinitialise(network, key, make)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    if frozen:
        old, new = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (network, fresh))
        with torch.no_grad():
            for name in (*frozen, *dict(network.named_buffers())):
                new[name].copy_(old[name])
    return fresh


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
