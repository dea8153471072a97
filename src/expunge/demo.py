"""``expunge demo``: a trained classifier of handwritten digits forgets real records, beside models retrained without them.

Two requests: ``digit``, one whole digit; and ``memorised``, the tenth of the records that the model fits but would not
predict had it not seen them. A random tenth would prove nothing: there, doing nothing is as near to retraining as one
retrained model is to another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audit.page import Section, write_page
from expunge.audit.report import Report, Row, compare
from expunge.core import Data, Key, Refused, Request
from expunge.data.builtin import Suite, suite, train_counted
from expunge.data.split import split
from expunge.journal import write_bytes
from expunge.oracle import positions
from expunge.progress import progress
from expunge.registry import methods
from expunge.run import unlearn, writing
from expunge.version import revision

DIGIT = 3
REFERENCES = 4
FOLDS = 5

# Found by bench/tune_demo.py on other digits and other splits of the training records; a test holds the two together.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "digit": {
        "bad_teacher": {"lr": 0.002, "steps": 40, "batch": 32},
        "eupmu": {"lr": 0.3, "tolerance": -0.03, "variant": "fast", "max_norm": 1.0, "steps": 28},
        "finetune": {"lr": 0.2, "steps": 50},
        "grad_diff": {"lr": 0.0004, "steps": 45, "batch": 32, "forget_weight": 0.05},
        "gradient_ascent": {"lr": 0.0002, "steps": 30},
        "influence": {"scale": 4.0, "recursion": "exact", "samples": 300},
        "l1_sparse": {"lr": 0.005, "steps": 48, "alpha": 0.0015},
        "npo": {"lr": 0.0006, "steps": 45, "batch": 32, "beta": 1.0, "retain_weight": 5.0},
        "random_label": {"lr": 0.006, "steps": 42, "batch": 32, "retain_weight": 5.0},
        "salun": {"lr": 0.004, "steps": 42, "batch": 32, "retain_weight": 5.0},
        "scrub": {"lr": 0.002, "epochs": 4, "ascent_epochs": 1, "retain_steps": 6, "temperature": 2.0},
        "ssd": {"share": 0.06, "strength": 1.0},
        "surgery": {"lr": 0.1, "tolerance": -1.0, "steps": 32, "max_norm": 1.0},
    },
    "memorised": {
        "bad_teacher": {"lr": 0.001, "steps": 40, "batch": 32},
        "eupmu": {"lr": 0.2, "tolerance": -0.5, "variant": "paper", "max_norm": 2.0, "steps": 28},
        "finetune": {"lr": 0.2, "steps": 50},
        "grad_diff": {"lr": 0.0004, "steps": 45, "batch": 32, "forget_weight": 0.05},
        "gradient_ascent": {"lr": 0.0002, "steps": 20},
        "influence": {"scale": 4.0, "recursion": "exact", "samples": 300},
        "l1_sparse": {"lr": 0.003, "steps": 48, "alpha": 0.0015},
        "npo": {"lr": 0.0003, "steps": 35, "batch": 32, "beta": 1.0, "retain_weight": 5.0},
        "random_label": {"lr": 0.004, "steps": 42, "batch": 32, "retain_weight": 5.0},
        "salun": {"lr": 0.004, "steps": 42, "batch": 32, "retain_weight": 5.0},
        "scrub": {"lr": 0.002, "epochs": 4, "ascent_epochs": 2, "retain_steps": 6, "temperature": 2.0},
        "ssd": {"share": 0.1, "strength": 0.1},
        "surgery": {"lr": 0.15, "tolerance": -1.0, "steps": 25, "max_norm": 2.0},
    },
}

TITLE = {"digit": "One digit", "memorised": "Memorised records"}
INTENT = {
    "digit": "Forget one whole digit: every training record of the {digit}.",
    "memorised": "Forget the tenth of the training records that the model fits but would not predict had it not seen them, "
    "by their loss under models trained without them. These are what a network knows by heart.",
}
SCORES = ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership_auc", "average_gap")


@dataclass(frozen=True)
class Trained:
    """A request with the models that it is judged by."""

    request: Request
    original: nn.Module
    retrained: tuple[nn.Module, ...]
    records: tuple[dict[str, float], ...]


def run(out: str | Path = "out/demo", seed: int = 0) -> dict[str, Any]:
    """Train, forget two requests with each method that was tuned for it, retrain, audit; write ``summary.json`` and ``report.html``.

    Args:
        out: folder for the two files.
        seed: of every model and every method.

    Returns:
        The summary: ``{"requests": {name: [row, ...]}, "floor": {name: points}, ...}``.
    """
    out = Path(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    reports = {name: report for name, report, _ in compared(seed)}
    summary = summarise(reports, seed)
    sections = [
        Section(report.title, report, f"{INTENT[name].format(digit=DIGIT)} {report.summary}")
        for name, report in reports.items()
    ]
    with writing(out):
        write_bytes(out / "summary.json", json.dumps(summary, indent=1).encode())
        write_page(
            out / "report.html",
            "expunge: digits that were forgotten",
            sections,
            intro="A small convolutional network was trained on 1,457 scans of handwritten digits, then asked to forget. "
            "Each method is judged by how near it comes to networks retrained without those records.",
        )
    return {**summary, "_reports": reports}


def compared(seed: int) -> Any:
    """(name, report, outcomes) of each request."""
    digits = suite("digits")
    steps = 1 + FOLDS + 2 * REFERENCES + sum(len(tuned) for tuned in SETTINGS.values())
    with progress("demo", steps) as show:
        done = _Counter(show)
        original = done(digits.fit(seed=Key(seed).at("original").seed))
        asked = {
            "digit": split(digits.train, forget=f"label == {DIGIT}"),
            "memorised": most_memorised(digits, digits.train, seed, tick=done),
        }
        for name, request in asked.items():
            trained = retrained(digits, request, original, Key(seed).at(name).seed, done)
            outcomes = {method: done(outcome) for method, outcome in forgotten(digits, trained, name, seed)}
            runs = {method: (outcome.model, outcome.record) for method, outcome in outcomes.items()}
            report = compare(
                original,
                runs,
                request,
                digits.task,
                digits.test,
                trained.retrained,
                trained.records,
                title=TITLE[name],
                names=[str(label) for label in range(10)],
                key=Key(seed),
            )
            yield name, report, outcomes


class _Counter:
    """Passes a result on and counts it for the progress bar."""

    def __init__(self, show: Callable[[int], None]):
        self._show, self._count = show, 0

    def __call__(self, result: Any) -> Any:
        self._count += 1
        self._show(self._count)
        return result


def retrained(digits: Suite, request: Request, original: nn.Module, seed: int, tick: Callable[[Any], Any]) -> Trained:
    """The references: fresh networks trained on the retain data alone, each with its own seed."""
    models, records = [], []
    for number in range(REFERENCES):
        key = Key(seed).at("retrained", number)
        model, record = tick(train_counted(digits.make, request.data("retain"), digits.task, key.seed, digits.recipe))
        models.append(model)
        records.append(record)
    return Trained(request, original, tuple(models), tuple(records))


def forgotten(digits: Suite, trained: Trained, name: str, seed: int) -> Any:
    """(method, outcome) for every method with settings for this kind of request; the others would run untuned."""
    for method, spec in methods().items():
        if method not in SETTINGS[name]:
            continue
        stage = spec.build(**SETTINGS[name][method])
        yield method, unlearn(trained.original, trained.request, task=digits.task, method=stage, seed=seed)


def most_memorised(
    digits: Suite, train: Data, seed: int, share: float = 0.1, tick: Callable[[Any], Any] = lambda x: x
) -> Request:
    """Forget the share of the records with the largest out-of-fold loss: what the model knows only by having seen it.

    Each record's loss is that of a model trained, by the suite's own recipe, on the folds without it.
    """
    order = positions(Key(seed).at("folds"), len(train), len(train), 0)
    loss = torch.empty(len(train))
    for fold in range(FOLDS):
        inside = order[fold::FOLDS]
        outside = torch.ones(len(train), dtype=torch.bool)
        outside[inside] = False
        model = tick(digits.fit(train.select(torch.nonzero(outside).flatten()), Key(seed).at("fold", fold).seed))
        with torch.no_grad():
            loss[inside] = torch.cat([digits.task.nll(model, batch) for batch in train.select(inside).batches(1024)])
    hardest = loss.argsort(descending=True)[: round(share * len(train))]
    return split(train, forget=train.ids[hardest])


def summarise(reports: Mapping[str, Report], seed: int) -> dict[str, Any]:
    """JSON: each row of each request with its scores as value, low, high (accuracies and gaps in points)."""
    rows = {name: [_row(row) for row in report.rows] for name, report in reports.items()}
    floor = {name: _score(report.row("retrain"), "average_gap")["value"] for name, report in reports.items()}
    return {
        "requests": rows,
        "floor": floor,
        "seed": seed,
        "revision": revision(),
        "references": REFERENCES,
        "notes": {name: list(report.notes) for name, report in reports.items()},
    }


def _row(row: Row) -> dict[str, Any]:
    cost = row.record.get("cost", row.record)
    return {
        "method": row.name,
        **{score: _score(row, score) for score in SCORES},
        "seconds": cost.get("seconds", 0.0),
        "backward_examples": cost.get("backward", 0),
        "verdict": row.verdict,
        "notes": list(row.notes),
    }


def _score(row: Row, name: str) -> dict[str, float]:
    reading = row.readings.get(name)
    if reading is None:
        raise Refused(f"the audit of {row.name} has no {name}: {'; '.join(row.notes) or 'it could not be measured'}")
    return {"value": reading.value, "low": reading.low, "high": reading.high}
