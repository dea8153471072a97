"""What a table is about, and what its reader must know before using a number of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from expunge.audit import judge
from expunge.audit.distance import chance
from expunge.audit.subject import Subject, plain
from expunge.version import revision

if TYPE_CHECKING:
    from expunge.audit.report import Row


def notes(subject: Subject, do_nothing: Row, held: Row | None) -> Iterable[str]:
    """Sentences: what is missing, what this request cannot show, how the rule treats genuine retrained models."""
    count = len(subject.retrained)
    if count == 0:
        yield (
            "No retrained model was given: the target is unknown, so nothing here is judged. Retrain at least three "
            "times without the forget examples to learn it."
        )
    elif count < judge.ENOUGH:
        yield (
            f"Only {count} retrained model{'s were' if count > 1 else ' was'} given: how much retraining varies by "
            f"itself cannot be told from fewer than {judge.ENOUGH}, so verdicts are provisional."
        )
    gap = do_nothing.readings.get("average_gap")
    if gap is not None and gap.verdict == "within":
        yield (
            "This request cannot show anything: doing nothing is as near to retraining as retrained models are to each "
            "other, so a method that forgets and one that does nothing look alike here."
        )
    if not subject.has("test"):
        yield "No test data was given: test accuracy and membership are missing, and the gap is over fewer metrics."
    if subject.has("test") and subject.forgotten_classes() and not subject.has("test_forgotten"):
        yield (
            "The test data has no example of the forgotten classes: whether the records are told from others of their "
            "class cannot be measured."
        )
    if held is not None and "flagged" in held.verdict:
        yield (
            f"Of the held-out retrained models {held.verdict.removesuffix(' flagged')} would have been called a "
            f"failure by the rule that judges the methods: read single verdicts with care."
        )


def facts(subject: Subject) -> dict[str, Any]:
    """Sizes, classes, the number of retrained models, the key, the revision (JSON-able)."""
    sizes = {
        name: len(subject.outputs(name)) for name in ("forget", "retain", "test", "test_forgotten") if subject.has(name)
    }
    gone = subject.forgotten_classes()
    names = [subject.names[label] if label < len(subject.names) else str(label) for label in gone]
    return {
        "task": subject.task.name,
        "unit": subject.task.unit,
        "examples": sizes,
        "retrained": len(subject.retrained),
        "forgotten_classes": names,
        "chance": plain(chance(subject)),
        "key": subject.key.seed,
        "draws": subject.draws,
        "revision": revision(),
    }
