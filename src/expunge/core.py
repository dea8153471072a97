"""The nouns of expunge: Data, Request, Case, Stage, and the protocols that a Task, an Objective and a Combiner meet.

A method is a ``Stage``: a function from a ``Case`` to a ``Case``. Stages chain. Nothing here differentiates or loops:
``oracle`` is the only module that differentiates and ``descend`` the only gradient loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from expunge.meter import Meter

if TYPE_CHECKING:
    from expunge.journal import Journal
    from expunge.oracle import Oracle
    from expunge.scope import Scope
    from expunge.watch import Probes

Batch = dict[str, Any]
"""Name -> Tensor [b, ...] or a nested Batch. ``"id"`` (int64 [b]) is always there; ``"weight"`` ([b]) optionally."""

Grads = dict[str, Tensor]
"""Canonical parameter name -> gradient. An absent name is not stepped at all: no decay, no moments."""


class Refused(ValueError):
    """Bad input or an unmet need, refused before any work. Exit status 2 on the command line."""


def require(good: bool, owner: object, setting: str, wanted: str) -> None:
    """Refuse a setting of a part (an objective, a combiner) that is out of range, naming part, setting and value."""
    if not good:
        raise Refused(f"{type(owner).__name__}: {setting} must be {wanted}, found {getattr(owner, setting)!r}")


class RunFailed(RuntimeError):
    """A run that started and could not finish. Exit status 1 on the command line."""


class MissingExtra(ImportError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


@dataclass(frozen=True)
class Key:
    """A random stream that is a value: every draw is a function of (seed, what, step), so nothing has to be rewound.

    ``key.at("forget", 7).generator()`` gives the same numbers whoever asks, whenever, on whichever process.
    """

    seed: int

    def at(self, *what: str | int) -> Key:
        """The stream named by `what` below this one."""
        digest = hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=8).digest()
        return Key(int.from_bytes(digest, "little") >> 1)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator at the start of this stream."""
        return torch.Generator(device=device).manual_seed(self.seed)

    def take(self) -> tuple[Key, Key]:
        """One key for a stage to use, and the key that it leaves behind in the Case."""
        return self.at("use"), self.at("next")


@contextlib.contextmanager
def own_streams(seed: int, devices: Sequence[int] = ()) -> Iterator[None]:
    """The global random streams of torch, numpy and Python at a start given by `seed`, and put back afterwards.

    For code of the user's that may draw from them: a constructor, a data set that augments. `devices` are CUDA's.
    """
    numbers, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(python)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `function` to every tensor of a nest of mappings, lists and tuples."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {name: map_tensors(function, value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def described(part: Any) -> str:
    """What a part says of itself, without the addresses of functions, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))


def printed(value: Any) -> Any:
    """A setting's value for JSON: a number, a string, a flag or None as it is, a part by what it says of itself."""
    return value if value is None or isinstance(value, bool | int | float | str) else described(value)


