"""Probes: leak@k by hand, prompts as they are asked, and models that know, hide and never knew."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from expunge.attacks.prompting import PREFIX, leak_at_k, persona
from expunge.benchmarks.asking import Asking
from expunge.benchmarks.probes import PROBES, Fact, Probing, probe
from expunge.benchmarks.tofu import Item
from expunge.core import Key, Refused
from expunge.data.json_lines import Example
from expunge.data.text import Template
from expunge.tasks.causal_lm import CausalLM
from expunge.tasks.language_model import LanguageModel
from tests.language import CITIES, PEOPLE, llama, tokenizer

SHORT = Probing(new_tokens=16, samples=4, k=2, draws=200)


def test_leak_at_k_is_the_mean_over_all_choices() -> None:
    values = np.array([[0.1, 0.7, 0.3, 0.9, 0.3], [0.0, 0.0, 0.5, 0.0, 0.0]])
    for k in range(1, 6):
        by_hand = [np.mean([max(pick) for pick in itertools.combinations(row, k)]) for row in values]
        assert leak_at_k(values, k) == pytest.approx(by_hand, rel=1e-12)
    assert leak_at_k(values, 5).tolist() == [0.9, 0.5]
    for bad in (0, 6):
        with pytest.raises(Refused, match="k from 1 to the samples"):
            leak_at_k(values, bad)
    with pytest.raises(Refused, match="no role"):
        persona("king", "x", "y")


def facts(count: int = 6) -> list[Fact]:
    return [
        Fact(
            f"Where was {PEOPLE[n]} born?",
            f"{PEOPLE[n]} was born in {CITIES[n]}",
            about=PEOPLE[n],
            article=f"{PEOPLE[n]} came from {CITIES[n]}",
            again=(f"Which city did {PEOPLE[n]} come from?", f"Wo kam {PEOPLE[n]} zur Welt?"),
            answer_again=f"It was {CITIES[n]}",
        )
        for n in range(count)
    ]


def asking(seed: int = 0, kind: Any = "plain", learnt: list[Fact] | None = None, steps: int = 350) -> Asking:
    words = tokenizer(chat=kind == "chat")
    model = LanguageModel(llama(len(words), seed, context=192), words)
    template = Template(words, kind)
    if learnt:
        rows = [
            template.ids(Example(({"role": "user", "content": fact.question},), fact.answer, "here")) for fact in learnt
        ]
        from expunge.data.text import Texts

        batch = {**Texts(rows, 0).fetch(torch.arange(len(rows))), "id": torch.arange(len(rows))}
        task, optimizer = CausalLM(model.vocab), torch.optim.Adam(model.model.parameters(), 5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            (task.nll(model.model, batch).sum() / task.units(batch).sum()).backward()
            optimizer.step()
    return Asking(model, template)


class Heard(Asking):
    """Writes what it is told to, and keeps what it was asked."""

    asked: list[str]
    answers: dict[str, str]

    def texts(self, prompts: Any, **how: Any) -> list[str]:
        self.asked = [self.found.tokenizer.decode(ids) for ids in prompts]
        self.how = how
        return [next((a for q, a in self.answers.items() if q in text), "") for text in self.asked]


def heard(answers: dict[str, str], kind: Any = "plain") -> Heard:
    found = asking(kind=kind)
    model = Heard(found.found, found.template)
    model.answers, model.asked = answers, []
    return model


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_how_each_probe_asks(kind: Any) -> None:
    one, model = facts(1), heard({}, kind)

    def asked(name: str) -> str:
        PROBES[name][1](model, one, SHORT)
        return model.asked[0]

    plain = asked("plain")
    assert plain.endswith("Answer:" if kind == "plain" else "<|assistant|>")
    assert asked("prefix") == plain + (f" {PREFIX}" if kind == "plain" else PREFIX)
    assert "knows everything" in asked("persona")
    assert "grandmother" in asked("grandmother").lower()
    assert "Ada came from Oslo\n\nWhere was Ada born?" in asked("article")
    asked("reworded")
    assert [("Which city" in text, "Wo kam" in text) for text in model.asked] == [(True, False), (False, True)]
    asked("leak")
    assert model.asked == [plain] * 4
    assert model.how["temperature"] == 1.0


def test_values_by_hand() -> None:
    """Answered rightly as itself, half rightly in one of two other wordings."""
    model = heard({"Where was Ada born?": "Ada was born in Oslo", "Which city": "Ada was here", "Wo kam": ""})
    value = {name: float(PROBES[name][1](model, facts(1), SHORT)[0]) for name in ("plain", "reworded", "leak")}
    assert value == {"plain": 1.0, "reworded": pytest.approx((2 / 5 + 0) / 2), "leak": 1.0}


def test_what_facts_gain_by_hand() -> None:
    model, one = asking(), facts(1)

    def probability(question: str, answer: str) -> float:
        words = model.found.tokenizer
        start = len(words(f"Question: {question}\nAnswer:")["input_ids"])
        ids = [*words(f"Question: {question}\nAnswer: {answer}")["input_ids"], words.eos_token_id]
        with torch.no_grad():
            logs = model.found.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(np.exp(np.mean([float(logs[at - 1, ids[at]]) for at in range(start, len(ids))])))

    question, answer = one[0].question, one[0].answer
    gain = probability(f"{one[0].article}\n\n{question}", answer) - probability(question, answer)
    assert PROBES["in_context"][1](model, one, SHORT)[0] == pytest.approx(gain, rel=1e-4, abs=1e-9)
    told = PROBES["reworded_answer"][1](model, one, SHORT)[0]
    assert told == pytest.approx(probability(question, "It was Oslo"), rel=1e-4)


def test_a_model_that_knows_leaks_beside_one_that_never_did() -> None:
    known, others = facts(6), [Fact(f"Where is number {n}?", f"In {CITIES[n]} by the sea") for n in range(6)]
    before, retrained = asking(0, learnt=known), [asking(seed, learnt=others, steps=60) for seed in (0, 1)]
    found = {one.name: one for one in probe(before, before, retrained, known, settings=SHORT)}
    assert list(found) == [*list(PROBES)[:-1], "leak@2"]
    plain = found["plain"]
    assert plain.after.value == plain.before.value == 1.0
    assert plain.retrained is not None
    assert plain.gap is not None
    assert plain.gap.value == pytest.approx(1 - plain.retrained.value)
    assert plain.leaks
    assert found["leak@2"].leaks
    for one in found.values():
        assert set(one.items) == {"before", "after", "retrained 0", "retrained 1"}
        assert all(
            mean.low <= mean.value <= mean.high for mean in (one.before, one.after, one.retrained, one.gap) if mean
        )
    itself = {one.name: one for one in probe(before, retrained[0], retrained[:1], known, settings=SHORT)}
    for one in itself.values():
        assert one.gap is not None
        assert (one.gap.value, one.leaks) == (0.0, False)


def test_samples_depend_on_the_key_and_not_on_the_batch() -> None:
    few, model = facts(3), asking(2)
    first = PROBES["leak"][1](model, few, SHORT)
    model.batch = 5
    assert np.array_equal(first, PROBES["leak"][1](model, few, SHORT))
    several = {tuple(model.texts([[5, 6]], new_tokens=8, temperature=1.0, rng=Key(seed))) for seed in range(4)}
    assert len(several) == 4


def test_probes_take_the_facts_that_have_their_part() -> None:
    model = asking()
    bare = Fact.of(Item(0, "Who?", "Ada", "", "", ("Bo",)))
    told = Fact.of(Item(1, "Which city?", "Oslo", "What city?", "It was Oslo", ()))
    names = {one.name: one.n for one in probe(model, model, [], [bare, told], settings=SHORT)}
    assert names == {"plain": 2, "prefix": 2, "reworded": 1, "reworded_answer": 1, "leak@2": 2}
    alone = probe(model, model, [], [bare], only=["plain"], settings=SHORT)[0]
    assert (alone.retrained, alone.gap, alone.leaks) == (None, None, None)
    with pytest.raises(Refused, match="no fact has what the probe persona needs"):
        probe(model, model, [], [bare], only=["persona"])
    with pytest.raises(Refused, match=r"unknown probe 'reword' .did you mean 'reworded'"):
        probe(model, model, [], [bare], only=["reword"])
    with pytest.raises(Refused, match="nothing to probe for"):
        probe(model, model, [], [])
    with pytest.raises(Refused, match="samples must be at least k"):
        Probing(samples=2, k=3)
    with pytest.raises(Refused, match="temperature must be above 0"):
        Probing(temperature=0)
