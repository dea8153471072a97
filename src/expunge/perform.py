"""Run a run file: train or load, forget, train references, audit, and leave the evidence in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from expunge.checkpointing import with_checkpointing
from expunge.core import Refused, Request
from expunge.data.builtin import Recipe, fresh
from expunge.references import References, references
from expunge.registry import asked_for
from expunge.run import (
    RECORD,
    REFERENCES,
    WEIGHTS,
    Outcome,
    check_folder,
    check_model,
    unlearn,
    writing,
)
from expunge.sections import AuditSection
from expunge.spec import RunSpec
from expunge.store import Store
from expunge.trainer import Train
from expunge.watch import Watch
from expunge.workload import Workload, function, load, requested

if TYPE_CHECKING:
    from expunge.audit import Report, Subject


@dataclass(frozen=True)
class Performed:
    """What a run left: the outcome, the report where references were asked for, the folder, and sentences to read."""

    outcome: Outcome
    report: Report | None
    folder: Path | None
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """JSON for the command line: the record without its per-step history, and the report."""
        record = {key: value for key, value in self.outcome.record.items() if key != "history"}
        return {
            "record": record,
            "report": None if self.report is None else self.report.to_json(),
            "out": None if self.folder is None else str(self.folder),
            "notes": list(self.notes),
        }


def perform(spec: RunSpec) -> Performed:
    """Do what a run file says. Everything that can be refused is checked before the long work.

    Raises:
        Refused: for bad input. RunFailed: for a run that could not finish.
    """
    stage = spec.run.adapted(spec.method.stage(), merge=not spec.model.four_bit)
    stage = with_checkpointing(stage) if spec.model.checkpointing else stage
    workload = load(spec)
    request = requested(spec, workload)
    check_makeable(spec.audit, workload)
    if spec.out is not None:
        check_folder(spec.out)
    given, copy, notes = request, True, list[str]()
    if workload.language is not None:
        from expunge.language_run import prepared, with_alternates

        given, notes = with_alternates(spec, workload.language, request, stage)
        stage, copy, more = prepared(spec, workload.language, given, stage)
        notes += more
    model = workload.trained(spec.run.seed)
    outcome = unlearn(
        model,
        given,
        task=workload.task,
        method=stage,
        seed=spec.run.seed,
        out=spec.out,
        copy=copy,
        scope=spec.run.scope,
        every=spec.run.every,
        watch=_watch(spec, workload),
        predict=workload.language is not None,
        pieces=spec.run.pieces,
    )
    if workload.language is not None and spec.out is not None and not spec.model.four_bit:
        workload.language.save(outcome.model, spec.out, spec.out / WEIGHTS)
    report = None
    if (spec.audit.wanted or workload.language is not None) and spec.out is not None:
        before = model if copy else workload.trained(spec.run.seed)
        report = judged(spec, workload, request, before, outcome.model, spec.out, outcome.record)
    return Performed(outcome, report, spec.out, tuple(notes))


def _watch(spec: RunSpec, workload: Workload) -> Watch | None:
    """What the run file asks to be measured along the run."""
    if not spec.run.watch:
        return None
    further = {} if workload.test is None else {"test": workload.test}
    return Watch(spec.run.watch, spec.run.watch_examples, further)


def check_makeable(section: AuditSection, workload: Workload) -> None:
    """Refuse references that cannot be made, before anything else is."""
    if section.train is not None:
        function(section.train)
    if section.trained and workload.make is None and section.train is None:
        raise Refused(
            "references cannot be retrained: the data's function returns no make, which builds a fresh network; add "
            "it, or give [audit] train with the function that trains, or weights with retrained models"
        )
    for path in section.weights:
        if not (Path(path).is_file() or workload.language is not None):
            raise Refused(f"there is no weights file {path} of a retrained model")


def judged(
    spec: RunSpec,
    workload: Workload,
    request: Request,
    before: nn.Module,
    after: nn.Module,
    folder: Path,
    record: dict[str, Any] | None,
    also: Sequence[str] = (),
) -> Report:
    """Audit against the references that the run file asks for, and write the report into the folder."""
    from expunge.audit import audit

    files = tuple(workload.read(before, path) for path in spec.audit.weights)
    found = trained_references(spec, workload, request, before, reference_folder(spec, folder))
    subject = found.subject(
        before,
        after,
        request,
        workload.task,
        workload.test,
        retrained=(*files, *found.retrained),
        names=workload.names,
        record=record,
    )
    if not spec.audit.trust:
        _check_references(subject)
    report = audit(subject, also=also, trust_references=spec.audit.trust)
    if workload.language is not None:
        from expunge.language_run import about_answers, answers

        notes = (*report.notes, *workload.language.notes, *about_answers(report))
        report = replace(report, exchanges=answers(workload.language, subject), notes=notes)
    with writing(folder):
        report.save(folder)
    return report


def _check_references(subject: Subject) -> None:
    """Refuse references that give themselves away, and say how to go on."""
    from expunge.audit.genuine import check_references

    try:
        check_references(subject)
    except Refused as error:
        raise Refused(f"{error}; or audit.trust=true where you know better") from error


def reference_folder(spec: RunSpec, folder: Path) -> Path:
    """Where references are kept: as the run file says, or in the folder of the run (or of the audit)."""
    return (spec.out or folder) / REFERENCES if spec.audit.folder is None else Path(spec.audit.folder)


def trained_references(
    spec: RunSpec, workload: Workload, request: Request, like: nn.Module, folder: Path
) -> References:
    """The models that the run file asks for, trained where they are not in the folder yet."""
    section = spec.audit
    if not section.trained:
        return References(Store(folder / "outputs"), spec.run.seed)
    return references(
        training(section, workload),
        workload.train,
        request,
        task=workload.task,
        make=workload.make or like,
        folder=folder,
        retrained=section.retrained,
        originals=section.originals,
        shadows=section.shadows,
        method=spec.method.stage() if section.unlearn else None,
        test=workload.test,
        seed=spec.run.seed,
        workers=section.workers,
        ray=section.ray,
        recipe=section.recipe,
    )


def training(section: AuditSection, workload: Workload) -> Train | Recipe:
    """The user's function, or the data's own recipe with what the run file changes of it."""
    if section.train is not None:
        return function(section.train)
    if workload.recipe is None:
        return Recipe(epochs=section.epochs, lr=section.lr, batch=section.batch)
    changed = section.model_fields_set & {"epochs", "lr", "batch"}
    return replace(workload.recipe, **{name: getattr(section, name) for name in changed})


def train_references(spec: RunSpec) -> tuple[References, list[dict[str, Any]]]:
    """Train what ``[audit]`` of a run file asks for, and nothing else; and what was done, one mapping per role.

    Raises:
        Refused: for bad input, before any training. RunFailed: for a model that cannot be made.
    """
    section = spec.audit
    if not section.trained:
        raise Refused("nothing to train: give --retrained 3, --originals or --shadows, or the same in [audit]")
    workload = load(spec)
    request = requested(spec, workload)
    check_makeable(section, workload)
    like = workload.trained(spec.run.seed) if workload.make is None else fresh(workload.make, 0)
    found = trained_references(spec, workload, request, like, reference_folder(spec, Path("out")))
    return found, summary(found, workload, request)


def summary(found: References, workload: Workload, request: Request) -> list[dict[str, Any]]:
    """Per role: how many models, how many of them were trained just now, seconds each, and how right they are."""
    rows = []
    for role in dict.fromkeys(entry.role for entry in found.ledger):
        entries = [entry for entry in found.ledger if entry.role == role]
        subject = found.subject(entries[0].model, entries[0].model, request, workload.task, workload.test)
        new = sum(entry.fresh for entry in entries)
        seconds = sum(entry.seconds for entry in entries) / len(entries)
        row = {"role": role, "models": len(entries), "trained": new, "reused": len(entries) - new, "seconds": seconds}
        for name in (name for name in ("forget", "retain", "test") if subject.has(name)):
            said = [subject.outputs(name, entry.model) for entry in entries]
            right = [100 * float(one.correct.mean()) for one in said if one.correct is not None]
            values = right or [float(one.loss.mean()) for one in said]
            row[f"{name} {'accuracy' if right else 'loss'}"] = sum(values) / len(values)
        rows.append(row)
    return rows


def audit_files(
    spec: RunSpec,
    after: str | None,
    before: str | None,
    retrained: list[str],
    folder: Path,
    also: Sequence[str] = (),
) -> Report:
    """Audit weights that are there already: `after` (default: the run's own) against `before` and the references.

    Weights in `retrained` take the place of references that the run file would retrain; `also` names measures that train
    or attack.

    Raises:
        Refused: for weights that are missing or do not fit the run file's model.
    """
    asked_for(also)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    section = spec.audit.model_copy(
        update={"weights": [*spec.audit.weights, *retrained], "retrained": spec.audit.retrained if not retrained else 0}
    )
    spec = spec.model_copy(update={"audit": section})
    workload = load(spec)
    request = requested(spec, workload)
    check_makeable(section, workload)
    path = after or (None if spec.out is None else str(spec.out / WEIGHTS))
    if path is None or not (Path(path).is_file() or (workload.language is not None and Path(path).is_dir())):
        where = "" if path is None else f" at {path}"
        raise Refused(f"there are no weights to audit{where}: run the run file first, or give --after")
    original = workload.trained(spec.run.seed)
    first = original if before is None else workload.read(original, before)
    second = workload.read(original, path)
    for model in (first, second):
        check_model(model, request, workload.task)
    record = None if after is not None else _record_of(spec)
    return judged(spec, workload, request, first, second, folder, record, also)


def _record_of(spec: RunSpec) -> dict[str, Any] | None:
    """The record of the run in the run file's folder, for the price of forgetting."""
    path = None if spec.out is None else spec.out / RECORD
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not the record of a run ({error}): delete it and run the run file again") from error
