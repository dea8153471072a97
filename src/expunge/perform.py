"""Run a run file: train or load, forget, retrain references, audit, and leave the evidence in one folder."""

from __future__ import annotations

import copy as copying
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from expunge.core import Key, Refused, Request
from expunge.data.builtin import Recipe, fresh, train_counted
from expunge.data.sources import fingerprint
from expunge.journal import write_bytes
from expunge.progress import progress
from expunge.run import RECORD, WEIGHTS, Outcome, check_folder, check_model, unlearn, writing
from expunge.spec import AuditSection, RunSpec
from expunge.weights import load_weights, save_weights
from expunge.workload import Workload, load, request_of

if TYPE_CHECKING:
    from expunge.audit import Report

REFERENCES = "references"


@dataclass(frozen=True)
class Performed:
    """What a run left: the outcome, the report where references were asked for, and the folder."""

    outcome: Outcome
    report: Report | None
    folder: Path | None

    def summary(self) -> dict[str, Any]:
        """JSON for the command line: the record without its per-step history, and the report."""
        record = {key: value for key, value in self.outcome.record.items() if key != "history"}
        return {
            "record": record,
            "report": None if self.report is None else self.report.to_json(),
            "out": None if self.folder is None else str(self.folder),
        }


def perform(spec: RunSpec) -> Performed:
    """Do what a run file says. Everything that can be refused is checked before the long work.

    Raises:
        Refused: for bad input. RunFailed: for a run that could not finish.
    """
    stage = spec.method.stage()
    workload = load(spec)
    request = request_of(workload, spec.request.forget, spec.request.retain)
    check_references(spec.audit, workload)
    if spec.out is not None:
        check_folder(spec.out)
    model = workload.trained(spec.run.seed)
    outcome = unlearn(
        model,
        request,
        task=workload.task,
        method=stage,
        seed=spec.run.seed,
        out=spec.out,
        scope=spec.run.scope,
        every=spec.run.every,
    )
    report = None
    if spec.audit.wanted and spec.out is not None:
        report = judged(spec, workload, request, model, outcome.model, spec.out, outcome.record)
    return Performed(outcome, report, spec.out)


def check_references(section: AuditSection, workload: Workload) -> None:
    """Refuse references that cannot be made, before anything else is."""
    if section.retrained and workload.make is None:
        raise Refused(
            "references cannot be retrained: the data's function returns no make, which builds a fresh network; add "
            "it, or give [audit] weights with retrained models"
        )
    for path in section.weights:
        if not Path(path).is_file():
            raise Refused(f"there is no weights file {path} of a retrained model")


def judged(
    spec: RunSpec,
    workload: Workload,
    request: Request,
    before: nn.Module,
    after: nn.Module,
    folder: Path,
    record: dict[str, Any] | None,
) -> Report:
    """Audit against the references that the run file asks for, and write the report into the folder."""
    from expunge.audit import Subject, audit

    kept = (spec.out or folder) / REFERENCES
    models, records = references(spec.audit, workload, request, before, spec.run.seed, kept)
    subject = Subject(
        before,
        after,
        request,
        workload.task,
        workload.test,
        tuple(models),
        workload.names,
        record,
        tuple(records),
        Key(spec.run.seed),
    )
    report = audit(subject)
    with writing(folder):
        report.save(folder)
    return report


def references(
    section: AuditSection, workload: Workload, request: Request, like: nn.Module, seed: int, folder: Path | None
) -> tuple[list[nn.Module], list[dict[str, float]]]:
    """Models that never saw the forget data: read from the files given, then retrained; and what retraining cost.

    Retrained ones are kept in the folder and read back where the same is asked for again.
    """
    models: list[nn.Module] = []
    records: list[dict[str, float]] = []
    for path in section.weights:
        models.append(load_weights(_blank(workload, like), path).eval())
    if not section.retrained or workload.make is None or request.retain is None:
        return models, records
    recipe = workload.recipe or Recipe(epochs=section.epochs, lr=section.lr, batch=section.batch)
    if workload.recipe is not None and section.model_fields_set & {"epochs", "lr", "batch"}:
        changed = {
            name: getattr(section, name) for name in ("epochs", "lr", "batch") if name in section.model_fields_set
        }
        recipe = replace(workload.recipe, **changed)
    with progress("retraining references", section.retrained) as show:
        for number in range(section.retrained):
            model, record = _reference(workload, request, seed + 1 + number, recipe, folder)
            models.append(model)
            records.append(record)
            show(number + 1)
    return models, records


def _blank(workload: Workload, like: nn.Module) -> nn.Module:
    return copying.deepcopy(like) if workload.make is None else fresh(workload.make, 0)


def _reference(
    workload: Workload, request: Request, seed: int, recipe: Recipe, folder: Path | None
) -> tuple[nn.Module, dict[str, float]]:
    """One retrained model; kept as weights and a JSON file that says of what."""
    if workload.make is None or request.retain is None:
        raise Refused("retraining needs a function that builds a fresh network, and data to retain")
    if folder is None:
        return train_counted(workload.make, request.retain, workload.task, seed, recipe)
    identity = {"retain": fingerprint(request.retain), "recipe": asdict(recipe), "seed": seed}
    weights, about = folder / f"retrained-{seed}.safetensors", folder / f"retrained-{seed}.json"
    if weights.is_file() and about.is_file():
        known = json.loads(about.read_text())
        if known.get("identity") == identity:
            return load_weights(fresh(workload.make, seed), weights).eval(), known["cost"]
    model, cost = train_counted(workload.make, request.retain, workload.task, seed, recipe)
    with writing(folder):
        save_weights(model, weights)
        write_bytes(about, json.dumps({"identity": identity, "cost": cost}, indent=1).encode())
    return model, cost


def audit_files(spec: RunSpec, after: str | None, before: str | None, retrained: list[str], folder: Path) -> Report:
    """Audit weights that are there already: `after` (default: the run's own) against `before` and the references.

    Weights in `retrained` take the place of references that the run file would retrain.

    Raises:
        Refused: for weights that are missing or do not fit the run file's model.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    section = spec.audit.model_copy(
        update={"weights": [*spec.audit.weights, *retrained], "retrained": spec.audit.retrained if not retrained else 0}
    )
    spec = spec.model_copy(update={"audit": section})
    workload = load(spec)
    request = request_of(workload, spec.request.forget, spec.request.retain)
    check_references(section, workload)
    path = after or (None if spec.out is None else str(spec.out / WEIGHTS))
    if path is None or not Path(path).is_file():
        where = "" if path is None else f" at {path}"
        raise Refused(f"there are no weights to audit{where}: run the run file first, or give --after")
    original = workload.trained(spec.run.seed)
    first = original if before is None else load_weights(_blank(workload, original), before).eval()
    second = load_weights(_blank(workload, original), path).eval()
    for model in (first, second):
        check_model(model, request, workload.task)
    return judged(spec, workload, request, first, second, folder, None if after is not None else _record_of(spec))


def _record_of(spec: RunSpec) -> dict[str, Any] | None:
    """The record of the run in the run file's folder, for the price of forgetting."""
    path = None if spec.out is None else spec.out / RECORD
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not the record of a run ({error}): delete it and run the run file again") from error
