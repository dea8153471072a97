"""Alternate answers for AltPO (arXiv:2409.13474): plausible and untrue, best by the very model that is to forget.

Written by the model or read from a file, then encoded: one example per alternate, the true answer the one to lose and the
alternate the one to win, as the method ``alt_po`` reads them. Answers that a model did not write itself are off its own
distribution; the method works with them, the paper's results are not of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Batch, Data, Key, Refused
from expunge.data.json_lines import Example, lines, parsed
from expunge.data.text import Encoded, Template, encode
from expunge.journal import write_bytes
from expunge.tasks.generation import generate

STOPS = ("Question:", "Q:")
KEYS = ("question", "answer", "sub_answer")
INSTRUCTION = (
    "Write this answer once more, in the same form and at about the same length, but with every name, place, date and "
    "number changed to another one that is just as plausible. Give the new answer only."
)


@dataclass(frozen=True)
class Alternates:
    """Questions, their true answers and other ones; one row per alternate, so a question stands in several.

    Attributes:
        true: the examples to forget. other: the same prompts with the alternate for an answer, row by row.
        dropped: alternates left out, empty or equal to the true answer.
    """

    true: tuple[Example, ...]
    other: tuple[Example, ...]
    dropped: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know."""
        if not self.dropped:
            return ()
        whole = self.dropped + len(self.other)
        return (f"{self.dropped} of {whole} alternates were empty or the true answer itself, and were dropped",)

    def asked_as(self, examples: Iterable[Example]) -> Alternates:
        """The same rows, a prompt with all the turns before it that an example of the same prompt and answer has.

        A file holds the last turn alone; a system message and what was said earlier come back from the texts to forget.
        """
        whole: dict[tuple[str, str], Example] = {}
        for example in examples:
            whole.setdefault((example.prompt, example.answer), example)
        true = tuple(whole.get((example.prompt, example.answer), example) for example in self.true)
        pairs = zip(true, self.other, strict=True)
        return replace(self, true=true, other=tuple(asked.answered(other.answer) for asked, other in pairs))

    def save(self, path: str | Path) -> None:
        """Write the rows as JSON lines with question, answer and sub_answer, whole or not at all."""
        rows = (
            dict(zip(KEYS, (true.prompt, true.answer, other.answer), strict=True))
            for true, other in zip(self.true, self.other, strict=True)
        )
        write_bytes(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def encode(self, template: Template, *, length: int, first_id: int = 0) -> Encoded:
        """Tokenised for training: the true answers, with the alternates as nested column ``win``.

        Args:
            template, length, first_id: as for ``data.text.encode``.
        """
        lose, win = (encode(part, template, length=length, first_id=first_id) for part in (self.true, self.other))
        notes = tuple(dict.fromkeys((*lose.notes, *win.notes, *self.notes)))
        return Encoded(paired(lose.data, win.data), lose.examples, notes)


class Pairs:
    """A source of examples with another answer each: the columns of `lose`, and those of `win` nested under ``win``."""

    def __init__(self, lose: Data, win: Data):
        self.lose, self.win = lose, win
        self.in_memory = all(getattr(part.source, "in_memory", False) for part in (lose, win))

    def __len__(self) -> int:
        return len(self.lose)

    def fetch(self, rows: Tensor) -> Batch:
        """The rows as a batch, each answer padded on its own."""
        lose, win = ({n: v for n, v in part.batch(rows).items() if n != "id"} for part in (self.lose, self.win))
        return {**lose, "win": win}


def paired(lose: Data, win: Data) -> Data:
    """Data whose answers are those to forget, and whose column ``win`` has those to give instead, row by row.

    Raises:
        Refused: where they differ in length.
    """
    if len(lose) != len(win):
        raise Refused(f"there are {len(lose)} answers to forget and {len(win)} to give: expected one for each")
    return Data(Pairs(lose, win), torch.arange(len(lose)), lose.ids)


def make_alternates(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    rng: Key,
    each: int = 5,
    instruction: str = INSTRUCTION,
    temperature: float = 1.0,
    new_tokens: int = 200,
    batch: int = 16,
) -> Alternates:
    """Let the model that is to forget write `each` alternates per question, shown the true answer and an instruction.

    What it writes depends on (key, question, number) alone. That an alternate is untrue, or plausible, is not checked:
    only that it is not empty and not the true answer. A model that follows no instructions repeats it often.

    Args:
        model, tokenizer: the model to unlearn, as it is before.
        examples: prompts with their true answers, from ``data.text.read_texts``; no running text.
        rng: of the sampling.
        each: alternates per question, >= 1. instruction: what is asked for.
        temperature: of the sampling, > 0. new_tokens: most tokens of an alternate, >= 1. batch: at a time, >= 1.

    Raises:
        Refused: for running text, a number out of range, or a question that is left without an alternate.
    """
    if each < 1 or not temperature > 0:
        raise Refused(
            f"expected at least 1 alternate per question at a temperature above 0, found {each} at {temperature}"
        )
    text = next((example for example in examples if not example.messages), None)
    if text is not None:
        raise Refused(f"{text.where} is running text: alternates are other answers, give a prompt and an answer")
    template = Template(tokenizer)
    requests = [_request(template, example, instruction) for example in examples]
    prompts = [request for request in requests for _ in range(each)]
    key = rng.at("alternates")
    written = generate(
        model,
        tokenizer,
        prompts,
        new_tokens=new_tokens,
        batch=batch,
        temperature=temperature,
        rng=key,
        stop=STOPS,
        streams=[key.at(request, number).seed for request in requests for number in range(each)],
    )
    true = [example for example in examples for _ in range(each)]
    return _kept(zip(true, written, strict=True))


def _request(template: Template, example: Example, instruction: str) -> str:
    """Question, true answer and instruction: the user's turn of a chat, or plain text that the new answer follows."""
    shown = f"Question: {example.prompt}\nAnswer: {example.answer}\n\n{instruction}"
    if template.chat:
        return template.prompt(Example(({"role": "user", "content": shown},), "", example.where))
    return f"{shown}\n\nNew answer:"


def read_alternates(path: str | Path) -> Alternates:
    """Alternates from JSON lines with question, answer and sub_answer, one line per alternate.

    Raises:
        Refused: for a file that cannot be read, a line that is no such object, or a question that is left without one.
    """
    path = Path(path)
    rows: list[tuple[Example, str]] = []
    for number, text in lines(path):
        where = f"{path} line {number}"
        tree = parsed(text, where)
        if not isinstance(tree, dict) or not all(isinstance(tree.get(key), str) for key in KEYS):
            found = ", ".join(map(str, tree)) if isinstance(tree, dict) else f"a {type(tree).__name__}"
            raise Refused(f"{where} has {found or 'nothing'}: expected the texts {', '.join(KEYS)}; correct the line")
        if not tree["question"].strip() or not tree["answer"].strip():
            raise Refused(f"{where} has an empty question or answer: correct or drop the line")
        asked = ({"role": "user", "content": tree["question"]},)
        rows.append((Example(asked, tree["answer"], where), tree["sub_answer"]))
    if not rows:
        raise Refused(f"{path} has no alternates: expected a JSON object with {', '.join(KEYS)} on each line")
    return _kept(rows)


def _kept(rows: Iterable[tuple[Example, str]]) -> Alternates:
    """The rows with an alternate that is one; every question keeps at least one."""
    true: list[Example] = []
    other: list[Example] = []
    asked: dict[tuple[str, str], Example] = {}
    left: Counter[tuple[str, str]] = Counter()
    dropped = 0
    for example, text in rows:
        question = (repr(example.messages), _plain(example.answer))
        asked.setdefault(question, example)
        if not _plain(text) or _plain(text) == _plain(example.answer):
            dropped += 1
            continue
        left[question] += 1
        true.append(example)
        other.append(example.answered(text.strip()))
    bare = [example for question, example in asked.items() if not left[question]]
    if bare:
        raise Refused(
            f"{bare[0].where}: {bare[0].prompt!r} is left without an alternate ({len(bare)} of {len(asked)} questions "
            f"are): every one is empty or the true answer itself; give others, or leave the question out"
        )
    return Alternates(tuple(true), tuple(other), dropped)


def _plain(text: str) -> str:
    """For comparing: case and runs of spaces do not make another answer."""
    return " ".join(text.split()).casefold()
