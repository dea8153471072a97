"""A run file about a language model: its model, its texts, the request they make, and what is written in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from expunge.core import Data, Key, Refused, Request
from expunge.data.builtin import Recipe
from expunge.data.json_lines import Example, lines, read_texts
from expunge.data.text import Encoded, Template, Texts
from expunge.spec import RunSpec
from expunge.tasks.alternates import make_alternates, read_alternates
from expunge.tasks.language_model import LanguageModel, check_fit, load_language_model, save_language_model
from expunge.weights import load_weights

if TYPE_CHECKING:
    from expunge.tasks.causal_lm import CausalLM

FOLDER = "model"
"""Folder of a run that transformers loads."""
RECIPE = Recipe(epochs=5, lr=1e-5, weight_decay=0.01, batch=8, optimizer="adamw")
"""How references are fine-tuned from the base unless the run file says otherwise: TOFU's settings, on smaller batches."""
ASKED = {"forget": 6, "retain": 3, "test": 1}
"""Questions of each part that a report shows."""


@dataclass(frozen=True)
class Language:
    """A language model and the texts of a run.

    Attributes:
        found: the model before unlearning. texts: "forget", "retain", "test" -> what was read and tokenised.
        template, length: how texts are written, and how many tokens of each are read. dtype, four_bit, tokenizer: how the model is read.
        given: not empty once the model was given away, to be changed.
    """

    found: LanguageModel
    texts: Mapping[str, Encoded]
    task: CausalLM
    template: str = "auto"
    dtype: str = "auto"
    length: int = 512
    four_bit: bool = False
    tokenizer: str | None = None
    given: list[bool] = field(default_factory=list, repr=False, compare=False)

    @property
    def train(self) -> Data:
        """What the model was trained on, as far as the files say: forget and retain, with ids 0, 1, 2 ..."""
        parts = [self.texts[name].data for name in ("forget", "retain") if name in self.texts]
        return parts[0] if len(parts) == 1 else joined(parts)

    @property
    def request(self) -> Request:
        """What to forget and keep."""
        size, train = len(self.texts["forget"].data), self.train
        retain = train.select(range(size, len(train))) if "retain" in self.texts else None
        return Request(train.select(range(size)), retain)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the texts."""
        return [f"{name}: {note}" for name, encoded in self.texts.items() for note in encoded.notes]

    def alternates(self, path: str | None, own: Path | None, rng: Key) -> Encoded:
        """The forget texts with other answers to give: of a file, or written by the model and kept in `own`.

        Raises:
            Refused: for a file of other questions than those to forget, or a question without another answer.
        """
        asked = {(example.prompt, example.answer) for example in self.texts["forget"].examples}
        kept = own if path is None and own is not None and own.is_file() else path
        if kept is not None:
            told = read_alternates(kept)
            odd = [example for example in told.true if (example.prompt, example.answer) not in asked]
            if odd:
                raise Refused(
                    f"{odd[0].where} has a question and answer that are not in the texts to forget: remove it"
                )
            left = asked - {(example.prompt, example.answer) for example in told.true}
            if left:
                raise Refused(f"{kept} has no alternate for the question {sorted(left)[0][0]!r}: add one")
            told = told.asked_as(self.texts["forget"].examples)
        else:
            model, words = self.found.model, self.found.tokenizer
            told = make_alternates(model, words, self.texts["forget"].examples, rng=rng.at("alternates"))
            if own is not None:
                told.save(own)
        template = Template(self.found.tokenizer, self.template)  # type: ignore[arg-type]
        first = sum(len(encoded.data) for encoded in self.texts.values())
        return told.encode(template, length=self.length, first_id=first)

    def model(self, seed: int) -> nn.Module:
        """The model as its files have it: the one that was read first, then read anew, since a run may change it."""
        if self.given:
            again = load_language_model(
                self.found.source,
                dtype=self.dtype,  # type: ignore[arg-type]
                four_bit=self.four_bit,
                tokenizer=self.tokenizer,
            )
            return again.model
        self.given.append(True)
        return self.found.model

    def asked(self, wanted: Mapping[str, int] = ASKED) -> list[tuple[str, str, str, list[int]]]:
        """Questions to show a person: (part, question, true answer, token ids of the prompt), spread over the files.

        Of running text the first half is the question and the second the answer. Of a prompt that leaves no room for an
        answer, the model is asked the last three quarters.
        """
        context = self.found.context
        template = Template(self.found.tokenizer, self.template)  # type: ignore[arg-type]
        found = []
        for part, count in wanted.items():
            for place in spread(len(self.texts[part].examples), count) if part in self.texts else ():
                example = self.texts[part].examples[place]
                if example.messages:
                    ids = template.prompt_ids(example)
                    ids = ids if len(ids) < context else ids[-(3 * context // 4) :]
                    found.append((part, example.prompt, example.answer, ids))
                    continue
                ids = self.texts[part].data.source.ids[place].tolist()  # type: ignore[attr-defined]
                half = max(1, len(ids) // 2)
                found.append((part, self.found.decode(ids[:half]), self.found.decode(ids[half:]), ids[:half]))
        return found

    def save(self, model: nn.Module, folder: Path, weights: Path) -> Path:
        """The unlearned model as a folder that transformers loads, its weights linked to those of the run."""
        return save_language_model(LanguageModel(model, self.found.tokenizer), folder / FOLDER, weights=weights)

    def read(self, path: str | Path) -> nn.Module:
        """Another model of this architecture, from a folder of transformers or a file of weights, in eval mode.

        Raises:
            Refused: for one with another vocabulary, or that does not fit.
        """
        if Path(path).is_file():
            blank = type(self.found.model)(self.found.model.config)
            return load_weights(blank.to(next(self.found.model.parameters()).dtype), path).eval()
        other = load_language_model(path, dtype=self.dtype, tokenizer=self.found.source)  # type: ignore[arg-type]
        if other.vocab != self.found.vocab:
            raise Refused(
                f"{path} has {other.vocab} tokens and {self.found.source} {self.found.vocab}: an audit compares models of "
                f"one vocabulary"
            )
        return other.model


def joined(parts: Sequence[Data]) -> Data:
    """Texts of several files as one, with the ids that they have."""
    whole = Texts([], 0)
    for part in parts:
        source = part.source
        if not isinstance(source, Texts):
            raise Refused(f"cannot join a {type(source).__name__}: expected texts")
        whole.ids += source.ids
        whole.starts += source.starts
        whole.examples += source.examples
        whole.pad = source.pad
    return Data(whole, torch.arange(len(whole)), torch.cat([part.ids for part in parts]))


def read_language(spec: RunSpec) -> Language:
    """The model and the texts of a run file.

    Raises:
        Refused: for a model or texts that cannot be read, texts to forget that are to be kept or unseen as well, and a
            tokenizer that does not belong to the model.
    """
    given = {
        "forget": spec.request.forget_file,
        "retain": spec.request.retain_file,
        "test": spec.request.test_file,
    }
    examples = {name: read_texts(path) for name, path in given.items() if path is not None}
    _apart(examples)
    refusals = () if spec.data.refusals is None else _refusals(spec.data.refusals)
    found = load_language_model(
        spec.model.weights or "",
        dtype=spec.model.dtype,
        four_bit=spec.model.four_bit,
        tokenizer=spec.model.tokenizer,
    )
    texts, first = {}, 0
    for name, told in examples.items():
        texts[name] = found.encode(told, spec.data.template, spec.data.length, first)
        first += len(texts[name].data)
    task = found.task(refusals, spec.data.template)
    _room(texts, task, found.context)
    check_fit(found.model, task, texts["forget"].data)
    model = spec.model
    length = spec.data.length or found.context
    return Language(found, texts, task, spec.data.template, model.dtype, length, model.four_bit, model.tokenizer)


def _room(texts: Mapping[str, Encoded], task: CausalLM, context: int) -> None:
    """Refuse prompts that leave no room for the longest refusal: some models have no place for more tokens."""
    longest = max(map(len, task.refusals), default=0)
    for encoded in texts.values():
        for start, example in zip(encoded.data.source.starts, encoded.examples, strict=True):  # type: ignore[attr-defined]
            if longest and start + longest > context:
                raise Refused(
                    f"{example.where}: the prompt has {start} tokens, which leaves no room for a refusal of {longest} in the "
                    f"{context} that the model reads: shorten one of them"
                )


def _apart(examples: Mapping[str, tuple[Example, ...]]) -> None:
    """Refuse the same text in two files: it cannot be forgotten and kept, nor trained on and unseen."""
    seen: dict[tuple[str, str], Example] = {}
    for told in examples.values():
        own: dict[tuple[str, str], Example] = {}
        for example in told:
            text = (repr(example.messages), example.answer)
            if text in seen:
                raise Refused(
                    f"{example.where} holds the same text as {seen[text].where}: remove it from one of the two files"
                )
            own.setdefault(text, example)
        seen |= own


def _refusals(path: str) -> tuple[str, ...]:
    """One refusal per line of a text file."""
    found = tuple(text for _, text in lines(Path(path)))
    if not found:
        raise Refused(f"{path} has no line: expected one refusal per line")
    return found


def base(spec: RunSpec, language: Language) -> Callable[[], nn.Module]:
    """Gives the model that references are fine-tuned from."""
    path = spec.audit.base or ""
    return lambda: language.read(path)


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` places of 0 .. count - 1, evenly apart, the first among them: no model has a say in the choice."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]
