"""TOFU: questions about 200 invented authors, from a local folder of its JSON-lines files.

Every file is checked against what TOFU says of it: the number of lines, the fields, the number of wrong answers. A cut or
edited file would give numbers that look like TOFU's and are not. Nothing is fetched: bring the folder, under the names
that the authors gave the files (``forget10.json``, ``real_authors_perturbed.json``, ``idontknow.jsonl``).

Paper: Maini et al. 2024 (arXiv:2401.06121); the data are MIT. The hold-out sets of the data hub are not read: how they were
made is not published.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expunge.benchmarks.tofu_scores import Said
from expunge.core import Refused
from expunge.registry import did_you_mean

AUTHORS, EACH = 200, 20
TOTAL = AUTHORS * EACH
SHARES = (1, 5, 10, 20, 30, 50, 90)
"""Percent of the authors that are forgotten, always the last ones; 1, 5 and 10 are the paper's."""
REFUSALS = "idontknow.jsonl"
LOGS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
"""Set -> its name in the evaluation log that the authors' code writes."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: its place in ``full`` (0 to 3999, author by author), so that an item has one id in all files; real authors
            have 4000 to 4099 and world facts 4100 to 4216.
        question, answer: text. paraphrased_question, paraphrased_answer: of the perturbed sets of invented authors, else "".
        wrong: five wrong answers in the wording of the paraphrase, or three of real authors and world facts; empty
            where the file has none.
    """

    id: int
    question: str
    answer: str
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    wrong: tuple[str, ...] = ()

    @property
    def correct(self) -> str:
        """What the truth ratio holds the wrong answers against: the paraphrase, where there is one, or the answer."""
        return self.paraphrased_answer or self.answer


@dataclass(frozen=True)
class File:
    """What a file of TOFU has to hold: ids from `start`, so many `lines`, so many `wrong` answers, paraphrases or not."""

    start: int
    lines: int
    wrong: int = 0
    paraphrased: bool = False


def _files() -> dict[str, File]:
    found = {"full": File(0, TOTAL)}
    for share in SHARES:
        size = TOTAL * share // 100
        found[f"forget{share:02d}"] = File(TOTAL - size, size)
        found[f"retain{100 - share:02d}"] = File(0, TOTAL - size)
        if share <= 10:
            found[f"forget{share:02d}_perturbed"] = File(TOTAL - size, size, 5, True)
    found["retain_perturbed"] = File(0, 400, 5, True)
    for name, start, lines in (("real_authors", TOTAL, 100), ("world_facts", TOTAL + 100, 117)):
        found[name] = File(start, lines)
        found[f"{name}_perturbed"] = File(start, lines, 3)
    return found


FILES: Mapping[str, File] = _files()
"""Name of a set -> what its file holds."""


@dataclass(frozen=True)
class Tofu:
    """One forgetting job, whole: what to forget and to keep, and the four sets that the scores are over.

    Attributes:
        forget, retain: to train on; disjoint, and together all 4000.
        forget_perturbed, retain_perturbed, real_authors, world_facts: to score, each with wrong answers.
    """

    forget: tuple[Item, ...]
    retain: tuple[Item, ...]
    forget_perturbed: tuple[Item, ...]
    retain_perturbed: tuple[Item, ...]
    real_authors: tuple[Item, ...]
    world_facts: tuple[Item, ...]


def read(folder: str | Path, share: int = 10) -> Tofu:
    """All that one forgetting job needs.

    Args:
        folder: holds the JSON-lines files. share: percent of the authors to forget, one of 1, 5 and 10.

    Raises:
        Refused: for another share, a file as in ``items``, files of different releases (the same id with another
            question), or a question with its answer both to forget and to keep.
    """
    if share not in (1, 5, 10):
        raise Refused(f"TOFU forgets 1, 5 or 10 percent of the authors, found {share!r}: only these have wrong answers")
    folder = Path(folder)
    forget, retain = items(folder, f"forget{share:02d}"), items(folder, f"retain{100 - share:02d}")
    told, kept = items(folder, f"forget{share:02d}_perturbed"), items(folder, "retain_perturbed")
    both = {_pair(item) for item in forget} & {_pair(item) for item in retain}
    if both:
        raise Refused(
            f"{folder}: {sorted(both)[0][0]!r} is to be forgotten and to be kept ({len(both)} such questions)"
        )
    _same(folder, f"forget{share:02d}", forget, told)
    _same(folder, f"retain{100 - share:02d}", retain, kept)
    real, world = (items(folder, f"{name}_perturbed") for name in ("real_authors", "world_facts"))
    return Tofu(forget, retain, told, kept, real, world)


