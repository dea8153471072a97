"""From a run file to what it names: data, request, task, trained model; then the run, its references and its report."""

from __future__ import annotations

import copy as copying
import functools
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import Tensor, nn

from expunge.core import Data, Refused, Request, Task
from expunge.data import builtin
from expunge.data.files import class_count, read
from expunge.data.sources import as_data
from expunge.data.split import split
from expunge.data.tables import Loaded, Target, few
from expunge.registry import did_you_mean
from expunge.run import check_request
from expunge.sections import DataSection
from expunge.spec import RunSpec
from expunge.weights import load_weights

if TYPE_CHECKING:
    from expunge.texts import Language

_CONDITION = re.compile(r"^\s*(\S.*?)\s*(==|!=|<=|>=|<|>|\bin\b(?=\s*[\[({]))\s*(.+?)\s*$")


@dataclass(frozen=True)
class Workload:
    """What there is to work on.

    Attributes:
        train: the training data. task: the modality.
        trained: gives the trained model, for a seed; this is the first thing that may take long.
        test, valid: further data, where there is any.
        make: builds a fresh network, where references may be retrained. recipe: how; None for the run file's own.
        names: of the classes.
        columns: [n] numbers per training example, for conditions. texts: what the numbers of a text column stand for.
        language: a language model and its texts, where the run is about one.
    """

    train: Data
    task: Task
    trained: Callable[[int], nn.Module] = field(repr=False)
    test: Data | None = None
    valid: Data | None = None
    make: Callable[[], nn.Module] | None = field(default=None, repr=False)
    recipe: builtin.Recipe | None = None
    names: tuple[str, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    language: Language | None = field(default=None, repr=False)

    def read(self, like: nn.Module, path: str | Path) -> nn.Module:
        """Another model of the same architecture, from its weights, in eval mode; `like` and its weights stay as they are."""
        if self.language is not None:
            return self.language.read(path)
        return load_weights(copying.deepcopy(like) if self.make is None else builtin.fresh(self.make, 0), path).eval()


def load(spec: RunSpec) -> Workload:
    """The data and task of a run file, and how to get its model.

    Raises:
        Refused: for files or a function that do not give what they should.
    """
    if spec.language:
        return _from_texts(spec)
    held_out = spec.request.held_out()
    if held_out is not None:
        _apart(spec, held_out)
    found = _loaded(spec)
    return found if held_out is None else _without(found, held_out)


def _loaded(spec: RunSpec) -> Workload:
    if spec.data.suite is not None:
        found = _from_suite(builtin.suite(spec.data.suite))
    elif spec.data.python is not None:
        found = from_function(spec.data.python)
    else:
        return _from_files(spec)
    if spec.model.weights is None:
        return found
    weights, base = spec.model.weights, found
    build = (lambda seed: builtin.fresh(base.make, seed)) if base.make is not None else base.trained
    return Workload(**{**vars(found), "trained": lambda seed: load_weights(build(seed), weights).eval()})


def _from_texts(spec: RunSpec) -> Workload:
    from expunge.texts import RECIPE, base, read_language

    language = read_language(spec)
    test = language.texts.get("test")
    return Workload(
        language.train,
        language.task,
        language.model,
        None if test is None else test.data,
        make=base(spec, language) if spec.audit.base is not None else None,
        recipe=RECIPE,
        language=language,
    )


def _apart(spec: RunSpec, held_out: Sequence[int]) -> None:
    """Refuse ids that are to be forgotten or kept, and are said to be unseen as well."""
    for name, ids in zip(("forget", "retain"), spec.request.chosen(), strict=True):
        both = sorted(set(held_out) & set(ids)) if isinstance(ids, list) else []
        if both:
            raise Refused(
                f"the {name} and test files share {len(both)} ids, the first is {both[0]}: no model may have been trained on "
                f"test rows; remove them from one of the two"
            )


def _without(workload: Workload, ids: Sequence[int]) -> Workload:
    """The rows with these ids taken out of the training data: they are the test data."""
    wanted = torch.as_tensor(ids)
    unknown = wanted[~torch.isin(wanted, workload.train.ids)]
    if len(unknown):
        raise Refused(
            f"the test file names id {int(unknown[0])}, which no example has ({len(unknown)} of {len(ids)} are unknown)"
        )
    if workload.test is not None:
        raise Refused(
            "the test file takes test rows out of the training data, and the data brings test data of its own"
        )
    inside = torch.isin(workload.train.ids, wanted)
    rest = torch.nonzero(~inside).flatten()
    if not len(rest):
        raise Refused("the test file names every example: nothing is left that the model was trained on")
    return replace(
        workload,
        train=workload.train.select(rest),
        test=workload.train.select(torch.nonzero(inside).flatten()),
        columns={name: values[rest] for name, values in workload.columns.items()},
    )


def _from_suite(suite: builtin.Suite) -> Workload:
    return Workload(
        suite.train, suite.task, lambda seed: suite.fit(seed=seed), suite.test, None, suite.make, suite.recipe
    )


def _from_files(spec: RunSpec) -> Workload:
    section, model = spec.data, spec.model
    train = _read(section, section.train)
    given = {"test": section.test, "valid": section.valid}
    others = {name: _read(section, path, like=train) for name, path in given.items() if path is not None}
    if model.weights is None or model.python is None:
        raise Refused("data from files needs [model] weights and python")
    build, weights = function(model.python), model.weights
    data = {name: loaded.data for name, loaded in others.items()}
    return Workload(
        train.data,
        _task(section, train, *others.values()),
        lambda seed: load_weights(_network(build, seed), weights).eval(),
        data.get("test"),
        data.get("valid"),
        build,
        None,
        train.classes,
        train.columns,
        train.texts,
    )


def _read(section: DataSection, path: str | None, like: Loaded | None = None) -> Loaded:
    target: Target = "number" if section.task == "regression" else "class"
    return read(
        path or "",
        label=section.label,
        target=target,
        categories=section.categories,
        ids=section.ids,
        drop=section.drop,
        like=like,
    )


def _task(section: DataSection, *parts: Loaded) -> Task:
    from expunge.tasks.classification import Classification
    from expunge.tasks.regression import Regression

    if section.task == "regression":
        return Regression()
    known = len(parts[0].classes) or class_count(*(part.data for part in parts))
    return Classification(section.classes or known)


def _network(build: Callable[..., Any], seed: int) -> nn.Module:
    model = builtin.fresh(build, seed)
    if not isinstance(model, nn.Module):
        raise Refused(f"the function of [model] python returned a {type(model).__name__}: expected a torch.nn.Module")
    return model


def function(reference: str) -> Callable[..., Any]:
    """``path.py:name`` -> that function, wrapped so that an error in it is one sentence.

    Raises:
        Refused: for a file or a function that is not there, or a file that cannot be imported.
    """
    path, _, name = reference.rpartition(":")
    if not path or not name.isidentifier():
        raise Refused(f"cannot read {reference!r}: expected FILE.py:FUNCTION")
    file = Path(path)
    if not file.is_file():
        raise Refused(f"there is no Python file {file}")
    found = getattr(_calling(file, lambda: _module(file)), name, None)
    if not callable(found):
        raise Refused(f"{file} has no function {name!r}: define it, or name another one")
    return functools.wraps(found)(lambda *args: _calling(file, lambda: found(*args)))


def _module(file: Path) -> Any:
    name = f"expunge_user_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=6).hexdigest()}"
    description = importlib.util.spec_from_file_location(name, file)
    if description is None or description.loader is None:
        raise Refused(f"{file} is not a Python file: expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses look their module up
    cloudpickle.register_pickle_by_value(module)  # other processes cannot import it
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        description.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return module


def _calling(file: Path, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Refused:
        raise
    except Exception as error:  # whatever the user's own code raises
        own = file.resolve()
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == own
        ]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        said = (str(error).splitlines() or [""])[0]
        raise Refused(
            f"{file} failed{f' at line {line}' if line else ''} with {type(error).__name__}: {said}"
        ) from error


def from_function(reference: str) -> Workload:
    """What ``path.py:name()`` returns: a mapping or an object with model, train, task, and test, valid, make, names.

    ``make`` builds a fresh, untrained network of the model's architecture: with it, references can be retrained.
    """
    found = function(reference)()
    known = ("model", "train", "task", "test", "valid", "make", "names")
    named = {name: getattr(found, name) for name in known if hasattr(found, name)}
    parts: dict[str, Any] = dict(found) if isinstance(found, Mapping) else named
    for name in parts:
        if name not in known:
            raise Refused(f"{reference} returned {name!r}{did_you_mean(str(name), known)}; expected {', '.join(known)}")
    for name, kind in (("model", nn.Module), ("train", object), ("task", Task)):
        value = parts.get(name)
        if value is None or not isinstance(value, kind):
            what = f"no {name}" if value is None else f"a {type(value).__name__} as {name}"
            raise Refused(
                f"{reference} returned {what}: "
                f"expected model (a torch.nn.Module), train (data) and task (such as expunge.Classification(10))"
            )
    model, make = parts["model"], parts.get("make")
    if make is not None and not callable(make):
        raise Refused(
            f"{reference} returned a {type(make).__name__} as make: expected a function that builds a fresh network"
        )
    data = {name: None if parts.get(name) is None else as_data(parts[name]) for name in ("test", "valid")}
    return Workload(
        as_data(parts["train"]),
        parts["task"],
        lambda seed: model,
        data["test"],
        data["valid"],
        make,
        names=tuple(parts.get("names") or ()),
    )


def requested(spec: RunSpec, workload: Workload) -> Request:
    """What a run file asks to be forgotten and kept.

    Raises:
        Refused: as ``request_of``.
    """
    if workload.language is None:
        return request_of(workload, *spec.request.chosen())
    request = workload.language.request
    check_request(request, workload.task)
    return request


def request_of(workload: Workload, forget: str | Sequence[int], retain: Sequence[int] | None = None) -> Request:
    """What to forget and keep. A condition may use any column of a table, and the name of a class.

    Raises:
        Refused: as ``expunge.split``, and for data that the task cannot use.
    """
    ids: Any = forget
    if isinstance(forget, str):
        annotated = workload.train  # for this choice only: a column of a table may be called "weight" or "id"
        for name, values in workload.columns.items():
            annotated = annotated.annotate(name, values)
        chosen = split(annotated, _as_number(forget, workload)).forget
        ids = chosen.ids if chosen is not None else forget
    request = split(workload.train, ids, retain=None if retain is None else list(retain), valid=workload.valid)
    check_request(request, workload.task)
    if workload.test is not None:
        workload.task.check(workload.test, "test")
    return request


def _as_number(condition: str, workload: Workload) -> str:
    """``label == cat`` as ``label == 3`` where class 3 is called so; ``name in [Ann, Bob]`` as the numbers of those texts."""
    match = _CONDITION.match(condition)
    if match is None:
        return condition
    column, operator, text = match.groups()
    texts = column in workload.texts
    known = workload.texts.get(column, workload.names if column in ("label", "y") else ())
    values = [part.strip(" '\"") for part in (text.strip("[](){} ").split(",") if operator == "in" else [text])]
    if texts and operator not in ("==", "!=", "in"):
        raise Refused(f"the column {column!r} holds text: compare it with ==, != or in, found {condition!r}")
    numbers = [str(number) for number in range(len(known))]
    if not known or (not texts and all(value in ("", *numbers) for value in values)):
        return condition
    for value in values:
        if value not in known:
            said = f"no example has {value!r} in the column {column!r}" if texts else f"no class is called {value!r}"
            raise Refused(f"{said}{did_you_mean(value, known)}; there are {few(known)}")
    return f"{column} {operator} [{', '.join(str(known.index(value)) for value in values)}]"
