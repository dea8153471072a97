"""``unlearn``: check, copy, seed, run, record. One call from a trained model to one that forgot."""

from __future__ import annotations

import copy as copying
import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import (
    Case,
    Chain,
    Key,
    Refused,
    Request,
    RunFailed,
    Stage,
    Task,
    chain,
    described,
    lent_stream,
    only_looked_at,
)
from expunge.data.sources import fingerprint
from expunge.data.split import disjoint
from expunge.journal import CannotWrite, Journal, sweep, write_bytes
from expunge.meter import Meter, peak_bytes
from expunge.registry import Bound, check_needs, find, methods
from expunge.scope import Scope
from expunge.version import __version__, revision
from expunge.watch import Probes, Watch
from expunge.weights import hash_tensors, load_weights, read_tensors, save_weights, tensors_of

RECORD, WEIGHTS = "record.json", "weights.safetensors"
REFERENCES = "references"  # folder of a run, which may be there before the run is
ALTERNATES = "alternates.jsonl"  # answers that a model wrote to replace those it is to forget: before the run, too


@dataclass(frozen=True)
class Outcome:
    """What ``unlearn`` gives back.

    Attributes:
        model: the model that forgot, in the mode (train or eval) of the caller's.
        record: what was done, to what, at what price: JSON-able, as written to ``record.json``.
        case: the last Case, for stages that choose examples or leave teachers; None for a finished run read back.
    """

    model: nn.Module
    record: dict[str, Any]
    case: Case | None = field(default=None, repr=False)

    @property
    def notes(self) -> list[str]:
        """Sentences that a person should read: a guard that stopped the run, a method that changed nothing."""
        return self.record["notes"]


def unlearn(
    model: nn.Module,
    request: Request,
    *,
    task: Task,
    method: str | Stage,
    seed: int = 0,
    out: str | Path | None = None,
    copy: bool = True,
    scope: Scope | Sequence[str] | None = None,
    every: float = 20.0,
    shard: Callable[[nn.Module], nn.Module] | None = None,
    watch: Watch | None = None,
    predict: bool = False,
    pieces: int = 1,
) -> Outcome:
    """Make a trained model forget.

    The caller's model, data, flags and global random state are not touched (with ``copy=True``). The same call with
    the same seed gives the same bits. It does not promise that the model forgot: ``audit`` measures that.

    Args:
        model: any ``nn.Module`` that the task can call.
        request: what to forget and keep, from ``split``.
        task: the modality.
        method: a registered name (with its defaults) or a Stage.
        seed: of every random draw.
        out: folder for checkpoints, ``weights.safetensors`` and ``record.json``. The same call again resumes a killed
            run to the same bits, or returns the finished one.
        copy: work on a copy. False changes `model` itself, for one that fills the machine; then there is no teacher
            "original", and methods that need one are refused.
        scope: what may change: a Scope, or name patterns; everything trainable by default.
        every: seconds between checkpoints inside a stage.
        shard: applied to the copy before work starts, for models spread over processes (FSDP2's ``fully_shard`` and the
            like): a sharded model cannot be copied, so the copy comes first. Every process makes the same call; the first
            one writes, and no checkpoint is kept inside the run.
        watch: measure the model along the run, for the record; the result does not change by a bit.
        pieces: cut every batch into so many, to save memory: the update is the same to rounding. Not with live
            normalisation.
        predict: say before each loop of steps what peak memory and time it will take, on a terminal and in the record
            (``cost.predicted``, beside what was measured). It costs two gradients of the first step, counted as checks;
            the result does not change by a bit.

    Raises:
        Refused: for bad input or unmet needs, before any work.
        RunFailed: for a run that could not finish.
    """
    _check_kinds(model, request, task)
    if not isinstance(pieces, int) or isinstance(pieces, bool) or pieces < 1:
        raise Refused(f"pieces must be a whole number of at least 1, found {pieces!r}")
    name, stage = resolve(method)
    runtime.reshard(model)
    if copy and any(runtime.sharded(p) for p in model.parameters()):
        raise Refused(
            "a sharded model cannot be copied: give the whole model and shard=a function that shards it, or copy=False"
        )
    check_request(request, task)
    check_model(model, request, task)
    teachers = {"original": model} if copy else {}
    check_stage(stage, request, teachers)
    chosen = _scope(model, scope)
    probes = None if watch is None else _probes(watch, request, task, seed)
    identity = {**_identity(name, stage, seed, model, request, task, chosen, probes), "pieces": pieces}
    if not runtime.same(identity):
        raise Refused("the processes of this run hold different models, data or settings: give each of them the same")
    folder = None if out is None else runtime.on_first(lambda: _open(Path(out), identity, model))
    if folder is not None and (folder / RECORD).exists():
        return _finished(folder, copying.deepcopy(model) if copy else model, shard, stage)
    work = copying.deepcopy(model) if copy else model
    work = work if shard is None else runtime.reshard(shard(work))
    meter = Meter()
    meter.predicted = [] if predict else None
    case = Case(
        work,
        request,
        task,
        chosen,
        teachers,
        Key(seed),
        meter,
        Journal(folder / "checkpoint", every) if folder is not None and runtime.world() == 1 else None,
        probes,
        pieces,
    )
    start = _looked(case, probes)
    case = _run(stage, case)
    if not isinstance(case, Case):
        raise RunFailed(f"the stage returned a {type(case).__name__}: expected a Case, its own or replace(case, ...)")
    _say_if_unchanged(case, model if copy else None)
    end = _looked(case, probes)
    record = _record(name, stage, seed, task, request, identity, case)
    if probes is not None:
        record["watched"] = {"start": start, "end": end}
    if folder is not None:
        with writing(folder):
            save_weights(case.model, folder / WEIGHTS)
            runtime.on_first(lambda: write_bytes(folder / RECORD, json.dumps(record, indent=1).encode()))
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return Outcome(case.model, record, case)


