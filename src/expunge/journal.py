"""Checkpoint and resume: whole files or none, no pickle.

``chain`` writes the Case at each stage's entry and ``Descend`` writes its own state inside a stage. Resuming loads the
last entry and runs that stage again; a Descend in it continues at its step. Since every draw is a function of (seed,
what, step), a plain function needs no code for this: a run killed anywhere ends in the same bits.

One file holds one state: tensors as safetensors, the rest as JSON in its header, written beside and renamed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from expunge.core import Case, Chain, Data, Key, Refused, Request, Stage, described, lent_stream
from expunge.scope import Scope
from expunge.stream import chunks


class CannotWrite(OSError):
    """A file of the run could not be written; not to be taken for a failure to read the user's data."""


def write_bytes(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, given whole or in pieces, whole or not at all: beside it, flushed to disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writes that were killed half-way left behind; such files are never read."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nest of dicts, lists, numbers, strings and tensors -> a JSON-able nest and the tensors (not copied) by number."""
    tensors: dict[str, Tensor] = {}

    def go(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach()
            return {"~tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"~dict": [[_plain(k), go(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"~tuple": [go(v) for v in value]}
        if isinstance(value, list):
            return [go(v) for v in value]
        return _plain(value)

    return go(tree), tensors


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers, strings, lists and dicts, found {type(value).__name__}")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if "~tensor" in tree:
            return tensors[tree["~tensor"]]
        if "~tuple" in tree:
            return tuple(unpack(value, tensors) for value in tree["~tuple"])
        return {key: unpack(value, tensors) for key, value in tree["~dict"]}
    return tree


def save_tree(path: Path, tree: Any) -> None:
    """Write a nest as one safetensors file, whole or not at all; no copy of its tensors is made."""
    plain, tensors = pack(tree)
    write_bytes(path, chunks(tensors or {"empty": torch.zeros(1)}, {"tree": json.dumps(plain)}))


def load_tree(path: Path) -> Any:
    """Read what ``save_tree`` wrote. No code of the file is run.

    Raises:
        Refused: when the file is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            return unpack(tree, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Refused(
            f"{path} is not a whole checkpoint of expunge ({error}); delete it, or give another out folder"
        ) from error


class Checkpoint:
    """The file of one Descend inside one stage."""

    def __init__(self, path: Path, plan: str, every: float):
        self.path, self.plan, self.every = path, plan, every
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that this very Descend wrote, or None."""
        if not self.path.exists():
            return None
        saved = load_tree(self.path)
        return saved["state"] if saved["plan"] == self.plan else None

    def tick(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state if it is time to."""
        now = time.monotonic()
        if now - self._last >= self.every:
            save_tree(self.path, {"plan": self.plan, "state": state()})
            self._last = time.monotonic()


class Journal:
    """Where a run writes its checkpoints.

    Args:
        folder: the run's own folder.
        every: seconds between two checkpoints inside a Descend; 0 writes at every step.

    A boundary can be written when the model has the structure of the caller's, the task is the caller's and all data
    derive from the caller's; otherwise (an adapter attached by hand between stages) the previous boundary stays, and
    resuming starts there.
    """

    def __init__(self, folder: Path, every: float = 20.0):
        self.folder, self.every = Path(folder), every
        self._stage = -1
        self._inside = 0
        self._roots: dict[str, Data] = {}

    def run(self, stages: Sequence[Stage], case: Case) -> Case:
        """Run stages, writing the Case at each one's entry; continue where an earlier run of the same was killed."""
        if self._stage >= 0:  # a chain inside a stage: its stages are re-run from the outer stage's entry
            for stage in stages:
                with lent_stream(case.rng):
                    case = stage(case)
            return case
        stages = _flat(stages)
        self._roots = _named(case.request)
        structure = {name: t.detach().to("meta") for name, t in _weights(case.model).items()}
        task = case.task
        path = self.folder / "boundary.safetensors"
        sweep(self.folder)
        start = 0
        if path.exists():
            saved = load_tree(path)
            start, case = saved["stage"], _load_case(saved["case"], case, self._roots)
        try:
            for number in range(start, len(stages)):
                self._stage, self._inside = number, 0
                if number > start:
                    tree = _save_case(case, self._roots, structure) if case.task is task else None
                    if tree is not None:
                        save_tree(path, {"stage": number, "case": tree})
                with lent_stream(case.rng):
                    case = stages[number](case)
            return case
        finally:
            self._stage = -1

    def enter(self, plan: Any) -> Checkpoint:
        """The checkpoint of the next Descend in this stage."""
        self._inside += 1
        name = f"inside-{self._stage}-{self._inside}.safetensors"
        return Checkpoint(self.folder / name, described(plan), self.every)

    def clear(self) -> None:
        """Remove the checkpoints of a finished run."""
        for name in ("inside", "kept", "boundary"):
            for path in self.folder.glob(f"{name}*.safetensors"):
                path.unlink()


def _flat(stages: Sequence[Stage]) -> list[Stage]:
    """Registered methods and chains opened up, so that each inner stage has its own boundary."""
    flat: list[Stage] = []
    for stage in stages:
        inner = getattr(stage, "stage", stage)
        flat.extend(_flat(inner.stages) if isinstance(inner, Chain) else (inner,))
    return flat


def _named(request: Request) -> dict[str, Data]:
    parts = {"forget": request.forget, "retain": request.retain, "valid": request.valid}
    return {
        **{name: data for name, data in parts.items() if data is not None},
        **{f"extra/{name}": data for name, data in request.extra.items()},
    }


def _save_data(data: Data, roots: Mapping[str, Data]) -> Any:
    for name, root in roots.items():
        if root.source is data.source:
            return {"root": name, "rows": data.rows, "ids": data.ids, "columns": data.columns}
    return None


def _load_data(tree: Any, roots: Mapping[str, Data]) -> Data:
    return Data(roots[tree["root"]].source, tree["rows"], tree["ids"], tree["columns"])


def _same_structure(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers (those outside the state dict too) by canonical name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in _weights(model).items():
            target.copy_(weights[name])


def _save_case(case: Case, roots: Mapping[str, Data], structure: Mapping[str, Tensor]) -> Any:
    """The Case as a nest, with the caller's own objects by name; None where something in it has no such form."""
    parts = {name: _save_data(data, roots) for name, data in _named(case.request).items()}
    if any(tree is None for tree in parts.values()):
        return None
    weights = _weights(case.model)
    if not _same_structure(weights, structure):
        return None
    teachers = {}
    for name, teacher in case.teachers.items():
        if name == "original":
            continue
        if not isinstance(teacher, nn.Module) or not _same_structure(weights, _weights(teacher)):
            return None
        teachers[name] = _weights(teacher)
    trainable = [name for name, p in case.model.named_parameters() if p.requires_grad]
    return {
        "weights": weights,
        "trainable": trainable,
        "data": parts,
        "concepts": case.request.concepts,
        "scope": dict(case.scope.masks),
        "rng": case.rng.seed,
        "meter": case.meter.state(),
        "teachers": teachers,
    }


def _load_case(tree: Any, case: Case, roots: Mapping[str, Data]) -> Case:
    teachers = {name: t for name, t in case.teachers.items() if name == "original"}
    for name, weights in tree["teachers"].items():
        teachers[name] = copy.deepcopy(case.model)
        _put(teachers[name], weights)
    _put(case.model, tree["weights"])
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name in tree["trainable"])
    parts = {name: _load_data(data, roots) for name, data in tree["data"].items()}
    named = {name: parts.pop(name, None) for name in ("forget", "retain", "valid")}
    request = Request(
        **named,
        concepts=tuple(tree["concepts"]),
        extra={name.removeprefix("extra/"): data for name, data in parts.items()},
    )
    case.meter.load(tree["meter"])
    scope = Scope(tree["scope"], case.scope.universe)
    return replace(case, request=request, scope=scope, teachers=teachers, rng=Key(tree["rng"]))