def _pair(item: Item) -> tuple[str, str]:
    return item.question, item.answer


def _same(folder: Path, name: str, plain: Sequence[Item], perturbed: Sequence[Item]) -> None:
    known = {item.id: item for item in plain}
    for item in perturbed:
        if item.id in known and _pair(known[item.id]) != _pair(item):
            raise Refused(
                f"{folder}: item {item.id} of {name} and of its perturbed set differ ({known[item.id].question!r} and "
                f"{item.question!r}): take all files from one release of TOFU"
            )


def items(folder: str | Path, name: str) -> tuple[Item, ...]:
    """The items of one set, in the order of the file.

    Args:
        folder: holds ``<name>.json``. name: a key of ``FILES``.

    Raises:
        Refused: for a name that is none, a file that is missing or not UTF-8, a line that is no JSON object or lacks
            a field (with its line number), or another number of lines than TOFU has.
    """
    if name not in FILES:
        raise Refused(f"TOFU has no set {name!r}{did_you_mean(name, FILES)}")
    wanted, path = FILES[name], Path(folder) / f"{name}.json"
    found = tuple(
        _item(tree, wanted, wanted.start + place, f"{path} line {line}")
        for place, (line, tree) in enumerate(_objects(path))
    )
    if len(found) != wanted.lines:
        raise Refused(
            f"{path} has {len(found)} items where TOFU has {wanted.lines}: it is cut short or edited; take it again "
            f"from the release"
        )
    return found


def refusals(folder: str | Path) -> tuple[str, ...]:
    """The sentences that give nothing away, one per line of ``idontknow.jsonl`` (plain text, in spite of its name).

    Raises:
        Refused: for a missing file, one that is not UTF-8, or one without a sentence.
    """
    path = Path(folder) / REFUSALS
    found = tuple(text.strip() for _, text in _lines(path))
    if not found:
        raise Refused(f"{path} has no line: expected one refusal per line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number from 1 and text of each line that is not blank."""
    if not path.is_file():
        raise Refused(f"there is no file {path.name} in {path.parent}: name the folder that holds TOFU's files")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Refused(f"{path} line {number} is not UTF-8 ({error.reason}): save the file as UTF-8") from error
            if text.strip():
                yield number, text


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in _lines(path):
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise Refused(
                f"{path} line {number} is not JSON ({error.msg} at column {error.colno}): expected one object per line"
            ) from error
        if not isinstance(tree, dict):
            raise Refused(f"{path} line {number} is a {type(tree).__name__}: expected one JSON object per line")
        yield number, tree


def _item(tree: Mapping[str, Any], wanted: File, number: int, where: str) -> Item:
    names = ("question", "answer", *(("paraphrased_question", "paraphrased_answer") if wanted.paraphrased else ()))
    texts = {name: _text(tree.get(name), f"{where}: {name!r}") for name in names}
    wrong = tree.get("perturbed_answer", []) if wanted.wrong else []
    if not isinstance(wrong, list) or len(wrong) != wanted.wrong:
        count = len(wrong) if isinstance(wrong, list) else "no list of"
        raise Refused(f"{where}: 'perturbed_answer' has {count} wrong answers, expected {wanted.wrong}")
    told = tuple(_text(text, f"{where}: 'perturbed_answer' {place}") for place, text in enumerate(wrong, 1))
    return Item(number, **texts, wrong=told)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else "empty" if isinstance(value, str) else f"a {type(value).__name__}"
        raise Refused(f"{what} is {found}: expected a text")
    return value


def read_log(path: str | Path) -> dict[str, Said]:
    """What a model said of the four sets, from an aggregated evaluation log of the authors' code: see ``LOGS``.

    The probability is of ``avg_gt_loss``; the correct answer of the truth ratio is ``avg_paraphrased_loss`` in all four
    sets, also in real authors and world facts: their paraphrase is the answer itself, in another pass of the authors',
    whose rounding moves the fourth digit of what is published.

    Raises:
        Refused: for a file that is missing or not such a log.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"there is no evaluation log {path}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {name: _said(tree[key]) for name, key in LOGS.items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Refused(
            f"{path} is not an aggregated evaluation log of TOFU ({type(error).__name__}: {error}): expected "
            f"{', '.join(LOGS.values())}, each with a number per item"
        ) from error


def _said(tree: Mapping[str, Mapping[str, Any]]) -> Said:
    order = list(tree["avg_gt_loss"])
    columns = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    answer, correct, wrong, rouge = (
        np.array([tree[column][item] for item in order], dtype=np.float64) for column in columns
    )
    asked = tuple(str(tree["generated_text"][item][0]) for item in order)
    return Said(asked, answer, correct, wrong, rouge)
