"""A benchmark suite: methods x requests x seeds on one built-in suite, each judged against retrained models.

suite = "digits"
seeds = [0, 1, 2]
retrained = 3

[requests]
class_3 = "y == 3"
random_50 = {random = 50}            # so many training examples, drawn by the seed

[methods.finetune]                   # the method of that name, with settings
lr = 0.02
[methods.finetune_long]              # a second setting of it
method = "finetune"
steps = 400
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from expunge.core import Key, Refused, Request, Stage
from expunge.data import builtin
from expunge.data.builtin import Suite
from expunge.data.sources import fingerprint
from expunge.data.split import split
from expunge.journal import write_bytes
from expunge.progress import progress
from expunge.references import references
from expunge.registry import did_you_mean
from expunge.run import unlearn, writing
from expunge.sections import MethodSection, Section, WholeNumber
from expunge.spec import checked, read_toml
from expunge.version import __version__, revision

SUITES, RESULTS = Path("bench/suites"), Path("bench/results")


class Drawn(Section):
    """A request for examples drawn at random."""

    random: Annotated[int, Field(ge=1)]


class BenchSpec(Section):
    """A suite file."""

    suite: str
    seeds: Annotated[list[WholeNumber], Field(min_length=1)]
    retrained: WholeNumber = 3
    requests: Annotated[dict[str, str | list[int] | Drawn], Field(min_length=1)]
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]

    def stages(self) -> dict[str, Stage]:
        """Row name -> stage, every setting checked."""
        return {
            name: checked(MethodSection, {"name": name, **_renamed(settings)}, f"[methods.{name}]").stage()
            for name, settings in self.methods.items()
        }


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {("name" if key == "method" else key): value for key, value in settings.items()}


def suite_file(name: str) -> Path:
    """A path to a suite file, or the name of one in ``bench/suites``.

    Raises:
        Refused: for a name that is neither, with the nearest one.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return path
    known = {file.stem: file for file in sorted(SUITES.glob("*.toml"))}
    if name not in known:
        have = ", ".join(known) or "none in bench/suites"
        raise Refused(
            f"unknown bench suite {name!r}{did_you_mean(name, known)}; there are {have}, or give the path of a .toml"
        )
    return known[name]


def bench(path: Path, results: Path) -> dict[str, Any]:
    """Run a suite file and write ``results/<name>.json``; returns what was written.

    The file is written again after every request and seed, so that a run that breaks off leaves what it has.

    Raises:
        Refused: for a suite file that cannot work, before any training.
    """
    spec = checked(BenchSpec, read_toml(path), str(path))
    suite, stages = builtin.suite(spec.suite), spec.stages()
    requests = {
        (seed, name): _request(suite, request, seed) for seed in spec.seeds for name, request in spec.requests.items()
    }
    found = _heading(path, spec, suite)
    rows: list[dict[str, Any]] = found["rows"]
    with progress(f"bench {path.stem}", len(requests)) as show:
        for number, ((seed, name), request) in enumerate(requests.items()):
            rows += [{"request": name, "seed": seed, **row} for row in _rows(spec, suite, stages, request, seed)]
            with writing(results):
                write_bytes(results / f"{path.stem}.json", json.dumps(found, indent=1).encode())
            show(number + 1)
    return found


def _heading(path: Path, spec: BenchSpec, suite: Suite) -> dict[str, Any]:
    return {
        "suite": path.stem,
        "spec": spec.model_dump(),
        "expunge": __version__,
        "revision": revision(),
        "data": {"train": fingerprint(suite.train), "test": fingerprint(suite.test)},
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "rows": [],
    }


def _request(suite: Suite, request: str | list[int] | Drawn, seed: int) -> Request:
    if not isinstance(request, Drawn):
        return split(suite.train, request)
    if request.random >= len(suite.train):
        raise Refused(f"{request.random} random examples leave none of {len(suite.train)} to keep: ask for fewer")
    order = torch.randperm(len(suite.train), generator=Key(seed).at("request").generator())
    return split(suite.train, suite.train.ids[order[: request.random]])


def _retrained(
    suite: Suite, request: Request, count: int, seed: int
) -> tuple[list[nn.Module], tuple[Mapping[str, Any], ...]]:
    """References, one after the other, so that their seconds are what a method's are compared with."""
    if not count:
        return [], ()
    with tempfile.TemporaryDirectory() as folder:
        found = references(
            suite.recipe,
            suite.train,
            request,
            task=suite.task,
            make=suite.make,
            folder=folder,
            retrained=count,
            seed=seed,
            workers=1,
            fill=(),
        )
        return [model.load() for model in found.retrained], found.records


def _rows(
    spec: BenchSpec, suite: Suite, stages: dict[str, Stage], request: Request, seed: int
) -> Iterator[dict[str, Any]]:
    """One row per method, and the controls, of one request and seed."""
    from expunge.audit import compare

    original = suite.fit(seed=seed)
    models, records = _retrained(suite, request, spec.retrained, 1000 * (seed + 1))
    outcomes = {
        name: unlearn(original, request, task=suite.task, method=stage, seed=seed) for name, stage in stages.items()
    }
    judged = {name: (outcome.model, outcome.record) for name, outcome in outcomes.items()}
    report = compare(original, judged, request, suite.task, suite.test, models, records, key=Key(seed))
    for row in report.rows:
        record = outcomes[row.name].record if row.name in outcomes else {}
        readings = {name: reading.to_json() for name, reading in row.readings.items()}
        yield {
            "row": row.name,
            "kind": row.kind,
            "verdict": row.verdict,
            "notes": list(row.notes),
            "method": record.get("method"),
            "settings": record.get("settings"),
            "cost": record.get("cost"),
            "weights": record.get("result"),
            "readings": readings,
        }
