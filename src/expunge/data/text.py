"""Texts -> token ids with labels on the answer (the last message; the whole of a running text), by a template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.core import Batch, Data, Refused
from expunge.data.json_lines import Example, Message

IGNORED = -100
STAND_IN = "\u203b"
"""An answer that is put into a chat template to see where answers stand."""


@dataclass(frozen=True)
class Template:
    """How a prompt and an answer become one text, for training and for asking alike.

    Args:
        tokenizer: of the Hugging Face kind.
        kind: "chat" uses the tokenizer's own chat template; "plain" writes `question` and `lead`; "auto" is chat where
            the tokenizer has one.
        question, lead: what stands around a prompt in the plain kind, without a space at the end: that belongs to the first
            word of the answer. Turns before the last are written one per line.

    Raises:
        Refused: for chat without a chat template.
    """

    tokenizer: Any
    kind: Literal["auto", "chat", "plain"] = "auto"
    question: str = "Question: {}\n"
    lead: str = "Answer:"

    def __post_init__(self) -> None:
        if self.kind == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise Refused("the tokenizer has no chat template: use the plain template, or give the tokenizer one")

    @property
    def chat(self) -> bool:
        """Whether the tokenizer's chat template is used."""
        return self.kind == "chat" or (self.kind == "auto" and bool(getattr(self.tokenizer, "chat_template", None)))

    def prompt(self, example: Example, prefix: str = "") -> str:
        """The text that the model is asked to go on from; `prefix` is put into its mouth."""
        if not example.messages:
            return prefix
        if not self.chat:
            earlier = "".join(f"{turn['content']}\n" for turn in example.messages[:-1])
            asked = f"{earlier}{self.question.format(example.prompt)}{self.lead}"
            return f"{asked} {prefix}" if prefix else asked
        asked = self._rendered(list(example.messages), example.where, add_generation_prompt=True)
        return asked + prefix

    def prompt_ids(self, example: Example, prefix: str = "") -> list[int]:
        """Token ids of ``prompt``; a tokenizer that ends every text does not end this one."""
        text, bare = self.prompt(example, prefix), self.chat and bool(example.messages)
        found = self._ids(text, bare)
        ended = not bare and len(found) > 1 and found[-1] in self._ends()
        return found[:-1] if ended and found[-1:] != self._ids(text, bare=True)[-1:] else found

    def ids(self, example: Example) -> tuple[list[int], int]:
        """Token ids of prompt and answer, its end token included, and how many of them are prompt.

        The text is tokenised as a whole. What the tokens of the prompt alone have in common with it is prompt, so a token
        that a tokenizer merges across the border belongs to the answer, and no answer loses its labels.
        """
        asked = self.prompt_ids(example) if example.messages else []
        if self.chat and example.messages:
            text = self._answered(example, example.answer).rstrip()
            whole = self._ids(text, bare=True)
            if not text.startswith(self.prompt(example)):
                asked = self._ids(self._before(example, text), bare=True)
        else:
            answer = example.answer.strip() if example.messages else example.answer
            whole = self._ids(self.prompt(example, answer), bare=False)
        shared = next((n for n, pair in enumerate(zip(asked, whole, strict=False)) if pair[0] != pair[1]), None)
        start = min(len(asked), len(whole)) if shared is None else shared
        if len(whole) == start:
            raise Refused(f"{example.where}: the answer {example.answer!r} has no token of its own: correct or drop it")
        end = self.tokenizer.eos_token_id
        if end is not None and whole[-1] not in self._ends(of_turns=self.chat and bool(example.messages)):
            whole = [*whole, end]
        return whole, start

    def _ends(self, of_turns: bool = False) -> set[int | None]:
        """Tokens that end a text: those so named; `of_turns`, any special one that has no other use."""
        named = {getattr(self.tokenizer, f"{name}_token_id", None) for name in ("eos", "sep")}
        if of_turns:
            added = getattr(self.tokenizer, "added_tokens_decoder", {})
            special = {*self.tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
            named |= special - {getattr(self.tokenizer, f"{name}_token_id", None) for name in ("unk", "bos", "pad")}
        return named

    def _answered(self, example: Example, answer: str) -> str:
        """The whole conversation as the chat template writes it."""
        return self._rendered([*example.messages, {"role": "assistant", "content": answer}], example.where)

    def _before(self, example: Example, whole: str) -> str:
        """What the chat template writes before the answer, where that is not how it asks.

        Some move the system message before the last turn, or open a <think> when they ask: the answer is found by putting
        another in its place.
        """
        before, found, _ = self._answered(example, STAND_IN).rpartition(STAND_IN)
        same = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return before[:same] if found else whole

    def _rendered(self, turns: list[Message], where: str, **how: Any) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **how))
        except TemplateError as error:
            raise Refused(
                f"{where}: the tokenizer's chat template does not take this conversation ({error})"
            ) from error

    def _ids(self, text: str, bare: bool) -> list[int]:
        """Token ids; a chat template writes the special tokens itself, so a `bare` text gets none."""
        return list(self.tokenizer(text, add_special_tokens=not bare)["input_ids"])


