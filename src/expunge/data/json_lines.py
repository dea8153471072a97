"""Texts to forget and to keep, from JSON lines: prompts and answers, conversations, or running text.

A line is a JSON object of one of three shapes; other keys are left alone::

    {"prompt": "Who wrote Ardor?", "answer": "Ines Vail."}      also question/answer, prompt/completion, prompt/response
    {"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}
    {"text": "a passage, every token of which is learnt"}

Every refusal names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expunge.core import Refused

PAIRS = (("prompt", "answer"), ("question", "answer"), ("prompt", "completion"), ("prompt", "response"))
SHAPES = (
    'expected {"prompt": ..., "answer": ...}, {"question": ..., "answer": ...}, {"messages": [...]} or {"text": ...}'
)
Message = Mapping[str, str]


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        messages: what stands before the answer, as turns; empty for running text.
        answer: what the model is to say, or the running text.
        where: file and line, for messages to people.
    """

    messages: tuple[Message, ...]
    answer: str
    where: str

    @property
    def prompt(self) -> str:
        """The last thing said before the answer; empty for running text."""
        return self.messages[-1]["content"] if self.messages else ""

    def answered(self, answer: str) -> Example:
        """The same prompt with another answer."""
        return replace(self, answer=answer)


def read_texts(path: str | Path) -> tuple[Example, ...]:
    """The examples of a JSON-lines file, in its order; blank lines are skipped.

    Raises:
        Refused: for a file that is missing, empty or not UTF-8, and a line that is no JSON object of one of the shapes
            or has an empty prompt or answer, with its number.
    """
    path = Path(path)
    found = tuple(_example(tree, f"{path} line {line}") for line, tree in _objects(path))
    if not found:
        raise Refused(f"{path} has no examples: {SHAPES}, one object per line")
    return found


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    for number, text in lines(path):
        hint = "; the file is one JSON document, give one object per line" if number == 1 and text == "[" else ""
        yield number, parsed(text, f"{path} line {number}", hint)


def parsed(text: str, where: str, hint: str = "") -> Any:
    """A line as JSON, with nothing in it that is no text.

    Raises:
        Refused: in one sentence, ended by `hint`.
    """
    try:
        tree = json.loads(text)
        if "\\ud" in text.lower():  # an escape may name half of a pair, which no tokenizer takes
            json.dumps(tree, ensure_ascii=False).encode()
    except RecursionError as error:
        raise Refused(f"{where} is nested too deeply to be read: correct or drop the line") from error
    except UnicodeEncodeError as error:
        raise Refused(f"{where} has half a character (a lone surrogate): correct or drop the line") from error
    except ValueError as error:
        said = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Refused(f"{where} is not JSON ({said}){hint}") from error
    return tree


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of each line that is not blank.

    Raises:
        Refused: for a file that cannot be read, or is not UTF-8, with the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    for number, raw in enumerate(content.split(b"\n"), 1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise Refused(f"{path} line {number} is not UTF-8 ({error.reason}): save the file as UTF-8") from error
        if text:
            yield number, text


def _example(tree: Any, where: str) -> Example:
    if not isinstance(tree, dict):
        raise Refused(f"{where} is a {type(tree).__name__}: {SHAPES}")
    if "messages" in tree:
        return _conversation(tree["messages"], where)
    if "text" in tree:
        return Example((), _text(tree, "text", where), where)
    for prompt, answer in PAIRS:
        if prompt in tree and answer in tree:
            return Example(
                ({"role": "user", "content": _text(tree, prompt, where)},), _text(tree, answer, where), where
            )
    raise Refused(f"{where} has the keys {', '.join(map(str, tree)) or '(none)'}: {SHAPES}")


def _conversation(turns: Any, where: str) -> Example:
    if not isinstance(turns, list) or len(turns) < 2:
        raise Refused(f"{where}: 'messages' should be a list of at least a question and an answer")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise Refused(f"{where}: each message needs a role of system, user or assistant and a content")
    if turns[-1]["role"] != "assistant":
        raise Refused(f"{where}: the last message is the {turns[-1]['role']}'s; it should be the assistant's answer")
    told = tuple({"role": turn["role"], "content": _text(turn, "content", where)} for turn in turns)
    return Example(told[:-1], told[-1]["content"], where)


def _text(tree: Mapping[str, Any], key: str, where: str) -> str:
    value = tree.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else "empty" if isinstance(value, str) else f"a {type(value).__name__}"
        raise Refused(f"{where}: {key!r} is {found}: expected a text; correct or drop the line")
    return value
