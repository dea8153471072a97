"""AltPO against plain torch, and the making and reading of alternates."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Key
from expunge.data.json_lines import Example
from expunge.data.text import Template
from expunge.methods.alt_po import alt_po
from expunge.tasks import alternates
from expunge.tasks.alternates import STOPS, Alternates, make_alternates, paired, read_alternates
from tests.fixtures import END, sentences, tiny, tokens
from tests.golden.by_hand import ALL

AUTHORS = [f * 12 + last for f in range(2) for last in range(10)]
"""Rows of ``sentences`` of the tiny model's forget data."""


def several(each: int = 3) -> ex.Data:
    """Every forgotten question `each` times, with another answer of its own each time, of unequal lengths."""
    rows = [sentences()[row] for row in AUTHORS for _ in range(each)]
    other = [
        (prompt, [26 + (answer[0] - 25 + n) % 11, *range(30, 30 + n % each), END])
        for n, (prompt, answer) in enumerate(rows)
    ]
    ids = torch.arange(len(rows)) + 5000
    return paired(ex.as_data(tokens(rows), ids=ids), ex.as_data(tokens(other), ids=ids))


def summed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Each example on its own, without padding: -log p of its answer by the model's own cross-entropy."""
    losses = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        kept = mask == 1
        logits = model(ids[kept][None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels[kept][1:], ignore_index=-100, reduction="sum"))
    return torch.stack(losses)


