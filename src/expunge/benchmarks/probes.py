"""Is it gone, or only not said? The same questions asked in other ways, of the model before, after, and retrained.

    plain            as it was asked in training: the measure of the others
    prefix           the beginning of a willing answer is put into the model's mouth
    persona          it is told that it is an expert who knows everything about the subject
    grandmother      it is told to be a grandmother who used to tell about the subject
    article          the first 2000 characters of a text about the subject stand before the question
    reworded         the question in other words, or another language; the mean over the wordings
    reworded_answer  probability exp(-S/N) of the answer in other words, after the question itself
    in_context       the same of the answer with facts before the question, less without: what the facts gain, in [-1, 1]
    leak@k           expected best of k samples at temperature 1

Values are per item; the others are ROUGE-L recall of what is written greedily, in [0, 1]. None of them says anything alone: a
model that never saw the answers guesses words of them, and reads an article as well as any. What counts is the gap to a
retrained model under the same probe, with its interval over items. The wordings are ours, so that numbers are not to be held
beside published ones; and that these find nothing is no proof that another would not.

Sources of the kinds: ConceptVectors (arXiv:2406.11614) for persona, grandmother, article and another language; paraphrases as
in open-unlearning. In-context probing has no published common definition: this one is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.attacks.prompting import CHARACTERS, PREFIX, leak_at_k, persona
from expunge.audit import intervals
from expunge.benchmarks.asking import Asking
from expunge.benchmarks.tofu import Item
from expunge.benchmarks.tofu_scores import rouge_l_recall
from expunge.core import Key, Refused, require
from expunge.data.json_lines import Example
from expunge.registry import find


@dataclass(frozen=True)
class Fact:
    """One thing that should be forgotten, and what there is to ask it in other ways; a probe takes the facts that have its part.

    Attributes:
        question, answer: as in training. about: the subject's name, for personas. article: a text about it.
        again: the question in other words or languages. answer_again: the answer in other words.
        related: facts to stand before the question in context; the article, where there is none.
    """

    question: str
    answer: str
    about: str = ""
    article: str = ""
    again: tuple[str, ...] = ()
    answer_again: str = ""
    related: str = ""

    @staticmethod
    def of(item: Item, about: str = "", related: str = "") -> Fact:
        """A question of TOFU with its paraphrases."""
        again = (item.paraphrased_question,) if item.paraphrased_question else ()
        return Fact(item.question, item.answer, about, "", again, item.paraphrased_answer, related)


@dataclass(frozen=True)
class Probing:
    """Settings of the probes.

    Args:
        new_tokens: most that is written, >= 1. samples: drawn per question for leak@k, >= k. k: >= 1.
        temperature: of the samples, > 0. draws: bootstrap resamples, >= 1. key: of samples and bootstrap.
    """

    new_tokens: int = 200
    samples: int = 8
    k: int = 4
    temperature: float = 1.0
    draws: int = 1000
    key: Key = Key(0)

    def __post_init__(self) -> None:
        for setting in ("new_tokens", "k", "draws"):
            require(getattr(self, setting) >= 1, self, setting, "at least 1")
        require(self.samples >= self.k, self, "samples", f"at least k, {self.k}")
        require(self.temperature > 0, self, "temperature", "above 0")


@dataclass(frozen=True)
class Mean:
    """A mean over items with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Probed:
    """One probe of all models.

    Attributes:
        name: of the probe. n: facts that it could be tried on.
        before, after, retrained: means over them; of several retrained models, the mean of all.
        gap: after less retrained, facts resampled together. None without a retrained model, as `retrained`.
        items: model -> [n] values.
    """

    name: str
    n: int
    before: Mean
    after: Mean
    retrained: Mean | None
    gap: Mean | None
    items: Mapping[str, np.ndarray]

    @property
    def leaks(self) -> bool | None:
        """Whether more comes out than of a retrained model, beyond the interval; None where there is none to say so."""
        return None if self.gap is None else self.gap.low > 0


def probe(
    before: Asking,
    after: Asking,
    retrained: Sequence[Asking],
    facts: Sequence[Fact],
    *,
    only: Iterable[str] | None = None,
    settings: Probing = Probing(),
) -> tuple[Probed, ...]:
    """Every probe that the facts have the parts for, of every model.

    Args:
        before, after: the models. retrained: models that never saw the facts, one or more; without one, what comes out
            cannot be judged. only: names of probes, where not all.

    Raises:
        Refused: for no facts, an unknown probe, or one asked for by name that no fact has the parts for.
    """
    if not facts:
        raise Refused("there is nothing to probe for: give one or more facts")
    wanted = list(PROBES) if only is None else [name for name in only if find("probe", name, PROBES)]
    found = []
    for name in wanted:
        part, ask = PROBES[name]
        chosen = [fact for fact in facts if part(fact)]
        if not chosen and only is not None:
            raise Refused(f"no fact has what the probe {name} needs: see expunge.benchmarks.probes.Fact")
        if chosen:
            models = {"before": before, "after": after}
            models |= {f"retrained {number}": model for number, model in enumerate(retrained)}
            values = {model: ask(asking, chosen, settings) for model, asking in models.items()}
            found.append(_probed(f"leak@{settings.k}" if name == "leak" else name, values, settings))
    return tuple(found)


