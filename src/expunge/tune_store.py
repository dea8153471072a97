"""The folder of a search: what it is a search of, and one file for each trial that is finished. JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.core import Refused
from expunge.journal import sweep, write_bytes
from expunge.run import writing
from expunge.tune_trial import Trial

SEARCH, TRIALS, REFERENCES = "search.json", "trials", "references"


def opened(folder: Path) -> Path:
    """Make or re-enter a folder; refuse one with other things in it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != REFERENCES)
    if strangers and not (folder / SEARCH).exists():
        raise Refused(
            f"{folder} is not empty and holds no search (found {strangers[0]!r}): give an empty or new folder"
        )
    sweep(folder)
    return folder


def finished(folder: Path | None, search: Mapping[str, Any]) -> list[Trial]:
    """The trials of this very search that are there already, up to the first that is not."""
    if folder is None:
        return []
    marker, plain = folder / SEARCH, json.loads(json.dumps(search))
    with writing(folder):
        (folder / TRIALS).mkdir(exist_ok=True)
        sweep(folder / TRIALS)
        if not marker.exists():
            write_bytes(marker, json.dumps(search, indent=1).encode())
    before = _read(marker)
    changed = [name for name in plain if before.get(name) != plain[name]]
    if changed:
        raise Refused(
            f"{folder} holds another search, which differs from this one in {', '.join(changed)}: give another out folder"
        )
    trials: list[Trial] = []
    while (path := _place(folder, len(trials))).exists():
        trials.append(Trial.from_json(_read(path)))
    return trials


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, OSError) as error:
        raise Refused(f"{path} cannot be read ({error}): delete it, and what comes after it is done again") from error


def keep(folder: Path, trial: Trial) -> None:
    """Write a finished trial, whole or not at all."""
    with writing(folder):
        write_bytes(_place(folder, trial.number), json.dumps(trial.to_json(), indent=1).encode())


def _place(folder: Path, number: int) -> Path:
    return folder / TRIALS / f"{number:05}.json"
