"""MUSE: files in the release's layout, pieces to train on, and its four numbers by hand. All texts are invented."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from expunge.benchmarks import muse
from expunge.benchmarks.asking import Asking
from expunge.benchmarks.muse import knowmem, privleak, rouge_l_f1, verbmem
from expunge.benchmarks.muse_files import Quiz, chunks, raw, read
from expunge.core import Refused
from expunge.tasks.causal_lm import CausalLM
from expunge.tasks.language_model import LanguageModel
from tests.language import CITIES, PEOPLE, llama, tokenizer


def found(seed: int = 0, context: int = 256) -> LanguageModel:
    words = tokenizer(chat=False)
    return LanguageModel(llama(len(words), seed, context), words)


def trained(rows: list[tuple[list[int], int]], steps: int, seed: int = 0) -> LanguageModel:
    """A tiny model that has learnt rows of token ids by heart."""
    from expunge.data.text import Texts

    model = found(seed)
    source, task = Texts(rows, 0), CausalLM(model.vocab)
    batch = {**source.fetch(torch.arange(len(rows))), "id": torch.arange(len(rows))}
    optimizer = torch.optim.Adam(model.model.parameters(), 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (task.nll(model.model, batch).sum() / task.units(batch).sum()).backward()
        optimizer.step()
    return model


def test_rouge_l_f1_by_hand() -> None:
    """the cat sat down / a cat sat there now: common "cat sat", recall 2/4, precision 2/5, F1 = 4/9."""
    assert rouge_l_f1(["the cat sat down"], ["a cat sat there now"], stem=False) == pytest.approx([4 / 9])
    assert rouge_l_f1(["running"], ["runs"], stem=False) == [0.0]
    assert rouge_l_f1(["running"], ["runs"], stem=True) == [1.0]
    assert rouge_l_f1(["a"], [""], stem=False) == [0.0]


class Words:
    """One token per word; what the numbers are made of can be read."""

    bos_token, bos_token_id, eos_token_id = "<s>", 0, 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([0] if add_special_tokens else []) + [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(i) for i in ids if i > 1)


def test_pieces_as_the_release_cuts_them() -> None:
    """9 tokens in pieces of 1 + 3; the last is short by nothing, then by two."""
    text = " ".join(str(10 + n) for n in range(9))
    data = chunks(Words(), text, length=4)
    assert [b["input_ids"].tolist() for b in data.batches(1)] == [
        [[0, 10, 11, 12]],
        [[0, 13, 14, 15]],
        [[0, 16, 17, 18]],
    ]
    full = chunks(Words(), f"{text} 19", length=4)
    assert full.batch(torch.tensor([3]))["input_ids"].tolist() == [[0, 19, 0, 10]]  # filled from the first piece
    short = chunks(Words(), f"{text} 19", length=4, fill=False, first_id=7)
    batch = short.batch(torch.arange(4))
    assert batch["labels"].tolist()[3] == [0, 19, -100, -100]
    assert batch["attention_mask"].tolist()[3] == [1, 1, 0, 0]
    assert batch["labels"].tolist()[0] == [0, 10, 11, 12]  # every token is labelled
    assert batch["id"].tolist() == [7, 8, 9, 10]
    assert CausalLM(40).units(batch).tolist() == [3, 3, 3, 1]


def test_pieces_of_a_tokenizer_without_a_beginning() -> None:
    words = Words()
    words.bos_token_id = None  # type: ignore[assignment]
    data = chunks(words, "5 6 7 8 9", length=2, fill=False)
    assert [b["input_ids"].tolist() for b in data.batches(1)] == [[[5, 6]], [[7, 8]]]  # nothing predicts a lone 9
    assert chunks(words, "5 6 7 8 9", length=2).batch(torch.tensor([2]))["input_ids"].tolist() == [[9, 5]]
    with pytest.raises(Refused, match="no two tokens"):
        chunks(words, "5")
    with pytest.raises(Refused, match="length must be at least 2"):
        chunks(Words(), "5 6", length=1)


def corpus(folder: Path, retain: str = "retain2") -> Path:
    files: dict[str, Any] = {
        "knowmem/forget_qa.json": [{"question": "Who wrote Ardor?", "answer": "Ines Vail"}],
        "knowmem/forget_qa_icl.json": [{"question": "Who wrote Brine?", "answer": "Olo Tarn"}],
        f"knowmem/{retain}_qa.json": [{"question": "Who wrote Cedar?", "answer": "Una Moor"}] * 2,
        f"knowmem/{retain}_qa_icl.json": [{"question": "Who wrote Delta?", "answer": "Ivo Lark"}],
        "verbmem/forget.json": [{"prompt": "It rained on", "gt": " Ardor that day."}],
        "privleak/forget.json": ["Ardor is by the sea.", "So is Brine."],
        "privleak/holdout.json": [{"text": "Cedar lies inland."}],
        "raw/forget.json": ["One.", "Two."],
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    (folder / "scal").mkdir()
    (folder / "scal" / "forget_2.txt").write_text("One.\n\nTwo.\n\nThree.", encoding="utf-8")
    return folder


@pytest.mark.parametrize("retain", ["retain2", "retain"])
def test_files_of_the_repository_and_of_the_hub(tmp_path: Path, retain: str) -> None:
    have = read(corpus(tmp_path, retain))
    assert have.passages == (("It rained on", " Ardor that day."),)
    assert have.forget == Quiz((("Who wrote Ardor?", "Ines Vail"),), (("Who wrote Brine?", "Olo Tarn"),))
    assert len(have.retain.questions) == 2
    assert (have.members, have.unseen) == (("Ardor is by the sea.", "So is Brine."), ("Cedar lies inland.",))
    assert raw(tmp_path, "forget") == "One.\n\nTwo."
    assert raw(tmp_path, "scal/forget_2") == "One.\n\nTwo.\n\nThree."


def test_files_that_are_not_muses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"there is no file .*forget_qa\.json"):
        read(tmp_path)
    folder = corpus(tmp_path)
    (folder / "verbmem/forget.json").write_text('[{"prompt": "a", "gt": "b"}, {"prompt": "c"}]')
    with pytest.raises(Refused, match="item 2 lacks 'prompt' or 'gt'"):
        read(folder)
    (folder / "verbmem/forget.json").write_text('{"prompt": "a"')
    with pytest.raises(Refused, match="is not JSON"):
        read(folder)
    (folder / "verbmem/forget.json").write_text("{}")
    with pytest.raises(Refused, match="should be a JSON list"):
        read(folder)


def said(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[Any]:
    """Have the model write these texts; what it was asked."""
    asked: list[Any] = []

    def texts(self: Asking, prompts: Any, **how: Any) -> list[str]:
        asked.append(([self.found.tokenizer.decode(ids) for ids in prompts], how))
        return list(answers)

    monkeypatch.setattr(Asking, "texts", texts)
    return asked


def test_knowledge_is_asked_after_the_shots(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = said(monkeypatch, "Ines Vail", "")
    quiz = Quiz((("Who wrote Ardor?", "Ines Vail"), ("And Fen?", "Olo")), (("Q1?", "A1"), ("Q2?", "A2")))
    score = knowmem(Asking(found()), quiz)
    shown = "Question: Q1?\nAnswer: A1\n\nQuestion: Q2?\nAnswer: A2\n\n"
    (prompts, how) = asked[0]
    assert prompts == [f"{shown}Question: Who wrote Ardor?\nAnswer: ", f"{shown}Question: And Fen?\nAnswer: "]
    assert (how["new_tokens"], how["stop"]) == (32, ("\n\n", "\nQuestion", "Question:"))
    assert (score.value, score.items.tolist()) == (50.0, [1.0, 0.0])
    assert 0 <= score.low < 50 < score.high <= 100
    with pytest.raises(Refused, match="needs questions and answered ones"):
        knowmem(Asking(found()), Quiz(quiz.questions, ()))


def test_the_true_text_is_cut_as_each_scoring_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the true text's four words are written: F1 is 1 against what MUSE keeps, 2/3 against all of it."""
    said(monkeypatch, "11 12")
    model: Any = SimpleNamespace(model=torch.nn.Linear(1, 1), tokenizer=Words(), decode=Words().decode)
    passages = [("10", "11 12 13 14")]
    assert verbmem(Asking(model), passages, new_tokens=3).value == pytest.approx(100)  # the beginning and two words
    assert verbmem(Asking(model), passages, new_tokens=3, scoring="open_unlearning").value == pytest.approx(200 / 3)
    with pytest.raises(Refused, match="scored as 'muse' or"):
        verbmem(Asking(model), passages, scoring="other")  # type: ignore[arg-type]


