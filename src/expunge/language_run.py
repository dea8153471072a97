"""What a run on a language model does beside any other: one copy of the model, other answers, questions for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from expunge.audit.chat import Exchange
from expunge.audit.words import title
from expunge.core import Key, Refused, Request, Stage
from expunge.registry import find, methods
from expunge.run import ALTERNATES, bounds
from expunge.single import lean
from expunge.spec import RunSpec
from expunge.tasks.generation import generate_ids
from expunge.texts import Language

if TYPE_CHECKING:
    from expunge.audit import Report, Subject

LONGEST = 1200
"""Characters of a question or an answer that a report keeps."""
SMALL = 30_000_000
"""Weights up to which the methods' default learning rates were tried."""


def with_alternates(spec: RunSpec, language: Language, request: Request, stage: Stage) -> tuple[Request, list[str]]:
    """The request with other answers to give, for a method that learns them: from a file, or written by the model itself.

    What the model writes is kept in the run's folder and read back by the same command.
    """
    if not any("column:win" in bound.spec.needs for bound in bounds(stage)):
        if spec.data.alternates is not None:
            raise Refused(f"method {spec.method.name} learns no alternate answers: remove [data] alternates")
        return request, []
    own = None if spec.out is None else spec.out / ALTERNATES
    encoded = language.alternates(spec.data.alternates, own, Key(spec.run.seed))
    return replace(request, forget=encoded.data), list(encoded.notes)


def prepared(spec: RunSpec, language: Language, request: Request, stage: Stage) -> tuple[Stage, bool, list[str]]:
    """A stage that needs no second copy of the model where that can be; whether one is held; and sentences to read."""
    notes = [*language.notes, *about_rate(spec, language.found.model)]
    try:
        return lean(stage, request, language.task), False, notes
    except Refused as error:
        return stage, True, [*notes, f"a second copy of the model is held: {error}"]


def answers(language: Language, subject: Subject) -> tuple[Exchange, ...]:
    """A few questions, put to the model before, after, and one retrained."""
    models = {"original": subject.before, "unlearned": subject.after}
    models |= {"retrained": subject.retrained[0]} if subject.retrained else {}
    opened = {name: subject.opened(model) for name, model in models.items()}
    return exchanges(language.asked(), opened, language.found.tokenizer)


def about_answers(report: Report) -> list[str]:
    """A sentence where the model's own answers are of another kind than those of retrained models."""
    found = {row.name: row.readings for row in report.rows}
    said = []
    for name in ("lm_repetition", "lm_fluency"):
        own, other = (found.get(row, {}).get(name) for row in ("unlearned", "retrain"))
        if own is not None and other is not None and own.verdict == "outside":
            said.append(
                f"{title(name).lower()}, is {own.value:.3g} {own.unit} and {other.value:.3g} of retrained models"
            )
    if not said:
        return []
    return [
        f"its own answers are unlike those of retrained models: {'; '.join(said)}. The verdict does not judge that: read them"
    ]


def exchanges(
    asked: Sequence[tuple[str, str, str, Sequence[int]]],
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    *,
    new_tokens: int = 80,
    batch: int = 8,
) -> tuple[Exchange, ...]:
    """Put each question to each model.

    The answers are greedy: what a model would say most likely, not all it could be brought to say.

    Args:
        asked: (part, question, true answer, token ids of the prompt). models: name -> model, in the order to be shown.
        tokenizer: of all of them. new_tokens, batch: of the writing.

    Raises:
        Refused: where there is no model.
    """
    if not models:
        raise Refused("exchanges needs at least one model to ask")
    prompts = [ids for *_, ids in asked]
    said = {
        name: generate_ids(model, tokenizer, prompts, new_tokens=new_tokens, batch=batch)
        for name, model in models.items()
    }
    return tuple(
        Exchange(part, _short(question), _short(truth), {name: _short(told[place]) for name, told in said.items()})
        for place, (part, question, truth, _) in enumerate(asked)
    )


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def about_rate(spec: RunSpec, model: nn.Module) -> list[str]:
    """A sentence where a method's default learning rate is used on a model far larger than it was tried on."""
    size = sum(p.numel() for p in model.parameters())
    settings = find("method", spec.method.name, methods()).settings()
    if size <= SMALL or "lr" not in settings or "lr" in (spec.method.model_extra or {}):
        return []
    return [
        f"the learning rate is the method's default, tried on models of up to {SMALL // 1_000_000} million weights, and this "
        f"one has {size / 1e6:,.0f}: papers use 1e-5 for all weights of a model of billions and 1e-4 in an adapter; give "
        f"method.lr"
    ]
