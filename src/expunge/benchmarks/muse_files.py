"""MUSE's files, from a local folder in the release's layout, and its running texts in pieces to train on.

The passages are of the BBC and of novels, whose rights are third parties'. Nothing is fetched: bring the folder of one
corpus (``data/bbc`` or ``data/hp``), with ``knowmem/``, ``verbmem/``, ``privleak/`` and ``raw/`` in it.

Paper: Shi et al. 2024 (arXiv:2407.06460).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.core import Data, Refused
from expunge.data.text import Texts


@dataclass(frozen=True)
class Quiz:
    """Questions, and answered ones that are shown before each. Each is a (question, answer)."""

    questions: tuple[tuple[str, str], ...]
    shots: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Muse:
    """One corpus to score on.

    Attributes:
        passages: (beginning, what follows it) of the forget texts.
        forget, retain: quizzes. members, unseen: texts that the model before forgetting was, and was not, trained on.
    """

    passages: tuple[tuple[str, str], ...]
    forget: Quiz
    retain: Quiz
    members: tuple[str, ...]
    unseen: tuple[str, ...]


def read(folder: str | Path) -> Muse:
    """The evaluation files of one corpus: ``data/bbc`` or ``data/hp`` of the release, or a copy of the hub's.

    Raises:
        Refused: for a file that is missing, no JSON list, or has an item without its texts, with its number.
    """
    folder = Path(folder)
    quizzes = []
    for names in (("forget",), ("retain2", "retain")):  # the repository and the hub call it differently
        questions = _records(folder, [f"knowmem/{name}_qa.json" for name in names], ("question", "answer"))
        shots = _records(folder, [f"knowmem/{name}_qa_icl.json" for name in names], ("question", "answer"))
        quizzes.append(Quiz(questions, shots))
    passages = _records(folder, ["verbmem/forget.json"], ("prompt", "gt"))
    members, unseen = (_plain(folder, f"privleak/{name}.json") for name in ("forget", "holdout"))
    forget, retain = quizzes
    return Muse(passages, forget, retain, members, unseen)


def raw(folder: str | Path, name: str) -> str:
    """A running text to train on: "forget", "retain1", "retain2" or "holdout" of ``raw``, or "scal/forget_2" and the like.

    From the ``.txt``, or the articles of the ``.json`` with a blank line between them.
    """
    path = Path(folder) / (name if "/" in name else f"raw/{name}")
    text = path.with_name(f"{path.name}.txt")
    if text.is_file():
        try:
            return text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Refused(f"{text} is not UTF-8 ({error.reason}): take it again from the release") from error
    return "\n\n".join(_plain(path.parent, f"{path.name}.json"))


def chunks(tokenizer: Any, text: str, *, length: int = 2048, fill: bool = True, first_id: int = 0) -> Data:
    """Running text in pieces of `length` tokens, each after a beginning-of-sequence token, every token labelled.

    Args:
        length: tokens of a piece, that first one included, >= 2. fill: make the last piece as long as the others with the
            beginning of the first, as the release does; otherwise it stays short. Neither way is there padding that counts.

    Raises:
        Refused: for a length below 2, or a text without two tokens.
    """
    if length < 2:
        raise Refused(f"length must be at least 2 tokens, found {length}")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    begin = tokenizer.bos_token_id
    head = [] if begin is None else [begin]
    step = length - len(head)
    pieces = [[*head, *ids[start : start + step]] for start in range(0, len(ids), step)]
    if fill and len(pieces) > 1:
        pieces[-1] = [*pieces[-1], *pieces[0]][:length]
    if not pieces or len(pieces[0]) < 2:
        raise Refused("the text has no two tokens: there is nothing to predict in it")
    if len(pieces[-1]) < 2:  # one token over, and no token before it that could predict it
        pieces.pop()
    source = Texts([(piece, 0) for piece in pieces], 0)
    return Data(source, torch.arange(len(pieces)), torch.arange(first_id, first_id + len(pieces)))


def _records(folder: Path, names: Sequence[str], keys: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    found = []
    for number, tree in enumerate(_list(path), 1):
        values = [tree.get(key) if isinstance(tree, Mapping) else None for key in keys]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise Refused(f"{path} item {number} lacks {' or '.join(map(repr, keys))}: expected both, as texts")
        found.append((str(values[0]), str(values[1])))
    return tuple(found)


def _plain(folder: Path, name: str) -> tuple[str, ...]:
    path = folder / name
    found = [tree.get("text") if isinstance(tree, Mapping) else tree for tree in _list(path)]
    for number, text in enumerate(found, 1):
        if not isinstance(text, str) or not text.strip():
            raise Refused(f"{path} item {number} is no text: expected a text, or an object with 'text'")
    return tuple(map(str, found))


def _list(path: Path) -> list[Any]:
    if not path.is_file():
        raise Refused(
            f"there is no file {path}: name the folder of one corpus, with knowmem, verbmem, privleak and raw in it"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{path} is not JSON ({error}): take it again from the release") from error
    if not isinstance(tree, list) or not tree:
        raise Refused(f"{path} should be a JSON list of one or more items, found {type(tree).__name__}")
    return tree
