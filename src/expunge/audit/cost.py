"""What forgetting cost, from the record of the run, beside the price of retraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.audit.subject import Reading, Subject
from expunge.registry import measure


@measure
def seconds(subject: Subject) -> Reading | None:
    """Wall-clock seconds of the run; one measurement on one machine, so without an interval."""
    return _cost(subject, "seconds", "s")


@measure
def forward_rows(subject: Subject) -> Reading | None:
    """Examples that went forward through a model during the run, teachers included."""
    return _cost(subject, "forward", "rows", "forward_rows")


@measure
def backward_rows(subject: Subject) -> Reading | None:
    """Examples that were differentiated during the run (a second derivative counts twice)."""
    return _cost(subject, "backward", "rows", "backward_rows")


def spent(record: Mapping[str, Any] | None, what: str) -> float | None:
    """A price in a record: under "cost" (a record of ``unlearn``), or at the top of a plain mapping."""
    if record is None:
        return None
    found = (record.get("cost") or record).get(what)
    return None if found is None else float(found)


def retraining(subject: Subject, what: str) -> float | None:
    """The mean price of one retrained model."""
    found = [value for record in subject.retrain_records if (value := spent(record, what)) is not None]
    return sum(found) / len(found) if found else None


def _cost(subject: Subject, what: str, unit: str, name: str = "") -> Reading | None:
    value = spent(subject.record, what)
    if value is None:
        return None
    whole = retraining(subject, what)
    detail = {} if not whole else {"ratio_to_retraining": value / whole}
    return Reading(name or what, value, value, value, 1, unit, "lower", detail=detail)
