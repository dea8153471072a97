"""One trial of a search: runs with some settings, each judged, ended early where they cannot win."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from expunge import progress
from expunge.audit.subject import classifies, holdable
from expunge.core import Key, Refused, RunFailed, Stage, Task
from expunge.descend import Descend
from expunge.registry import Bound, Method, tasks
from expunge.run import parts, unlearn
from expunge.tune_rules import SEEDS, Problem
from expunge.watch import ROW, Stop, Stopped, Watch
from expunge.weights import hash_tensors, tensors_of

FAILED = 1000.0  # points of utility that a run without a result counts as having lost, and its score
LOOKS, EXAMPLES, PATIENCE = 8, 128, 3  # along a run; hopeless is what is found so often in a row
HOPELESS = 0.5  # share of the way to knowing nothing


@dataclass(frozen=True)
class Trial:
    """What came of one setting.

    Attributes:
        number: from 0. settings: of the dimensions of the space.
        score: the less the better. violation: points of utility lost beyond the floor; feasible where it is 0 or less.
        drop: points lost. runs: readings of each run. weights: hashes of the models that came out.
        seconds, forward, backward: what it cost. note: why it was ended early, or "".
    """

    number: int
    settings: Mapping[str, Any]
    score: float
    violation: float
    drop: float
    runs: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[str, ...] = ()
    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    note: str = ""

    @property
    def feasible(self) -> bool:
        """Whether the utility stayed above the floor in every run."""
        return self.violation <= 0

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **vars(self),
            "settings": dict(self.settings),
            "runs": [holdable(run) for run in self.runs],
            "weights": list(self.weights),
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Trial:
        """The inverse of ``to_json``.

        Raises:
            Refused: for what is no trial.
        """
        try:
            return Trial(**{**tree, "runs": tuple(tree["runs"]), "weights": tuple(tree["weights"])})
        except (KeyError, TypeError) as error:
            raise Refused(f"this is no trial of a search ({error}): delete the search's folder") from error


@dataclass(frozen=True)
class Bench:
    """How settings of one method are tried: see the arguments of ``tune``."""

    method: Method
    fixed: Mapping[str, Any]
    problems: tuple[Problem, ...]
    task: Task
    floor: float
    per_run: int | None
    seeds: int
    key: Key
    scope: Sequence[str] | None = None
    wrap: Callable[[Stage], Stage] = field(default=lambda stage: stage, repr=False)

    def stage(self, settings: Mapping[str, Any]) -> Stage:
        """The method with these settings and those that are fixed."""
        return self.wrap(self.method.build(**{**self.fixed, **settings}))

    def tried(self, number: int, settings: Mapping[str, Any], before: Sequence[Trial] = ()) -> Trial:
        """Run the settings on every problem; a trial that breaks the floor is not run on the others.

        Raises:
            Refused: where even the first trial, of the settings as they are, cannot be run.
        """
        again = next((trial for trial in before if trial.settings == settings), None)
        if again is not None:
            costs: dict[str, Any] = {"seconds": 0.0, "forward": 0, "backward": 0}
            return replace(again, number=number, **costs, note=f"the settings of trial {again.number} again")
        begun, quiet = time.perf_counter(), progress.enabled.set(False)  # one bar at a time: the search's
        found = _Tally()
        try:
            for problem in self.problems:
                for run in range(self.seeds):
                    self._run(found, problem, settings, run)
                    if found.note or found.drop > self.floor:
                        return self._trial(number, settings, found, time.perf_counter() - begun)
        except Refused as error:
            if number == 0:
                raise
            found.fail(str(error))
        finally:
            progress.enabled.reset(quiet)
        return self._trial(number, settings, found, time.perf_counter() - begun)

    def _trial(self, number: int, settings: Mapping[str, Any], found: _Tally, seconds: float) -> Trial:
        score = FAILED if found.note or not found.scores else sum(found.scores) / len(found.scores)
        note, total = found.note, len(self.problems) * self.seeds
        if not note and found.drop > self.floor:
            note = f"lost {found.drop:.3g} points of utility" + (
                f" in run {len(found.scores)} of {total}" if len(found.scores) < total else ""
            )
        return Trial(
            number,
            dict(settings),
            score,
            found.drop - self.floor,
            found.drop,
            tuple(found.runs),
            tuple(found.weights),
            seconds,
            found.forward,
            found.backward,
            note,
        )

    def _run(self, found: _Tally, problem: Problem, settings: Mapping[str, Any], run: int) -> None:
        """One run of ``unlearn``, judged."""
        declared = self._declared(problem, settings)
        if self.per_run is not None and declared > self.per_run:
            found.fail(f"a run would differentiate {declared:,} rows, more than {self.per_run:,}")
            return
        stage = self.stage(settings)
        seed = self.key.at("run", problem.name, run).seed % SEEDS
        watch = self._watch(stage, problem)
        try:
            outcome = unlearn(
                problem.original,
                problem.request,
                task=self.task,
                method=stage,
                seed=seed,
                scope=self.scope,
                watch=watch,
            )
        except RunFailed as error:
            found.pay(error.cost if isinstance(error, Stopped) else {"backward": declared})
            found.fail(str(error))
            return
        cost = outcome.record["cost"]
        found.pay(cost)
        if self.per_run is not None and cost["backward"] > self.per_run:
            found.fail(f"a run differentiated {cost['backward']:,} rows, more than {self.per_run:,}")
            return
        judged = problem.judge(outcome.model)
        found.scores.append(judged.score)
        found.drop = max(found.drop, judged.drop)
        found.runs.append(
            {"problem": problem.name, "seed": seed, "score": judged.score, "drop": judged.drop, **judged.readings}
        )
        found.weights.append(hash_tensors(tensors_of(outcome.model)))

    def _declared(self, problem: Problem, settings: Mapping[str, Any]) -> int:
        """Rows that a run will differentiate, as the method declares; 0 where it cannot be told beforehand."""
        if self.task.name not in tasks():
            return 0
        known = {name: parameter.default for name, parameter in self.method.settings().items()}
        sizes = len(problem.request.data("forget")), len(problem.request.data("retain"))
        return self.method.rows({**known, **self.fixed, **settings}, *sizes, self.task.name)["backward"]

    def _watch(self, stage: Stage, problem: Problem) -> Watch | None:
        """A look now and then that ends a hopeless run; not where stages follow each other, which may harm and then repair."""
        loops = list(_loops(stage))
        if len(loops) != 1:
            return None
        every = max(1, (loops[0].steps or LOOKS * 10) // LOOKS)
        return Watch(every, EXAMPLES, stop=hopeless(self.task, problem))


@dataclass
class _Tally:
    """What the runs of a trial add up to."""

    scores: list[float] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    drop: float = -FAILED
    forward: int = 0
    backward: int = 0
    note: str = ""

    def pay(self, cost: Mapping[str, Any]) -> None:
        """Count what a run cost, looks included."""
        self.forward += cost.get("forward", 0) + cost.get("checks", 0)
        self.backward += cost.get("backward", 0)

    def fail(self, why: str) -> None:
        """A run that gave nothing to judge."""
        self.drop, self.note = FAILED, why


def _loops(stage: Stage) -> Iterator[Descend]:
    """The gradient loops that a stage is made of, as far as they can be seen."""
    for part in parts(stage):
        if isinstance(part, Bound):
            yield from _loops(part.stage)
        elif isinstance(part, Descend):
            yield part


def hopeless(task: Any, problem: Problem) -> Stop:
    """Whether the retain data are, look after look, nearer to knowing nothing than to how well they were known."""
    batch = problem.request.data("retain").batch(torch.arange(min(256, len(problem.request.data("retain")))))
    accuracy = classifies(task)
    chance = 100 / task.classes if accuracy else float(task.chance(batch))
    seen: list[float] = []

    def stop(found: Mapping[str, float]) -> str | None:
        seen.append(found[f"{ROW}retain"])
        way = chance - seen[0]
        if abs(way) < 0.05 * abs(chance) or (way > 0) == accuracy:  # it knew next to nothing before
            return None
        late = [value for value in seen[1:][-PATIENCE:] if (value - seen[0]) / way > HOPELESS]
        if len(late) < PATIENCE:
            return None
        return f"ended early: on the retain data it went from {seen[0]:.3g} to {seen[-1]:.3g}, and {chance:.3g} is knowing nothing"

    return stop
