"""``tune``: find a method's settings by a stated budget of search, without a look at what they will be reported on.

    found = tune(model, request, task=task, method="surgery", rule="proxy", train=recipe, make=make, budget=Budget(30))
    found.settings                       # for methods()["surgery"].build(**found.settings)

What is tried next comes from optuna's TPE sampler. Each finished trial is one JSON file of the search's folder, and every
suggestion is drawn anew from the finished trials and from (seed, number of the trial): so a search that was killed goes on
to the same trials, a larger budget goes on where a smaller one ended, and no sampler has a state to be kept.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from expunge import tune_space
from expunge.audit.subject import holdable
from expunge.core import Data, Key, Refused, Request, Stage, Task, described
from expunge.data.builtin import Recipe
from expunge.journal import write_bytes
from expunge.progress import progress
from expunge.registry import Method, did_you_mean, find, methods, need_extra
from expunge.run import check_model, check_request, check_stage, writing
from expunge.trainer import Train
from expunge.tune_found import Budget, Tuned
from expunge.tune_rules import RULES, SEEDS, Problem, blind, proxies
from expunge.tune_space import Space
from expunge.tune_store import REFERENCES, finished, keep, opened
from expunge.tune_trial import Bench, Trial
from expunge.version import revision

TUNED = "tuned.json"


def tune(
    model: nn.Module | None,
    request: Request,
    *,
    task: Task,
    method: str,
    rule: str = "blind",
    budget: Budget = Budget(),
    floor: float = 2.0,
    target: float | None = None,
    space: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: int = 1,
    out: str | Path | None = None,
    problems: Sequence[Problem] | None = None,
    train: Train | Recipe | None = None,
    make: Callable[[], nn.Module] | nn.Module | None = None,
    count: int = 2,
    retrained: int = 2,
    draw: Callable[[Data, int], Any] | None = None,
    workers: int = 1,
    recipe: str = "",
    scope: Sequence[str] | None = None,
    wrap: Callable[[Stage], Stage] = lambda stage: stage,
) -> Tuned:
    """Search a method's settings for this request, by a rule that looks at no model retrained for it and at no test data.

    The first trial is the method's defaults, so that one sees whether the search was worth it. The same call gives the
    same trials to the bit, however often it is killed and given again with the same `out`; with a budget in seconds how
    many of them depends on the machine. It does not promise that the settings pass an audit: that is to be seen, once,
    after the search.

    Args:
        model: the trained model; not looked at by the rule "proxy", and None will do there.
        request: what is to be forgotten and kept. task: the modality. method: a registered name.
        rule: "blind", see ``tune_rules.blind``, or "proxy": the audit's average gap as a share of do-nothing's, on other
            requests of the same kind, see ``tune_rules.proxies``.
        budget: of the search. target: end it when a feasible trial scores this or less.
        floor: points that accuracy (or loss, in percent of knowing nothing) on retain and held-out data may lose, >= 0;
            trials that lose more are not feasible, are not run to the end, and never win.
        space: the user's own ranges, see ``tune_space.space_of``. fixed: settings that stay as given.
        seed: of every draw. seeds: runs of each setting per problem, >= 1; the score is their mean, the loss their worst.
        out: folder for trials, models of proxies and ``tuned.json``; None keeps nothing.
        problems: proxies that are there already, in place of drawing some: ``tune_rules.proxies`` once for many methods.
        train, make, count, retrained, draw, workers, recipe: how proxies are made, see ``tune_rules.proxies``.
        scope: as ``unlearn``. wrap: put around every stage, an adapter say.

    Raises:
        Refused: for bad input, before any work. MissingExtra: where optuna is not installed.
    """
    optuna = need_extra("optuna", "tune", "expunge tune")
    spec, fixed = checked(method, rule, floor, seeds), dict(fixed or {})
    ranges = tune_space.space_of(spec, fixed, space)
    fixed = {name: value for name, value in fixed.items() if name not in ranges}
    _check_data(request, task)
    first = wrap(spec.build(**fixed))
    check_stage(first, request, {"original": model})
    key = Key(seed).at("tune")
    _check_problems(problems, rule)
    folder = None if out is None else opened(Path(out))
    if rule == "blind":
        if not isinstance(model, nn.Module):
            raise Refused(f"model is a {type(model).__name__}: the blind rule needs the trained model")
        check_model(model, request, task)
        problems = [blind(model, request, task, key)]
    elif problems is None:
        problems = _proxies(request, task, train, make, folder, count, retrained, key, draw, workers, recipe)
    runs = Bench(spec, fixed, tuple(problems), task, floor, budget.per_run, seeds, key, scope, wrap)
    search = _search(spec, fixed, ranges, rule, runs, seed, optuna)
    trials, ended = _searched(optuna, runs, ranges, budget, target, folder, search, seed)
    found = Tuned(method, fixed, tuple(trials), search, budget, ended)
    if folder is not None:
        with writing(folder):
            write_bytes(folder / TUNED, json.dumps(found.to_json(), indent=1).encode())
    return found


def checked(method: str, rule: str, floor: float, seeds: int) -> Method:
    """The method; refuses what needs no look at data."""
    if rule not in RULES:
        raise Refused(f"unknown rule {rule!r}{did_you_mean(str(rule), RULES)}; there are {', '.join(RULES)}")
    if not isinstance(method, str):
        raise Refused(f"method is a {type(method).__name__}: expected a registered name; its settings go into fixed=")
    found: Method = find("method", method, methods())
    if found.promise == "exact":
        raise Refused(
            f"{method} is exact: it equals retraining whatever its settings, so there is nothing to tune; choose an "
            f"approximate method (expunge list methods)"
        )
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor <= 100:
        raise Refused(f"floor must be a number of points from 0 to 100, found {floor!r}")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise Refused(f"seeds must be a whole number of at least 1, found {seeds!r}")
    return found


def _check_data(request: Request, task: Task) -> None:
    for part in ("forget", "retain"):
        if getattr(request, part, None) is None:
            raise Refused(
                f"tuning needs {part} data to judge settings by, and the request has none: give the examples to {part}"
            )
    check_request(request, task)


def _check_problems(problems: Sequence[Problem] | None, rule: str) -> None:
    if problems is None:
        return
    names = [problem.name for problem in problems]
    if rule != "proxy" or not names or len(set(names)) < len(names):
        found = f"rule {rule!r}" if rule != "proxy" else f"the names {names}"
        raise Refused(
            f"problems= belongs to the rule 'proxy', at least one, each with a name of its own; found {found}"
        )


def _proxies(
    request: Request,
    task: Task,
    train: Train | Recipe | None,
    make: Callable[[], nn.Module] | nn.Module | None,
    folder: Path | None,
    count: int,
    retrained: int,
    key: Key,
    draw: Callable[[Data, int], Any] | None,
    workers: int,
    recipe: str,
) -> list[Problem]:
    """Proxies with models trained for them, which are kept where there is a folder."""
    for name, value in (("count", count), ("retrained", retrained)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Refused(f"{name} of the proxies must be a whole number of at least 1, found {value!r}")
    if train is None or make is None:
        raise Refused(
            "proxies are trained from scratch: give train= (a function of data and seed, or a Recipe) and make=, which "
            "builds a fresh network, or use the rule 'blind'"
        )
    with tempfile.TemporaryDirectory() as nowhere:
        home = Path(nowhere) if folder is None else folder / REFERENCES
        options: dict[str, Any] = {"count": count, "retrained": retrained, "key": key, "draw": draw, "workers": workers}
        return proxies(request, task, train, make, home, **options, recipe=recipe)


def _search(
    spec: Method, fixed: Mapping[str, Any], space: Space, rule: str, runs: Bench, seed: int, optuna: Any
) -> dict[str, Any]:
    """What makes two searches the same search; the budget is not part of it."""
    return {
        "method": spec.name,
        "fixed": {name: holdable(value) for name, value in fixed.items()},
        "space": tune_space.described(space),
        "rule": rule,
        "floor": runs.floor,
        "per_run": runs.per_run,
        "seed": seed,
        "seeds": runs.seeds,
        "task": described(runs.task),
        "stage": described(runs.stage({})),
        "scope": None if runs.scope is None else list(runs.scope),
        "problems": {problem.name: dict(problem.identity) for problem in runs.problems},
        "revision": revision(),
        "optuna": optuna.__version__,
    }


def _searched(
    optuna: Any,
    runs: Bench,
    space: Space,
    budget: Budget,
    target: float | None,
    folder: Path | None,
    search: Mapping[str, Any],
    seed: int,
) -> tuple[list[Trial], str]:
    """The trials, and why there are no more of them."""
    known, trials = finished(folder, search), list[Trial]()
    with progress("tuning", budget.trials) as show:
        while True:
            show(len(trials))
            met = target is not None and any(trial.feasible and trial.score <= target for trial in trials)
            over = "the target was met" if met else budget.spent(trials)
            if over is not None:
                return trials, over if met else f"the budget of {over} is spent"
            if len(trials) < len(known):
                trials.append(known[len(trials)])
                continue
            settings = suggested(optuna, runs.method, space, trials, seed, runs.fixed)
            trial = runs.tried(len(trials), settings, trials)
            trials.append(trial)
            if folder is not None:
                keep(folder, trial)


def suggested(
    optuna: Any, method: Method, space: Space, trials: Sequence[Trial], seed: int, fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """What to try after these trials: a function of them, the space and the seed alone."""
    if not trials:
        return tune_space.defaults(method, space, fixed)
    kinds = {name: dimension.distribution(optuna) for name, dimension in space.items()}
    with _quiet(optuna):
        sampler = optuna.samplers.TPESampler(seed=Key(seed).at("trial", len(trials)).seed % SEEDS)
        study = optuna.create_study(sampler=sampler)
        for trial in trials:
            drawn = {name: space[name].drawn(value) for name, value in trial.settings.items()}
            limits = {"utility": trial.violation}
            study.add_trial(
                optuna.trial.create_trial(value=trial.score, params=drawn, distributions=kinds, constraints=limits)
            )
        asked = study.ask(kinds)
    return {name: dimension.setting(asked.params[name]) for name, dimension in space.items()}


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna's log and its warnings of what is experimental, put back afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
