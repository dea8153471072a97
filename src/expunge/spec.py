"""A run file: TOML in sections, checked completely before any work. Composition is Python; here are numbers and names.

    [data]                                # exactly one of: suite, python, train
    suite = "digits"                      # a built-in suite: data, task and network; the network is trained first
    # python = "mine.py:everything"       # a function that returns model, train, task (and test, valid, make)
    # train = "train.csv"                 # a folder of images, a CSV or Parquet table, .npz or .safetensors
    # test = "test.csv"
    # label = "income"
    # task = "causal-lm"                  # a language model: [model] weights is its folder or hub id, and [request]
                                          # forget_file, retain_file and test_file are JSON lines of texts

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

    [tune]                                # only for expunge tune
    # rule = "proxy"                      # how settings are judged; trials, seconds, backward: what the search may cost
    # space = {lr = [1e-4, 1e-1]}         # what may vary; settings in [method] do not, unless they stand here

Files that a run file names are looked for beside it; those on the command line, and ``run.out``, in the current folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expunge.core import Refused
from expunge.registry import did_you_mean, methods
from expunge.run import WEIGHTS
from expunge.sections import (
    LANGUAGE,
    AuditSection,
    DataSection,
    MethodSection,
    ModelSection,
    RequestSection,
    RunSection,
    Section,
    TuneSection,
)

PATHS = (
    ("data", "train"),
    ("data", "test"),
    ("data", "valid"),
    ("data", "python"),
    ("data", "refusals"),
    ("data", "alternates"),
    ("model", "weights"),
    ("model", "tokenizer"),
    ("model", "python"),
    ("request", "forget_file"),
    ("request", "retain_file"),
    ("request", "test_file"),
    ("audit", "weights"),
    ("audit", "train"),
    ("audit", "base"),
)
TEXTS = {"template", "length", "refusals", "alternates"}
"""Keys of [data] that belong to a language model alone."""
HUB = (("model", "weights"), ("model", "tokenizer"), ("audit", "weights"), ("audit", "base"))
"""Keys that may name a model on a hub in place of a path, for a language model."""


class RunSpec(Section):
    """A whole run file."""

    data: DataSection
    model: ModelSection = ModelSection()
    request: RequestSection
    method: MethodSection = MethodSection(name="")
    run: RunSection = RunSection()
    audit: AuditSection = AuditSection()
    tune: TuneSection = TuneSection()

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
    def language(self) -> bool:
        """Whether the run is about a language model and texts."""
        return self.data.task == LANGUAGE

    @property
    def out(self) -> Path | None:
        """The output folder."""
        return None if self.run.out is None else Path(self.run.out)

    def _consistent(self, source: str) -> None:
        """Refuse keys that exclude or need each other."""
        if self.language:
            self._texts(source)
        else:
            self._rows(source)
        self._rest(source)

    def _texts(self, source: str) -> None:
        """Refuse keys that a run on a language model lacks or cannot use."""
        data, model, request = self.data, self.model, self.request
        odd = sorted(data.model_fields_set - TEXTS - {"task"})
        if odd:
            raise Refused(f"{source}: [data] {odd[0]} does not belong to task {LANGUAGE!r}; remove it")
        if model.weights is None or model.python is not None:
            raise Refused(
                f"{source}: task {LANGUAGE!r} needs [model] weights (--model), the folder or hub id of a language model, "
                f"and nothing else that builds one"
            )
        if request.forget_file is None or request.forget is not None or request.retain is not None:
            raise Refused(
                f"{source}: task {LANGUAGE!r} needs [request] forget_file (--forget), JSON lines of the texts to forget; "
                f"retain_file and test_file are such files too, and forget and retain are not used"
            )
        if model.four_bit and self.run.adapter is None:
            raise Refused(f'{source}: a 4-bit model cannot be trained itself: give [run] adapter = "lora" (--adapter)')
        if self.audit.base is None and self.audit.train is None and self.audit.trained:
            raise Refused(
                f"{source}: references of a language model are fine-tuned from the model before it: give [audit] base, or "
                f"weights with the folders of retrained models"
            )

    def _rows(self, source: str) -> None:
        """Refuse keys of data and model that exclude or need each other."""
        data, model, request = self.data, self.model, self.request
        texts = sorted(
            [f"[data] {name}" for name in data.model_fields_set & TEXTS]
            + [f"[model] {name}" for name in model.model_fields_set - {"weights", "python"}]
            + (["[audit] base"] if self.audit.base is not None else [])
        )
        if texts:
            raise Refused(
                f'{source}: {texts[0]} belongs to a language model: give [data] task = "{LANGUAGE}", or remove it'
            )
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
        if request.forget is None and request.forget_file is None:
            raise Refused(f"{source}: [request] needs the key 'forget', or forget_file with ids")
        if request.test_file is not None and data.test is not None:
            raise Refused(
                f"{source}: [request] test_file takes test rows out of the training data, and [data] test names others"
            )

    def _rest(self, source: str) -> None:
        """Refuse keys of the request, the references and the run that exclude or need each other."""
        model, request = self.model, self.request
        for one, other in (("forget", "forget_file"), ("retain", "retain_file")):
            if getattr(request, one) is not None and getattr(request, other) is not None:
                raise Refused(f"{source}: [request] {one} and {other} say the same thing twice; remove one")
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
    """Paths of a run file are relative to the run file; what may name a model on a hub is one where there is no such path."""
    data = document.get("data")
    language = isinstance(data, dict) and data.get("task") == LANGUAGE

    def placed(value: Any, hub: bool) -> Any:
        if not isinstance(value, str) or (hub and not (folder / value).exists()):
            return value
        return str(folder / value)

    for section, key in PATHS:
        part = document.get(section)
        if isinstance(part, dict) and key in part:
            value, hub = part[key], language and (section, key) in HUB
            part[key] = [placed(item, hub) for item in value] if isinstance(value, list) else placed(value, hub)


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