def _probed(name: str, values: Mapping[str, np.ndarray], settings: Probing) -> Probed:
    others = [row for model, row in values.items() if model.startswith("retrained")]
    others = [np.mean(others, axis=0)] if others else []
    n, key = len(values["after"]), settings.key.at("probe", name)

    def mean(row: np.ndarray, shares: bool) -> Mean:
        sampled = intervals.resampled_mean(row, settings.draws, key)
        low, high = intervals.share_interval(sampled, n) if shares else intervals.percentile(sampled)
        return Mean(float(row.mean()), low, high)

    shares = name != "in_context"
    parts = [mean(row, shares) for row in (values["before"], values["after"], *others)]
    gap = mean(values["after"] - others[0], False) if others else None
    return Probed(name, n, parts[0], parts[1], parts[2] if others else None, gap, dict(values))


def _written(asking: Asking, facts: Sequence[Fact], settings: Probing, prefix: str = "") -> np.ndarray:
    """[n] ROUGE-L recall of the greedy answer against the true one."""
    template = asking.written
    prompts = [template.prompt_ids(_example(fact.question, fact.answer), prefix) for fact in facts]
    said = asking.texts(prompts, new_tokens=settings.new_tokens)
    return rouge_l_recall([fact.answer for fact in facts], said)


def _probability(asking: Asking, questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """[n] exp(-S/N) of each answer, its end token among the N."""
    rows = [asking.written.ids(_example(question, answer)) for question, answer in zip(questions, answers, strict=True)]
    nll, units = asking.losses(rows)
    return np.exp(-nll / units)


def _prefixed(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
    return _written(asking, facts, settings, PREFIX)


def _as(kind: str) -> Callable[[Asking, Sequence[Fact], Probing], np.ndarray]:
    def ask(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
        told = [replace(fact, question=persona(kind, fact.about, fact.question)) for fact in facts]
        return _written(asking, told, settings)

    return ask


def _article(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
    told = [replace(fact, question=f"{fact.article[:CHARACTERS]}\n\n{fact.question}") for fact in facts]
    return _written(asking, told, settings)


def _reworded(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
    told = [replace(fact, question=question) for fact in facts for question in fact.again]
    owner = np.repeat(np.arange(len(facts)), [len(fact.again) for fact in facts])
    values = _written(asking, told, settings)
    return np.bincount(owner, values) / np.bincount(owner)


def _reworded_answer(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
    return _probability(asking, [fact.question for fact in facts], [fact.answer_again for fact in facts])


def _in_context(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
    answers = [fact.answer for fact in facts]
    told = [f"{fact.related or fact.article[:CHARACTERS]}\n\n{fact.question}" for fact in facts]
    return _probability(asking, told, answers) - _probability(asking, [fact.question for fact in facts], answers)


def _leak(asking: Asking, facts: Sequence[Fact], settings: Probing) -> np.ndarray:
    one = [asking.written.prompt_ids(_example(fact.question, fact.answer)) for fact in facts]
    prompts = [ids for ids in one for _ in range(settings.samples)]
    said = asking.texts(
        prompts,
        new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        rng=settings.key.at("probe", "samples"),
        what="sampling",
    )
    answers = [fact.answer for fact in facts for _ in range(settings.samples)]
    return leak_at_k(rouge_l_recall(answers, said).reshape(len(facts), settings.samples), settings.k)


def _example(question: str, answer: str) -> Example:
    return Example(({"role": "user", "content": question},), answer, f"the question {question[:60]!r}")


Ask = Callable[[Asking, Sequence[Fact], Probing], np.ndarray]
PROBES: Mapping[str, tuple[Callable[[Fact], bool], Ask]] = {
    "plain": (lambda fact: True, _written),
    "prefix": (lambda fact: True, _prefixed),
    "persona": (lambda fact: bool(fact.about), _as("persona")),
    "grandmother": (lambda fact: bool(fact.about), _as("grandmother")),
    "article": (lambda fact: bool(fact.article), _article),
    "reworded": (lambda fact: bool(fact.again), _reworded),
    "reworded_answer": (lambda fact: bool(fact.answer_again), _reworded_answer),
    "in_context": (lambda fact: bool(fact.related or fact.article), _in_context),
    "leak": (lambda fact: True, _leak),
}
"""Name -> which facts have what it needs, and how it is asked."""
