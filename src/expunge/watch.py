"""Watching a run: how well the model does on fixed examples after every step, not only at the end.

A method may pass through a bad model on its way to a good one (the stability gap). Whoever serves the model while it
forgets, or stops the run early, meets that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge import runtime
from expunge.core import Case, Data, Key, Refused, Request, RunFailed, Task, eval_mode, lent_stream
from expunge.data.sources import fingerprint

ROW, ERROR = "watch/", "watch_error/"
"""What the columns of a history row begin with: a value, and the standard error of a loss."""
BATCH = 256
Stop = Callable[[Mapping[str, float]], "str | None"]


class Stopped(RunFailed):
    """A look along the run was enough to know that nobody wants its end. `cost`: rows until then."""

    def __init__(self, sentence: str, cost: Mapping[str, int]):
        super().__init__(sentence)
        self.cost = cost


@dataclass(frozen=True)
class Watch:
    """What to measure along a run: ``unlearn(..., watch=Watch(every=5))``.

    Accuracy in percent where the task has one label per example, else the loss per unit, in eval mode, on a fixed draw
    of the request's retain, forget and valid data and of `data`. Test and valid examples of classes that are forgotten
    whole are left out, as an audit leaves them out. The run itself does not change by a bit; its cost is counted as
    ``checks``. It does not stop a run and keep a good state: that is for ``Guard``.

    Args:
        every: steps between two looks, >= 1; the steps of all stages count on. Start and end are always looked at.
        examples: of each data set, >= 1, drawn once by the run's seed; fewer where there are fewer.
        data: further data by name, such as ``{"test": test}``.
        stop: asked at every look, of what was seen; a sentence from it ends the run with ``Stopped``. For searches.

    Raises:
        Refused: for numbers out of range, or names that cannot be column names.
    """

    every: int = 1
    examples: int = 512
    data: Mapping[str, Data] = field(default_factory=dict)
    stop: Stop | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("every", "examples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Refused(f"Watch: {name} must be a whole number of at least 1, found {value!r}")
        for name, data in self.data.items():
            if not (isinstance(name, str) and name and "/" not in name):
                raise Refused(f"Watch: data is named {name!r}: expected a name without a slash")
            if not isinstance(data, Data):
                raise Refused(f"Watch: data {name!r} is a {type(data).__name__}: make it with expunge.as_data(...)")

    def probes(self, request: Request, task: Task, seed: int) -> Probes:
        """The examples that this run will be watched on.

        Raises:
            Refused: for data that the task cannot use, or where there is none to watch.
        """
        for name, data in self.data.items():
            task.check(data, name)
        parts = {name: getattr(request, name) for name in ("retain", "forget", "valid")}
        named = {**{name: data for name, data in parts.items() if data is not None}, **self.data}
        key, gone = Key(seed).at("watch"), _forgotten_classes(task, request) if _labelled(task) else ()
        found = {}
        for name, data in named.items():
            if gone and name not in ("forget", "retain"):
                kept = ~torch.isin(_labels(task, data), torch.tensor(gone))
                data = data.select(torch.nonzero(kept).flatten())
            if len(data):
                order = torch.randperm(len(data), generator=key.at("probe", name).generator())
                found[name] = data.select(order[: self.examples].sort().values)
        if not found:
            raise Refused("there is nothing to watch: the request has no retain, forget or valid data; give data=")
        return Probes(self.every, found, task, key, self.stop)


@dataclass(frozen=True)
class Probes:
    """The fixed examples of one run, and how to look at them.

    Attributes:
        every: steps between two looks. data: name -> the examples. key: of the task's own randomness, at every look
            the same.
    """

    every: int
    data: Mapping[str, Data]
    task: Task = field(repr=False)
    key: Key = Key(0)
    stop: Stop | None = field(default=None, repr=False, compare=False)

    @property
    def unit(self) -> str:
        """ "%" for accuracy, else the unit of the loss."""
        return "%" if _labelled(self.task) else self.task.unit

    def due(self, done: int) -> bool:
        """Whether to look after so many steps of the whole run."""
        return done % self.every == 0

    def look(self, case: Case) -> dict[str, float]:
        """Columns for a row of the history. Modes, buffers and random streams are afterwards as they were."""
        model, found = case.model, {}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad(), case.meter.checking(), eval_mode(model), lent_stream(self.key):
            for name, data in self.data.items():
                value, error = self._value(case, data)
                found[f"{ROW}{name}"] = value
                if error is not None:
                    found[f"{ERROR}{name}"] = error
            for name, buffer in model.named_buffers():  # a model may count its calls, say
                buffer.copy_(buffers[name])
        said = None if self.stop is None else self.stop(found)
        if said is not None:
            meter = case.meter
            raise Stopped(said, {name: getattr(meter, name) for name in ("forward", "backward", "checks")})
        return found

    def _value(self, case: Case, data: Data) -> tuple[float, float | None]:
        task: Any = case.task
        losses, units, right = [], [], 0
        for number, batch in enumerate(data.batches(BATCH)):
            batch = runtime.to_device(batch, runtime.device_of(case.model))
            batch = task.prepare(batch, self.key.at("prepare", number))
            if _labelled(task):
                right += int((task.logits(case.model, batch).argmax(1) == task.labels(batch)).sum())
            else:
                losses.append(task.nll(case.model, batch).double().cpu())
                units.append(task.units(batch).double().cpu())
        if _labelled(task):
            return 100 * right / len(data), None
        return _ratio(torch.cat(losses), torch.cat(units))

    def describe(self) -> dict[str, Any]:
        """JSON for the identity of a run: what is looked at, and how often."""
        examples = {name: {"examples": len(data), "data": fingerprint(data)} for name, data in self.data.items()}
        return {"every": self.every, "unit": self.unit, "probes": examples}


def _ratio(losses: Tensor, units: Tensor) -> tuple[float, float]:
    """(loss per unit, its standard error over examples): a ratio of sums, to first order."""
    value, count = float(losses.sum() / units.sum()), len(losses)
    if count < 2:
        return value, math.inf
    spread = (losses - value * units).square().sum() / (count * (count - 1))
    return value, float(spread.sqrt() / units.mean())


def _labelled(task: Any) -> bool:
    """Whether the task has one label per example and logits over classes."""
    return all(hasattr(task, name) for name in ("classes", "labels", "logits"))


def _labels(task: Any, data: Data) -> Tensor:
    return torch.cat([task.labels(batch) for batch in data.batches(1024)])


def _forgotten_classes(task: Any, request: Request) -> tuple[int, ...]:
    """Classes with forget examples and no retain examples."""
    if request.forget is None or request.retain is None:
        return ()
    forget, kept = (_labels(task, data).unique() for data in (request.forget, request.retain))
    return tuple(forget[~torch.isin(forget, kept)].tolist())
