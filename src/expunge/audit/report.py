"""``audit`` one model and ``compare`` several: rows of readings, controls in every table, and what they do not show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.audit import context, intervals, judge, words
from expunge.audit.chat import Exchange
from expunge.audit.distance import floor
from expunge.audit.genuine import check_references
from expunge.audit.judge import Equivalence, Verdict
from expunge.audit.subject import Curve, Model, Reading, Subject, back, holdable, plain
from expunge.core import Data, Key, Refused, Request, Task
from expunge.journal import write_bytes
from expunge.registry import asked_for, is_asked, measures, need_extra
from expunge.store import Store
from expunge.version import __version__

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

FORMAT = "expunge-report-2"
ORIGINAL, RETRAIN, NOT_JUDGED = "original", "retrain", "not judged"
ATTACKED = 5  # retrained models that a measure which trains or attacks is held against, each costs as much again
_NUMBERS = ("difference", "low", "high", "margin")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One model of a table.

    Attributes:
        name: of the method, or of the control. kind: "control" or "method".
        readings: measure -> Reading, for those that apply.
        verdict: of a model, one of ``judge.Word``; of the control "retrain", how many of them pass; "not judged" for a model
            that could not be.
        reasons: sentences behind the verdict. tests: the pairs of one-sided tests behind it. needed: see ``judge.Verdict``.
        record: what the run wrote of itself, without its history. history: one mapping per step.
        notes: sentences that a person should read.
    """

    name: str
    kind: str
    readings: Mapping[str, Reading]
    verdict: str = ""
    record: Record = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    tests: tuple[Equivalence, ...] = ()
    needed: int | None = None

    def ruled(self, verdict: Verdict) -> Row:
        """The row with this verdict."""
        return replace(self, verdict=verdict.word, reasons=verdict.reasons, tests=verdict.tests, needed=verdict.needed)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        history = [{name: plain(back(value)) for name, value in step.items()} for step in self.history]
        return {
            "name": self.name,
            "kind": self.kind,
            "verdict": self.verdict,
            "notes": list(self.notes),
            "reasons": list(self.reasons),
            "tests": [
                {name: plain(v) if isinstance(v, float) else v for name, v in vars(t).items()} for t in self.tests
            ],
            "needed": self.needed,
            "readings": {name: reading.to_json() for name, reading in self.readings.items()},
            "record": holdable(self.record),
            "history": history,
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Row:
        """The inverse of ``to_json``."""
        readings = {name: Reading.from_json(reading) for name, reading in tree["readings"].items()}
        return Row(
            tree["name"],
            tree["kind"],
            readings,
            tree["verdict"],
            tree["record"],
            tuple(tree["history"]),
            tuple(tree["notes"]),
            tuple(tree["reasons"]),
            tuple(Equivalence(**{**test, **{part: back(test[part]) for part in _NUMBERS}}) for test in tree["tests"]),
            tree["needed"],
        )


@dataclass(frozen=True)
class Report:
    """A table in which every number has an interval and every method stands beside doing nothing and retraining.

    Attributes:
        title: for people. rows: controls and methods.
        summary: one paragraph in plain language. notes: what a reader must know before using the numbers.
        facts: sizes, classes, task, number of retrained models, revision (JSON-able).
        exchanges: questions and what the models answer, where they are language models.
    """

    title: str
    rows: tuple[Row, ...]
    summary: str = ""
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    exchanges: tuple[Exchange, ...] = ()

    @property
    def verdict(self) -> str:
        """What the audit says of its model (of the first, where it compares several): one of ``judge.Word``.

        The row says why: ``report.row("unlearned").reasons``. It is about these examples and these measures.
        """
        return next((row.verdict for row in self.rows if row.kind == "method"), "cannot tell")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentences behind the verdict."""
        return next((row.reasons for row in self.rows if row.kind == "method"), ())

    def to_frame(self) -> DataFrame:
        """A pandas table with one line per model and measure: value, interval, band, verdicts (``expunge[files]``)."""
        pandas = need_extra("pandas", "files", "Report.to_frame")
        lines = [
            {
                "model": row.name,
                "kind": row.kind,
                "verdict": row.verdict,
                "measure": name,
                **{part: getattr(found, part) for part in ("value", "low", "high", "n", "unit", "better")},
                "reference_low": math.nan if found.reference is None else found.reference[0],
                "reference_high": math.nan if found.reference is None else found.reference[1],
                "reading": found.verdict,
            }
            for row in self.rows
            for name, found in row.readings.items()
        ]
        return pandas.DataFrame(lines)

    def row(self, name: str) -> Row:
        """The row called `name`."""
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise Refused(f"the report has no row {name!r}; it has {', '.join(row.name for row in self.rows)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``Report.from_json`` reads it back."""
        return {
            "format": FORMAT,
            "expunge": __version__,
            "title": self.title,
            "summary": self.summary,
            "notes": list(self.notes),
            "facts": holdable(self.facts),
            "rows": [row.to_json() for row in self.rows],
            "exchanges": [exchange.to_json() for exchange in self.exchanges],
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Report:
        """The inverse of ``to_json``.

        Raises:
            Refused: for a mapping that is not a report of this format.
        """
        if tree.get("format") != FORMAT:
            raise Refused(f"this is no report of expunge: expected format {FORMAT!r}, found {tree.get('format')!r}")
        rows = tuple(Row.from_json(row) for row in tree["rows"])
        told = tuple(Exchange.from_json(exchange) for exchange in tree.get("exchanges", ()))
        return Report(tree["title"], rows, tree["summary"], tuple(tree["notes"]), tree["facts"], told)

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json`` and ``report.html``, each whole or not at all; returns the folder."""
        from expunge.audit.page import Section, write_page

        folder = Path(folder)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        write_bytes(folder / "report.json", text.encode())
        write_page(folder / "report.html", self.title, [Section(self.title, self)])
        return folder

    def table(self) -> Table:
        """For a terminal."""
        from expunge.audit.table import table

        return table(self)


def audit(
    subject: Subject,
    *,
    extra_rows: Sequence[Row] = (),
    name: str = "unlearned",
    title: str = "Audit",
    also: Sequence[str] = (),
    trust_references: bool = False,
) -> Report:
    """Judge one model: every measure that applies, with intervals, beside doing nothing and retraining.

    It does not prove forgetting: it says whether these measures tell the model from retrained ones.

    Args:
        subject: the model and what it is judged against.
        extra_rows: further rows for the same table, judged elsewhere.
        name: of the model's row. title: of the report.
        also: measures that train or attack, by name, which run only where they are asked for; "all" for every one.
        trust_references: do not look whether the retrained models saw the forget data (``genuine.check_references``).
    """
    asked_for(also)
    for taken in (name, *(row.name for row in extra_rows)):
        _free(taken)
    _apart(subject)
    row = measured(subject, name, "method", also)
    return _report(subject, [row, *extra_rows], title, also, trust_references)


def compare(
    original: Model,
    methods: Mapping[str, tuple[Model, Record | None]],
    request: Request,
    task: Task,
    test: Data | None = None,
    retrained: Sequence[Model] = (),
    retrain_records: Sequence[Record] = (),
    *,
    title: str = "Audit",
    names: Sequence[str] = (),
    key: Key = Key(0),
    draws: int = 500,
    also: Sequence[str] = (),
    store: Store | None = None,
    originals: Sequence[Model] = (),
    trust_references: bool = False,
) -> Report:
    """Judge several models of one request in one table, on the same resampled examples.

    Args:
        original: the model before forgetting; it is the row "original" (do nothing).
        methods: name -> (model that was made to forget, record of its run or None).
        request, task, test: what was forgotten and kept, the modality, unseen examples.
        retrained: models trained without the forget data by the same recipe, with other seeds; three or more for a
            spread. Each is held out in turn and judged against the others: the row "retrain".
        retrain_records: their records, in the same order, or at least ``{"seconds": ..., "backward": ...}``.
        names: names of the classes. key, draws: of the bootstrap.
        also, trust_references: see ``audit``. store, originals: see ``Subject``.
    """
    asked_for(also)
    for name in methods:
        _free(name)
    subject = Subject(
        original,
        original,
        request,
        task,
        test,
        tuple(retrained),
        tuple(names),
        None,
        tuple(retrain_records),
        key,
        draws,
        store=store,
        originals=tuple(originals),
    )
    _apart(subject)
    rows = []
    for name, (model, record) in methods.items():
        try:
            rows.append(measured(subject.judging(model, record=record), name, "method", also))
        except Refused as error:
            rows.append(Row(name, "method", {}, NOT_JUDGED, notes=(str(error),)))
    return _report(subject, rows, title, also, trust_references)


def _free(name: str) -> None:
    if name in (ORIGINAL, RETRAIN):
        raise Refused(f"a method is called {name!r}, which is the name of a control: give it another name")


def _apart(subject: Subject) -> None:
    """Refuse one retrained model that is given twice: of a spread, which is what the verdict needs, two equal ones know
    nothing."""
    seen: dict[bytes, int] = {}
    for number, model in enumerate(subject.retrained):
        said = subject.answers(model)
        if said in seen:
            raise Refused(
                f"retrained models {seen[said] + 1} and {number + 1} are the same: they answer alike, to the last bit, on "
                f"every example; give each model once, trained with a seed of its own"
            )
        seen[said] = number


def measured(subject: Subject, name: str, kind: str, also: Sequence[str] = ()) -> Row:
    """One row: every measure that applies, judged against the retrained models; the audit has not yet judged itself.

    A retrained model that is itself judged, or one that answers as the judged one, does not judge.
    """
    own = subject.answers(subject.after)
    others = tuple(model for model in subject.retrained if subject.answers(model) != own)
    itself: tuple[str, ...] = ()
    if len(others) < len(subject.retrained):
        itself = ("It is one of the retrained models, and was judged against the others.",)
        subject = replace(subject, retrained=others)
    found, refusals = _found(subject, also)
    references = {name: _references(subject, reading) for name, reading in found.items()}
    tests = max(1, len(judge.deciding(found, references)))
    readings = {name: judge.judged(reading, references[name], tests) for name, reading in found.items()}
    record = subject.record or {}
    history = tuple(record.get("history", ()))
    kept = {key: value for key, value in record.items() if key not in ("history", "notes")}
    row = Row(name, kind, readings, "", kept, history, (*record.get("notes", ()), *itself, *refusals))
    enough = judge.ENOUGH - (len(subject.retrained) < len(subject.family))  # one of them may be held out
    return row.ruled(judge.decide(found, references, enough))


def _found(subject: Subject, also: Sequence[str]) -> tuple[dict[str, Reading], tuple[str, ...]]:
    """Every reading; a measure that was asked for and cannot be had is a sentence, and not the end of the audit."""
    found, refusals = {}, []
    for name, function in asked_for(also).items():
        try:
            reading = function(_few(subject) if is_asked(name) else subject)
        except Refused as error:
            if not is_asked(name):
                raise
            refusals.append(f"{name} was not measured: {error}")
            continue
        if reading is not None:
            found[name] = reading
    return found, tuple(refusals)


def _few(subject: Subject) -> Subject:
    """The same audit with few retrained models, for measures that train or attack each of them."""
    return subject.judging(subject.after, subject.retrained[:ATTACKED], subject.record)


def _references(subject: Subject, reading: Reading) -> list[Reading]:
    """The measure of each retrained model, held out from the others; of a few only, where it attacks or trains."""
    if reading.better != "nearer_retrained":
        return []
    models = subject.retrained[:ATTACKED] if is_asked(reading.name) else subject.retrained
    found = (_alone(subject, model, reading.name) for model in models)
    return [reading for reading in found if reading is not None]


def _alone(subject: Subject, model: Model, name: str) -> Reading | None:
    """A measure of one retrained model against the rest of the whole family: the same in whatever row it is asked."""
    family = subject.family[:ATTACKED] if is_asked(name) else subject.family
    rest = tuple(other for other in family if other is not model)
    return subject.cache.get(model, f"alone {name}", lambda: _try(name, subject.judging(model, rest)))


def _try(name: str, subject: Subject) -> Reading | None:
    try:
        return measures()[name](subject)
    except Refused:
        if not is_asked(name):
            raise
        return None


def _report(subject: Subject, rows: Iterable[Row], title: str, also: Sequence[str], trusted: bool) -> Report:
    do_nothing = measured(subject.judging(subject.before), ORIGINAL, "control", also)
    each = [
        measured(subject.held_out(number), RETRAIN, "control", also if number < ATTACKED else ())
        for number in range(len(subject.retrained))
    ]
    wrong = "" if trusted else _wrong_references(subject)
    ruled = [_controlled(subject, row, do_nothing, each, wrong) for row in rows]
    held = _held_out(subject, each)
    passes = do_nothing.verdict == "forgotten"  # which is a word that must not stand beside a model that forgot nothing
    nothing = _controlled(subject, do_nothing, do_nothing, each, wrong) if passes else do_nothing
    table = (nothing, *ruled, *([held] if held is not None else []))
    facts = context.facts(subject)
    notes = tuple(context.notes(subject, do_nothing, held))
    return Report(title, table, words.summary(table, facts), notes, facts)


def _wrong_references(subject: Subject) -> str:
    """The sentence about a retrained model that was trained on the wrong data; "" where none is found."""
    try:
        check_references(subject)
    except Refused as error:
        return str(error)
    return ""


def _controlled(subject: Subject, row: Row, do_nothing: Row, each: Sequence[Row], wrong: str) -> Row:
    """The row, after doing nothing and the held-out retrained models have been judged by the same rule."""
    if row.verdict == NOT_JUDGED:
        return row
    if wrong:
        return row.ruled(Verdict("audit broken", (wrong, *row.reasons), None, row.tests))
    return row.ruled(
        judge.controlled(_verdict(row), _verdict(do_nothing), _needed(subject, do_nothing), [_verdict(r) for r in each])
    )


def _verdict(row: Row) -> Verdict:
    word: Any = row.verdict
    return Verdict(word, row.reasons, row.needed, row.tests)


def _needed(subject: Subject, do_nothing: Row) -> int | None:
    """Retrained models with which doing nothing would be found to remember, by some deciding measure."""
    names = [t.name for t in do_nothing.tests if judge.direction(t.name, t.difference) == "under-forgot"]
    found = [
        judge.needed_to_tell(
            do_nothing.readings[name], _references(subject, do_nothing.readings[name]), len(do_nothing.tests)
        )
        for name in names
    ]
    return min((number for number in found if number is not None), default=None)


def _held_out(subject: Subject, each: Sequence[Row]) -> Row | None:
    """The control "retrain": each retrained model in turn judged against the others, then averaged."""
    if not each:
        return None
    names = {name: None for row in each for name in row.readings}
    readings = {name: _pooled([row.readings[name] for row in each if name in row.readings]) for name in names}
    level = floor(subject)
    if level is not None and "average_gap" in readings:
        readings["average_gap"] = replace(readings["average_gap"], value=level.value, low=level.low, high=level.high)
    passed = sum(row.verdict == "forgotten" for row in each)
    verdict = f"{passed} of {len(each)} pass" if len(each) > judge.ENOUGH - 1 else ""
    failures = tuple(
        f"retrained model {number}: {row.verdict} ({'; '.join(row.reasons)})"
        for number, row in enumerate(each)
        if row.verdict != "forgotten" and verdict
    )
    record = dict(subject.retrain_records[0]) if subject.retrain_records else {}
    history = tuple(record.pop("history", ()))
    return Row(RETRAIN, "control", readings, verdict, record, history, reasons=failures)


def _pooled(readings: Sequence[Reading]) -> Reading:
    """The mean over retrained models. Its interval holds Student's over models and their mean own one over examples."""
    if len(readings) == 1:
        return readings[0]
    values = [reading.value for reading in readings]
    low, high = intervals.t_interval(values)
    low, high = (
        min(low, float(np.mean([r.low for r in readings]))),
        max(high, float(np.mean([r.high for r in readings]))),
    )
    first = readings[0]
    top = judge.ceiling(first)
    if top is not None:
        low, high = max(0.0, low), min(top, high)
    if first.better == "lower":
        low = max(0.0, low)
    shared = set.intersection(*(set(reading.detail) for reading in readings))
    detail = {
        name: float(np.mean([reading.detail[name] for reading in readings])) for name in first.detail if name in shared
    }
    return replace(
        first,
        value=float(np.mean(values)),
        low=low,
        high=high,
        n=len(readings),
        reference=None,
        verdict="",
        detail=detail,
        curves=_pooled_curves(readings),
    )


def _pooled_curves(readings: Sequence[Reading]) -> dict[str, Curve]:
    """The mean line over models with the range of the lines about it, where they have their points in common."""
    pooled: dict[str, Curve] = {}
    for name, first in readings[0].curves.items():
        curves = [reading.curves[name] for reading in readings if name in reading.curves]
        if len(curves) < len(readings) or any(curve[0] != first[0] for curve in curves):
            continue
        heights = np.array([curve[1] for curve in curves])
        parts = (first[0], heights.mean(0), heights.min(0), heights.max(0))
        pooled[name] = tuple(tuple(float(value) for value in part) for part in parts)
    return pooled