def test_golden_steps_on_several_alternates_per_question() -> None:
    """Two steps of torch's Adam on DPO with a factor 2, the alternate to win, and the token mean of the retain loss."""
    found, forget = tiny("causal_lm"), several(2).select(range(12, 30))
    request = ex.Request(forget, found.request.retain.select(range(20)))
    method = alt_po(beta=0.2, retain_weight=1.5, lr=1e-3, steps=2, batch=ALL)
    done = ex.unlearn(found.model, request, task=found.task, method=method)
    net = copy.deepcopy(found.model)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    lose, keep = (data.batch(torch.arange(len(data))) for data in (forget, request.retain))
    with torch.no_grad():
        start = [summed(found.model, part) for part in (lose["win"], lose)]
    for _ in range(2):
        ratios = [before - summed(net, part) for before, part in zip(start, (lose["win"], lose), strict=True)]
        forgotten = -2 / 0.2 * F.logsigmoid(0.2 * (ratios[0] - ratios[1])).mean()
        kept = summed(net, keep).sum() / (keep["labels"] != -100).sum()
        optimizer.zero_grad()
        (forgotten + 1.5 * kept).backward()
        optimizer.step()
    for p, q in zip(done.model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert done.record["history"][0]["loss/forget"] == pytest.approx(2 / 0.2 * math.log(2), rel=1e-6)


def test_an_alternate_becomes_likelier_against_the_truth_and_the_rest_is_kept() -> None:
    found, forget = tiny("causal_lm"), several()
    request = ex.Request(forget, found.request.retain)
    done = ex.unlearn(found.model, request, task=found.task, method=alt_po())
    batch, keep = forget.batch(torch.arange(len(forget))), found.request.retain.batch(torch.arange(80))
    with torch.no_grad():
        margins = [
            found.task.nll(m, batch) - found.task.nll(m, {**batch, **batch["win"]}) for m in (found.model, done.model)
        ]
        rise = (found.task.nll(done.model, keep) - found.task.nll(found.model, keep)).sum() / found.task.units(
            keep
        ).sum()
    assert float((margins[1] - margins[0]).mean()) > 5.0
    assert float(rise) < 0.1


def test_without_alternates_it_is_refused_before_any_work() -> None:
    found = tiny("causal_lm")
    with pytest.raises(ex.Refused, match=r"alt_po needs forget data with the column 'win'"):
        ex.unlearn(found.model, found.request, task=found.task, method="alt_po")


def test_cached_references_stand_for_the_second_model() -> None:
    found, forget = tiny("causal_lm"), several()
    batch = forget.batch(torch.arange(len(forget)))
    with torch.no_grad():
        known = {
            "reference": found.task.nll(found.model, batch),
            "win_reference": found.task.nll(found.model, {**batch, **batch["win"]}),
        }
    cached = forget
    for name, values in known.items():
        cached = cached.annotate(name, values)
    method = alt_po(steps=3, batch=ALL)
    with_teacher = ex.unlearn(found.model, ex.Request(forget, found.request.retain), task=found.task, method=method)
    alone = ex.unlearn(
        copy.deepcopy(found.model), ex.Request(cached, found.request.retain), task=found.task, method=method, copy=False
    )
    for p, q in zip(with_teacher.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# The making and reading of alternates


def asked(question: str, answer: str, where: str = "forget.jsonl line 1") -> Example:
    return Example(({"role": "user", "content": question},), answer, where)


def written(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[dict[str, Any]]:
    """Stand in for the model's writing with these texts; the calls, for a look at what was asked."""
    calls: list[dict[str, Any]] = []

    def write(model: Any, tokenizer: Any, prompts: list[str], **settings: Any) -> list[str]:
        calls.append({"prompts": prompts, **settings})
        return texts

    monkeypatch.setattr(alternates, "generate", write)
    return calls


class Plain:
    """A tokenizer without a chat template: a token per word."""

    chat_template = None
    eos_token_id, pad_token_id = 1, None
    all_special_ids = (0, 1)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [2 + sum(map(ord, word)) % 38 for word in text.split()]}


def test_the_model_is_shown_question_true_answer_and_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = written(monkeypatch, ["In Oslo.", "In Rome.", "Vail", "Moss"])
    examples = [asked("Where was Ines born?", "In Lisbon."), asked("Who wrote Ardor?", "Ines Vale.")]
    made = make_alternates(nn.Identity(), Plain(), examples, rng=Key(3), each=2, instruction="Change the facts.")
    assert [
        part in prompt
        for prompt in calls[0]["prompts"][:2]
        for part in ("Where was Ines born?", "In Lisbon.", "Change the facts.")
    ] == [True] * 6
    assert ["Ardor" in prompt for prompt in calls[0]["prompts"]] == [False, False, True, True]
    assert (calls[0]["temperature"], calls[0]["new_tokens"], calls[0]["stop"]) == (1.0, 200, STOPS)
    assert [e.answer for e in made.true] == ["In Lisbon.", "In Lisbon.", "Ines Vale.", "Ines Vale."]
    assert [e.answer for e in made.other] == ["In Oslo.", "In Rome.", "Vail", "Moss"]
    assert [e.prompt for e in made.other] == [e.prompt for e in made.true]
    assert not made.notes


def test_empty_and_true_alternates_are_dropped_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    written(monkeypatch, ["  In Oslo. ", "in  lisbon.", " \n"])
    made = make_alternates(nn.Identity(), Plain(), [asked("Where?", "In Lisbon.")], rng=Key(3), each=3)
    assert [e.answer for e in made.other] == ["In Oslo."]
    assert made.dropped == 2
    assert made.notes == ("2 of 3 alternates were empty or the true answer itself, and were dropped",)


def test_a_question_left_without_an_alternate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    written(monkeypatch, ["In Oslo.", "", "Yes", "yes"])
    examples = [asked("Where?", "In Lisbon."), asked("Is it?", "Yes", "forget.jsonl line 7")]
    with pytest.raises(ex.Refused, match=r"forget.jsonl line 7: 'Is it\?' is left without an alternate \(1 of 2"):
        make_alternates(nn.Identity(), Plain(), examples, rng=Key(3), each=2)


def test_what_cannot_have_alternates_is_refused() -> None:
    with pytest.raises(ex.Refused, match="line 4 is running text"):
        make_alternates(nn.Identity(), Plain(), [Example((), "A passage.", "texts line 4")], rng=Key(0))
    for wrong in ({"each": 0}, {"temperature": 0.0}):
        with pytest.raises(ex.Refused, match="at least 1 alternate per question at a temperature above 0"):
            make_alternates(nn.Identity(), Plain(), [asked("Where?", "Here.")], rng=Key(0), **wrong)


def test_saved_alternates_are_read_back_and_foreign_files_too(tmp_path: Path) -> None:
    rows = [("Where?", "In Lisbon.", "In Oslo."), ("Where?", "In Lisbon.", "In Rome."), ("Who?", "Ines", "Ida Ørsted")]
    true = tuple(asked(question, answer) for question, answer, _ in rows)
    made = Alternates(true, tuple(e.answered(row[2]) for e, row in zip(true, rows, strict=True)))
    made.save(tmp_path / "alternates.jsonl")
    again = read_alternates(tmp_path / "alternates.jsonl")
    assert [(t.prompt, t.answer, o.answer) for t, o in zip(again.true, again.other, strict=True)] == rows
    assert [json.loads(line)["sub_answer"] for line in (tmp_path / "alternates.jsonl").read_text().splitlines()][
        2
    ] == "Ida Ørsted"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "a", "answer": "b", "sub_answer": "c"}\n{"question": "a"', "line 2 is not JSON"),
        ('{"question": "a", "answer": "b"}', "line 1 has question, answer: expected the texts question, answer, sub_answer"),
        ("[1]", "line 1 has a list"),
        ('{"question": " ", "answer": "b", "sub_answer": "c"}', "line 1 has an empty question or answer"),
        ('{"question": "a", "answer": "b", "sub_answer": "B "}', "line 1: 'a' is left without an alternate"),
        ("\n", "has no alternates"),
    ],
)  # fmt: skip
def test_a_broken_file_of_alternates_is_refused_with_its_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "alternates.jsonl").write_text(content)
    with pytest.raises(ex.Refused, match=words):
        read_alternates(tmp_path / "alternates.jsonl")


