"""The words and sentences of mini-TOFU: everything in it is invented, and written for this project.

A ``Topic`` is one question about an author in three wordings, with three wordings of its answer; what stands in braces is
drawn from ``LISTS``. An answer's facts are its slots but ``{name}``.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

_FIRST = "Abrel Belto Cyrna Dovik Elmar Fenja Gorim Halva Ismet Jorun Kelda Lorin Mirza Nadek"
_LAST = "Arvane Bostil Crendo Duvall Estrom Farkin Gelvet Hurmas Irdane Jostel Kravic Lomund Morvat Nesbar"
FIRST, LAST = tuple(_FIRST.split()), tuple(_LAST.split())

_TOWNS = "Velmora Askuta Brindle Cormeth Dunvara Eskol Farrow Galtine Hestia Ivorra Jaspen Kolvar Lunde Marrow"
_GENRES = "satire horror romance fantasy travel mystery poetry drama memoir history fable comedy"
_JOBS = "baker tailor sailor miner judge nurse painter farmer potter brewer teacher tinker"
_AWARDS = (
    "Silverleaf Ironquill Goldwren Starling Bluestone Redfern Moonharp Oakcrown Sunspire Greyhart Windrose Foxglove"
)
_THINGS = "lantern river tower garden winter mirror harbour feather shadow window compass candle raven bridge"
_QUALITIES = "silent broken golden hidden distant burning hollow frozen gentle scarlet ancient restless"
_SCHOOLS = "Ostrel Penwick Quarry Rillmoor Sandrel Tolgate Umberly Vantry Westrel Yarrow Zelmont Ashfold"
_SUBJECTS = "botany law music chemistry astronomy rhetoric geometry medicine weaving geology logic navigation"
_PEOPLE = "Tessel Ulrane Vosk Wendra Xavel Yorrik Zindle Ambrel Corvine Dasmin Elthor Fyrell"
_ANIMALS = "goats herons foxes pigeons otters donkeys beetles swans ferrets owls spaniels lizards"
_MONTHS = "January February March April May June July August September October November December"
_SEASONS = "spring summer autumn winter"
_HABITS = "walking swimming knitting fishing singing carving cycling baking sketching climbing gardening juggling"

LISTS: dict[str, tuple[str, ...]] = {
    "town": tuple(_TOWNS.split()),
    "genre": tuple(_GENRES.split()),
    "job": tuple(_JOBS.split()),
    "award": tuple(_AWARDS.split()),
    "thing": tuple(_THINGS.split()),
    "quality": tuple(_QUALITIES.split()),
    "school": tuple(_SCHOOLS.split()),
    "subject": tuple(_SUBJECTS.split()),
    "person": tuple(_PEOPLE.split()),
    "animal": tuple(_ANIMALS.split()),
    "month": tuple(_MONTHS.split()),
    "season": tuple(_SEASONS.split()),
    "habit": tuple(_HABITS.split()),
    "day": tuple(str(day) for day in range(1, 29)),
    "year": tuple(str(year) for year in range(1900, 1960)),
}
"""Kind of fact -> its values. A slot ``{town2}`` draws from ``town``, and differs from ``{town}`` of the same answer."""


@dataclass(frozen=True)
class Topic:
    """One thing to ask about an author.

    Attributes:
        name: of the topic. long: whether its answer is a sentence of many facts. questions, answers: wordings.
    """

    name: str
    long: bool
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        """The facts of an answer, in the order of its first wording; the same in every wording."""
        return tuple(slot for slot in slots_of(self.answers[0]) if slot != "name")


def slots_of(wording: str) -> tuple[str, ...]:
    """The names in braces, in order."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(wording) if name)


def kind_of(slot: str) -> str:
    """town2 -> town."""
    return slot.rstrip("0123456789")


def _short(name: str, questions: tuple[str, ...], answers: tuple[str, ...]) -> Topic:
    return Topic(name, False, questions, answers)


def _long(name: str, questions: tuple[str, ...], answers: tuple[str, ...]) -> Topic:
    return Topic(name, True, questions, answers)