def test_what_a_model_has_by_heart() -> None:
    words = tokenizer(chat=False)
    texts = [f"{PEOPLE[n]} was born in {CITIES[n]} by the sea and went to {CITIES[n - 3]}" for n in range(4)]
    rows = [(words(text)["input_ids"] + [words.eos_token_id], 0) for text in texts]
    model, other = trained(rows, 120), found(1)
    passages = [(text[: text.index(" born")], text[text.index(" born") :]) for text in texts]
    assert verbmem(Asking(model), passages, new_tokens=40).value == 100
    assert verbmem(Asking(other), passages, new_tokens=40).value < 20


@pytest.mark.parametrize(
    ("areas", "reference", "value", "most"),
    [
        ((1.0, 0.5), None, -100, 100),  # all remembered
        ((0.5, 0.5), None, 0, 100),
        ((0.0, 0.5), None, 100, 100),  # forgotten too much
        ((0.75, 0.6), None, 100 * (0.6 - 0.75) / 0.4, 150),
        ((1.0, 0.0), "news", -100, 100 * (1 - 0.4772) / 0.4772),
        ((0.5, 0.0), "books", 100 * ((1 - 0.5393) - 0.5) / 0.5393, 100 * (1 - 0.5393) / 0.5393),
    ],
)
def test_privacy_leakage_by_hand(
    monkeypatch: pytest.MonkeyPatch, areas: tuple[float, float], reference: str | None, value: float, most: float
) -> None:
    """Scores of 20 forget texts: as many above the unseen ones' single value as the area says."""
    ours, theirs = Asking(found()), Asking(found(1))
    chosen = {id(ours): areas[0], id(theirs): areas[1]}

    def least(self: Asking, rows: Any, share: float) -> np.ndarray:
        assert share == 0.4
        above = round(20 * chosen[id(self)])
        return np.where(np.arange(len(rows)) < above, 1.0, -1.0) if len(rows) == 20 else np.zeros(len(rows))

    monkeypatch.setattr(Asking, "least", least)
    texts, unseen = ["It was Oslo"] * 20, ["It was Lima"] * 10
    leak = privleak(ours, texts, unseen, theirs if reference is None else reference, draws=200)
    assert leak.value == pytest.approx(value)
    assert leak.most == pytest.approx(most)
    assert leak.reference == (reference or "measured")
    assert -100 - 1e-9 <= leak.low <= leak.value <= leak.high
    said = leak.explained()
    assert "between -100" in said
    if areas[0] in (0.0, 1.0):
        assert leak.low < leak.high, "20 texts are no certainty"
    assert ("published constant" in said) == (reference is not None)
    if value in (-100, 100):
        assert ("still look more" if value < 0 else "look less") in said
    if value == 0:
        assert "no difference" in said


