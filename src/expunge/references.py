"""Models to judge by, from the user's own training function: retrained, originals, shadows, and what a method makes of them.

``references(train, data, request, task=..., make=..., retrained=8, folder="refs")`` trains what is not in the folder yet,
in parallel, and leaves what every model says in a store, so that an audit needs no forward pass of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.audit.subject import Model, Shadows, Subject
from expunge.core import Data, Key, Refused, Request, Stage, Task
from expunge.data.builtin import Recipe
from expunge.data.sources import as_data, fingerprint
from expunge.reference_plan import Plan
from expunge.run import check_request, check_stage, resolve
from expunge.shelf import Job, Made, Shelf, Work
from expunge.store import Kept, Store
from expunge.trainer import Train, Trainer
from expunge.training_pool import make_all

ROLES = ("retrained", "original", "shadow", "unlearned", "unlearned shadow")


@dataclass(frozen=True)
class Entry:
    """One model of the ledger: its role and number, its seed, seconds of its making, whether it was made just now."""

    role: str
    number: int
    seed: int
    seconds: float
    fresh: bool
    model: Kept = field(repr=False)


@dataclass(frozen=True)
class References:
    """Models by name: their weights are read from the folder when a measure asks, their outputs from the store.

    Attributes:
        store: what they say. seed: of the audit's draws, part of where that is kept.
        retrained: trained without the forget data. records: what each cost.
        originals: trained on all data. unlearned: what the method made of each of them.
        shadows: trained on random halves; with a method, what it made of them (see ``shadow_design.arms``).
        trained_shadows: with a method, the shadows before it.
        ledger: every model, for people. request: hashes of the data that these models belong to.
    """

    store: Store
    seed: int
    retrained: tuple[Kept, ...] = ()
    originals: tuple[Kept, ...] = ()
    unlearned: tuple[Kept, ...] = ()
    shadows: Shadows | None = None
    trained_shadows: Shadows | None = None
    records: tuple[Mapping[str, Any], ...] = ()
    ledger: tuple[Entry, ...] = ()
    request: Mapping[str, str] = field(default_factory=dict)

    def subject(
        self, before: Model, after: Model, request: Request, task: Task, test: Data | None = None, **more: Any
    ) -> Subject:
        """What to audit, beside these references; `more` goes to ``Subject``.

        Raises:
            Refused: where they were trained for other forget or retain data.
        """
        if self.request and self.request != hashes(request):
            raise Refused(
                "these references were trained for another request (its forget or retain data differ): train them for this one"
            )
        given = {
            "retrained": self.retrained,
            "retrain_records": self.records,
            "originals": self.originals,
            "unlearned": self.unlearned,
            "shadows": self.shadows,
            "store": self.store,
            "key": Key(self.seed),
        }
        return Subject(before, after, request, task, test, **{**given, **more})


def references(
    train: Train | Recipe,
    data: Any,
    request: Request | None = None,
    *,
    task: Task,
    make: Callable[[], nn.Module] | nn.Module,
    folder: str | Path,
    retrained: int = 0,
    originals: int = 0,
    shadows: int = 0,
    method: str | Stage | None = None,
    test: Data | None = None,
    seed: int = 0,
    workers: int = 2,
    ray: str | None = None,
    recipe: str = "",
    fill: Sequence[str] | None = None,
) -> References:
    """Train the models that an audit is judged by, each once; what is in the folder already is read back.

    A model is known by the hashes of its data, of the training code (``trainer.source_of`` says what of it is seen) and
    by its seed. Any number of calls may work on one folder at once, on one machine; a call that is killed and given again
    repeats no finished model. The number of workers does not change a bit of any model: each has one thread. It does
    not promise that `train` is a good recipe, nor the one that the audited model was trained by.

    Args:
        train: ``(data, seed) -> model``, all its random draws from that seed, or a ``Recipe`` for what `make` builds.
            The global random streams of torch, numpy and Python start from the seed, and are put back.
        data: the training set of the originals, in any form that ``as_data`` takes.
        request: what is to be forgotten and kept; None for originals and shadows alone.
        task: the modality.
        make: builds an untrained network of the architecture, or is a model of it: weights are read back into it.
        folder: ``models`` and ``outputs`` go there.
        retrained: models trained on ``request.retain``; seeds seed + 1, seed + 2, ...
        originals: models trained on `data`; seeds derived from `seed`, as those of
        shadows: models trained on random halves of forget and retain (of `data` without a request), 0 or >= 2; a
            multiple of 4 balances the arms of U-LiRA.
        method: applied to every original and every shadow, for measures over models.
        test: unseen examples, to keep outputs on. fill: names of data to keep outputs on; forget, retain and test by
            default, or any of ``request.extra`` (a sample of a large retain set).
        seed: of every draw.
        workers: processes on this machine; with 1 the work is done in this one.
        ray: address of a Ray cluster ("local" starts one here), in place of the processes.
        recipe: tells apart what the code does not show.

    Raises:
        Refused: for bad input, before any training. RunFailed: for a model that cannot be made; finished ones are kept.
    """
    data = as_data(data)
    counts = {"retrained": retrained, "originals": originals, "shadows": shadows}
    _check(counts, workers, data, request, method)
    if request is not None:
        check_request(request, task)
    name, stage = ("", None) if method is None else resolve(method)
    if stage is not None and request is not None:
        check_stage(stage, request, {"original": None})
    folder = Path(folder).absolute()  # a worker may stand elsewhere
    plan = Plan(Trainer(train, make, task, recipe), data, request, seed, stage, name, shadows > 0)
    shelf, store = Shelf(folder / "models"), Store(folder / "outputs")
    work = _work(plan, store, test, fill)
    first = {
        "retrained": plan.retrained(retrained),
        "original": plan.originals(originals),
        "shadow": plan.shadows(shadows),
    }
    made, new = make_all(shelf, work, _flat(first), workers, ray, "training references")
    _check_seeds(first, made)
    second: dict[str, list[Job]] = {}
    if stage is not None:
        second["unlearned"] = plan.unlearned(first["original"], made)
        second["unlearned shadow"] = plan.unlearned_shadows(first["shadow"], made)
        more, newer = make_all(shelf, work, _flat(second), workers, ray, "unlearning references")
        made, new = {**made, **more}, new | newer
    return _assembled(plan, shelf, work, {**first, **second}, made, new)


def hashes(request: Request) -> dict[str, str]:
    """What tells two requests apart: the hashes of their data."""
    parts = {name: getattr(request, name) for name in ("forget", "retain")}
    return {name: fingerprint(part) for name, part in parts.items() if part is not None}


def _check(
    counts: Mapping[str, int], workers: int, data: Data, request: Request | None, method: str | Stage | None
) -> None:
    """Refuse what cannot be made, before anything else is."""
    for name, count in {**counts, "workers": workers}.items():
        least = 1 if name == "workers" else 0
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise Refused(f"{name} must be a whole number >= {least}, found {count!r}")
    if not any(counts.values()):
        raise Refused("nothing to train: ask for retrained=, originals= or shadows=")
    if counts["shadows"] == 1:
        raise Refused("shadows must be 0 or >= 2, found 1: some must be trained on an example and some not")
    if counts["retrained"] and (request is None or request.retain is None):
        raise Refused("retrained models need a request with retain data: give what expunge.split returns")
    if method is None:
        return
    if request is None or request.forget is None or request.retain is None:
        raise Refused("method= needs a request with forget and retain data: give what expunge.split returns")
    if not counts["originals"] and not counts["shadows"]:
        raise Refused("method= is applied to originals and shadows: ask for originals= or shadows=")


def _check_seeds(jobs: Mapping[str, Sequence[Job]], made: Mapping[str, Made]) -> None:
    """Refuse a training that gives the same weights whatever its seed."""
    for role in ("retrained", "original"):
        seen: dict[str, Job] = {}
        for job in jobs[role]:
            other = seen.setdefault(made[job.key].weights, job)
            if other.seed != job.seed:
                raise Refused(
                    f"training gives the same weights for seeds {other.seed} and {job.seed}: it does not use its seed, so "
                    f"several models say no more than one; let every random draw come from it, or ask for one model"
                )


def _flat(jobs: Mapping[str, Sequence[Job]]) -> list[Job]:
    return [job for some in jobs.values() for job in some]


def _nobody() -> nn.Module:
    raise Refused("this model stands for none: it cannot be opened")


def _work(plan: Plan, store: Store, test: Data | None, fill: Sequence[str] | None) -> Work:
    """What is sent to every process. Outputs are kept where a Subject with the same key looks for them."""
    subject, addresses, request = None, {}, plan.request
    if request is not None and request.forget is not None:
        nobody = Kept("0", _nobody)
        subject = Subject(nobody, nobody, request, plan.trainer.task, test, key=Key(plan.seed), store=store)
        usual = {
            "forget": True,
            "retain": request.retain is not None,
            "test": test is not None or request.valid is not None,
        }
        names = [name for name, there in usual.items() if there] if fill is None else list(fill)
        addresses = {name: subject.data_address(name) for name in names}
    return Work(plan.trainer, plan.parts, store, subject, addresses, request, plan.stage)


def _assembled(
    plan: Plan,
    shelf: Shelf,
    work: Work,
    jobs: Mapping[str, Sequence[Job]],
    made: Mapping[str, Made],
    new: Iterable[str],
) -> References:
    """Handles of the models, the ledger, and what the shadows saw."""

    def kept(job: Job) -> Kept:
        found = made[job.key]
        return Kept(found.name, lambda: work.opened(shelf.check(found), job))

    models = {role: tuple(kept(job) for job in some) for role, some in jobs.items()}
    ledger = tuple(
        Entry(role, n, job.seed, float(made[job.key].record["cost"]["seconds"]), job.key in set(new), models[role][n])
        for role, some in jobs.items()
        for n, job in enumerate(some)
    )
    count, forgot, trained, after = len(jobs["shadow"]), models.get("unlearned shadow", ()), None, None
    if count:
        pool = plan.parts["pool"].ids.numpy()
        trained = Shadows(models["shadow"], pool, plan.inside(count).astype(np.int8))
        after = Shadows(forgot, pool, plan.states(count), True) if forgot else None
    return References(
        work.store,
        plan.seed,
        models["retrained"],
        models["original"],
        models.get("unlearned", ()),
        trained if after is None else after,
        None if after is None else trained,
        tuple(made[job.key].record for job in jobs["retrained"]),
        ledger,
        {} if plan.request is None else hashes(plan.request),
    )
