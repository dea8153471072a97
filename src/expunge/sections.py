"""The sections of a run file: which keys each has, and of what kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from expunge.core import Refused, Stage
from expunge.data.indices import read_indices
from expunge.registry import did_you_mean, find, methods, parts

WholeNumber = Annotated[int, Field(ge=0)]
ADAPTER = "adapter"
"""Folder of a run with its adapter, as peft writes it."""
LANGUAGE = "causal-lm"
"""What [data] task says of a language model."""


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
    task: Literal["classification", "regression", "causal-lm"] = "classification"
    classes: Annotated[int, Field(ge=2)] | None = None
    categories: Literal["onehot", "integer"] = "onehot"
    ids: str | None = None
    drop: list[str] = Field(default_factory=list)
    template: Literal["auto", "chat", "plain"] = "auto"
    length: Annotated[int, Field(ge=2)] | None = None
    refusals: str | None = None
    alternates: str | None = None


class ModelSection(Section):
    """The trained model, where `data` does not bring it."""

    weights: str | None = None
    python: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    four_bit: bool = False
    checkpointing: bool = False


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
        return find("method", self.name, methods()).build(**self.settings())

    def settings(self) -> dict[str, Any]:
        """What the file sets, parts made."""
        return {name: _part(name, value) for name, value in (self.model_extra or {}).items()}


class RunSection(Section):
    """Where results go, and what makes the run repeatable."""

    out: str | None = None
    seed: WholeNumber = 0
    scope: list[str] | None = None
    every: Annotated[float, Field(ge=0)] = 20.0
    watch: WholeNumber = 0
    watch_examples: Annotated[int, Field(ge=1)] = 512
    adapter: str | dict[str, Any] | None = None
    pieces: Annotated[int, Field(ge=1)] = 1

    def adapted(self, stage: Stage, merge: bool = True) -> Stage:
        """The stage in the adapter that is asked for, which is saved beside the run's weights; itself without one.

        Raises:
            Refused: for an unknown adapter or setting.
        """
        if self.adapter is None:
            return stage
        asked = {"name": self.adapter} if isinstance(self.adapter, str) else dict(self.adapter)
        if not isinstance(asked.get("name"), str):
            raise Refused(
                f'[run] adapter should be a name or a table with a name, such as {{name = "lora"}}, found {asked}'
            )
        from expunge.wrap import carrier, in_adapter

        name = asked.pop("name")
        made = carrier(
            name, **{key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()}
        )
        save = None if self.out is None or not made.as_peft else Path(self.out) / ADAPTER
        return in_adapter(made, stage, merge=merge, save=save)


class AuditSection(Section):
    """References to compare with: models retrained without the forget set, and others; see ``expunge.references``.

    Without `train`, the model that the data bring is trained by a recipe: `epochs`, `lr` and `batch`. `folder` is where
    the models are kept (references in the run's folder by default), to be shared between runs. `trust` takes retrained
    models as they are; otherwise those that look trained on the forget data are refused. `base` is the language model
    before it was fine-tuned: from there references are trained by the recipe, with AdamW.
    """

    retrained: WholeNumber = 0
    originals: WholeNumber = 0
    shadows: WholeNumber = 0
    unlearn: bool = False
    weights: list[str] = Field(default_factory=list)
    trust: bool = False
    train: str | None = None
    base: str | None = None
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


class TuneSection(Section):
    """A search for settings; see ``expunge.tune.tune``. `space` has ranges of the user's own: ``{lr = [1e-4, 1e-1]}``.

    `rule`, `floor`, `target` and `seeds` say what is looked for; `trials`, `seconds`, `backward` and `per_run` are the
    budget. `proxies` other requests with `retrained` models each belong to the rule "proxy".
    """

    rule: str = "blind"
    floor: float = 2.0
    target: float | None = None
    seeds: int = 1
    trials: int = 30
    seconds: float | None = None
    backward: int | None = None
    per_run: int | None = None
    proxies: int = 2
    retrained: int = 2
    space: dict[str, list[Any]] = Field(default_factory=dict)


def _part(name: str, value: Any) -> Any:
    """A setting; a table with a name is a part (objective, combiner) or a method with its own settings."""
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    if value.get("name") in methods():
        return MethodSection(**value).stage()
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