def _check_kinds(model: Any, request: Any, task: Any) -> None:
    """Refuse arguments that are something else than they should be."""
    if not isinstance(model, nn.Module):
        raise Refused(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if not isinstance(request, Request):
        raise Refused(f"request is a {type(request).__name__}: expected what expunge.split(train, forget=...) returns")
    if isinstance(task, type) or not hasattr(task, "nll"):
        found = f"the class {task.__name__}" if isinstance(task, type) else f"a {type(task).__name__}"
        raise Refused(f"task is {found}: expected a task such as expunge.Classification(classes=10)")


def resolve(method: str | Stage) -> tuple[str, Stage]:
    """A registered name or a Stage -> (name, Stage)."""
    if isinstance(method, str):
        return method, find("method", method, methods()).build()
    if not callable(method):
        raise Refused(
            f"method is a {type(method).__name__}: expected a registered name or a stage (a function of a Case)"
        )
    builders: dict[str, Any] = {name: spec.build for name, spec in methods().items()}
    for name, build in builders.items():
        if method is build:
            raise Refused(f"method is the function {name} itself: call it, methods.{name}(), to make a stage")
    return getattr(method, "name", type(method).__name__), method


def parts(stage: Stage) -> Iterator[Stage]:
    """The stages that a stage is made of, in order: chains opened, a bracket before what it brackets.

    A stage or bracket may have ``provides``, names of needs (``column:reference``, ``teacher:original``) that it meets
    for those after or inside it.
    """
    if isinstance(stage, Chain):
        for part in stage.stages:
            yield from parts(part)
        return
    yield stage
    inner = getattr(stage, "inner", None)
    if callable(inner):
        yield from parts(inner)


def bounds(stage: Stage) -> Iterator[Bound]:
    """The registered methods inside a stage, brackets included."""
    return (part for part in parts(stage) if isinstance(part, Bound))


def check_stage(stage: Stage, request: Request, teachers: Mapping[str, Any]) -> None:
    """Refuse a stage of which some registered method needs what neither the request nor an earlier part has."""
    _check_stage(stage, request, teachers, set())


def _check_stage(stage: Stage, request: Request, teachers: Mapping[str, Any], provided: set[str]) -> None:
    for part in parts(stage):
        if isinstance(part, Bound):
            check_needs(part, request, teachers, provided)
            _check_stage(part.stage, request, teachers, set(provided))  # a method that was given another to run
        provided.update(getattr(part, "provides", ()))


def check_request(request: Request, task: Task) -> None:
    """Refuse an empty or overlapping request, and data that the task cannot use."""
    if request.forget is None and not request.concepts and not request.extra:  # safe_grad has only data to learn
        raise Refused("the request names nothing to forget: give forget data (expunge.split) or concepts")
    disjoint(request)
    for name in ("forget", "retain", "valid", *request.extra):
        data = request.extra.get(name) or getattr(request, name, None)
        if data is not None:
            task.check(data, name)


def check_model(model: nn.Module, request: Request, task: Task) -> None:
    """Refuse weights that are not finite, and a model that cannot be called on the data or returns another shape."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not runtime.finite([value]):
            raise Refused(
                f"the model's weight {name!r} has entries that are not finite: load the weights of a trained model"
            )
    data = request.forget or request.retain
    if data is None:
        return
    batch = task.prepare(
        runtime.to_device(data.batch(torch.arange(min(2, len(data)))), runtime.device_of(model)), Key(0)
    )
    try:
        with torch.no_grad(), only_looked_at(model), lent_stream(Key(0)):
            loss = task.nll(model, batch)
    except Refused:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise Refused(
            f"the model cannot be called on the data: {str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            f"check the input's shape, or say how to call it with call=lambda model, batch: ..."
        ) from error
    if loss.shape != (len(batch["id"]),):
        raise Refused(
            f"task {task.name} gives a loss of shape {tuple(loss.shape)} for {len(batch['id'])} examples: expected one each"
        )
    if bool(torch.isnan(loss).any()):
        raise Refused(
            "the model gives losses that are not numbers before anything was changed: look at the data, or load it in "
            "float32 if it is in half precision"
        )


def _scope(model: nn.Module, scope: Scope | Sequence[str] | None) -> Scope:
    if isinstance(scope, Scope):
        for name, p in scope.parameters(model).items():
            mask = scope.masks[name]
            if isinstance(mask, Tensor) and (mask.shape != p.shape or mask.dtype != torch.bool):
                raise Refused(
                    f"the scope's mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}: expected torch.bool of "
                    f"shape {tuple(p.shape)}"
                )
        return scope
    if isinstance(scope, str):
        scope = [scope]
    found = Scope.all(model) if scope is None else Scope.match(model, *scope)
    if not found.masks:
        raise Refused("the model has no trainable floating parameter: nothing could change")
    return found


def _identity(
    name: str,
    stage: Stage,
    seed: int,
    model: nn.Module,
    request: Request,
    task: Task,
    scope: Scope,
    probes: Probes | None = None,
) -> dict[str, Any]:
    """What makes two runs the same run."""
    data = {
        part: fingerprint(value)
        for part in ("forget", "retain", "valid")
        if (value := getattr(request, part)) is not None
    }
    data.update({f"extra/{part}": fingerprint(value) for part, value in request.extra.items()})
    masked = {n: m for n, m in scope.masks.items() if isinstance(m, Tensor)}
    return {
        "method": name,
        "settings": _settings(stage),
        "seed": seed,
        "task": described(task),
        "data": data,
        "concepts": list(request.concepts),
        "weights": hash_tensors(tensors_of(model)),
        "scope": sorted(scope.masks),
        "masks": hash_tensors(masked) if masked else None,
        "watch": None if probes is None else probes.describe(),
        "revision": revision(),
    }


def _settings(stage: Stage) -> Any:
    if isinstance(stage, Bound):
        return stage.printed()
    return described(stage)


class writing:
    """Turn a failed write into one sentence; what was written before stays whole."""

    def __init__(self, folder: Path, errors: type[OSError] = OSError):
        self.folder, self.errors = folder, errors

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, self.errors):
            what = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
            raise Refused(
                f"cannot write to {self.folder}: {what}; mend that and give the same command again, a run goes on from "
                f"its last checkpoint"
            ) from error


def check_folder(folder: Path, needed: int = 1 << 20) -> Path:
    """Make an output folder; refuse one that cannot be written, lacks `needed` bytes, or holds anything but a run of expunge."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise Refused(f"cannot write to {folder}: permission denied; give another out folder")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refused(
            f"the disk of {folder} is full: {free >> 20} MiB are free, the run needs about {(needed >> 20) + 1} MiB; free "
            f"some, or give another out folder"
        )
    if not (folder / "run.json").exists():
        strangers = sorted(
            p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in (REFERENCES, ALTERNATES)
        )
        if strangers:
            raise Refused(
                f"{folder} is not empty and holds no run of expunge (found {strangers[0]!r}): give an empty or new folder"
            )
    return folder


