"""A benchmark's file: which suite, which requests, which methods with which settings, and which seeds.

suite = "digits"                     # data, task, network and recipe (``expunge list suites``)
retrained = 5                        # reference models for each request
# settings = "found/digits.json"     # settings by row and request that a search found (bench/tune_suites.py wrote them)
seeds = {train = [0, 1, 2], unlearn = [0], audit = [0]}

[manipulate]                         # optional: bad examples in the training data
poison = {target = 0, count = 50}    # or mislabel = {classes = [3, 5], count = 50}

[requests]
class_3 = "y == 3"                   # a condition, or a list of ids
tenth = {random = 0.1}               # drawn at random: a share, or a number of examples
in_turn = {random = 100, turns = 10} # the same draw as {random = 100}, asked in ten requests, one after the other
                                     # like = "tenth": with the settings of the request of that name, here or in `settings`
known = {memorised = 0.1}            # what models trained without it predict worst
worst = {worst_case = 0.05}          # what fine-tuning erases least (``expunge.challenges.worst_case``)
found = {identified = 0.5}           # that share of the bad examples of [manipulate]

[methods.finetune]                   # the method of that name, with settings
lr = 0.02
on.known = {lr = 0.05}               # settings for one request
[methods.finetune_long]              # a second row of it
method = "finetune"
steps = 400
requests = ["class_3"]               # a row for some of the requests
space = {lr = [0.01, 0.1]}           # what a search of its settings may vary; the bench itself does not read it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from expunge.core import Refused, Stage
from expunge.registry import did_you_mean
from expunge.sections import MethodSection, Section, WholeNumber
from expunge.spec import checked, read_toml

SUITES, RESULTS = Path("bench/suites"), Path("bench/results")
CONTROLS = ("original", "retrain")
Size = Annotated[int | float, Field(gt=0)]


class Drawn(Section):
    """A request for examples that are found by a rule: one of the four."""

    random: Size | None = None
    memorised: Size | None = None
    worst_case: Size | None = None
    identified: Annotated[float, Field(gt=0, le=1)] | None = None
    turns: Annotated[int, Field(ge=1)] = 1
    like: str | None = None

    @property
    def rule(self) -> tuple[str, float]:
        """(which rule, how many or what share)."""
        given = {name: value for name in _RULES if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise Refused(f"a request needs one of {', '.join(_RULES)}, found {', '.join(given) or 'none'}")
        return next(iter(given.items()))


_RULES = ("random", "memorised", "worst_case", "identified")


class Seeds(Section):
    """Seeds of the original models, of unlearning and of the audit's draws; every combination is run."""

    train: Annotated[list[WholeNumber], Field(min_length=1)]
    unlearn: Annotated[list[WholeNumber], Field(min_length=1, default_factory=lambda: [0])]
    audit: Annotated[list[WholeNumber], Field(min_length=1, default_factory=lambda: [0])]


class Poison(Section):
    """A backdoor, see ``expunge.challenges.corrective.poison``."""

    target: WholeNumber
    count: Annotated[int, Field(ge=1)]
    patch: Annotated[int, Field(ge=1)] = 3


class Mislabel(Section):
    """Swapped labels of two classes, see ``expunge.challenges.corrective.mislabel``."""

    classes: Annotated[list[WholeNumber], Field(min_length=2, max_length=2)]
    count: Annotated[int, Field(ge=2)]


class Manipulate(Section):
    """Bad examples in the training data: the originals are trained on them, the references without them."""

    poison: Poison | None = None
    mislabel: Mislabel | None = None


class BenchSpec(Section):
    """A suite file."""

    suite: str
    seeds: Seeds
    retrained: Annotated[int, Field(ge=0)] = 3
    settings: str | None = None
    manipulate: Manipulate | None = None
    requests: Annotated[dict[str, str | list[int] | Drawn], Field(min_length=1)]
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]

    @staticmethod
    def read(path: Path) -> BenchSpec:
        """The file, every setting of every method checked.

        Raises:
            Refused: for an unknown key, method, setting or request, or a request that is none.
        """
        spec: BenchSpec = checked(BenchSpec, read_toml(path), str(path))
        if spec.settings is not None:
            spec = spec._with_found(path.parent / spec.settings)
        for name, request in spec.requests.items():
            if isinstance(request, Drawn) and request.rule[0] == "identified" and not spec.bad:
                raise Refused(f"{path}: request {name!r} asks for identified bad examples, and [manipulate] makes none")
            named = request.like if isinstance(request, Drawn) else None
            known = {*spec.requests, *(of for row in spec.methods.values() for of in row.get("on", {}))}
            if named is not None and named not in known:
                raise Refused(
                    f"{path}: request {name!r} is to be like {named!r}{did_you_mean(named, known)}, which neither [requests] "
                    f"nor the settings file has"
                )
        spec.stages()
        return spec

    @property
    def named(self) -> set[str]:
        """The requests, and those that they are to be like."""
        return {*self.requests, *(self.like(request) for request in self.requests)}

    def like(self, request: str) -> str:
        """The request whose settings this one has: itself, or the one that it is to be like."""
        asked = self.requests[request]
        return asked.like if isinstance(asked, Drawn) and asked.like is not None else request

    def _with_found(self, path: Path) -> BenchSpec:
        """The rows with the settings of a search for each request, below what the suite file itself says of it."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["methods"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"settings = {self.settings!r}: {path} cannot be read as settings that a search found ({error}); run the "
                f"search again, or take the line out"
            ) from error
        rows = {}
        for row, given in self.methods.items():
            on = {
                request: dict(one["settings"]) for request, one in found.get(row, {}).items() if request in self.named
            }
            for request, own in given.get("on", {}).items():
                on[request] = {**on.get(request, {}), **own}
            rows[row] = {**given, "on": on} if on else given
        return self.model_copy(update={"methods": rows})

    @property
    def bad(self) -> Poison | Mislabel | None:
        """What is done to the training data."""
        if self.manipulate is None:
            return None
        given = [part for part in (self.manipulate.poison, self.manipulate.mislabel) if part is not None]
        if len(given) != 1:
            raise Refused("[manipulate] needs one of poison and mislabel")
        return given[0]

    def stages(self) -> dict[tuple[str, str], Stage]:
        """(request, row) -> stage."""
        found = {}
        for row, settings in self.methods.items():
            if row in CONTROLS:
                raise Refused(f"[methods.{row}] has the name of a control: give it another name")
            own = dict(settings)
            name, on = own.pop("method", row), own.pop("on", {})
            own.pop("space", None)  # for the search alone
            chosen = own.pop("requests", list(self.requests))
            unknown = [name for name in chosen if name not in self.requests] + [n for n in on if n not in self.named]
            for request in unknown[:1]:
                near = did_you_mean(request, self.requests)
                raise Refused(f"[methods.{row}] names the request {request!r}{near}, which [requests] has not")
            for request in chosen:
                where = f"[methods.{row}]"
                given = {**own, **on.get(self.like(request), {}), **on.get(request, {}), "name": name}
                found[request, row] = checked(MethodSection, given, where).stage()
        return found


def suite_file(name: str) -> Path:
    """A path to a suite file, or the name of one in ``bench/suites``.

    Raises:
        Refused: for a name that is neither, with the nearest one.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return path
    known = {file.stem: file for file in sorted(SUITES.glob("*.toml"))}
    if name not in known:
        have = ", ".join(known) or "none in bench/suites"
        raise Refused(
            f"unknown bench suite {name!r}{did_you_mean(name, known)}; there are {have}, or give the path of a .toml"
        )
    return known[name]
