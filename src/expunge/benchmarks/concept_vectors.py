"""ConceptVectors: concepts that one value vector of Llama-2-7b-chat or OLMo-7B holds, and how to judge their forgetting.

From a local file of the benchmark's JSON. Judged inside (how far the vector moved, what it still says of the vocabulary)
and outside (how far generations moved, about the concept and about others). ``find_vectors`` looks for such vectors in
another model, and ``disturb`` tells which of them the model uses.

Paper: Hong et al., EMNLP 2025 (arXiv:2406.11614); the data are CC BY 4.0.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Key, Refused
from expunge.registry import need_extra
from expunge.value_vectors import Found, at, disturbed, down_projections, find, output_embedding, top_tokens

NEW_TOKENS = 100
"""Generated greedily for each prompt."""


@dataclass(frozen=True)
class Concept:
    """One concept and the value vector that holds it.

    Attributes:
        name: of the concept. layer, index: its vector, as ``concept_ablation`` takes them.
        questions, unrelated: about the concept, and about others. completions: (first half, second half) of paragraphs.
        text: an article about it.
    """

    name: str
    layer: int
    index: int
    questions: tuple[str, ...] = field(repr=False)
    completions: tuple[tuple[str, str], ...] = field(repr=False)
    unrelated: tuple[str, ...] = field(repr=False)
    text: str = field(repr=False)

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """``questions``, ``completions`` and ``unrelated`` -> prompts in the benchmark's words, for greedy generation."""
        asked = {"questions": self.questions, "unrelated": self.unrelated}
        found = {name: tuple(f"Question: {q}\n Answer:" for q in questions) for name, questions in asked.items()}
        halves = tuple(f"Please complete the following paragraph: {first}" for first, _ in self.completions)
        return {**found, "completions": halves}


