"""What there is, found by looking: methods, objectives, combiners, measures, tasks. And "did you mean"."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import torch

from expunge.core import Case, MissingExtra, Objective, Refused, Request, Stage, printed

FIRST = torch.zeros(1, dtype=torch.int64)  # the place of an example to look at
FEW, NEAREST = 20, 8  # names that a sentence can hold, and how many of more it gives
ALL = ("classification", "regression", "causal_lm", "diffusion")


@dataclass(frozen=True)
class Range:
    """The range of a numeric setting, for ``Annotated[float, Range(0, 1)]``; an open end is excluded."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range (NaN and infinity never do)."""
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Share = typing.Annotated[float, Range(0, 1)]
Positive = typing.Annotated[float, Range(0, open_low=True)]
NonNegative = typing.Annotated[float, Range(0)]
Finite = typing.Annotated[float, Range(open_low=True, open_high=True)]
Count = typing.Annotated[int, Range(0)]
AtLeastOne = typing.Annotated[int, Range(1)]


@dataclass(frozen=True)
class Method:
    """What a method declares of itself; the contract tests hold it to this.

    Attributes:
        name: function, file, registry, command-line and docs name.
        build: keyword-only settings -> Stage.
        paper: identifier of the source.
        tasks: names of the tasks it is for.
        needs: of ``forget``, ``retain``, ``valid``, ``teacher:original``; with ``|`` between alternatives, among which may be
            ``column:NAME``, a column of the forget data.
        dose: name of the setting that is 0 for the identity; None with a reason in `departures`.
        promise: "approximate", or "exact" where it equals retraining to the bit.
        cost: ``{"forward": expression, "backward": expression}`` in rows, over the settings, n_forget, n_retain, and
            ``relabel``, the forward rows that a wrong answer costs: 0, or 1 for a task that asks the model for it;
            and ``kept_outputs``, 1 for a task whose outputs are small and always the same, so that a teacher is asked once.
        departures: key -> why it departs from its paper, from the authors' code or from a contract.
        status: "implemented", or "reproduced" once a committed result stands beside the paper's or the authors' code's.
        reason: why it is not reproduced.
        labels: whether it reads the labels of the data.
    """

    name: str
    build: Callable[..., Stage]
    paper: str
    tasks: tuple[str, ...]
    needs: frozenset[str]
    dose: str | None
    promise: str
    cost: Mapping[str, str]
    departures: Mapping[str, str] = field(default_factory=dict)
    status: str = "implemented"
    reason: str = ""
    labels: bool = True

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.build) or "").splitlines()[0]

    def settings(self) -> dict[str, inspect.Parameter]:
        """The method's keyword-only settings."""
        return dict(inspect.signature(self.build).parameters)

    def rows(
        self, bound: Mapping[str, Any], n_forget: int, n_retain: int, task: str = "classification"
    ) -> dict[str, int]:
        """The declared cost in rows, for these settings on that task."""
        sizes = {"n_forget": n_forget, "n_retain": n_retain, "relabel": getattr(tasks()[task], "relabel_rows", 0)}
        sizes["kept_outputs"] = getattr(tasks()[task], "kept_outputs", 0)
        names = {"ceil": math.ceil, "min": min, "max": max, **sizes, **bound}
        return {kind: int(eval(text, {"__builtins__": {}}, names)) for kind, text in self.cost.items()}

    def describe(self) -> dict[str, Any]:
        """JSON for ``expunge list``."""
        return {
            "name": self.name,
            "summary": self.summary,
            "paper": self.paper,
            "tasks": list(self.tasks),
            "needs": sorted(self.needs),
            "dose": self.dose,
            "promise": self.promise,
            "cost": dict(self.cost),
            "departures": dict(self.departures),
            "status": self.status,
            "reason": self.reason,
            "labels": self.labels,
            "settings": {n: printed(p.default) for n, p in self.settings().items()},
        }


_METHODS: dict[str, Method] = {}
_TASKS: dict[str, type] = {}
_MEASURES: dict[str, Any] = {}
_ASKED: set[str] = set()