def rows_of(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(batch["id"])


class Source(Protocol):
    """Where examples come from: row numbers in, a Batch (without ids) out."""

    def __len__(self) -> int: ...

    def fetch(self, rows: Tensor) -> Batch: ...


class Data:
    """Examples with stable ids, and columns of what is known about each one.

    What is known per example (a cached reference loss, a target, a weight) is a column: it travels with the example
    through selections, shuffles and shards, so nothing ever needs joining. Immutable: every change returns a new Data
    over the same source.

    Args:
        source: where rows are fetched from.
        rows: int64 [n], the rows of the source that these examples are.
        ids: int64 [n], unique.
        columns: name -> Tensor [n, ...], added to every batch under that name.
    """

    def __init__(self, source: Source, rows: Tensor, ids: Tensor, columns: Mapping[str, Tensor] | None = None):
        self.source, self.rows, self.ids, self.columns = source, rows, ids, dict(columns or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        columns = f", columns={sorted(self.columns)}" if self.columns else ""
        return f"Data({len(self)} examples{columns})"

    def batch(self, positions: Tensor) -> Batch:
        """The examples at `positions` (int64 [b], each in 0 .. len-1), with their ids and columns."""
        batch = dict(self.source.fetch(self.rows[positions]))
        batch["id"] = self.ids[positions]
        batch.update({name: values[positions] for name, values in self.columns.items()})
        return batch

    def batches(self, size: int) -> Iterator[Batch]:
        """Every example once, in order, `size` at a time (the last batch may be shorter)."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))))

    def select(self, positions: Tensor | Sequence[int] | np.ndarray) -> Data:
        """The examples at these positions, in this order, columns included."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        columns = {name: values[index] for name, values in self.columns.items()}
        return Data(self.source, self.rows[index], self.ids[index], columns)

    def without(self, ids: Tensor | Sequence[int]) -> Data:
        """These examples less those with the given ids."""
        return self.select(torch.nonzero(~torch.isin(self.ids, torch.as_tensor(ids))).flatten())

    def annotate(self, column: str, values: Tensor) -> Data:
        """The same examples with one more column, `values` [n, ...] in the order of ``ids``."""
        if len(values) != len(self):
            raise Refused(f"column {column!r} has {len(values)} values for {len(self)} examples; give one per example")
        return Data(self.source, self.rows, self.ids, {**self.columns, column: values})


@dataclass(frozen=True)
class Request:
    """What to forget and what to keep.

    Attributes:
        forget: the examples to forget.
        retain: the examples to keep; disjoint from `forget`. None where the user no longer has them.
        valid: examples that were in neither, to watch utility on.
        concepts: names of concepts to forget, where the task has them.
        extra: further named data (a surrogate retain set, an alignment set).
    """

    forget: Data | None = None
    retain: Data | None = None
    valid: Data | None = None
    concepts: tuple[str, ...] = ()
    extra: Mapping[str, Data] = field(default_factory=dict)

    def data(self, name: str) -> Data:
        """The data called `name`: ``forget``, ``retain``, ``valid`` or one of ``extra``."""
        found = self.extra.get(name) if name in self.extra else getattr(self, name, None)
        if not isinstance(found, Data):
            have = [n for n in ("forget", "retain", "valid") if getattr(self, n) is not None] + list(self.extra)
            raise Refused(f"the request has no data called {name!r}; it has {', '.join(have) or 'none'}")
        return found


@runtime_checkable
class Task(Protocol):
    """The only object that knows the modality. A per-example loss has shape [b] and is never reduced here.

    Capabilities beyond these are asked for by name and found with ``hasattr``: ``logits(model, batch)``,
    ``features(model, batch, layer)``, ``linear_maps(model)``, ``embed``, ``modules(pipeline)``.

    Attributes:
        name: registry name.
        unit: what a loss is measured in per unit, for people to read ("nats per label").
        stochastic: whether ``prepare`` draws anything that reaches the model (then nothing per example can be cached).
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def stochastic(self) -> bool: ...

    def check(self, data: Data, name: str) -> None:
        """Refuse data that this task cannot use (labels outside the classes, NaN), with one clear sentence."""

    def prepare(self, batch: Batch, rng: Key) -> Batch:
        """The modality's own randomness (timestep, noise, crop), once per step on the whole batch."""

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b], summed over the units of each example."""

    def units(self, batch: Batch) -> Tensor:
        """[b], units per example: 1 label, tokens answered, pixels."""

    def chance(self, batch: Batch) -> float:
        """Loss per unit of a predictor that knows nothing: the scale on which a rise of the loss is judged."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, ...], what the model says of each example: logits, predictions, predicted noise."""

    def divergence(self, model: nn.Module, batch: Batch, target: Tensor, temperature: float = 1.0) -> Tensor:
        """[b], from a teacher's ``outputs`` `target` to the model: KL in nats, or squared error; summed over units."""

    def relabel(self, batch: Batch, rng: Key) -> Batch:
        """The same inputs with a wrong answer, never the true one."""


class Objective(Protocol):
    """A per-example loss, minimised. Deterministic on any slice of a drawn batch; all randomness is in ``draw``.

    Optional members: ``draw(case, batch, rng) -> Batch``, once per step on the whole batch (relabelling, pairing,
    references, teacher targets); ``weigh(case, batch) -> Tensor [b]``, the weight of each example in the batch mean
    (units give a token mean); ``parameters_only = True`` for a penalty that reads no data and returns shape [1];
    ``one_pass`` and ``of(case, batch, one_pass(case, batch)) -> Tensor [b]``: roles that read one batch and whose `one_pass`
    are equal share it (``Oracle.grad``).
    """

    def __call__(self, case: Case, batch: Batch) -> Tensor: ...


class Combiner(Protocol):
    """Losses and gradients of several roles -> one update. Pure, with explicit state.

    Optional members: ``settle(after, state) -> state``, where `after` sees the same drawn batches at the new weights;
    ``clock(role, step) -> int``, which batch of its source a role reads at this step (default: the step).
    """

    def init(self) -> dict[str, Any]: ...

    def combine(self, oracle: Oracle, state: dict[str, Any]) -> tuple[Grads, dict[str, Any]]: ...


@dataclass(frozen=True)
class Case:
    """Everything a stage may read or replace. Frozen: a stage returns ``replace(case, ...)``.

    Attributes:
        model: one Module (a ModuleDict for several networks). The one thing that is changed in place.
        request: what to forget and keep.
        task: the modality.
        scope: which coordinates may change.
        teachers: name -> frozen reference model; ``"original"`` is the caller's own untouched model.
        rng: the random stream that the next stage takes its seed from.
        meter: what the run has cost and recorded.
        journal: where checkpoints go; None keeps none.
        watch: what to measure along the run; None measures nothing.
        pieces: that every batch of a gradient loop is cut into, at least; the update is the same to rounding.
    """

    model: nn.Module
    request: Request
    task: Task
    scope: Scope
    teachers: Mapping[str, Any] = field(default_factory=dict)
    rng: Key = Key(0)
    meter: Meter = field(default_factory=Meter)
    journal: Journal | None = None
    watch: Probes | None = None
    pieces: int = 1

    @contextlib.contextmanager
    def teacher(self, name: str, *, differentiable: bool = False) -> Iterator[nn.Module]:
        """A frozen reference model in eval mode, its flags restored afterwards.

        Without gradient, unless `differentiable`: then gradients flow through it to its input, never to its weights.
        """
        if name not in self.teachers:
            have = ", ".join(sorted(self.teachers)) or "none"
            raise Refused(
                f"this run has no teacher {name!r} (it has {have}): run with copy=True, in an adapter, or "
                f"with a cached reference column"
            )
        teacher = self.teachers[name]
        opened = teacher.opened(self) if hasattr(teacher, "opened") else contextlib.nullcontext(teacher)
        with opened as model, eval_mode(model), torch.set_grad_enabled(differentiable):
            flags = [(p, p.requires_grad) for p in model.parameters()] if differentiable else []
            try:
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
                yield model
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)