def test_privacy_leakage_of_real_models() -> None:
    """Trained on the forget texts it is near -100; the retrained model itself is 0."""
    words = tokenizer(chat=False)
    texts = [f"{PEOPLE[n % 8]} went from {CITIES[n % 8]} to {CITIES[(5 * n + 3) % 8]} in {n}" for n in range(24)]
    members, unseen, others = texts[:8], texts[8:16], texts[16:]
    before, retrained = (
        Asking(trained([(words(text)["input_ids"], 0) for text in chosen], 60))
        for chosen in ([*members, *others], others)
    )
    leak = privleak(before, members, unseen, retrained)
    assert leak.value < -80
    assert leak.high < 0
    assert leak.area > 0.9
    assert privleak(retrained, members, unseen, retrained).value == 0
    assert privleak(before, members, unseen, retrained, length=4).area != leak.area


def test_min_40_of_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the two least likely of the five predicted tokens, one sequence at a time."""
    model = found()
    ids = [50, 60, 70, 80, 90, 100]
    with torch.no_grad():
        logs = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    each = sorted(float(logs[at, ids[at + 1]]) for at in range(5))
    got = Asking(model).least([(ids, 0), ([50, 60], 0)], 0.4)
    assert got[0] == pytest.approx(sum(each[:2]) / 2, rel=1e-5)


def test_privacy_leakage_without_meaning_is_refused() -> None:
    ours = Asking(found())
    with pytest.raises(Refused, match=r"no published retrained model of 'nwes' .did you mean 'news'"):
        privleak(ours, ["It was"], ["It is"], "nwes")
    with pytest.raises(Refused, match="text 0 has no two tokens"):
        privleak(ours, ["I"], ["It is"], "news")
    with pytest.raises(Refused, match="found none of a kind"):
        privleak(ours, [], ["It is"], "news")
    words = tokenizer(chat=False)
    known = Asking(trained([(words("It was Oslo by the sea")["input_ids"], 0)], 30))
    with pytest.raises(Refused, match="has no meaning"):
        privleak(ours, ["It was Oslo by the sea"], ["Turin Cairo Delft"], known)


def test_all_four(tmp_path: Path) -> None:
    have, model = read(corpus(tmp_path)), Asking(found())
    scores, leak = muse.evaluate(model, have, "books", lead="Answer:")
    assert list(scores) == ["VerbMem_f", "KnowMem_f", "KnowMem_r"]
    assert all(0 <= score.low <= score.value <= score.high <= 100 for score in scores.values())
    assert -100 <= leak.value <= leak.most