def method(
    *,
    paper: str,
    needs: Iterable[str],
    cost: Mapping[str, str],
    dose: str | None,
    tasks: Iterable[str] = ALL,
    promise: str = "approximate",
    departures: Mapping[str, str] | None = None,
    status: str = "implemented",
    reason: str = "",
    labels: bool = True,
) -> Callable[[Callable[..., Stage]], Callable[..., Stage]]:
    """Register a function of keyword-only settings that returns a Stage; its settings are checked at each call.

    A setting that is an Objective may be given by the name of one, which then has its defaults.
    """

    def register(build: Callable[..., Stage]) -> Callable[..., Stage]:
        hints = typing.get_type_hints(build, include_extras=True)
        signature = inspect.signature(build)

        @functools.wraps(build)
        def checked(**settings: Any) -> Stage:
            for name in settings:
                if name not in signature.parameters:
                    raise Refused(
                        f"{build.__name__} has no setting {name!r}{did_you_mean(name, signature.parameters)}; it has "
                        f"{', '.join(signature.parameters)}"
                    )
            bound = {n: p.default for n, p in signature.parameters.items()} | settings
            for name, value in settings.items():
                if hints.get(name) is Objective and isinstance(value, str):
                    bound[name] = _objective(build.__name__, name, value)
            for name, value in bound.items():
                check_setting(build.__name__, name, value, hints.get(name))
            stage = build(**bound)
            return Bound(build.__name__, tuple(bound.items()), stage)

        _METHODS[build.__name__] = Method(
            build.__name__,
            checked,
            paper,
            tuple(tasks),
            frozenset(needs),
            dose,
            promise,
            dict(cost),
            dict(departures or {}),
            status,
            reason,
            labels,
        )
        return checked

    return register


@dataclass(frozen=True)
class Bound:
    """A registered method with its settings: a Stage that knows its name, for the record and for the checks of needs."""

    name: str
    settings: tuple[tuple[str, Any], ...]
    stage: Stage = field(repr=False)

    def __call__(self, case: Case) -> Case:
        check_needs(self, case.request, case.teachers)
        return self.stage(case)

    @property
    def spec(self) -> Method:
        """What the method declares."""
        return _METHODS[self.name]

    def printed(self) -> dict[str, Any]:
        """The settings for JSON."""
        return {name: printed(value) for name, value in self.settings}


def check_needs(bound: Bound, request: Request, teachers: Mapping[str, Any], provided: Iterable[str] = ()) -> None:
    """Refuse a method whose needs neither the request, nor the teachers, nor what is `provided` before it, meet."""
    columns = request.forget.columns if request.forget is not None else {}
    have = {*provided, *(f"teacher:{name}" for name in teachers), *(f"column:{name}" for name in columns)}
    for need in sorted(bound.spec.needs):
        kinds = need.split("|")
        if any(kind in have or getattr(request, kind, None) is not None for kind in kinds):
            continue
        named = [kind.removeprefix("column:") for kind in kinds if kind.startswith("column:")]
        if named and request.forget is not None and any(name in request.forget.batch(FIRST) for name in named):
            continue  # the data have it from their source, not by annotation
        if kinds[0].startswith("teacher:"):
            cached = "".join(f", or cache the column {kind.removeprefix('column:')!r} first" for kind in kinds[1:])
            raise Refused(
                f"method {bound.name} needs the original model as a teacher, and copy=False leaves none: use "
                f"copy=True, or run it in an adapter{cached}"
            )
        if named:
            raise Refused(
                f"method {bound.name} needs forget data with the column {named[0]!r}, and these have none: what it "
                f"is, and how it is made, stands in 'expunge explain {bound.name}'"
            )
        raise Refused(f"method {bound.name} needs {need} data and the request has none")


def _objective(owner: str, setting: str, name: str) -> Objective:
    """The objective of that name with its defaults, for a run file, which can name one but not build it."""
    kind = find("objective", name, parts("objectives"))
    try:
        return kind()
    except TypeError as error:
        raise Refused(
            f"{owner}: {setting} = {name!r} cannot be made by its name alone, as {error}; build it in Python"
        ) from error


