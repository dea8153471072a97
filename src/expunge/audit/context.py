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
            f"itself cannot be told from fewer than {judge.ENOUGH}, so there is no verdict."
        )
    if count >= judge.ENOUGH and do_nothing.verdict in ("forgotten", "cannot tell"):
        yield (
            "Doing nothing cannot be told from retraining here, so neither can a method that forgets: "
            "a harder forget set, or more retrained models, may tell."
        )
    if not subject.has("retain") and not subject.has("test"):
        yield (
            "Neither retain nor test data were given: whether the model still does what it was to keep is not judged here, "
            "and a model that is of no use otherwise may be called forgotten."
        )
    if not subject.has("test"):
        yield "No test data was given: test accuracy and membership are missing, and the gap is over fewer metrics."
    if subject.has("test") and subject.forgotten_classes() and not subject.has("test_forgotten"):
        yield (
            "The test data has no example of the forgotten classes: whether the records are told from others of their "
            "class cannot be measured."
        )
    if held is not None and held.verdict and held.verdict != f"{count} of {count} pass":
        yield f"Of the retrained models, each held out, {held.verdict} by the rule that judges the methods."


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
        "class_names": list(subject.names),
        "chance": plain(chance(subject)),
        "key": subject.key.seed,
        "draws": subject.draws,
        "revision": revision(),
    }
