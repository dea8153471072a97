"""What is audited, and what a measure says of it. Each model is run once per data set, however many measures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Data, Key, Refused, Request, Task, described, lent_stream, only_looked_at
from expunge.data.sources import fingerprint
from expunge.store import Kept, Store
from expunge.weights import hash_tensors, tensors_of

Better = Literal["higher", "lower", "nearer_retrained"]
Model = nn.Module | Kept
"""A model, or the name of one whose outputs are in a store."""

Curve = tuple[tuple[float, ...], ...]
"""(x, y) or (x, y, low, high), each with one number per point."""


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
        curves: lines to draw, by name: a ROC ("roc"), accuracy while relearning ("unlearned", "retrained", "original"),
            a number per layer. Each is (x, y) or (x, y, low, high).
        axes: what x and y are, for people.
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
    curves: Mapping[str, Curve] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")

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
            **({"curves": _lines(self.curves, plain), "axes": list(self.axes)} if self.curves else {}),
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
                "curves": _lines(tree.get("curves", {}), back),
                "axes": tuple(tree.get("axes", ("", ""))),
            }
        )


def _lines(curves: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: tuple(tuple(convert(point) for point in line) for line in curve) for name, curve in curves.items()}


def plain(value: float) -> float | None:
    """A float that JSON can hold; null otherwise."""
    return float(value) if math.isfinite(value) else None


def back(value: float | None) -> float:
    """The inverse of ``plain``."""
    return math.nan if value is None else float(value)


def holdable(value: Any) -> Any:
    """A nest that JSON can hold: numbers that are not finite become null, and what it does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(name): holdable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [holdable(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return plain(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@dataclass(frozen=True)
class Outputs:
    """What one model says of one data set.

    Attributes:
        loss: [n] per unit, in the task's unit. units: [n].
        labels: [n] int64; None for a task without labels (as the four below).
        correct: [n] bool. probabilities: [n, C] float64.
        margin: [n] log p_y - log(1 - p_y), from the logits, so that confidences near 1 stay apart.
        logits: [n, C] float32.
    """

    loss: np.ndarray
    units: np.ndarray
    labels: np.ndarray | None = None
    correct: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    margin: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, chosen: np.ndarray) -> Outputs:
        """The examples that a mask [n] chooses."""
        parts: dict[str, Any] = {name: None if part is None else part[chosen] for name, part in vars(self).items()}
        return Outputs(**parts)

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> Outputs:
        """From what a store keeps: ``logits`` and ``label``, or ``loss`` and ``units``."""
        if "logits" not in arrays:
            return Outputs(arrays["loss"].astype(np.float64), arrays["units"].astype(np.float64))
        kept, labels = arrays["logits"], arrays["label"]
        row = np.arange(len(kept))
        shifted = kept.astype(np.float64) - kept.max(1, keepdims=True)
        powers = np.exp(shifted)
        total = powers.sum(1)
        chosen = shifted[row, labels]
        others = powers.copy()
        others[row, labels] = 0.0
        rest = others.sum(1)
        if not rest.all():  # every other class underflows: their largest logit decides
            masked = np.where(np.arange(kept.shape[1]) == labels[:, None], -np.inf, shifted)
            top = masked.max(1)
            logs = top + np.log(np.exp(masked - top[:, None]).sum(1))
        else:
            logs = np.log(rest)
        loss = np.log(total) - chosen
        return Outputs(
            loss, np.ones(len(kept)), labels, kept.argmax(1) == labels, powers / total[:, None], chosen - logs, kept
        )

    @property
    def membership(self) -> np.ndarray:
        """[n], larger for examples that look like training data: the margin, or minus the loss per unit."""
        return -self.loss if self.margin is None else self.margin


class Cache:
    """Results by (model, what): holds the models, so that an identity is never reused for another."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Any] = {}
        self._models: dict[int, Any] = {}
        self._about: tuple[Any, ...] | None = None

    def belongs(self, about: tuple[Any, ...]) -> bool:
        """Whether this is of the audit with these parts: of the first one that asks."""
        self._about = self._about or about
        pairs = zip(self._about, about, strict=True)
        return all(one is other or (isinstance(one, (int, Key)) and one == other) for one, other in pairs)

    def get(self, model: Any, what: str, compute: Callable[[], Any]) -> Any:
        """What is known of the model under this name, computed on first use."""
        self._models[id(model)] = model
        if (id(model), what) not in self._found:
            self._found[id(model), what] = compute()
        return self._found[id(model), what]


OUT, IN, FORGOTTEN = 0, 1, 2  # never seen; trained on; trained on and then made to forget


@dataclass(frozen=True)
class Shadows:
    """Models of which it is known what they were trained on: from them an attack learns what training leaves.

    Args:
        models: m of them, of the subject's recipe.
        ids: [n] int64, the examples that the states are about.
        states: [m, n] int8, OUT, IN or FORGOTTEN.
        unlearned: whether every model went through the method that is audited (with some other forget set, where it is
            OUT or IN for an example), as U-LiRA wants.
    """

    models: tuple[Model, ...]
    ids: np.ndarray
    states: np.ndarray
    unlearned: bool = False

    def __post_init__(self) -> None:
        if self.states.shape != (len(self.models), len(self.ids)):
            raise Refused(
                f"shadow models need one state per model and example: expected {(len(self.models), len(self.ids))}, found "
                f"{self.states.shape}"
            )

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[m, len(ids)] the states of these examples; examples of which nothing is said were never seen."""
        order = np.argsort(self.ids)
        place = np.clip(np.searchsorted(self.ids[order], ids), 0, len(order) - 1)
        found = order[place]
        return np.where(self.ids[found] == ids, self.states[:, found], OUT)


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
        originals: models trained on everything by the same recipe, with other seeds: each of them forgot nothing.
        unlearned: what the audited method made of models like the originals, each of its own; for measures over models.
        shadows: models trained on known parts of the data, for attacks that learn from them.
        store: where what the models say is kept between audits; None keeps it in memory only.
        names: names of the classes, for people to read.
        record: what the run cost (``Outcome.record``). retrain_records: the same of the retrained models.
        key: of every draw. draws: bootstrap resamples. batch: examples per forward pass.
        family: every retrained model, where some are held out; ``retrained`` by default.
    """

    before: Model
    after: Model
    request: Request
    task: Task
    test: Data | None = None
    retrained: tuple[Model, ...] = ()
    names: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None
    retrain_records: tuple[Mapping[str, Any], ...] = ()
    key: Key = Key(0)
    draws: int = 500
    batch: int = 256
    originals: tuple[Model, ...] = ()
    unlearned: tuple[Model, ...] = ()
    shadows: Shadows | None = None
    store: Store | None = None
    cache: Cache = field(default_factory=Cache, repr=False, compare=False)
    family: tuple[Model, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.request.forget is None:
            raise Refused("an audit needs forget data: the request has none")
        for name in ("retrained", "originals", "unlearned"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not set(map(id, self.retrained)) <= set(map(id, self.family)):
            object.__setattr__(self, "family", self.retrained)
        about = (self.before, self.request, self.task, self.test, self.originals, self.shadows, self.store, self.family)
        if not self.cache.belongs((*about, self.key, self.draws, self.batch)):  # changed by ``dataclasses.replace``
            object.__setattr__(self, "cache", Cache())
        kept = [model for model in self._models() if isinstance(model, Kept)]
        if kept and self.store is None:
            raise Refused(f"model {kept[0].name} is given by its name in a store: give the audit that store")

    def _models(self) -> tuple[Model, ...]:
        shadows = () if self.shadows is None else self.shadows.models
        return (self.before, self.after, *self.retrained, *self.originals, *self.unlearned, *shadows)

    def opened(self, model: Model) -> nn.Module:
        """The module itself; weights that are kept in a store are read, and not held on to."""
        return model.load() if isinstance(model, Kept) else model

    def judging(
        self, after: Model, retrained: tuple[Model, ...] | None = None, record: Mapping[str, Any] | None = None
    ) -> Subject:
        """The same audit of another model, sharing what is known."""
        retrained = self.retrained if retrained is None else retrained
        return replace(self, after=after, record=record, retrained=retrained, unlearned=())

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

    def outputs(self, name: str, model: Model | None = None) -> Outputs:
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
        if name == "test" and not chosen.any():
            return everything
        wanted = chosen if name == "test_forgotten" else ~chosen
        return self.cache.get(model, f"{name} apart", lambda: everything.where(wanted))

    def unseen(self, model: Model | None = None) -> Outputs:
        """Test examples to hold beside the forget examples: of the forgotten classes where whole classes go."""
        return self.outputs("test_forgotten" if self.has("test_forgotten") else "test", model)

    def margins(self, name: str, models: Sequence[Model] | None = None) -> np.ndarray:
        """[models, examples] float64: the margin of each of the models (default: the retrained) on data as ``outputs``.

        Minus the loss per unit, for a task without classes.
        """
        return np.stack(
            [self.outputs(name, model).membership for model in (self.retrained if models is None else models)]
        )

    def ids(self, name: str) -> np.ndarray:
        """[n] int64, the ids of the examples of data as ``outputs``, in the same order."""
        if name not in ("test", "test_forgotten"):
            return self.request.data(name).ids.numpy()
        data = self._test()
        if data is None:
            raise Refused("this audit has no test data: give test=, or a request with valid data")
        chosen = self._forgotten(self._run(self.after, "test", data))
        return data.ids.numpy()[chosen if name == "test_forgotten" else ~chosen]

    def data(self, name: str) -> Data:
        """The examples themselves, as ``outputs`` has them; for measures that run or train a model."""
        if name not in ("test", "test_forgotten"):
            return self.request.data(name)
        data = self._test()
        if data is None:
            raise Refused("this audit has no test data: give test=, or a request with valid data")
        chosen = self._forgotten(self._run(self.after, "test", data))
        return data.select(np.flatnonzero(chosen if name == "test_forgotten" else ~chosen))

    def answers(self, model: Model) -> bytes:
        """A digest of what a model says of all examples: equal for the same model, however it is given."""
        names = [name for name in ("forget", "retain") if self.has(name)] + ["test"] * (self._test() is not None)

        def compute() -> bytes:
            said = hashlib.blake2b(digest_size=16)
            for name in names:
                found = self._run(model, name, self._whole(name))
                said.update(np.ascontiguousarray(found.loss if found.logits is None else found.logits).tobytes())
            return said.digest()

        return self.cache.get(model, "answers", compute)

    def forgotten_classes(self) -> tuple[int, ...]:
        """Classes with forget examples and no retain examples."""
        return self.cache.get(self.request, "forgotten classes", self._forgotten_classes)

    def _forgotten_classes(self) -> tuple[int, ...]:
        forget = self.outputs("forget").labels
        if forget is None or self.request.retain is None:
            return ()
        kept = self.outputs("retain").labels
        return tuple(int(label) for label in np.setdiff1d(forget, kept if kept is not None else []))

    def _forgotten(self, outputs: Outputs) -> np.ndarray:
        if outputs.labels is None:
            return np.zeros(len(outputs), dtype=bool)
        return np.isin(outputs.labels, self.forgotten_classes())

    def _run(self, model: Model, name: str, data: Data) -> Outputs:
        return self.cache.get(model, name, lambda: Outputs.of(self._arrays(model, name, data)))

    def _arrays(self, model: Model, name: str, data: Data) -> dict[str, np.ndarray]:
        """What the model says, from the store where there is one."""

        def compute() -> dict[str, np.ndarray]:
            return run(self.opened(model), self.task, data, self.batch, self.key.at("audit", name))

        if self.store is None:
            return compute()
        return self.store.fill(self.address(model), self._data_address(name, data), compute)

    def said(self, model: nn.Module, name: str) -> dict[str, np.ndarray]:
        """What a model says of ``forget``, ``retain``, the whole ``test`` or extra data, as a store keeps it."""
        return run(model.eval(), self.task, self._whole(name), self.batch, self.key.at("audit", name))

    def data_address(self, name: str) -> str:
        """Where a store keeps what models say of data called as in ``said``."""
        return self._data_address(name, self._whole(name))

    def _whole(self, name: str) -> Data:
        data = self._test() if name == "test" else self.request.data(name)
        if data is None:
            raise Refused("this audit has no test data: give test=, or a request with valid data")
        return data

    def address(self, model: Model) -> str:
        """The content address of a model: of its weights and its structure."""
        if isinstance(model, Kept):
            return model.name
        return self.cache.get(model, "address", lambda: address_of(model))

    def _data_address(self, name: str, data: Data) -> str:
        """The content address of data under this task; of the audit's draws too, where the task draws."""
        found = self.cache.get(data, "fingerprint", lambda: fingerprint(data))
        drawn = f"{self.key.seed} {self.batch} {name}" if self.task.stochastic else ""
        return Key(0).at(found, described(self.task), drawn).seed.__format__("016x")


def address_of(model: nn.Module) -> str:
    """The content address of a module: blake2b of its weights and buffers, under its structure.

    The structure is what it prints, the classes, and plain numbers and names among the attributes of its parts. What else
    a forward pass reads (its source, a global) is not seen.
    """
    parts = [
        (name, type(part).__module__, type(part).__qualname__, _plain_of(part)) for name, part in model.named_modules()
    ]
    tensors = {**dict(model.named_buffers()), **tensors_of(model)}
    return hashlib.blake2b(f"{model}{parts}{hash_tensors(tensors)}".encode(), digest_size=16).hexdigest()


def _plain_of(part: nn.Module) -> list[tuple[str, Any]]:
    """Settings that a part keeps as attributes: a temperature, a number of heads."""
    known = (bool, int, float, str, type(None))
    kept = [(name, value) for name, value in vars(part).items() if not name.startswith("_") and name != "training"]
    return sorted(pair for pair in kept if isinstance(pair[1], known))


def run(model: nn.Module, task: Task, data: Data, size: int, key: Key) -> dict[str, np.ndarray]:
    """One pass over the data in eval mode; modes and the global random state are as before afterwards.

    The modality's randomness depends on the key and the batch only: every model sees the same.

    Returns:
        ``id`` [n] with ``logits`` [n, C] float32 and ``label`` [n] int64, or with ``loss`` per unit and ``units``.
    """
    device, parts = runtime.device_of(model), []
    names = ("logits", "label") if classifies(task) else ("loss", "units")
    with torch.no_grad(), only_looked_at(model), lent_stream(key):
        for number, batch in enumerate(data.batches(size)):
            batch = task.prepare(runtime.to_device(batch, device), key.at("prepare", number))
            parts.append(_classified(model, task, batch) if classifies(task) else _measured(model, task, batch))
    columns = {name: np.concatenate([part[place] for part in parts]) for place, name in enumerate(names)}
    return {"id": data.ids.numpy(), **columns}


def classifies(task: Task) -> bool:
    """Whether a task has one label per example and logits over classes."""
    return all(hasattr(task, name) for name in ("classes", "labels", "logits"))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _measured(model: nn.Module, task: Task, batch: Batch) -> tuple[np.ndarray, ...]:
    units = task.units(batch).double()
    return _finite(task.nll(model, batch).double() / units.clamp_min(1e-12)), _numpy(units)


def _finite(said: Tensor) -> np.ndarray:
    if not bool(torch.isfinite(said).all()):
        raise Refused(
            "a model gives outputs that are not finite: it cannot be audited; was its run stopped by a guard?"
        )
    return _numpy(said)


def _classified(model: nn.Module, task: Any, batch: Batch) -> tuple[np.ndarray, ...]:
    logits, labels = task.logits(model, batch).float(), task.labels(batch)
    if logits.shape != (len(labels), task.classes):
        raise Refused(
            f"a model gives outputs of shape {tuple(logits.shape)} for {len(labels)} examples of {task.classes} classes: "
            f"expected {(len(labels), task.classes)}; is it of another task?"
        )
    return _finite(logits), _numpy(labels)