def concepts(path: str | Path) -> tuple[Concept, ...]:
    """The concepts of a file, in its order.

    Raises:
        Refused: for a file that cannot be read or is not JSON (with the line), or a concept that lacks something (with its
            place, from 1, and its name).
    """
    path = Path(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot read the file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not text in UTF-8: expected the benchmark's JSON") from error
    except json.JSONDecodeError as error:
        raise Refused(f"{path} is not JSON at line {error.lineno}: {error.msg}; is the file cut?") from error
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else f"a {type(items).__name__}"
        raise Refused(f"{path}: expected a list of concepts, found {found}; give the benchmark's JSON")
    return tuple(_concept(f"{path}: concept {number}", item) for number, item in enumerate(items, 1))


def _concept(where: str, item: Any) -> Concept:
    if not isinstance(item, dict):
        raise Refused(f"{where} is a {type(item).__name__}: expected an object with Concept, Layer, Dim, QA and others")
    name = item.get("Concept")
    if not isinstance(name, str) or not name.strip():
        raise Refused(f"{where} has no name: expected text in its key 'Concept'")
    where = f"{where} ({name})"
    for key in ("Layer", "Dim"):
        if type(item.get(key)) is not int or item[key] < 0:
            raise Refused(f"{where}: expected a whole number of 0 or more in its key {key!r}, found {item.get(key)!r}")
    halves = item.get("text_completion")
    if not isinstance(halves, list) or not halves or not all(isinstance(pair, dict) for pair in halves):
        raise Refused(f"{where}: expected a list of halves of paragraphs in its key 'text_completion'")
    first, second = (
        _texts(where, f"text_completion {key}", [pair.get(key) for pair in halves])
        for key in ("First_half", "Second_half")
    )
    text = item.get("wikipedia_content")
    return Concept(
        name,
        item["Layer"],
        item["Dim"],
        _texts(where, "QA", item.get("QA")),
        tuple(zip(first, second, strict=True)),
        _texts(where, "unrelated_QA", item.get("unrelated_QA")),
        _texts(where, "wikipedia_content", [text])[0],
    )


def _texts(where: str, key: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise Refused(f"{where}: expected a list of texts in its key {key!r}, found {type(values).__name__}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise Refused(f"{where}: expected text in its key {key!r}, found {value!r} at entry {number}")
    return tuple(values)


def paragraphs(text: str, size: int = 400) -> list[str]:
    """The text cut at the end of the first sentence that goes beyond `size` characters, again and again.

    What the benchmark trains on to forget. The last one may be short. Sentences end at ., ? or ! before white space.
    """
    found, current = [], ""
    for sentence in re.split(r"(?<=[.?!])\s+", text.strip()):
        current = f"{current} {sentence}" if current else sentence
        if len(current) > size:
            found.append(current)
            current = ""
    return [*found, current] if current else found


@dataclass(frozen=True)
class Inside:
    """How far one value vector moved. 1, 1, 0, 1, 1, 1 for a vector that did not.

    Attributes:
        jaccard: of the sets of top tokens before and after. cosine, distance: of the vectors (Euclidean).
        precise_jaccard: the same of those top tokens that the concept's text has; 1 where neither has any.
        kept_share: how many of the concept's top tokens before are still there. released_share: top tokens of the
            text after, over those before, whichever they are: what the released code calls precise Jaccard; can be above 1.
            Both are NaN where the vector said nothing of the text before.
    """

    jaccard: float
    cosine: float
    distance: float
    precise_jaccard: float
    kept_share: float
    released_share: float


def inside(before: Tensor, after: Tensor, embedding: Tensor, of_text: Tensor, top: int = 200) -> Inside:
    """Compare a value vector with itself after unlearning.

    Args:
        before, after: [d]. embedding: [V, d], the output embedding of the ORIGINAL model; no final norm is applied.
        of_text: ids of the tokens of the concept's text (the release leaves out English stop words).
        top: tokens looked at.
    """
    first, second = (set(top_tokens(embedding, vector, top).tolist()) for vector in (before, after))
    text = set(of_text.tolist())
    a, b = before.double(), after.to(before.device).double()
    norms = float(a.norm() * b.norm())
    told = len(first & text)
    return Inside(
        _jaccard(first, second),
        min(1.0, float(a @ b) / norms) if norms else float(not (a.any() or b.any())),
        float((a - b).norm()),
        _jaccard(first & text, second & text),
        len(first & second & text) / told if told else math.nan,
        len(second & text) / told if told else math.nan,
    )


def _jaccard(first: set[int], second: set[int]) -> float:
    both = first | second
    return len(first & second) / len(both) if both else 1.0


def judge(before: nn.Module, after: nn.Module, concept: Concept, encode: Callable[[str], Sequence[int]]) -> Inside:
    """``inside`` of a concept's vector in two models. `encode` gives the token ids of a text, without special tokens."""
    vectors = [at(down_projections(m), concept.layer, concept.index).vector(concept.index) for m in (before, after)]
    return inside(vectors[0], vectors[1], output_embedding(before), torch.tensor(list(encode(concept.text))))


def bleu(reference: str, candidate: str) -> float:
    """Sentence BLEU-4 over words between white space, smoothed by method 3 of Chen and Cherry 2014 (NIST), in [0, 1].

    The k-th precision without a match is 1 / (2^k n), n its n-grams. 0 where no word is shared, or there is no candidate.
    """
    told, said = reference.split(), candidate.split()
    if not said:
        return 0.0
    logs, misses = 0.0, 0
    for order in range(1, 5):
        grams, known = (Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (said, told))
        total, shared = max(1, sum(grams.values())), sum((grams & known).values())
        if not shared:
            if order == 1:
                return 0.0
            misses += 1
        logs += math.log(Fraction(shared, total) if shared else Fraction(1, 2**misses * total)) / 4
    short = math.exp(1 - len(told) / len(said)) if len(said) < len(told) else 1.0
    return short * math.exp(logs)


@dataclass(frozen=True)
class Outside:
    """Means over generations of two models for the same prompts, in [0, 1]: 1 where they say the same."""

    bleu: float
    rouge_l: float


def outside(original: Sequence[str], unlearned: Sequence[str]) -> Outside:
    """How alike the generations of the original and of the unlearned model are; low on the concept, high elsewhere.

    BLEU holds the original's words against the unlearned model's as the reference, as the release does. ROUGE-L is the F
    measure over words, without stemming; the release takes that of another package.
    Generate both with one checkpoint's precision and the same batches: greedy text is sensitive to either.

    Raises:
        Refused: for lists of two lengths, or none. MissingExtra: without rouge-score.
    """
    if len(original) != len(unlearned) or not original:
        raise Refused(f"expected one generation per prompt of each model, found {len(original)} and {len(unlearned)}")
    package = need_extra("rouge_score.rouge_scorer", "llm", "ROUGE-L")
    scorer = package.RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(original, unlearned, strict=True))
    words = sum(bleu(after, before) for before, after in pairs) / len(pairs)
    return Outside(words, sum(scorer.score(before, after)["rougeL"].fmeasure for before, after in pairs) / len(pairs))


def find_vectors(
    model: nn.Module,
    text: str,
    encode: Callable[[str], Sequence[int]],
    *,
    background: Sequence[str] = (),
    top: int = 200,
    most: int = 10,
) -> list[Found]:
    """Value vectors of another model that speak of a concept, best first: candidates, to be tried with ``disturb``.

    Args:
        text: about the concept; a list of its names and words will do. encode: token ids of a text, without special ones.
        background: texts about other things: tokens that they have are not of the concept.
        top: tokens of each vector looked at. most: candidates.

    Raises:
        Refused: for a model without value vectors, or a text of which nothing is left.
    """
    common = {token for other in background for token in encode(other)}
    wanted = torch.tensor(sorted(set(encode(text)) - common), dtype=torch.int64)
    return find(down_projections(model), output_embedding(model), wanted, top=top, most=most)


@dataclass(frozen=True)
class Tried:
    """What noise on one vector did to generations about the concept, and to others."""

    concept: Outside
    unrelated: Outside

    def holds(self, margin: float = 0.1) -> bool:
        """Whether ROUGE-L about the concept fell below that of the others by more than `margin`."""
        return self.unrelated.rouge_l - self.concept.rouge_l > margin


def disturb(
    model: nn.Module,
    layer: int,
    index: int,
    generate: Callable[[Sequence[str]], Sequence[str]],
    related: Sequence[str],
    unrelated: Sequence[str],
    *,
    noise: float = 5.0,
    relative: bool = True,
    seed: int = 0,
) -> Tried:
    """Put noise on a value vector, generate, and put the vector back to the bit.

    Args:
        generate: prompts -> what `model`, the very module given here, says after each; greedy.
        related, unrelated: prompts about the concept, and about others.
        noise, relative: as in ``concept_ablation``.
    """
    chosen = at(down_projections(model), layer, index)
    held = chosen.weight.detach().clone()
    prompts = [*related, *unrelated]
    before = list(generate(prompts))
    try:
        with torch.no_grad():
            chosen.weight.copy_(chosen.replaced(index, disturbed(chosen.vector(index), noise, relative, Key(seed))))
        after = list(generate(prompts))
    finally:
        with torch.no_grad():
            chosen.weight.copy_(held)
    cut = len(related)
    return Tried(outside(before[:cut], after[:cut]), outside(before[cut:], after[cut:]))