class Texts:
    """Tokenised examples of unequal length; a batch is padded to the longest of the rows that it holds.

    Args:
        rows: (token ids, how many of them are prompt) of each example.
        pad: id that fills up; it is masked, so any id does.
        examples: what was tokenised, in the same order.
    """

    in_memory = True

    def __init__(self, rows: Sequence[tuple[list[int], int]], pad: int, examples: Sequence[Example] = ()):
        self.ids = [torch.tensor(ids, dtype=torch.int64) for ids, _ in rows]
        self.starts = [start for _, start in rows]
        self.pad, self.examples = pad, tuple(examples)

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, rows: Tensor) -> Batch:
        """The rows as columns ``input_ids``, ``attention_mask`` and ``labels``, padded on the right."""
        chosen = rows.tolist()
        width = max((len(self.ids[row]) for row in chosen), default=0)
        ids = torch.full((len(chosen), width), self.pad, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for place, row in enumerate(chosen):
            size, start = len(self.ids[row]), self.starts[row]
            ids[place, :size] = self.ids[row]
            mask[place, :size] = 1
            labels[place, start:size] = self.ids[row][start:]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples and what a person should know of them.

    Attributes:
        data: columns ``input_ids``, ``attention_mask`` and ``labels``; ids 0, 1, 2 ... in the order of the examples.
        examples: in the same order (a long running text is several). notes: sentences; answers that were cut.
    """

    data: Data
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()


def encode(examples: Sequence[Example], template: Template, *, length: int, first_id: int = 0) -> Encoded:
    """Tokenise examples for a model that reads up to `length` tokens.

    An answer that goes beyond that is cut, and a note says so; running text becomes as many examples as it takes, each
    token of which but the first of all is learnt once.

    Args:
        examples: from ``read_texts``. template: how they are written. length: tokens, >= 2. first_id: of the data.

    Raises:
        Refused: for no examples, an answer without a token of its own, or a prompt that leaves no room for an answer.
    """
    if not examples:
        raise Refused("there are no texts to tokenise: expected at least one example")
    if length < 2:
        raise Refused(f"length must be at least 2 tokens, found {length}")
    rows: list[tuple[list[int], int]] = []
    kept: list[Example] = []
    cut = 0
    for example in examples:
        ids, start = template.ids(example)
        if not example.messages:
            pieces = _pieces(ids, length, example.where)
            rows += pieces
            kept += [example] * len(pieces)
            continue
        if start >= length:
            raise Refused(
                f"{example.where}: the prompt has {start} tokens and the model reads {length}: shorten or drop it, there "
                f"is no room for an answer"
            )
        cut += len(ids) > length
        rows.append((ids[:length], start))
        kept.append(example)
    pad = template.tokenizer.pad_token_id
    source = Texts(rows, template.tokenizer.eos_token_id or 0 if pad is None else pad, kept)
    data = Data(source, torch.arange(len(rows)), torch.arange(first_id, first_id + len(rows)))
    notes = (f"{cut} of {len(examples)} answers go beyond the {length} tokens that the model reads and were cut",)
    return Encoded(data, tuple(kept), notes if cut else ())


def _pieces(ids: list[int], length: int, where: str) -> list[tuple[list[int], int]]:
    """Running text in pieces of `length` that overlap by one token, so that each is predicted once."""
    if len(ids) < 2:
        raise Refused(f"{where}: the text is a single token, which nothing predicts: correct or drop the line")
    return [(ids[at : at + length], 1) for at in range(0, len(ids) - 1, length - 1)]