def _open(folder: Path, identity: dict[str, Any], model: nn.Module) -> Path:
    """Make or re-enter a run's folder; refuse one that holds another run or cannot be written."""
    check_folder(folder, 4 * sum(p.numel() * p.element_size() for p in model.parameters()) + (1 << 20))
    sweep(folder)
    marker = folder / "run.json"
    if not marker.exists():
        with writing(folder):
            write_bytes(marker, json.dumps(identity, indent=1).encode())
        return folder
    try:
        before = json.loads(marker.read_text())
    except ValueError as error:
        raise Refused(f"{marker} cannot be read: delete the folder, or give another one") from error
    changed = [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]
    if changed:
        raise Refused(
            f"{folder} holds another run, which differs from this one in {', '.join(changed)}: give another out folder"
        )
    return folder


def _finished(folder: Path, model: nn.Module, shard: Callable[[nn.Module], nn.Module] | None, stage: Stage) -> Outcome:
    work = load_weights(rebuilt(stage, model, folder / WEIGHTS), folder / WEIGHTS)
    try:
        record = json.loads((folder / RECORD).read_text())
    except ValueError as error:
        raise Refused(
            f"{folder / RECORD} cannot be read: delete it to run again, or give another out folder"
        ) from error
    return Outcome(work if shard is None else runtime.reshard(shard(work)), record)


