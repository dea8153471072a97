"""What is audited, and what a measure says of it. Each model is run once per data set, however many measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Data, Key, Refused, Request, Task, eval_mode

Better = Literal["higher", "lower", "nearer_retrained"]


@dataclass(frozen=True)
class Reading:
    """One number about one model, with how sure it is.

    Attributes:
        name: of the measure.
        value, low, high: the number and its 95 % interval, in `unit`. What the interval is over, the measure says.
        n: examples (or models) that the interval is over.
        unit: "%" for percentage points, "" for a plain number.
        better: the direction of improvement; "nearer_retrained" has none: both sides are failures.
        reference: where one more retrained model is expected; None where no retrained model was given.
        verdict: "" where nothing is judged, "within" the reference, or how the model left it.
        detail: further numbers, by name.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    better: Better = "nearer_retrained"
    reference: tuple[float, float] | None = None
    verdict: str = ""
    detail: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; a number that is not finite becomes null."""
        band = None if self.reference is None else [plain(end) for end in self.reference]
        return {
            "name": self.name,
            "value": plain(self.value),
            "low": plain(self.low),
            "high": plain(self.high),
            "n": self.n,
            "unit": self.unit,
            "better": self.better,
            "reference": band,
            "verdict": self.verdict,
            "detail": {name: plain(value) for name, value in self.detail.items()},
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Reading:
        """The inverse of ``to_json``; null becomes NaN."""
        band = tree["reference"]
        numbers = {name: back(tree[name]) for name in ("value", "low", "high")}
        return Reading(
            **{
                **tree,
                **numbers,
                "reference": None if band is None else (back(band[0]), back(band[1])),
                "detail": {name: back(value) for name, value in tree["detail"].items()},
            }
        )


def plain(value: float) -> float | None:
    """A float that JSON can hold; null otherwise."""
    return float(value) if math.isfinite(value) else None


def back(value: float | None) -> float:
    """The inverse of ``plain``."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Outputs:
    """What one model says of one data set.

    Attributes:
        loss: [n] per unit, in the task's unit. units: [n].
        labels: [n] int64; None for a task without labels (as the three below).
        correct: [n] bool. probabilities: [n, C] float64.
        margin: [n] log p_y - log(1 - p_y), from the logits, so that confidences near 1 stay apart.
    """

    loss: np.ndarray
    units: np.ndarray
    labels: np.ndarray | None = None
    correct: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    margin: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, chosen: np.ndarray) -> Outputs:
        """The examples that a mask [n] chooses."""
        return Outputs(
            *(
                None if part is None else part[chosen]
                for part in (self.loss, self.units, self.labels, self.correct, self.probabilities, self.margin)  # type: ignore[arg-type]
            )
        )

    @property
    def membership(self) -> np.ndarray:
        """[n], larger for examples that look like training data: the margin, or minus the loss per unit."""
        return -self.loss if self.margin is None else self.margin


