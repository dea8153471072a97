"""By what a search judges settings: a rule that needs no retrained model, or other requests of the same kind.

Neither sees the request's own retrained models, nor its test data: they are no argument of anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.audit import distance
from expunge.audit.subject import Subject, address_of, classifies
from expunge.core import Data, Key, Refused, Request, Task
from expunge.data.builtin import Recipe
from expunge.data.sources import fingerprint
from expunge.references import references
from expunge.trainer import Train
from expunge.tune_kinds import a_range, alike, forgotten_whole, labels_of

RULES = ("blind", "proxy")
HELD = 0.2  # share of the retain data that is held out: to validate on, or as the test data of a proxy
EXAMPLES = 2048  # retain examples that settings are judged on; a search would otherwise pay for all of them each time
SEEDS = 1 << 31


@dataclass(frozen=True)
class Judged:
    """What a rule says of one model.

    Attributes:
        score: the less the better. drop: points of utility lost, on retain or on held-out data, whichever lost more.
        readings: what they were made of, in points.
    """

    score: float
    drop: float
    readings: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """A request to try settings on: what ``unlearn`` is given, and how its result is judged.

    Attributes:
        name: for people, and for the draws of the runs. request, original: what is forgotten, by which model.
        judge: what a rule says of the model that comes out.
        identity: hashes of data and models.
    """

    name: str
    request: Request
    original: nn.Module
    judge: Callable[[nn.Module], Judged] = field(repr=False)
    identity: Mapping[str, str] = field(default_factory=dict)


def blind(model: nn.Module, request: Request, task: Task, key: Key) -> Problem:
    """The request itself, judged without any retrained model, on data that no step of the run reads.

    Whole classes: as few forget examples as possible still answered rightly, and among equals the least utility lost.
    Anything else: |train(o) - retain(u)| + |valid(o) - valid(u)| + |forget(u) - valid(o)|, accuracies in points of the
    original o and the result u; a loss, where there are no labels, in percent of knowing nothing.

    The validation data are ``request.valid``. Without them a fifth of the retain data is held out of the run, which says
    enough of utility, but the original was trained on it: only for whole classes. It does not promise that the result is
    near a retrained model: no such model is looked at.

    Paper: the rule of EUPMU's authors, in their code; they validate on data held out of training.

    Raises:
        Refused: without retain data, or for single records without validation data.
    """
    forget, retain = request.data("forget"), request.data("retain")
    valid, trained_on = request.valid, request
    gone = forgotten_whole(request, task)
    if a_range(request, task):
        raise Refused(
            "the blind rule knows whole classes and records, and all targets of a range are forgotten here, which nobody "
            "can say how well a retrained model predicts: use --rule proxy"
        )
    if valid is None and not gone:
        raise Refused(
            "the blind rule for anything but whole classes needs examples that the model never saw: give the request "
            "validation data ([data] valid), or --rule proxy"
        )
    if valid is None:
        retain, valid = _halves(retain, HELD, key.at("held"))
        trained_on = replace(request, retain=retain)
    some = replace(trained_on, retain=_sample(retain, task, key.at("sample")))

    def looked(after: nn.Module) -> dict[str, float]:
        return _points(Subject(model, after, some, task, valid, key=key, draws=2))

    before = looked(model)
    seen = (len(forget) * before["forget"] + len(retain) * before["retain"]) / (len(forget) + len(retain))

    def judge(after: nn.Module) -> Judged:
        now = looked(after)
        drop = _drop(before, now, classifies(task))
        if gone:
            score = now["forget"] + 100 / len(forget) * float(np.clip(drop, -100, 100)) / 1000  # never worth an example
        else:
            score = (
                abs(seen - now["retain"]) + abs(before["valid"] - now["valid"]) + abs(now["forget"] - before["valid"])
            )
        return Judged(score, drop, now)

    identity = {"forget": fingerprint(forget), "retain": fingerprint(retain), "valid": fingerprint(valid)}
    return Problem("the request", trained_on, model, judge, {**identity, "original": address_of(model)})


def proxy(
    name: str, original: nn.Module, request: Request, test: Data, retrained: Sequence[nn.Module], task: Task, key: Key
) -> Problem:
    """Another request, judged as the audit judges: its average gap, as a share of do-nothing's.

    Args:
        name: unlike that of the other proxies. original: trained on forget and retain of `request`.
        request: to forget. test: unseen by any of the models. retrained: on ``request.retain``, by the same recipe.

    Raises:
        Refused: where doing nothing is no different from retraining, or there are no retrained models.
    """
    if not retrained:
        raise Refused(f"the proxy {name!r} has no retrained models to be judged by: train at least one")
    some = replace(request, retain=_sample(request.data("retain"), task, key.at("sample")))

    def subject(after: nn.Module) -> Subject:
        return Subject(original, after, some, task, test, key=key, draws=2)  # its own: what it knows holds the models

    target = np.mean([distance.points(subject(model), model) for model in retrained], axis=0)
    before = _points(subject(original))
    nothing = float(np.abs(distance.points(subject(original), original) - target).mean())
    if not nothing > 0:
        raise Refused(
            f"doing nothing cannot be told from retraining on the proxy {name!r}: no setting is better than another there; "
            f"give larger or harder requests"
        )

    def judge(after: nn.Module) -> Judged:
        judged = subject(after)
        gap = float(np.abs(distance.points(judged, after) - target).mean())
        now = _points(judged)
        readings = {**now, "gap": gap, "gap of doing nothing": nothing}
        return Judged(gap / nothing, _drop(before, now, classifies(task)), readings)

    parts = {"forget": request.forget, "retain": request.retain, "valid": request.valid, "test": test}
    identity = {part: fingerprint(data) for part, data in parts.items() if data is not None}
    identity |= {"original": address_of(original)}
    identity |= {f"retrained {number + 1}": address_of(one) for number, one in enumerate(retrained)}
    return Problem(name, request, original, judge, identity)


def proxies(
    request: Request,
    task: Task,
    train: Train | Recipe,
    make: Callable[[], nn.Module] | nn.Module,
    folder: Path,
    *,
    count: int = 2,
    retrained: int = 2,
    key: Key,
    draw: Callable[[Data, int], Any] | None = None,
    workers: int = 1,
    recipe: str = "",
    show: Callable[[int], None] = lambda done: None,
) -> list[Problem]:
    """Other requests of the same kind, drawn from the retain data alone, with models trained for them.

    Each has a split of its own: a fifth of the retain data is held out for tests, and the proxy's original is trained on
    the rest. So neither the real forget data nor any model trained for the real request has a part in it. Of the real
    forget data only their number and labels are looked at.

    Args:
        request: whose kind is meant: whole classes, parts of a few classes, a range of targets, or records.
        train, make, recipe, workers, folder: see ``expunge.references``; finished models there are read back.
        count: of proxies. retrained: references of each. key: of every draw.
        draw: ``(data, seed) -> ids`` to forget, for another kind of request (the most memorised records, say).
        show: called with the number of proxies that are ready.
    """
    found = []
    for number in range(count):
        own = key.at("proxy", number)
        pool, test = _halves(request.data("retain"), HELD, own.at("held"))
        valid = None
        if request.valid is not None:
            test, valid = _halves(test, 0.5, own.at("valid"))
        seed = own.seed % SEEDS
        ids = alike(request, pool, task, key, number) if draw is None else draw(pool, seed)
        chosen = torch.isin(pool.ids, torch.as_tensor(ids))
        everything = torch.arange(len(pool))
        asked = Request(pool.select(everything[chosen]), pool.select(everything[~chosen]), valid)
        made = references(
            train,
            pool,
            asked,
            task=task,
            make=make,
            folder=folder,
            retrained=retrained,
            originals=1,
            seed=seed,
            workers=workers,
            recipe=recipe,
            fill=(),
        )
        models = [one.load() for one in made.retrained]
        found.append(proxy(f"proxy {number + 1}", made.originals[0].load(), asked, test, models, task, own))
        show(number + 1)
    return found


def _halves(data: Data, share: float, key: Key) -> tuple[Data, Data]:
    """(the rest, so large a share drawn at random)."""
    order = torch.randperm(len(data), generator=key.generator())
    held = round(share * len(data))
    if not 0 < held < len(data):
        raise Refused(f"{len(data)} examples to keep are too few to hold some out of: give validation data, or more")
    return data.select(order[held:].sort().values), data.select(order[:held].sort().values)


def _sample(data: Data, task: Any, key: Key) -> Data:
    """So many examples, and one at least of every class: a class without any would count as forgotten."""
    if len(data) <= EXAMPLES:
        return data
    order = torch.randperm(len(data), generator=key.generator())
    chosen = order[:EXAMPLES]
    if classifies(task):
        labels = labels_of(task, data)
        missing = [label for label in labels.unique() if not bool((labels[chosen] == label).any())]
        chosen = torch.cat([chosen, *(torch.nonzero(labels == label)[0] for label in missing)])
    return data.select(chosen.sort().values)


def _points(subject: Subject) -> dict[str, float]:
    """Accuracy, or loss in percent of knowing nothing, on forget, retain and held-out data (called valid)."""
    values = dict(zip(distance.metrics(subject), distance.points(subject, subject.after).tolist(), strict=True))
    kept = {name.split("_")[0]: value for name, value in values.items() if name != "membership_auc"}
    return {"valid" if name == "test" else name: value for name, value in kept.items()}


def _drop(before: Mapping[str, float], now: Mapping[str, float], accuracy: bool) -> float:
    """Points lost on retain or held-out data, whichever lost more; below 0 where both gained."""
    sign = 1 if accuracy else -1
    return max(sign * (before[name] - now[name]) for name in ("retain", "valid") if name in before)
