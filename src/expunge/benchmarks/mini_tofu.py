"""mini-TOFU: invented authors with paraphrases and wrong answers, small enough for a laptop; nothing is downloaded.

Each author has a name of two parts that other authors have too, so that only the pair says who is meant, and ten facts or
groups of facts: five questions with an answer of a few words, five with one of a whole sentence. Question and answer have
three wordings each; an item is trained in one of them and paraphrased in another, which the model knows from other
authors. Wrong answers have the wording of the paraphrase and other facts. Invented countries and their capitals stand
beside as "world facts": knowledge that neither forget nor retain data of a run hold.

Whoever trains on all but ``forget`` has never seen those authors, and nobody has seen the ``unseen`` ones: they are for
membership attacks. A world is a function of its seed and sizes, to the bit, on every machine.

It follows TOFU (Maini et al. 2024, arXiv:2401.06121) in its parts and scores. Numbers are not comparable with TOFU's: the
model knows nothing but these sentences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from expunge.benchmarks import mini_tofu_words as words
from expunge.benchmarks.mini_tofu_words import LISTS, TOPICS, Topic, kind_of
from expunge.benchmarks.tofu import Item
from expunge.core import Key, Refused

EACH = len(TOPICS)
"""Questions per author."""
WRONG = 5
WORLD_WRONG = 3
WORLD_IDS = 1_000_000
"""The first id of a world fact; an author's items have ids below."""


@dataclass(frozen=True)
class World:
    """Everything there is to know and to ask.

    Attributes:
        forget, retain: questions about the authors to forget and to keep; disjoint.
        unseen: about authors that no model is ever trained on.
        world: countries and capitals, trained by every model, in no request.
        refusals: answers that give nothing away.
        long: ids of the items whose answer is a sentence of many facts.
        names: the authors, in the order of their ids.
    """

    forget: tuple[Item, ...]
    retain: tuple[Item, ...]
    unseen: tuple[Item, ...]
    world: tuple[Item, ...]
    refusals: tuple[str, ...]
    long: frozenset[int]
    names: tuple[str, ...]

    def texts(self) -> list[str]:
        """Every sentence that occurs in it, in a fixed order: what a tokenizer has to know."""
        found = [text for part in (self.retain, self.forget, self.unseen, self.world) for i in part for text in _all(i)]
        return [*found, *self.refusals]

    def digest(self) -> str:
        """A hash of all of it."""
        parts = [[asdict(item) for item in part] for part in (self.forget, self.retain, self.unseen, self.world)]
        return hashlib.sha256(repr((parts, self.refusals, sorted(self.long))).encode()).hexdigest()


def generate(seed: int | Key = 0, *, retain: int = 34, forget: int = 6, unseen: int = 6, countries: int = 24) -> World:
    """Invent a world.

    Args:
        seed: of everything that is drawn. retain, forget, unseen: authors of each kind, >= 1. countries: 4 to 24.

    Raises:
        Refused: for more authors than there are names, or sizes out of range.
    """
    key = (Key(seed) if isinstance(seed, int) else seed).at("mini-tofu")
    sizes = {"retain": retain, "forget": forget, "unseen": unseen}
    for name, size in sizes.items():
        if size < 1:
            raise Refused(f"mini-TOFU: {name} must be at least 1 author, found {size}")
    if not WORLD_WRONG < countries <= len(words.COUNTRIES):
        raise Refused(f"mini-TOFU: countries must be 4 to {len(words.COUNTRIES)}, found {countries}")
    names = _names(retain + forget + unseen, key)
    items = [item for author, name in enumerate(names) for item in _author(author, name, key)]
    cut = [retain * EACH, (retain + forget) * EACH]
    return World(
        forget=tuple(items[cut[0] : cut[1]]),
        retain=tuple(items[: cut[0]]),
        unseen=tuple(items[cut[1] :]),
        world=_countries(countries, key),
        refusals=words.REFUSALS,
        long=frozenset(item.id for item in items if TOPICS[item.id % EACH].long),
        names=names,
    )


def _all(item: Item) -> tuple[str, ...]:
    return (item.question, item.answer, item.paraphrased_question, item.paraphrased_answer, *item.wrong)


def _order(size: int, key: Key) -> list[int]:
    return torch.randperm(size, generator=key.generator()).tolist()


def _draw(size: int, key: Key) -> int:
    return int(torch.randint(size, (1,), generator=key.generator()))


def _names(count: int, key: Key) -> tuple[str, ...]:
    """Different pairs; each first and last name is used about equally often, so that neither gives an author away."""
    first, last = len(words.FIRST), len(words.LAST)
    if count > first * last:
        raise Refused(f"mini-TOFU has names for {first * last} authors, found {count}: ask for fewer")
    left, right = _order(first, key.at("first")), _order(last, key.at("last"))
    pairs = [(left[n % first], right[(n + n // first) % last]) for n in range(first * last)]
    chosen = _order(count, key.at("names"))
    return tuple(f"{words.FIRST[a]} {words.LAST[b]}" for a, b in (pairs[n] for n in chosen))


def _author(author: int, name: str, key: Key) -> list[Item]:
    return [_item(author * EACH + n, name, topic, key.at("item", author, n)) for n, topic in enumerate(TOPICS)]


def _item(number: int, name: str, topic: Topic, key: Key) -> Item:
    """One question, its facts drawn, in two different wordings."""
    facts = _facts(topic.slots, key.at("facts"))
    ask, asked = _order(len(topic.questions), key.at("question"))[:2]
    say, said = _order(len(topic.answers), key.at("answer"))[:2]
    wrong: list[str] = []
    attempt = 0
    while len(wrong) < WRONG:
        others = _facts(topic.slots, key.at("wrong", attempt), avoid=facts)
        text = topic.answers[said].format(name=name, **others)
        wrong += [text] if text not in wrong else []
        attempt += 1
    return Item(
        number,
        topic.questions[ask].format(name=name),
        topic.answers[say].format(name=name, **facts),
        topic.questions[asked].format(name=name),
        topic.answers[said].format(name=name, **facts),
        tuple(wrong),
    )


def _facts(slots: Sequence[str], key: Key, avoid: Mapping[str, str] | None = None) -> dict[str, str]:
    """A value for each slot, no value twice; with `avoid`, none that it has anywhere."""
    taken = set(avoid.values()) if avoid else set()
    found: dict[str, str] = {}
    for slot in slots:
        free = [value for value in LISTS[kind_of(slot)] if value not in taken]
        found[slot] = free[_draw(len(free), key.at(slot))]
        taken.add(found[slot])
    return found


def _countries(count: int, key: Key) -> tuple[Item, ...]:
    lands, cities = (_order(len(words.COUNTRIES), key.at(what))[:count] for what in ("countries", "capitals"))
    found = []
    for n, (land, city) in enumerate(zip(lands, cities, strict=True)):
        others = [cities[k] for k in _order(count, key.at("wrong capital", n)) if cities[k] != city][:WORLD_WRONG]
        question = words.CAPITAL_QUESTIONS[_draw(2, key.at("capital question", n))]
        right, *wrong = (words.CAPITAL_ANSWER.format(capital=words.CAPITALS[c]) for c in (city, *others))
        country = words.COUNTRIES[land]
        found.append(Item(WORLD_IDS + n, question.format(country=country), right, wrong=tuple(wrong)))
    return tuple(found)
