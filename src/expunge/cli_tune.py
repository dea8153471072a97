"""``expunge tune``: from a run file to a search, and what is printed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge import tune_space
from expunge.core import Refused
from expunge.journal import write_bytes
from expunge.perform import check_makeable, training
from expunge.run import writing
from expunge.sections import TuneSection
from expunge.spec import RunSpec, checked
from expunge.tune import checked as checked_method
from expunge.tune import tune
from expunge.tune_found import Budget, Tuned, lines_of
from expunge.workload import load, requested

SECTION = "method.toml"
SHOWN = 10  # trials in the table, and the first one


def tune_file(spec: RunSpec, asked: Mapping[str, Any], out: Path | None = None) -> tuple[Tuned, Path]:
    """Do the search that a run file and the command line ask for; its test data and references are not looked at.

    Returns:
        what was found, and the folder that ``tuned.json`` and ``method.toml`` were written to.

    Raises:
        Refused: for bad input, before any training.
    """
    section = checked(TuneSection, {**spec.tune.model_dump(exclude_unset=True), **asked}, "the command line")
    if spec.language:
        raise Refused(
            "expunge tune is for rows with labels or targets, and this run file is about a language model: call "
            "expunge.tune.tune from Python"
        )
    budget = Budget(section.trials, section.seconds, section.backward, section.per_run)
    method = checked_method(spec.method.name, section.rule, section.floor, section.seeds)
    fixed = spec.method.settings()
    tune_space.space_of(method, fixed, section.space)
    spec.method.stage()
    workload = load(spec)
    request = requested(spec, workload)
    proxy = section.rule == "proxy"
    if proxy:
        check_makeable(spec.audit.model_copy(update={"retrained": 1, "weights": []}), workload)
    folder = out or (Path("out/tune") if spec.out is None else spec.out.with_name(f"{spec.out.name}-tune"))
    alone = spec.run.model_copy(update={"out": None})
    found = tune(
        None if proxy else workload.trained(spec.run.seed),
        request,
        task=workload.task,
        method=method.name,
        rule=section.rule,
        budget=budget,
        floor=section.floor,
        target=section.target,
        space=section.space,
        fixed=fixed,
        seed=spec.run.seed,
        seeds=section.seeds,
        out=folder,
        train=training(spec.audit, workload) if proxy else None,
        make=workload.make or (workload.trained(spec.run.seed) if proxy else None),
        count=section.proxies,
        retrained=section.retrained,
        workers=spec.audit.workers,
        recipe=spec.audit.recipe,
        scope=spec.run.scope,
        wrap=alone.adapted,
    )
    raw = spec.method.model_extra or {}
    found = replace(found, fixed={name: raw[name] for name in found.fixed})  # as a run file writes them
    if found.best is not None:
        with writing(folder):
            write_bytes(folder / SECTION, "\n".join([*lines_of(found.method, found.settings), ""]).encode())
    return found, folder


def said(found: Tuned, path: Path, folder: Path) -> tuple[list[str], list[list[str]], list[str]]:
    """(columns, rows, lines after the table) for a terminal."""
    varied = [name for name in found.search["space"]]
    best = found.ranked[:SHOWN]
    shown = [*best, *(trial for trial in found.trials[:1] if trial not in best)]
    columns = ["trial", *varied, "score", "forget", "retain", "held out", "lost", "note"]
    rows = [
        [
            f"{trial.number}{' (defaults)' if trial.number == 0 else ''}",
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.settings.values()),
            _number(trial.score) if trial.runs else "",
            *(_number(_mean(trial.runs, part)) for part in ("forget", "retain", "valid")),
            _number(trial.drop) if trial.runs else "",
            trial.note,
        ]
        for trial in shown
    ]
    spent = found.to_json()["spent"]
    what = (
        "the average gap to retrained models on other requests, as a share of do-nothing's"
        if found.search["rule"] == "proxy"
        else "by the rule that looks at no retrained model"
    )
    lines = [
        f"{found.method}: {spent['trials']} trials, {spent['seconds']:.1f} s, {spent['backward']:,} rows backward; {found.ended}",
        f"score: {what}; the less the better. forget, retain, held out: points; lost: the most of a run, "
        f"{found.search['floor']:g} are allowed",
    ]
    if found.best is not None:
        lines += ["", *lines_of(found.method, found.settings), ""]
        settings = " ".join(f"method.{name}={value}" for name, value in found.best.settings.items())
        lines.append(f"expunge run {path} {settings}")
    return columns, rows, [*lines, f"written to {folder}"]


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