def rebuilt(stage: Stage, model: nn.Module, weights: Path) -> nn.Module:
    """The structure that the stages left the model in: a bracket that adds to it (an input vector) has ``rebuilt``."""
    for part in parts(stage):
        if isinstance(part, Bound):
            model = rebuilt(part.stage, model, weights)
        elif hasattr(part, "rebuilt"):
            model = part.rebuilt(model, read_tensors(weights))
    return model


def _run(stage: Stage, case: Case) -> Case:
    whole = chain(stage)
    modules = [t for t in case.teachers.values() if isinstance(t, nn.Module)]
    with case.meter.timed(), case.meter.watch(case.model, *modules):
        if case.journal is None:
            return whole(case)
        with writing(case.journal.folder, CannotWrite):  # any other is of the user's data or model
            return whole(case)


def _probes(watch: Any, request: Request, task: Task, seed: int) -> Probes:
    if not isinstance(watch, Watch):
        raise Refused(f"watch is a {type(watch).__name__}: expected expunge.Watch(every=1)")
    return watch.probes(request, task, seed)


def _looked(case: Case, probes: Probes | None) -> dict[str, float]:
    """What there is to see before the first stage and after the last, which may not be a step of a Descend."""
    if probes is None:
        return {}
    with case.meter.timed(), case.meter.watch(case.model):
        return probes.look(case)


def _say_if_unchanged(case: Case, before: nn.Module | None) -> None:
    if before is None:
        return
    old, new = tensors_of(before), tensors_of(case.model)
    if old.keys() == new.keys() and all(torch.equal(old[n], runtime.whole(new[n])) for n in old):
        case.meter.note("the method changed nothing: the model that comes back is the model that went in")


def _rows(meter: Meter) -> dict[str, int]:
    """What was counted, on all processes together."""
    counted = [meter.forward, meter.backward, meter.checks]
    total = runtime.all_sum(torch.tensor(counted, dtype=torch.float64)).tolist()
    return dict(zip(("forward", "backward", "checks"), map(int, total), strict=True))


def _record(
    name: str, stage: Stage, seed: int, task: Task, request: Request, identity: dict[str, Any], case: Case
) -> dict[str, Any]:
    meter = case.meter
    found = next(bounds(stage), None)
    sizes = {part: len(data) for part in ("forget", "retain", "valid") if (data := getattr(request, part)) is not None}
    return {
        "expunge": __version__,
        **identity,
        "paper": found.spec.paper if found is not None else None,
        "promise": found.spec.promise if found is not None else None,
        "examples": sizes,
        "result": hash_tensors(tensors_of(case.model)),
        "cost": {
            "seconds": meter.seconds,
            **_rows(meter),
            "peak_bytes": peak_bytes(),
            **({} if meter.predicted is None else {"predicted": list(meter.predicted)}),
        },
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processes": runtime.world(),
            "threads": torch.get_num_threads(),
            "device": str(runtime.device_of(case.model)),
        },
        "notes": list(meter.notes),
        "history": list(meter.history),
    }
