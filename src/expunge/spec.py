"""A run file: TOML in sections, checked completely before any work. Composition is Python; here are numbers and names.

    [data]                                # exactly one of: suite, python, train
    suite = "digits"                      # a built-in suite: data, task and network; the network is trained first
    # python = "mine.py:everything"       # a function that returns model, train, task (and test, valid, make)
    # train = "train.csv"                 # a folder of images, a CSV or Parquet table, .npz or .safetensors
    # test = "test.csv"
    # label = "income"

    [model]
    # weights = "before.safetensors"
    # python = "net.py:build"             # a function that builds the architecture of those weights

    [request]
    forget = "y == 3"                     # a condition on a column, or a list of ids
    # forget_file = "forget.txt"          # or ids in a file: .txt, .csv, .json, .npy, .npz; retain_file the same
    # test_file = "test.txt"              # rows of the training data that no model was trained on

    [method]                              # not needed by expunge audit
    name = "finetune"
    lr = 0.01                             # its settings; a part is a table: forget = {name = "NPO", beta = 0.1}

    [run]
    out = "out/run"
    seed = 0
    # watch = 1                           # measure accuracy (or loss) along the run, every so many steps

    [audit]
    retrained = 3                         # retrain this often without the forget set, and compare
    # originals = 3                       # and this often with it; shadows = 16: on random halves
    # unlearn = true                      # apply the method to each of those too
    # train = "mine.py:train"             # the function (data, seed) -> model that trained the model

Files that a run file names are looked for beside it; those on the command line, and ``run.out``, in the current folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expunge.core import Refused, Stage
from expunge.data.indices import read_indices
from expunge.registry import did_you_mean, find, methods, parts
from expunge.run import WEIGHTS

WholeNumber = Annotated[int, Field(ge=0)]
PATHS = (
    ("data", "train"),
    ("data", "test"),
    ("data", "valid"),
    ("data", "python"),
    ("model", "weights"),
    ("model", "python"),
    ("request", "forget_file"),
    ("request", "retain_file"),
    ("request", "test_file"),
    ("audit", "weights"),
    ("audit", "train"),
)


class Section(BaseModel):
    """A section whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSection(Section):
    """Where examples come from."""

    suite: str | None = None
    python: str | None = None
    train: str | None = None
    test: str | None = None
    valid: str | None = None
    label: str | None = None
    task: Literal["classification", "regression"] = "classification"
    classes: Annotated[int, Field(ge=2)] | None = None
    categories: Literal["onehot", "integer"] = "onehot"
    ids: str | None = None
    drop: list[str] = Field(default_factory=list)


class ModelSection(Section):
    """The trained model, where `data` does not bring it."""

    weights: str | None = None
    python: str | None = None


class RequestSection(Section):
    """What to forget: a condition or ids; and what to keep, if not all the rest. Ids may stand in files."""

    forget: str | list[int] | None = None
    retain: list[int] | None = None
    forget_file: str | None = None
    retain_file: str | None = None
    test_file: str | None = None

    def chosen(self) -> tuple[str | list[int], list[int] | None]:
        """What to forget, and what to keep, with the files read.

        Raises:
            Refused: for a file that is no list of ids.
        """
        forget = self.forget if self.forget_file is None else read_indices(self.forget_file)
        if forget is None:
            raise Refused("the request says nothing to forget: give [request] forget or forget_file")
        return forget, self.retain if self.retain_file is None else read_indices(self.retain_file)

    def held_out(self) -> list[int] | None:
        """Ids of the rows that no model was trained on, where a file names them."""
        return None if self.test_file is None else read_indices(self.test_file)


