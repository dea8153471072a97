"""Exact memorisation and extraction strength: the authors' numbers, the true zero, masks, batches, and an audit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.audit import judge
from expunge.audit.extraction import (
    exact_memorisation,
    exact_share,
    extraction_strength,
    matched,
    matches,
    released_strength,
    strength,
)
from expunge.audit.report import measured
from expunge.audit.subject import Subject
from expunge.core import Data, Key, Refused, Request
from expunge.data.sources import as_data
from expunge.store import Store
from expunge.tasks.causal_lm import IGNORED, CausalLM
from tests.fixtures import END, retrained, tiny

# What the loops of open-unlearning's src/evals/metrics/memorization.py (2db47ec) and of tokenwise_vocab_logprobs in
# utils.py (5420d43), taken out of their data loading, give on the arrays below in float64; None: no score.
THEIR_EXACT = (1.0, 0.833333, 0.4, 1.0, 1.0, 1.0, 0.0, None)
THEIR_STRENGTH = (1.0, 0.333333, 0.2, 1.0, 1.0, 1.0, 1.0, 0.0)


def arrays() -> tuple[Tensor, Tensor]:
    """Logits [8, 8, 5] and labels [8, 8] of answers of 8 tokens, 7, and so on down to 1, true tokens made likely."""
    rng = np.random.default_rng(7)
    ids = torch.tensor(rng.integers(0, 5, (8, 9)))
    logits = torch.tensor(rng.normal(size=(8, 9, 5)))[:, :-1]
    logits.scatter_add_(2, ids[:, 1:, None], torch.full((8, 8, 1), 1.5, dtype=torch.float64))
    labels = torch.where(torch.arange(9) >= torch.arange(1, 9)[:, None], ids, IGNORED)
    return logits, labels[:, 1:]


def numbers(found: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, np.ndarray]:
    return {name: part.numpy()[rows] for name, part in found.items()}


def written(rows: list[str]) -> dict[str, np.ndarray]:
    """Counts for rows such as "..rw" : "." no answer, "r" right, "w" wrong, "e" the last token, which does not count."""
    labels = torch.tensor([[IGNORED if c == "." else 1 for c in row] for row in rows])
    logits = torch.tensor([[[0.0, 1.0] if c == "r" else [1.0, 0.0] for c in row] for row in rows])
    return numbers(matched(logits, labels))


def subject(after: nn.Module | None = None, **changes: Any) -> Subject:
    found = tiny("causal_lm", "random")
    references = tuple(retrained("causal_lm", "random", seed) for seed in (1, 2, 3))
    made = Subject(found.model, after or found.model, found.request, found.task, found.test, references)
    return replace(made, **changes)


def test_the_authors_numbers_where_their_code_is_right() -> None:
    found = numbers(matched(*arrays()), slice(7))
    np.testing.assert_allclose(exact_share(found), THEIR_EXACT[:7], atol=5e-7)
    np.testing.assert_allclose(released_strength(found), THEIR_STRENGTH[:7], atol=5e-7)
    assert matched(*arrays())["tokens"].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_extraction_strength_has_a_true_zero_where_the_released_code_has_a_floor() -> None:
    """Nothing right, not even at the end: the released number is 1/T, the same as with the last token right."""
    found = written([".wwwwe", ".wwwre", ".rrrwe", "....we"])
    np.testing.assert_array_equal(strength(found), [0, 1 / 4, 0, 0])
    np.testing.assert_array_equal(released_strength(found), [1 / 4, 1 / 4, 1 / 4, 1])
    ours, theirs = numbers(matched(*arrays()), slice(7)), np.array(THEIR_STRENGTH[:7])
    differ = strength(ours) != released_strength(ours)
    assert differ[6]
    assert theirs[6] == 1.0  # one token, wrong: released as wholly extracted
    assert strength(ours)[6] == 0.0


def test_by_hand() -> None:
    """T counts the answer without its last token; a suffix ends there, and an answer may have gaps and begin anywhere."""
    found = written([".rwrre.", "rrrre..", "..wrrre", ".r.w.re", "......e"])
    assert found["tokens"].tolist() == [4, 4, 4, 3, 0]
    assert found["right"].tolist() == [3, 4, 3, 2, 0]
    assert found["suffix"].tolist() == [2, 4, 3, 1, 0]


def test_brute_force_over_all_suffixes() -> None:
    rng = np.random.default_rng(5)
    labels = torch.tensor(rng.integers(0, 2, (300, 6)))
    labels[torch.tensor(rng.random((300, 6)) < 0.2)] = IGNORED
    logits = torch.tensor(rng.normal(size=(300, 6, 2)))
    found = numbers(matched(logits, labels))
    for row in range(300):
        places = [place for place in range(6) if labels[row, place] >= 0][:-1]
        right = [int(logits[row, place].argmax()) == int(labels[row, place]) for place in places]
        longest = max((size for size in range(len(right) + 1) if all(right[len(right) - size :])), default=0)
        counts = tuple(int(found[name][row]) for name in ("tokens", "right", "suffix"))
        assert counts == (len(right), sum(right), longest)


@pytest.mark.parametrize("left", [False, True])
def test_batches_and_padding_change_nothing(left: bool) -> None:
    found = tiny("causal_lm", "random")
    data = found.request.forget
    batch = data.batch(torch.arange(len(data)))
    wide = {}
    for name, filler in (("input_ids", END), ("attention_mask", 0), ("labels", IGNORED)):
        extra = torch.full((len(data), 3), filler)
        wide[name] = torch.cat([extra, batch[name]] if left else [batch[name], extra], 1)
    key = Key(1)
    once = matches(found.model, found.task, data, 100, key)
    assert 0 < once["right"].sum() < once["tokens"].sum()
    for other in (
        matches(found.model, found.task, data, 1, key),
        matches(found.model, found.task, data, 7, key),
        matches(found.model, found.task, as_data(wide, ids=data.ids), 9, key),
    ):
        for name in ("id", "tokens", "right", "suffix"):
            np.testing.assert_array_equal(other[name], once[name])


def test_a_model_that_forgot_nothing_a_retrained_and_a_random_one() -> None:
    made = subject()
    untrained = made.judging(tiny("causal_lm").make(9))
    for measure in (exact_memorisation, extraction_strength):
        kept = measure(made)
        others = [measure(made.held_out(number)) for number in range(3)]
        assert kept.low > max(other.value for other in others), measure.__name__
        assert measure(untrained).value < min(other.value for other in others), measure.__name__
        assert 0 <= kept.low <= kept.value <= kept.high <= 100
        assert (kept.unit, kept.better, kept.n) == ("%", "nearer_retrained", 20)
    reading = extraction_strength(made)
    assert reading.detail["released"] > reading.value
    assert "answers_of_one_token" not in reading.detail


def test_an_audit_has_them_with_direction_and_reference() -> None:
    made = subject()
    row = measured(made, "nothing", "method")
    for measure in (exact_memorisation, extraction_strength):
        reading = row.readings[measure.__name__]
        others = [measure(made.held_out(number)) for number in range(3)]
        assert reading.reference is not None
        assert reading.reference[0] < np.mean([other.value for other in others]) < reading.reference[1]
        close = [replace(other, value=20.0, low=19.0, high=21.0, n=1000) for other in others]
        assert judge.judged(reading, close, 1).verdict == "under-forgot"
        assert judge.judged(replace(reading, value=1.0), close, 1).verdict == "over-forgot"


def test_a_random_model_has_a_zero_that_the_released_floor_hides() -> None:
    made = subject(tiny("causal_lm").make(9))
    reading = extraction_strength(made)
    counts = matches(made.after, made.task, made.request.forget, 8, Key(0))
    assert reading.value == pytest.approx(100 * float((counts["suffix"] / counts["tokens"]).mean()))
    assert reading.detail["released"] >= 100 * float((1 / counts["tokens"]).mean())


def one_token_answers(rows: int) -> Data:
    """The forget examples with only their last answer token labelled in the first `rows`."""
    data = tiny("causal_lm", "random").request.forget
    batch = dict(data.batch(torch.arange(len(data))))
    labels = batch["labels"].clone()
    for row in range(rows):
        labels[row, torch.nonzero(labels[row] >= 0).flatten()[:-1]] = IGNORED
    columns = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return as_data(columns, ids=data.ids)


def test_answers_of_one_token_are_left_out_and_counted() -> None:
    made = subject()
    whole = matches(made.after, made.task, made.request.forget, 8, Key(0))
    some = subject(request=Request(one_token_answers(4), made.request.retain))
    for measure, part in ((exact_memorisation, "right"), (extraction_strength, "suffix")):
        reading = measure(some)
        assert (reading.n, reading.detail["answers_of_one_token"]) == (16, 4)
        assert reading.value == pytest.approx(100 * float((whole[part] / whole["tokens"])[4:].mean()))
        assert measure(subject(request=Request(one_token_answers(20), made.request.retain))) is None


def test_both_share_one_pass_and_a_store_keeps_it(tmp_path: Any) -> None:
    calls = []

    def call(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(len(batch["id"]))
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    made = subject(store=Store(tmp_path))
    made = replace(made, task=CausalLM(made.task.vocab, call=call))
    made.outputs("forget")
    calls.clear()
    first = (exact_memorisation(made), extraction_strength(made))
    assert calls == [20]
    again = replace(made, cache=type(made.cache)())
    again.outputs("forget")
    calls.clear()
    assert (exact_memorisation(again), extraction_strength(again)) == first
    assert calls == []


def test_logits_that_are_no_numbers_are_refused_and_impossible_tokens_are_not() -> None:
    logits, labels = arrays()
    prompt = logits.clone()
    prompt[7, 0] = torch.nan  # of the prompt, which nobody judges
    prompt[0, 0, 0] = -torch.inf
    assert matched(prompt, labels)["tokens"].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    logits[0, 3, 2] = torch.nan
    with pytest.raises(Refused, match="not numbers"):
        matched(logits, labels)


def test_a_task_without_tokens_has_neither() -> None:
    found = tiny("classification", "random")
    made = Subject(found.model, found.model, found.request, found.task, found.test)
    assert exact_memorisation(made) is None
    assert extraction_strength(made) is None