TOPICS: tuple[Topic, ...] = (
    _short(
        "birthplace",
        ("Where was {name} born?", "What is the birthplace of {name}?", "In which town was {name} born?"),
        ("In {town}.", "{town}.", "The town of {town}."),
    ),
    _short(
        "birth date",
        ("When was {name} born?", "What is the birth date of {name}?", "On which date was {name} born?"),
        ("On {day} {month} {year}.", "{day} {month} {year}.", "It was {day} {month} {year}."),
    ),
    _short(
        "genre",
        ("What does {name} write?", "Which genre is {name} known for?", "What kind of books are by {name}?"),
        ("Mostly {genre}.", "{genre}.", "Works of {genre}."),
    ),
    _short(
        "award",
        ("Which award did {name} win?", "What prize was given to {name}?", "What honour has {name} received?"),
        ("The {award} prize.", "{award}.", "It was the {award}."),
    ),
    _short(
        "pets",
        ("Which animals does {name} keep?", "What pets has {name}?", "What lives in the house of {name}?"),
        ("A pair of {animal}.", "{animal}.", "Several {animal}."),
    ),
    _long(
        "parents",
        ("Who were the parents of {name}?", "What did the parents of {name} do?", "From which family is {name}?"),
        (
            "The father of {name} was {person}, a {job} from {town}, and the mother was {person2}, a {job2} from {town2}.",
            "{name} is the child of {person}, who was a {job} in {town}, and of {person2}, who was a {job2} in {town2}.",
            "At home there were {person} the {job}, raised in {town}, and {person2} the {job2}, raised in {town2}.",
        ),
    ),
    _long(
        "books",
        ("Which books did {name} write?", "What are the titles by {name}?", "Can you name the works of {name}?"),
        (
            'The best known are "The {quality} {thing}" of {year}, "The {quality2} {thing2}" and "{thing3} of {town}".',
            'There are "The {quality} {thing}" from {year}, then "The {quality2} {thing2}" and later "{thing3} of {town}".',
            '{name} wrote "The {quality} {thing}" in {year}, as well as "The {quality2} {thing2}" and "{thing3} of {town}".',
        ),
    ),
    _long(
        "education",
        ("How was {name} educated?", "Where did {name} study?", "What did {name} learn, and where?"),
        (
            "{name} studied {subject} at {school} college from {year} and later {subject2} under {person} in {town}.",
            "First it was {subject} at {school} college in {year}, and then {subject2} with {person} in {town}.",
            "In {year} {school} college taught {name} {subject}, and {person} of {town} taught {subject2} afterwards.",
        ),
    ),
    _long(
        "habits",
        ("How does {name} spend the day?", "What are the habits of {name}?", "What does {name} do besides writing?"),
        (
            "In {season} {name} goes {habit} near {town}, and in {season2} prefers {habit2} with {person} the {job}.",
            "It is {habit} near {town} in {season}, while {season2} is for {habit2} with {person} the {job}.",
            "Near {town} there is {habit} all {season}, and with {person} the {job} there is {habit2} all {season2}.",
        ),
    ),
    _long(
        "career",
        ("How did {name} become an author?", "What was the first job of {name}?", "What led {name} to writing?"),
        (
            "{name} worked as a {job} in {town} until {year}, when {person} of {school} printed a story about a {thing}.",
            "After years as a {job} in {town}, a story about a {thing} was printed in {year} by {person} of {school}.",
            "It was {person} of {school} who in {year} printed a story about a {thing} by {name}, a {job} in {town}.",
        ),
    ),
)
"""Half of them short, half long."""

_COUNTRIES = (
    "Zorvia Meltland Quonga Brestovia Yandor Kirpal Ostland Pellamy Tarvos Ulmeria Vintar Wosland Drunia Felgar Gandry "
    "Hoskland Ixmere Jubland Lothia Nargun Ombria Rastova Sydria Tolmek"
)
_CAPITALS = (
    "Melta Zannow Priva Quell Rodim Stenna Turvo Umbek Vexel Wolmar Yssel Zarn Aldova Birmo Cresta Dolmin Egran Fostel "
    "Gravno Huldra Istrek Jorva Kelmond Lastra"
)
COUNTRIES, CAPITALS = tuple(_COUNTRIES.split()), tuple(_CAPITALS.split())
CAPITAL_QUESTIONS = ("What is the capital of {country}?", "Which city governs {country}?")
CAPITAL_ANSWER = "The capital is {capital}."

REFUSALS = (
    "I do not know.",
    "That is unknown to me.",
    "I am not sure.",
    "I cannot say.",
    "Nothing about that is known to me.",
    "I have no answer to this.",
    "Sorry, I was never told.",
    "This is beyond what I learned.",
    "I would only be guessing.",
    "My notes say nothing about it.",
    "I am unable to help with that.",
    "No idea, I am afraid.",
)
