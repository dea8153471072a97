"""Sequence-aware sharded training (S3T): deletion by switching off what came after, without training again.

Paper: Basu Roy Chowdhury, Choromanski, Sehanobish, Dubey, Chaturvedi, ICLR 2025 (arXiv:2406.16257). Written from the
paper's rules; the authors' code was not used.

A shard learns its slices one after the other, in several orders; the stage at each place of an order trains layers of
its own, the top ones first, and its weights are kept. A deletion in a slice switches off, in every order, the stage
that first saw it and those after. The order with the longest prefix left serves.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from expunge.core import Case, Data, Key, Refused, Request, RunFailed, Stage
from expunge.data.sources import fingerprint
from expunge.orders import Sequences, matched, rotations
from expunge.scope import Scope
from expunge.shards import FEWEST, RULES, in_slice, merge, numbers, place, untrained


def groups(network: nn.Module, slices: int) -> list[list[str]]:
    """Trainable parameters that the stage at each place trains: its share of the layers, top first, and the last layer.

    A layer is a module that owns parameters; shares are contiguous and of sizes that differ by one at most. With fewer
    layers than slices the last stages train the last layer alone.
    """
    names = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    layers = []
    for module in network.modules():
        own = [names.pop(id(p)) for p in module.parameters(recurse=False) if id(p) in names]
        if own:
            layers.append(own)
    if not layers:
        raise Refused("the network has no trainable parameter: nothing could be trained in sequence")
    *below, head = layers
    below.reverse()
    cuts = [(len(below) * k + slices - 1) // slices for k in range(slices + 1)]
    return [[name for own in below[low:high] for name in own] + head for low, high in itertools.pairwise(cuts)]


class Sequenced(nn.Module):
    """Networks of S3T: ``members[s][b][k]`` is shard s after stage k of order b; called as one of them is.

    Those in service answer, one per shard, put together by the rule (``shards.Sharded``). What was switched off is
    erased: its weights are zeros. Memory: shards x budget x slices networks.

    Args:
        network: the architecture; copied. shards, slices, budget: >= 1. rule: see ``shards.Sharded``.
        seed: of every draw of its training.
    """

    alive: Tensor
    ledger: Tensor
    recipe: Tensor
    seed: Tensor
    chosen: Tensor
    orders: Tensor

    def __init__(self, network: nn.Module, shards: int, slices: int, budget: int, rule: str, seed: int):
        super().__init__()
        rotations(slices, budget)
        self.size = (shards, slices, budget)
        self.members = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(copy.deepcopy(network) for _ in range(slices)) for _ in range(budget))
            for _ in range(shards)
        )
        self.register_buffer("alive", torch.zeros(shards, budget, dtype=torch.int64))
        self.register_buffer("ledger", torch.zeros(shards, slices, 2, dtype=torch.int64))
        self.register_buffer("recipe", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("chosen", torch.tensor(RULES.index(rule)))
        self.register_buffer("orders", torch.tensor(rotations(slices, budget)))
        for part in (self, self.members, *self.members, *(row for rows in self.members for row in cast(Any, rows))):
            part.training = network.training

    def stages(self, shard: int, order: int) -> nn.ModuleList:
        """The networks of one order, stage by stage."""
        return cast(nn.ModuleList, cast(nn.ModuleList, self.members[shard])[order])

    @property
    def sequences(self) -> Sequences:
        """What is in service."""
        return Sequences(self.alive.tolist(), self.size[1], self.orders.tolist())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the shards in service together, in the form of one network's."""
        serving = self.sequences.serving()
        if not serving:
            raise RunFailed("no shard has a stage in service: train the sequences anew, from an ordinary network")
        return merge(
            [self.stages(shard, order)[stage](*args, **kwargs) for shard, order, stage in serving],
            RULES[int(self.chosen)],
        )


