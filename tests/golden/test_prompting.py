"""Attacks that only ask, and PrivLeak as a measure: by hand, and on models that know and never knew."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.attacks.prompting import common_share, leak_at_k, lm_in_context, lm_leak, lm_written
from expunge.audit import intervals
from expunge.audit.judge import direction
from expunge.audit.language import lm_min_k, lm_privacy_leakage, min_k
from expunge.audit.report import measured
from expunge.audit.subject import Reading, Subject
from expunge.core import Key
from expunge.registry import is_asked, measures
from tests.fixtures import END, retrained, sentences, tiny

MEASURES = (lm_written, lm_leak, lm_in_context, lm_privacy_leakage)


@functools.cache
def references() -> tuple[nn.Module, ...]:
    return tuple(retrained("causal_lm", "random", seed) for seed in range(2))


def subject(after: nn.Module | None = None, batch: int = 256) -> Subject:
    """Judged: the model that was trained on the forget data, unless told otherwise."""
    case = tiny("causal_lm", "random")
    after = case.model if after is None else after
    return Subject(case.model, after, case.request, case.task, case.test, references(), draws=100, batch=batch)


def lcs(first: list[int], second: list[int]) -> int:
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if a == b else max(table[i - 1, j], table[i, j - 1])
    return int(table[-1, -1])


def test_the_common_share_is_that_of_the_table() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        first, second = (generator.integers(0, 5, generator.integers(1, 90)).tolist() for _ in range(2))
        assert common_share(first, second) == lcs(first, second) / len(first)
    assert common_share([1, 2], []) == 0
    assert common_share([1, 2, 3], [9, 1, 9, 2, 3, 3]) == 1


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return [token for token in ids[len(prompt) :] if token != END]


def test_what_is_written_by_hand() -> None:
    made, pairs = subject(), sentences()
    rows = [pairs[row] for row in made.request.forget.ids.tolist()]
    longest = max(len(answer) for _, answer in rows)
    for model in (made.before, references()[0]):
        shares = [lcs(answer[:-1], greedy(model, prompt, longest)) / (len(answer) - 1) for prompt, answer in rows]
        reading = lm_written(subject(model))
        assert reading is not None
        assert reading.value == pytest.approx(100 * np.mean(shares))


def probability(model: nn.Module, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.exp(np.mean([float(logs[at - 1, ids[at]]) for at in range(start, len(ids))])))


def test_what_shots_gain_by_hand() -> None:
    made, pairs = subject(), sentences()
    key = made.key.at("prompting", "shots")
    order = torch.randperm(len(made.request.retain), generator=key.generator())[:5].sort().values
    before = [t for row in made.request.retain.ids[order].tolist() for part in pairs[row] for t in part]
    gains = []
    for row in made.request.forget.ids.tolist():
        prompt, answer = pairs[row]
        shown = before + prompt + answer
        gains.append(
            probability(made.after, shown, len(before + prompt)) - probability(made.after, prompt + answer, len(prompt))
        )
    reading = lm_in_context(made)
    assert reading is not None
    assert reading.value == pytest.approx(np.mean(gains), abs=1e-6)
    assert reading.detail["with"] - reading.detail["without"] == pytest.approx(reading.value)


def test_shots_that_do_not_fit_are_left_out() -> None:
    made = subject()
    made.after.config.max_position_embeddings = 8
    assert lm_in_context(made) is None


def test_privacy_leakage_is_that_of_muse() -> None:
    made = subject()
    reading, known = lm_privacy_leakage(made), lm_min_k(made)
    assert reading is not None
    assert known is not None
    assert reading.value == pytest.approx(known.detail["privacy_leakage"])
    assert reading.value < -50
    assert reading.high < 0
    area = reading.detail["retrained_area"]
    assert reading.detail["most"] == pytest.approx(100 * area / (1 - area))
    assert -100 <= reading.low <= reading.high <= reading.detail["most"] + 1e-9
    scores = []
    for data in (made.request.forget, made.test):
        batch = data.batch(torch.arange(len(data)))
        with torch.no_grad():
            logs, labels = -made.task.token_nll(made.after, batch), made.task.labels(batch)
        scores.append(min_k(logs.numpy(), (labels >= 0).numpy()))
    assert reading.detail["area"] == pytest.approx(intervals.auc(*scores))


def test_a_model_that_knows_stands_out_and_a_retrained_one_does_not() -> None:
    for kind in (lm_written, lm_leak):
        knows, other = kind(subject()), kind(subject(references()[1]).held_out(1))
        assert isinstance(knows, Reading)
        assert isinstance(other, Reading)
        assert knows.low > other.high
    knows, itself = lm_privacy_leakage(subject()), lm_privacy_leakage(subject().held_out(0))
    assert knows is not None
    assert itself is not None
    assert knows.high < itself.low


@pytest.mark.parametrize("kind", MEASURES)
def test_batches_change_nothing(kind: object) -> None:
    readings = [measures()[kind.__name__](subject(batch=size)) for size in (256, 7)]  # type: ignore[attr-defined]
    assert readings[0].value == pytest.approx(readings[1].value, abs=1e-4)


@pytest.mark.parametrize("kind", MEASURES)
def test_they_run_where_they_are_asked_for_and_on_language_only(kind: object) -> None:
    name = kind.__name__  # type: ignore[attr-defined]
    assert is_asked(name)
    case = tiny("classification")
    assert measures()[name](Subject(case.model, case.model, case.request, case.task, case.test)) is None


def test_the_best_of_samples_is_more_than_one() -> None:
    reading = lm_leak(subject(references()[0]))
    assert reading is not None
    assert reading.value > reading.detail["one_sample"]
    assert leak_at_k([[0.0, 1.0]], 1).tolist() == [0.5]
    again = lm_leak(subject(references()[0]))
    assert again is not None
    assert again.value == reading.value
    other = lm_leak(Subject(**{**vars(subject(references()[0])), "key": Key(9)}))
    assert other is not None
    assert other.value != reading.value


def test_verdicts_have_the_right_direction() -> None:
    """Less privacy leakage than a retrained model, or more of the answer written, is knowledge that is left."""
    assert direction("lm_privacy_leakage", -50.0) == direction("lm_written", 5.0) == "under-forgot"
    assert direction("lm_privacy_leakage", 50.0) == direction("lm_leak", -5.0) == "over-forgot"
    made = replace(subject(), retrained=tuple(retrained("causal_lm", "random", seed) for seed in range(4)), family=())
    row = measured(made, "nothing", "method", also=("lm_privacy_leakage", "lm_written"))
    band = row.readings["lm_privacy_leakage"].reference
    assert band is not None
    assert band[0] < 0 < band[1], "a measure that goes below 0 is not judged as a share"
    assert row.readings["lm_written"].verdict == "under-forgot"