def check_setting(owner: str, name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type or out of the range that its annotation declares."""
    bounds = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
    base = typing.get_args(hint)[0] if bounds else hint
    optional = type(None) in typing.get_args(base)
    if value is None and optional:
        return
    kinds = tuple(t for t in (typing.get_args(base) or (base,)) if isinstance(t, type))
    if typing.get_origin(base) is typing.Literal:
        if value not in typing.get_args(base):
            choices = [str(choice) for choice in typing.get_args(base)]
            raise Refused(
                f"{owner}: {name} must be one of {', '.join(choices)}, found {value!r}{did_you_mean(str(value), choices)}"
            )
        return
    if int in kinds or float in kinds:
        whole = int in kinds and float not in kinds
        good = isinstance(value, int) if whole else isinstance(value, (int, float))
        if not good or (isinstance(value, bool) and bool not in kinds):
            raise Refused(f"{owner}: {name} must be a {'whole ' if whole else ''}number, found {value!r}")
        for bound in bounds:
            if not bound.holds(value):
                raise Refused(f"{owner}: {name} must lie in {bound}, found {value!r}")


def task(kind: type) -> type:
    """Register a Task class under its ``name``."""
    _TASKS[kind.__dataclass_fields__["name"].default] = kind  # type: ignore[attr-defined]
    return kind


def measure(kind: Any = None, *, asked: bool = False) -> Any:
    """Register a Measure (a class or function) under its name.

    Args:
        kind: the measure; ``@measure`` and ``@measure(asked=True)`` both work.
        asked: it trains, attacks or is slow, and runs only where an audit asks for it by name (``also=``).
    """

    def register(kind: Any) -> Any:
        name = getattr(kind, "name", kind.__name__)
        _MEASURES[name] = kind
        if asked:
            _ASKED.add(name)
        return kind

    return register if kind is None else register(kind)


def _discover(package: str, group: str) -> None:
    """Import every module of a package, and every entry point of its group: a new file is all that a new part needs."""
    root = importlib.import_module(package)
    for module in pkgutil.iter_modules(root.__path__):
        importlib.import_module(f"{package}.{module.name}")
    for entry in entry_points(group=group):
        entry.load()


@functools.cache
def methods() -> dict[str, Method]:
    """name -> Method, sorted."""
    _discover("expunge.methods", "expunge.methods")
    return dict(sorted(_METHODS.items()))


@functools.cache
def tasks() -> dict[str, type]:
    """name -> Task class, sorted."""
    _discover("expunge.tasks", "expunge.tasks")
    return dict(sorted(_TASKS.items()))


@functools.cache
def measures() -> dict[str, Any]:
    """name -> Measure, sorted: those of every audit, and those that run only where they are asked for."""
    for package in ("expunge.audit", "expunge.attacks", "expunge.challenges"):
        _discover(package, "expunge.measures")
    return dict(sorted(_MEASURES.items()))


def is_asked(name: str) -> bool:
    """Whether a measure runs only where it is asked for."""
    return name in _ASKED


def asked_for(also: Iterable[str] = ()) -> dict[str, Any]:
    """The measures of every audit, and those of the others that are named; "all" names every one.

    Raises:
        Refused: for a name that is no measure, with the nearest one.
    """
    every, named = measures(), set(also)
    for name in named - {"all"}:
        find("measure", name, every)
    return {name: kind for name, kind in every.items() if name not in _ASKED or name in named or "all" in named}


_PARTS = {
    "objectives": (
        (
            "objectives",
            "token_objectives",
            "preference",
            "confidence",
            "label_smoothing",
            "runner_up",
            "deviation",
            "power_losses",
            "group_lasso",
            "confusion_objectives",
            "perturbed",
            "together",
        ),
        "__call__",
    ),
    "combiners": (
        (
            "combine",
            "implicit",
            "compose",
            "constrained",
            "smooth",
            "salient_rows",
            "rectify",
            "balance",
            "restriction",
            "bounded",
            "zeroth",
        ),
        "combine",
    ),
}


def parts(kind: str) -> dict[str, type]:
    """The public frozen dataclasses of a kind, ``objectives`` or ``combiners``, by what they can do."""
    modules, wanted = _PARTS[kind]
    found = {}
    for module in modules:
        found.update(_public(importlib.import_module(f"expunge.{module}"), wanted))
    return dict(sorted(found.items()))


def _public(module: Any, wanted: str) -> dict[str, type]:
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and kind.__module__ == module.__name__
        and hasattr(kind, "__dataclass_fields__")
        and hasattr(kind, wanted)
        and not name.startswith("_")
        and name != "Decay"
    }


def find(kind: str, name: str, among: Mapping[str, Any]) -> Any:
    """The entry called `name`, or a refusal that suggests the nearest, and names all of a few."""
    if name not in among:
        names = list(among)
        few = len(names) <= FEW
        shown = names if few else sorted(difflib.get_close_matches(name, names, NEAREST, 0.0))
        have = f"there are {', '.join(shown)}" if few else f"there are {len(names)}, such as {', '.join(shown)}"
        raise Refused(f"unknown {kind} {name!r}{did_you_mean(name, among)}; {have}")
    return among[name]


def did_you_mean(name: str, among: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing."""
    near = difflib.get_close_matches(name, list(among), 1, 0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def need_extra(module: str, extra: str, what: str) -> Any:
    """Import an optional package, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{what} needs the package {module.split('.')[0]!r}, which is not installed: pip install 'expunge[{extra}]'"
        ) from error
