"""The requests of a benchmark, each drawn once for all seeds, so that every model of a table forgot the same examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.bench.suite_file import BenchSpec, Drawn, Poison
from expunge.challenges.corrective import Manipulation, mislabel, poison
from expunge.challenges.worst_case import worst_case
from expunge.core import Data, Key, Refused, Request, Task
from expunge.data.builtin import Suite
from expunge.data.split import split
from expunge.journal import write_bytes

KEY = Key(0).at("bench")
FOLDS = 5


@dataclass(frozen=True)
class Material:
    """What a suite is run on: the suite, with bad examples in its training data where the file asks for them."""

    suite: Suite
    bad: Manipulation | None = None

    @staticmethod
    def of(suite: Suite, spec: BenchSpec) -> Material:
        """The suite as the file has it."""
        asked = spec.bad
        if asked is None:
            return Material(suite)
        if isinstance(asked, Poison):
            made = poison(
                suite.train, suite.test, target=asked.target, count=asked.count, patch=asked.patch, key=KEY.at("bad")
            )
        else:
            first, second = asked.classes
            made = mislabel(suite.train, suite.test, (first, second), count=asked.count, key=KEY.at("bad"))
        return Material(replace(suite, train=made.data), made)

    def clean(self, request: Request) -> Data:
        """What references are trained on: the retain data; with bad examples, all the good ones."""
        return request.data("retain") if self.bad is None else self.bad.clean


def drawn(material: Material, asked: str | list[int] | Drawn, ids: Callable[[str, int], Tensor]) -> tuple[Request, ...]:
    """One request, or several that are asked one after the other.

    Args:
        ids: ids of the examples that a rule other than `random` finds, by rule and number.

    Raises:
        Refused: for a request that cannot be made of these data.
    """
    train = material.suite.train
    if not isinstance(asked, Drawn):
        return (split(train, asked),)
    rule, size = asked.rule
    if rule == "identified":
        if material.bad is None:
            raise Refused("a request for identified bad examples needs [manipulate]")
        return (material.bad.request(size, KEY),)
    count = number(size, len(train))
    if rule == "random":
        order = torch.randperm(len(train), generator=KEY.at("request").generator())
        found = train.ids[order[:count]]
    else:
        found = ids(rule, count)
    return in_turn(train, found, asked.turns)


def number(size: float, total: int) -> int:
    """How many examples: a share below 1, or a number."""
    count = round(size * total) if size < 1 else int(size)
    if not 1 <= count < total:
        raise Refused(
            f"a request for {size:g} of {total} examples leaves none to keep or none to forget: ask for others"
        )
    return count


def in_turn(train: Data, ids: Tensor, turns: int) -> tuple[Request, ...]:
    """`turns` requests for these ids; each keeps what no request up to it forgets."""
    if turns > len(ids):
        raise Refused(f"{len(ids)} examples cannot be forgotten in {turns} turns: ask for fewer turns")
    groups = [ids[turn::turns] for turn in range(turns)]
    found, gone = [], torch.empty(0, dtype=torch.int64)
    for group in groups:
        gone = torch.cat([gone, group])
        inside = torch.isin(train.ids, group)
        kept = ~torch.isin(train.ids, gone)
        found.append(
            Request(train.select(torch.nonzero(inside).flatten()), train.select(torch.nonzero(kept).flatten()))
        )
    return tuple(found)


def union(requests: Sequence[Request], train: Data) -> Request:
    """What is forgotten and kept after all of them: what the audit is about."""
    if len(requests) == 1:
        return requests[0]
    gone = torch.cat([request.data("forget").ids for request in requests])
    inside = torch.isin(train.ids, gone)
    return Request(train.select(torch.nonzero(inside).flatten()), train.select(torch.nonzero(~inside).flatten()))


def folds(train: Data) -> list[Tensor]:
    """[fold] rows inside it; every row is in one."""
    order = torch.randperm(len(train), generator=KEY.at("folds").generator())
    return [order[fold::FOLDS].sort().values for fold in range(FOLDS)]


def most_memorised(train: Data, task: Task, models: Sequence[nn.Module], count: int, ranked: bool = False) -> Tensor:
    """[count] ids of the largest loss under the model of the fold that lacks them, in the order of the data.

    These are what a model of all data knows only by having seen it.

    Args:
        models: one per fold. ranked: the largest loss first, instead.
    """
    loss = torch.empty(len(train))
    with torch.no_grad():
        for inside, model in zip(folds(train), models, strict=True):
            loss[inside] = torch.cat([task.nll(model, batch) for batch in train.select(inside).batches(1024)])
    chosen = loss.argsort(descending=True)[:count]
    return train.ids[chosen if ranked else chosen.sort().values]


def hardest(train: Data, task: Task, model: nn.Module, count: int) -> Tensor:
    """[count] ids that fine-tuning forgets least, by bi-level selection on one trained model."""
    request = worst_case(model, train, task, count, key=KEY.at("worst case")).request
    return request.data("forget").ids


def kept(folder: Path, what: Mapping[str, str], find: Callable[[], Tensor]) -> Tensor:
    """The ids that `find` gives, found once and kept in a file under what they depend on."""
    name = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = folder / f"{name}.json"
    try:
        found = json.loads(path.read_text())
        if found["of"] == dict(what):
            return torch.tensor(found["ids"], dtype=torch.int64)
    except (OSError, ValueError, KeyError):
        pass
    ids = find()
    write_bytes(path, json.dumps({"of": dict(what), "ids": ids.tolist()}).encode())
    return ids
