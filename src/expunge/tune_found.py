"""The budget of a search, and what it found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.audit.subject import holdable
from expunge.core import Refused
from expunge.tune_trial import Trial
from expunge.version import __version__

FORMAT = "expunge-tuned-1"


@dataclass(frozen=True)
class Budget:
    """What a search may cost: it ends at the first of these.

    Args:
        trials: settings tried, >= 1. seconds: of all trials together; how many fit depends on the machine.
        backward: rows differentiated by all trials together. A trial that was begun is finished.
        per_run: rows that one run may differentiate: dearer settings are not feasible, and not tried where the method
            declares its cost.

    The models of proxies are trained before, and are not counted.
    """

    trials: int = 30
    seconds: float | None = None
    backward: int | None = None
    per_run: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "backward", "per_run"):
            value = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if wrong and not (value is None and name != "trials"):
                raise Refused(f"{name} must be a whole number of at least 1, found {value!r}")
        if self.seconds is not None and not self.seconds > 0:
            raise Refused(f"seconds must be above 0, found {self.seconds!r}")

    def spent(self, trials: Sequence[Trial]) -> str | None:
        """Which part of it these trials have used up."""
        if len(trials) >= self.trials:
            return f"{self.trials} trials"
        if self.seconds is not None and sum(trial.seconds for trial in trials) >= self.seconds:
            return f"{self.seconds:g} seconds"
        if self.backward is not None and sum(trial.backward for trial in trials) >= self.backward:
            return f"{self.backward:,} backward rows"
        return None


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        method: registered name. fixed: settings that were given. trials: in the order they were tried.
        search: rule, floor, space, seed and hashes: what makes two searches the same. budget: as given.
        ended: why the search did.
    """

    method: str
    fixed: Mapping[str, Any]
    trials: tuple[Trial, ...]
    search: Mapping[str, Any]
    budget: Budget
    ended: str

    @property
    def ranked(self) -> tuple[Trial, ...]:
        """The best first; those that broke the floor come last, the least bad first."""
        return tuple(sorted(self.trials, key=lambda trial: (max(0.0, trial.violation), trial.score, trial.number)))

    @property
    def best(self) -> Trial | None:
        """The feasible trial with the least score, the earliest of equals; None where all broke the floor."""
        return next((trial for trial in self.ranked if trial.feasible), None)

    @property
    def settings(self) -> dict[str, Any]:
        """The best trial's, with what was fixed.

        Raises:
            Refused: where no trial kept the utility.
        """
        if self.best is None:
            raise Refused(self.why_none())
        return {**self.fixed, **self.best.settings}

    def why_none(self) -> str:
        """The sentence for a search of which no trial kept the utility."""
        return (
            f"none of the {len(self.trials)} settings tried kept the utility within {self.search['floor']:g} points: give "
            f"a larger floor, more trials or another space"
        )

    def toml(self) -> str:
        """The section ``[method]`` of a run file with the best settings."""
        return "\n".join(lines_of(self.method, self.settings)) + "\n"

    def to_json(self) -> dict[str, Any]:
        """JSON-able: everything that is needed to judge the search, or to repeat it."""
        best = self.best
        return {
            "format": FORMAT,
            "expunge": __version__,
            "method": self.method,
            "settings": None if best is None else holdable(self.settings),
            "best": None if best is None else best.number,
            "ended": self.ended,
            "budget": vars(self.budget),
            "spent": {
                "trials": len(self.trials),
                **{
                    part: sum(getattr(trial, part) for trial in self.trials)
                    for part in ("seconds", "forward", "backward")
                },
            },
            "search": dict(self.search),
            "trials": [trial.to_json() for trial in self.trials],
        }


def lines_of(method: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """The section ``[method]`` of a run file; a part that was given as an object is left to the reader."""
    yield "[method]"
    yield f'name = "{method}"'
    for name, value in settings.items():
        try:
            yield f"{name} = {_toml(value)}"
        except TypeError:
            yield f"# {name} = {value}: a part, write it as a table"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value)