Stage = Callable[[Case], Case]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, every module's own training flag restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def only_looked_at(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode, and buffers that a forward pass changes (a counter of calls) put back: a look leaves no trace."""
    kept = [
        (m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    try:
        with eval_mode(model):
            yield model
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                buffer.copy_(value)


@contextlib.contextmanager
def lent_stream(key: Key) -> Iterator[None]:
    """Lend torch's global random stream a seed of our own, then give it back as it was; cheap enough for every step.

    For models that draw by themselves (dropout, a sampling layer): nothing of expunge draws from it.
    """
    seed, state = key.at("model").seed, torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would format a stack trace for a GPU it has not
    if cuda is not None:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


@dataclass(frozen=True)
class Chain:
    """Stages one after the other. Nested chains are flattened: chain(a, chain(b, c)) is chain(a, b, c) to the bit."""

    stages: tuple[Stage, ...]

    def __call__(self, case: Case) -> Case:
        if case.journal is not None:
            return case.journal.run(self.stages, case)
        for stage in self.stages:
            with lent_stream(case.rng):
                case = stage(case)
        return case


def chain(*stages: Stage) -> Chain:
    """Compose stages, left to right. With a journal, the Case is written at each stage's entry."""
    flat: list[Stage] = []
    for stage in stages:
        flat.extend(stage.stages if isinstance(stage, Chain) else (stage,))
    return Chain(tuple(flat))


def fork(case: Case, **changes: Any) -> Case:
    """A Case for work on the side (an inner attack, a lower level): its own random stream, no journal, not watched."""
    key, _ = case.rng.take()
    return replace(case, rng=key.at("fork"), journal=None, watch=None, **changes)