@dataclass(frozen=True)
class TrainSequences:
    """Train the sequences of a network on the retain data; or, given trained ones, switch off what saw a changed slice.

    Switching off trains nothing. The bits that stay are those of training on the slices that no request has touched.

    Args:
        shards, slices, budget, rule: see ``Sequenced``.
        train: the stage that trains one network on its case's retain data, in the scope of its group of layers.
        recipe: all that `train` and `make` depend on, in words; another one is refused.
        start: "fresh" weights, or the "given" ones, which then must never have seen the data.
        make: builds the network untrained; None resets every module of a copy by its own ``reset_parameters``.
        risks: of deletion, per slice, for orders by ``matched``; None for cyclic ones.
    """

    shards: int
    slices: int
    budget: int
    rule: str
    train: Stage
    recipe: str
    start: str
    make: Callable[[], nn.Module] | None = None
    risks: tuple[float, ...] | None = None

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if case.scope.count(case.model) != Scope.all(case.model).count(case.model):
            raise Refused("sequences train every trainable weight, and the scope leaves some out: give no scope")
        data = case.request.data("retain")
        places = self._places(data)
        slices = [[data.select(in_slice(data, places, s, k)) for k in range(self.slices)] for s in range(self.shards)]
        ledger = torch.tensor([[_digest(part) for part in row] for row in slices], dtype=torch.int64)
        if isinstance(case.model, Sequenced):
            self._switch_off(case, case.model, ledger)
            return replace(case, rng=rng)
        least = min(len(part) for row in slices for part in row)
        if least < FEWEST:
            raise Refused(
                f"a slice has {least} of the {len(data)} examples: expected at least {FEWEST}, since every slice is the "
                f"first of some order; take fewer shards or slices"
            )
        model = self.structure(case.model, key)
        if self.risks is not None:
            model.orders.copy_(torch.tensor(matched(self.risks, self.budget)))
        for shard, order in ((s, b) for s in range(self.shards) for b in range(self.budget)):
            self._learn(case, model, slices[shard], shard, order)
        model.ledger.copy_(ledger)
        model.recipe.copy_(_words(self.recipe))
        return replace(case, model=model, scope=Scope.all(model), rng=rng)

    def _places(self, data: Data) -> Tensor:
        """[n, 2] shard and slice: the slice of the data's column ``slice`` where there is one, for slices of other risks."""
        places = place(data.ids, self.shards, self.slices)
        own = data.columns.get("slice")
        if own is not None:
            if own.is_floating_point() or own.ndim != 1 or not bool(((own >= 0) & (own < self.slices)).all()):
                raise Refused(f"column 'slice' must hold one whole number from 0 to {self.slices - 1} per example")
            places[:, 1] = own
        return places

    def structure(self, model: nn.Module, key: Key) -> Sequenced:
        """The model itself where it is of this kind, else untrained sequences of its network."""
        if isinstance(model, Sequenced):
            return model
        found = Sequenced(model, self.shards, self.slices, self.budget, self.rule, key.seed)
        return found.to(next((p.device for p in model.parameters()), torch.device("cpu")))

    def _learn(self, case: Case, model: Sequenced, slices: list[Data], shard: int, order: int) -> None:
        """All stages of one order, each from the one before, on all slices up to its own."""
        stages, key = model.stages(shard, order), Key(int(model.seed)).at("shard", shard)
        network = untrained(stages[0], key.at("weights"), self.make) if self.start == "fresh" else stages[0]
        chosen, whole = groups(network, self.slices), tuple(name for name, _ in network.named_parameters())
        retain, order_of = case.request.data("retain"), model.orders[order].tolist()
        for number in range(self.slices):
            network = copy.deepcopy(network)
            ids = torch.cat([slices[k].ids for k in order_of[: number + 1]])
            request = Request(retain=retain.select(_positions(retain.ids, ids)))
            scope = Scope(dict.fromkeys(chosen[number], True), whole)
            inner = replace(case, model=network, request=request, scope=scope, teachers={}, watch=None)
            self.train(replace(inner, rng=key.at("order", order, number)))
            stages[number] = network
        model.alive[shard, order] = self.slices

    def _switch_off(self, case: Case, model: Sequenced, ledger: Tensor) -> None:
        """Retire every slice that is no longer what was learnt, and erase the stages that saw it."""
        same = torch.equal(model.recipe.cpu(), _words(self.recipe))
        if model.size != (self.shards, self.slices, self.budget) or not same:
            raise Refused(
                "these sequences were trained with other settings, and switching off needs the same: give those, or "
                "train anew from an ordinary network"
            )
        before = int(model.alive.sum())
        sequences = model.sequences
        gone = torch.nonzero((model.ledger.cpu() != ledger).any(-1)).tolist()
        for shard, number in gone:
            sequences.delete(shard, number)
        if not sequences.in_service:
            raise Refused(
                f"after this request {len(gone)} of {self.shards * self.slices} slices are retired and no shard could "
                f"answer: train anew from an ordinary network on the retain data"
            )
        model.alive.copy_(torch.tensor(sequences.alive))
        for shard, number in gone:
            model.ledger[shard, number] = 0  # retired: never what any data are
        for shard, order in ((s, b) for s in range(self.shards) for b in range(self.budget)):
            for network in list(model.stages(shard, order))[int(model.alive[shard, order]) :]:
                erase(network)
        left = int(model.alive.sum())
        case.meter.note(
            f"{before - left} stages were switched off and {left} of {model.alive.numel() * self.slices} are left"
        )


def erase(network: nn.Module) -> None:
    """Zeros for every parameter and buffer."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.zero_()


def _digest(data: Data) -> list[int]:
    return numbers(hashlib.blake2b(fingerprint(data).encode(), digest_size=16).digest())


def _words(recipe: str) -> Tensor:
    return torch.tensor(numbers(hashlib.blake2b(recipe.encode(), digest_size=16).digest()), dtype=torch.int64)


def _positions(known: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted id stands."""
    order = known.argsort()
    return order[torch.searchsorted(known[order], wanted)]