class Cache:
    """Results by (model, what): holds the models, so that an identity is never reused for another."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Any] = {}
        self._models: dict[int, nn.Module] = {}

    def get(self, model: nn.Module, what: str, compute: Callable[[], Any]) -> Any:
        """What is known of the model under this name, computed on first use."""
        self._models[id(model)] = model
        if (id(model), what) not in self._found:
            self._found[id(model), what] = compute()
        return self._found[id(model), what]


@dataclass(frozen=True)
class Subject:
    """A model that was made to forget, and what it is judged against.

    The models and data must not change while a Subject is in use: what they say is kept.

    Args:
        before: the model before forgetting.
        after: the model that is judged.
        request: what was to be forgotten and kept.
        task: the modality.
        test: examples that no model was trained on; ``request.valid`` where None.
        retrained: models trained from scratch without the forget data, by the same recipe, with other seeds.
        names: names of the classes, for people to read.
        record: what the run cost (``Outcome.record``). retrain_records: the same of the retrained models.
        key: of every draw. draws: bootstrap resamples. batch: examples per forward pass.
    """

    before: nn.Module
    after: nn.Module
    request: Request
    task: Task
    test: Data | None = None
    retrained: tuple[nn.Module, ...] = ()
    names: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None
    retrain_records: tuple[Mapping[str, Any], ...] = ()
    key: Key = Key(0)
    draws: int = 500
    batch: int = 256
    cache: Cache = field(default_factory=Cache, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.request.forget is None:
            raise Refused("an audit needs forget data: the request has none")
        object.__setattr__(self, "retrained", tuple(self.retrained))

    def judging(
        self, after: nn.Module, retrained: tuple[nn.Module, ...] | None = None, record: Mapping[str, Any] | None = None
    ) -> Subject:
        """The same audit of another model, sharing what is known."""
        return replace(self, after=after, record=record, retrained=self.retrained if retrained is None else retrained)

    def held_out(self, number: int) -> Subject:
        """Retrained model `number` judged against the others."""
        others = self.retrained[:number] + self.retrained[number + 1 :]
        record = self.retrain_records[number] if number < len(self.retrain_records) else None
        return self.judging(self.retrained[number], others, record)

    def has(self, name: str) -> bool:
        """Whether there is data called forget, retain, test or test_forgotten."""
        if name in ("test", "test_forgotten"):
            return self._test() is not None and len(self.outputs(name)) > 0
        return getattr(self.request, name) is not None

    def _test(self) -> Data | None:
        return self.request.valid if self.test is None else self.test

    def outputs(self, name: str, model: nn.Module | None = None) -> Outputs:
        """What a model (``after`` by default) says of ``forget``, ``retain``, ``test`` or ``test_forgotten``.

        Where whole classes are forgotten, ``test`` is without them and ``test_forgotten`` is the rest.
        """
        model = self.after if model is None else model
        if name not in ("test", "test_forgotten"):
            return self._run(model, name, self.request.data(name))
        data = self._test()
        if data is None:
            raise Refused("this audit has no test data: give test=, or a request with valid data")
        everything = self._run(model, "test", data)
        chosen = self._forgotten(everything)
        return everything.where(chosen if name == "test_forgotten" else ~chosen)

    def unseen(self, model: nn.Module | None = None) -> Outputs:
        """Test examples to hold beside the forget examples: of the forgotten classes where whole classes go."""
        return self.outputs("test_forgotten" if self.has("test_forgotten") else "test", model)

    def forgotten_classes(self) -> tuple[int, ...]:
        """Classes with forget examples and no retain examples."""
        forget = self.outputs("forget").labels
        if forget is None or self.request.retain is None:
            return ()
        kept = self.outputs("retain").labels
        return tuple(int(label) for label in np.setdiff1d(forget, kept if kept is not None else []))

    def _forgotten(self, outputs: Outputs) -> np.ndarray:
        if outputs.labels is None:
            return np.zeros(len(outputs), dtype=bool)
        return np.isin(outputs.labels, self.forgotten_classes())

    def _run(self, model: nn.Module, name: str, data: Data) -> Outputs:
        return self.cache.get(model, name, lambda: run(model, self.task, data, self.batch, self.key.at("audit", name)))


def run(model: nn.Module, task: Task, data: Data, size: int, key: Key) -> Outputs:
    """One pass over the data in eval mode; modes and the global random state are as before afterwards.

    The modality's randomness depends on the key and the batch only: every model sees the same.
    """
    device, parts = runtime.device_of(model), []
    with torch.no_grad(), eval_mode(model), torch.random.fork_rng():
        torch.manual_seed(key.seed)
        for number, batch in enumerate(data.batches(size)):
            batch = task.prepare(runtime.to_device(batch, device), key.at("prepare", number))
            parts.append(_classified(model, task, batch) if classifies(task) else _measured(model, task, batch))
    columns = [[part[i] for part in parts] for i in range(len(parts[0]))]
    return Outputs(*(np.concatenate(column) for column in columns))


def classifies(task: Task) -> bool:
    """Whether a task has one label per example and logits over classes."""
    return all(hasattr(task, name) for name in ("classes", "labels", "logits"))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _measured(model: nn.Module, task: Task, batch: Batch) -> tuple[np.ndarray, ...]:
    units = task.units(batch).double()
    return _numpy(task.nll(model, batch).double() / units.clamp_min(1e-12)), _numpy(units)


def _classified(model: nn.Module, task: Any, batch: Batch) -> tuple[np.ndarray, ...]:
    logits = task.logits(model, batch).double()
    labels = task.labels(batch)
    if not bool(torch.isfinite(logits).all()):
        raise Refused(
            "a model gives outputs that are not finite: it cannot be audited; was its run stopped by a guard?"
        )
    logs = logits.log_softmax(-1)
    chosen = logs.gather(1, labels[:, None])[:, 0]
    others = logs.scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    columns = (-chosen, task.units(batch).double(), labels, logits.argmax(-1) == labels, logs.exp(), chosen - others)
    return tuple(_numpy(column) for column in columns)