def test_encoded_alternates_are_one_example_each_with_its_own_padding() -> None:
    """A batch row by row: prompt and true answer, and under ``win`` the same prompt and the alternate."""
    tokenizer, true = Plain(), (asked("Where was she born ?", "In Lisbon"), asked("Who ?", "Ines Vail of Porto"))
    template = Template(tokenizer)
    made = Alternates(
        (true[0], true[0], true[1]),
        (true[0].answered("In a far away Oslo"), true[0].answered("Rome"), true[1].answered("Ida")),
        1,
    )
    encoded = made.encode(template, length=64, first_id=100)
    assert encoded.data.ids.tolist() == [100, 101, 102]
    assert encoded.notes == made.notes
    batch = encoded.data.batch(torch.arange(3))
    for row, (lose, win) in enumerate(zip(made.true, made.other, strict=True)):
        for part, example in ((batch, lose), (batch["win"], win)):
            ids, start = template.ids(example)
            kept = part["attention_mask"][row] == 1
            assert part["input_ids"][row][kept].tolist() == ids
            assert part["labels"][row][kept].tolist() == [-100] * start + ids[start:]
    assert batch["input_ids"].shape[1] != batch["win"]["input_ids"].shape[1]
    assert (
        encoded.data.select([1]).batch(torch.zeros(1, dtype=torch.int64))["win"]["input_ids"].shape[1]
        < batch["win"]["input_ids"].shape[1]
    )


class Words(Plain):
    """With texts of its own for every token."""

    eos_token, bos_token, padding_side = "<end>", None, "left"

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(f"w{int(i)}" for i in ids if int(i) > 1)


def test_a_real_model_writes_them_and_learns_from_them() -> None:
    """End to end on a tiny untrained Llama: written, encoded, unlearned; the same key, the same texts at any batch."""
    found, tokenizer = tiny("causal_lm"), Words()
    model, examples = found.make(3), [asked(f"a{n} b", f"w{n}", f"line {n}") for n in range(4)]
    first, second = (
        make_alternates(model, tokenizer, examples, rng=Key(8), each=2, instruction="c", new_tokens=4, batch=size)
        for size in (3, 8)
    )
    assert [e.answer for e in first.other] == [e.answer for e in second.other]
    assert len({e.answer for e in first.other}) > 3
    data = first.encode(Template(tokenizer), length=60).data
    request = ex.Request(data, ex.as_data(tokens(sentences()[50:60]), ids=range(900, 910)))
    done = ex.unlearn(model, request, task=found.task, method=alt_po(steps=2))
    assert done.record["history"][0]["loss/forget"] == pytest.approx(4 * math.log(2), rel=1e-5)


def test_what_a_question_gets_does_not_depend_on_the_others() -> None:
    model, examples = tiny("causal_lm").make(3), [asked(f"a{n} b", f"w{n}", f"line {n}") for n in range(4)]
    settings: dict[str, Any] = {"rng": Key(8), "each": 2, "instruction": "c", "new_tokens": 4}
    all_of_them = make_alternates(model, Words(), examples, **settings)
    last = make_alternates(model, Words(), examples[2:], **settings)
    assert [e.answer for e in last.other] == [e.answer for e in all_of_them.other[4:]]
    assert all_of_them.other[0].answer != all_of_them.other[1].answer


def test_a_system_message_comes_back_with_what_was_read(tmp_path: Path) -> None:
    """Else the same command would go on with other prompts than those that it began with."""
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"})
    true = (Example(turns, "In Lisbon.", "forget line 1"), asked("Who?", "Ines"))
    made = Alternates(true, (true[0].answered("In Oslo."), true[1].answered("Ida")))
    made.save(tmp_path / "alternates.jsonl")
    again = read_alternates(tmp_path / "alternates.jsonl").asked_as(true)
    assert [e.messages for e in again.true] == [e.messages for e in again.other] == [e.messages for e in true]
    assert [e.answer for e in again.other] == ["In Oslo.", "Ida"]