class MethodSection(BaseModel):
    """A registered method and its settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def given(self) -> bool:
        """Whether there is a method: an audit needs none."""
        return bool(self.name)

    def stage(self) -> Stage:
        """The method with its settings, each of them checked."""
        method = find("method", self.name, methods())
        return method.build(**{name: _part(name, value) for name, value in (self.model_extra or {}).items()})


class RunSection(Section):
    """Where results go, and what makes the run repeatable."""

    out: str | None = None
    seed: WholeNumber = 0
    scope: list[str] | None = None
    every: Annotated[float, Field(ge=0)] = 20.0
    watch: WholeNumber = 0
    watch_examples: Annotated[int, Field(ge=1)] = 512


class AuditSection(Section):
    """References to compare with: models retrained without the forget set, and others; see ``expunge.references``.

    Without `train`, the model that the data bring is trained by a recipe: `epochs`, `lr` and `batch`. `folder` is where
    the models are kept (references in the run's folder by default), to be shared between runs. `trust` takes retrained
    models as they are; otherwise those that look trained on the forget data are refused.
    """

    retrained: WholeNumber = 0
    originals: WholeNumber = 0
    shadows: WholeNumber = 0
    unlearn: bool = False
    weights: list[str] = Field(default_factory=list)
    trust: bool = False
    train: str | None = None
    recipe: str = ""
    folder: str | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    ray: str | None = None
    epochs: Annotated[float, Field(gt=0)] = 20
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch: Annotated[int, Field(ge=1)] = 64

    @property
    def wanted(self) -> bool:
        """Whether there is anything to compare with."""
        return bool(self.weights) or self.trained

    @property
    def trained(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.retrained or self.originals or self.shadows)


class RunSpec(Section):
    """A whole run file."""

    data: DataSection
    model: ModelSection = ModelSection()
    request: RequestSection
    method: MethodSection = MethodSection(name="")
    run: RunSection = RunSection()
    audit: AuditSection = AuditSection()

    @staticmethod
    def read(
        path: str | Path | None,
        overrides: Sequence[str] = (),
        given: Mapping[str, Mapping[str, Any]] | None = None,
        method: bool = True,
    ) -> RunSpec:
        """The run file with ``section.key=value`` overrides (TOML values; a bare word is a string).

        Args:
            path: of the run file; None where `given` says everything.
            given: section -> key -> value, put into the document before the overrides.
            method: whether there must be one.

        Raises:
            Refused: with one sentence that names the file, the section and the key.
        """
        source, document = "the command line", {}
        if path is not None:
            source, document = str(path), read_toml(Path(path))
            _resolve(document, Path(path).parent)
        for section, keys in (given or {}).items():
            place = document.setdefault(section, {})
            if not isinstance(place, dict):
                raise Refused(f"{source}: {section!r} is a section, found the value {place!r}")
            place.update(keys)
        for override in overrides:
            _override(document, override)
        spec = checked(RunSpec, document, source)
        if method and not spec.method.given:
            raise Refused(f"{source}: the file needs a section 'method'")
        spec._consistent(source)
        return spec

    @property
    def out(self) -> Path | None:
        """The output folder."""
        return None if self.run.out is None else Path(self.run.out)

    def _consistent(self, source: str) -> None:
        """Refuse keys that exclude or need each other."""
        data, model = self.data, self.model
        given = [name for name in ("suite", "python", "train") if getattr(data, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise Refused(f"{source}: [data] needs exactly one of suite, python and train, found {found}")
        files_only = {
            name
            for name in ("test", "valid", "label", "classes", "ids", "drop", "categories", "task")
            if name in data.model_fields_set
        }
        if given[0] != "train" and files_only:
            raise Refused(
                f"{source}: [data] {sorted(files_only)[0]} belongs to data from files, and this run takes its data "
                f"from {given[0]}; remove it"
            )
        if given[0] == "train" and (model.weights is None or model.python is None):
            raise Refused(
                f'{source}: data from files needs a trained model: give [model] weights = "FILE.safetensors" and '
                f'python = "FILE.py:FUNCTION" that builds its architecture'
            )
        if given[0] != "train" and model.python is not None:
            raise Refused(
                f"{source}: [model] python belongs to data from files; [data] {given[0]} brings the architecture"
            )
        request = self.request
        for one, other in (("forget", "forget_file"), ("retain", "retain_file")):
            if getattr(request, one) is not None and getattr(request, other) is not None:
                raise Refused(f"{source}: [request] {one} and {other} say the same thing twice; remove one")
        if request.forget is None and request.forget_file is None:
            raise Refused(f"{source}: [request] needs the key 'forget', or forget_file with ids")
        if request.test_file is not None and data.test is not None:
            raise Refused(
                f"{source}: [request] test_file takes test rows out of the training data, and [data] test names others"
            )
        if self.audit.unlearn and not self.method.given:
            raise Refused(f"{source}: [audit] unlearn applies the method, and there is no section 'method'")
        recipe = sorted(self.audit.model_fields_set & {"epochs", "lr", "batch"})
        if self.audit.train is not None and recipe:
            raise Refused(
                f"{source}: [audit] {recipe[0]} belongs to training by a recipe, and train names a function; remove one"
            )
        if self.audit.shadows == 1:
            raise Refused(f"{source}: [audit] shadows should be 0 or at least 2, found 1")
        if self.audit.unlearn and not (self.audit.originals or self.audit.shadows):
            raise Refused(f"{source}: [audit] unlearn is applied to originals and shadows, and there are none")
        if self.audit.wanted and self.run.out is None:
            raise Refused(f'{source}: [audit] writes a report, so the run needs a folder: give [run] out = "out/NAME"')
        own = None if self.out is None else (self.out / WEIGHTS).resolve()
        if model.weights is not None and Path(model.weights).resolve() == own:
            raise Refused(
                f"{source}: [run] out would overwrite the weights that the run starts from; give another folder"
            )


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a nest of dicts.

    Raises:
        Refused: for a file that is not there, not text, or not TOML (with its line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Refused(f"cannot read the file {path}: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is not TOML: {error}") from error


def checked(kind: type[Any], document: Mapping[str, Any], source: str) -> Any:
    """The document as a section of that kind, or a refusal that says which key is wrong and which one is right."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Refused(f"{source}: {_sentence(kind, first)}") from error


def _sentence(kind: type[Any], error: Mapping[str, Any]) -> str:
    """One pydantic error in our words."""
    location = [part for part in error["loc"] if isinstance(part, str)]
    section, key = ".".join(location[:-1]), location[-1] if location else "the file"
    where = f"[{section}]" if section else "the file"
    if error["type"] == "extra_forbidden":
        known = _keys(kind, location[:-1])
        return f"{where} has no key {key!r}{did_you_mean(key, known)}; it has {', '.join(known)}"
    if error["type"] == "missing":
        return f"{where} needs {'the key' if section else 'a section'} {key!r}"
    found = repr(error["input"])
    found = found if len(found) <= 60 else f"{found[:57]}..."
    message = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    place = [part for part in location if part in _keys(kind, location[: location.index(part)])]
    return f"{'.'.join(place or location)} should be {message}, found {found}"


def _keys(kind: type[Any], path: Sequence[str]) -> list[str]:
    """The keys of the section at `path` below `kind`."""
    for part in path:
        field = getattr(kind, "model_fields", {}).get(part)
        kind = field.annotation if field is not None else type(None)
    return list(getattr(kind, "model_fields", {}))


def _resolve(document: dict[str, Any], folder: Path) -> None:
    """Paths of a run file are relative to the run file."""
    for section, key in PATHS:
        part = document.get(section)
        if not isinstance(part, dict) or key not in part:
            continue
        value = part[key]
        if isinstance(value, str):
            part[key] = str(folder / value)
        elif isinstance(value, list):
            part[key] = [str(folder / item) if isinstance(item, str) else item for item in value]


def _override(document: dict[str, Any], text: str) -> None:
    """Put ``section.key=value`` into the document."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise Refused(f"cannot read {text!r}: expected section.key=value, such as method.lr=0.01")
    if len(names) < 2 or names[0] not in RunSpec.model_fields:
        raise Refused(f"{text!r} names no key of a run file{_nearest_key(names)}")
    place = document
    for name in names[:-1]:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise Refused(f"{text!r} goes below {name!r}, which is a value and not a section")
    place[names[-1]] = _value(value.strip())


def _nearest_key(names: Sequence[str]) -> str:
    """What was meant by a key that has no section, or an unknown one."""
    if len(names) > 1:
        return did_you_mean(names[0], RunSpec.model_fields)
    homes = [section for section in RunSpec.model_fields if names[0] in _keys(RunSpec, [section])]
    settings = {name for found in methods().values() for name in found.settings()}
    home = "method" if names[0] in settings or not homes else homes[0]  # lr and batch are settings of both
    return f" (did you mean '{home}.{names[0]}'?)"


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word or path: the shell has already taken the quotes away


def _part(name: str, value: Any) -> Any:
    """A setting; a table with a name is a part (objective, combiner, optimizer) with its own settings."""
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    known = {**parts("objectives"), **parts("combiners")}
    kind = find("part", str(value.get("name", "")), known)
    settings = {key: _part(key, inner) for key, inner in value.items() if key != "name"}
    fields = [field for field, info in kind.__dataclass_fields__.items() if info.init]
    for key in settings:
        if key not in fields:
            raise Refused(f"method.{name}: {kind.__name__} has no setting {key!r}{did_you_mean(key, fields)}")
    try:
        return kind(**settings)
    except TypeError as error:
        raise Refused(f"method.{name}: {kind.__name__} cannot be made of {settings}: {error}") from error
