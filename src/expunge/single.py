"""A run that holds one model: what a method asks of the original is cached before, or it runs in an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expunge.core import Case, Chain, Refused, Request, Stage, Task, chain
from expunge.reference import CacheReference, preferable
from expunge.registry import Bound
from expunge.run import parts

COLUMNS = {"reference", "reference_tokens", "win_reference", "refusal_references"}
"""Columns of the forget data that can stand for the original model."""


@dataclass(frozen=True)
class Cached:
    """A stage with its references cached before it. It goes by the stage's own name."""

    reference: CacheReference
    inner: Stage

    @property
    def name(self) -> str:
        """That of the stage."""
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    @property
    def provides(self) -> tuple[str, ...]:
        """Needs that the columns meet."""
        return self.reference.provides

    @property
    def stage(self) -> Chain:
        """Both, one after the other, each with a boundary to resume at."""
        return chain(self.reference, self.inner)

    def __call__(self, case: Case) -> Case:
        return self.stage(case)


def lean(stage: Stage, request: Request, task: Task, *, folder: str | None = None, batch: int = 32) -> Stage:
    """The stage made ready for ``unlearn(..., copy=False)``: the original model is never held beside the one that changes.

    References that a column of the forget data can hold are cached before the first step. What asks the original model
    anew at every step (a divergence from it) needs an adapter, whose original is the same model with the adapter off.
    A stage that asks nothing of the original model comes back as it is. Only registered methods say what they need: a
    ``Descend`` of the caller's own is taken as it is, and refused at its first step if it asks a teacher.

    The model given to ``unlearn`` is then the one that changes: whoever compares with it afterwards loads it again.

    Args:
        stage: a registered method with its settings and the methods that it runs, an adapter around one, or a chain.
        request, task: of the run.
        folder: where references are kept for several runs to share; see ``CacheReference``.
        batch: examples per pass while caching.

    Raises:
        Refused: for a method that needs the original model itself and runs in no adapter, in one sentence.
    """
    wanted = _wanted(stage, request, task, set())
    if not wanted:
        return stage
    reference = CacheReference(
        batch, "reference_tokens" in wanted, bool(wanted & {"win_reference", "refusal_references"}), folder
    )
    return Cached(reference, stage)


def _wanted(stage: Stage, request: Request, task: Task, provided: set[str]) -> set[str]:
    """The columns to cache for all methods in a stage, those that a method was given to run included."""
    wanted: set[str] = set()
    for part in parts(stage):
        if isinstance(part, Bound):
            wanted |= _columns(part, request, task, provided)
            wanted |= _wanted(part.stage, request, task, set(provided))
        provided.update(getattr(part, "provides", ()))
    return wanted


def _columns(bound: Bound, request: Request, task: Task, provided: set[str]) -> set[str]:
    """The columns to cache for a method; none where it needs no original model, or has what it needs."""
    own = set() if request.forget is None else set(request.forget.columns)
    for need in sorted(bound.spec.needs):
        kinds = need.split("|")
        if kinds[0] != "teacher:original":
            continue
        columns = {kind.removeprefix("column:") for kind in kinds[1:]}
        if columns & own or provided & set(kinds[1:]):
            continue
        able = columns & _possible(task, request)
        if able:
            return able
        if "teacher:original" not in provided:
            raise Refused(_sentence(bound.name, columns))
    return set()


def _possible(task: Any, request: Request) -> set[str]:
    if task.stochastic or request.forget is None:
        return set()
    preferred = preferable(task, request.forget)
    return {"reference", "reference_tokens"} | (set() if preferred is None else {preferred})


def _sentence(name: str, columns: set[str]) -> str:
    why = (
        "asks the original model about every batch"
        if not columns & COLUMNS
        else "asks the original model about answers that are drawn anew at every step"
    )
    return (
        f"method {name} {why}, which no cached column can stand for: run it in an adapter (the original is then this model "
        f"with the adapter off), or with copy=True, which holds a second copy of the model"
    )
