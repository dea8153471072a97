"""Worst-case selection as a stage: a chain that chooses its own hardest forget set, and then runs a method on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from expunge.challenges.worst_case import fine_tuning, worst_case
from expunge.class_choice import training_data
from expunge.core import Case, Stage, require


@dataclass(frozen=True)
class ForgetWorstCase:
    """Set the request to forget the `size` examples (or classes) whose influence is hardest to erase.

    For the stages after this one: forget and retain data together are taken for the training data, and split anew by
    ``worst_case``, which is where the formula, the paper and the departures stand. No weight changes. The rows of every
    lower level are metered. A run that was killed chooses anew from the start of this stage, and chooses the same.

    It does not promise the global worst case, nor that what it finds with one lower level is the worst for the method
    that follows. Choose a method's settings on another request than the one that was chosen to be hard for it.

    Args:
        size: to forget, 1 to one less than there are.
        by: "example" or "class".
        lower: the unlearning of the lower level; it must be a stage that obeys the column ``weight``.
        rounds: upper steps, >= 1. lr: of the upper level, > 0. gamma: >= 0; towards even weights.
        start: "even" or "random". reverse: the easiest to erase instead.
        batch: examples per forward pass; for memory only.

    Raises:
        Refused: for a size out of range, or classes where the task has none.
    """

    size: int
    by: Literal["example", "class"] = "example"
    lower: Stage = field(default_factory=fine_tuning)
    rounds: int = 5
    lr: float = 1.0
    gamma: float = 0.0
    start: Literal["even", "random"] = "even"
    reverse: bool = False
    batch: int = 256

    def __post_init__(self) -> None:
        require(self.by in ("example", "class"), self, "by", "'example' or 'class'")
        require(self.start in ("even", "random"), self, "start", "'even' or 'random'")
        require(callable(self.lower), self, "lower", "a stage, such as methods.finetune()")
        for name in ("size", "rounds", "batch"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, self, name, "a whole number of at least 1")
        require(self.lr > 0, self, "lr", "above 0")
        require(self.gamma >= 0, self, "gamma", "at least 0")

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        found = worst_case(
            case.model,
            training_data(case.request),
            case.task,
            self.size,
            by=self.by,
            lower=self.lower,
            rounds=self.rounds,
            lr=self.lr,
            gamma=self.gamma,
            start=self.start,
            reverse=self.reverse,
            batch=self.batch,
            key=key,
            meter=case.meter,
        )
        chosen = f"classes {', '.join(map(str, found.classes))}" if found.classes else f"{len(found.ids)} examples"
        case.meter.note(f"{chosen} were chosen to be forgotten, as the worst case of {self.rounds} rounds")
        request = replace(case.request, forget=found.request.forget, retain=found.request.retain)
        return replace(case, request=request, rng=rng)
