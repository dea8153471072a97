"""What a model writes by itself: the answers are the model's, and repetition and fluency are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import expunge as ex
from expunge.audit.answers import lm_fluency, lm_repetition, repeated
from expunge.tasks.causal_lm import CausalLM

VOCAB, END = 8, 7


class Chain(nn.Module):
    """Says after token t the token `after[t]`, with the odds given."""

    def __init__(self, after: list[int], sure: float = 6.0):
        super().__init__()
        table = torch.zeros(VOCAB, VOCAB)
        table[torch.arange(VOCAB), torch.tensor(after)] = sure
        self.table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def data(left: bool = False, times: int = 1) -> ex.core.Data:
    """Prompts 0 1 and 5 with true answers 2 3 END and 6 END, so many times."""
    ids = torch.tensor([[0, 1, 2, 3, END], [5, 6, END, 0, 0]])
    labels = torch.tensor([[-100, -100, 2, 3, END], [-100, 6, END, -100, -100]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    if left:
        ids, labels, mask = (torch.stack([t[0], t[1].roll(2)]) for t in (ids, labels, mask))
    columns = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return ex.as_data({name: column.repeat(times, 1) for name, column in columns.items()})


def answers(batch) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in batch["labels"]]


@pytest.mark.parametrize("left", [False, True])
def test_the_answers_are_the_models_own_with_their_end(left):
    task = CausalLM(VOCAB)
    straight = Chain([1, 4, 3, END, 2, 2, END, END])  # 1 4 2 3 END and 5 2 3 END
    found = task.written(straight, data(left).batch(torch.arange(2)))
    assert answers(found) == [[4, 2, 3, END], [2, 3, END]]
    assert found["input_ids"][0].tolist()[:6] == [0, 1, 4, 2, 3, END]
    assert found["attention_mask"].sum(1).tolist() == [6, 4]


def test_an_answer_that_does_not_end_is_cut_half_as_long_again():
    circle = Chain([1, 2, 1, 1, 1, 1, 1, 1])
    found = answers(CausalLM(VOCAB).written(circle, data().batch(torch.arange(2))))
    assert found == [
        [2, 1, 2, 1, 2],
        [1, 2, 1, 2, 1],
    ]  # 3 tokens of the longest true answer, times one and a half, and one


@pytest.mark.parametrize(
    ("tokens", "share"), [([1, 2, 1, 2, 1], 0.5), ([1, 1, 1, 1], 2 / 3), ([1, 2, 3], 0.0), ([1, 2], 0.0), ([1], 0.0)]
)
def test_repetition_by_hand(tokens, share):
    assert repeated(np.array(tokens)) == pytest.approx(share)


def subject(after, *retrained, times=1):
    """Texts to forget, judged against these models."""
    everything = data(times=times)
    return ex.Subject(
        Chain([1, 2, 3, END, 2, 6, END, END]), after, ex.Request(everything), CausalLM(VOCAB), retrained=retrained
    )


def test_fluency_is_the_loss_that_the_others_give_to_what_it_says():
    one, other = Chain([1, 4, 3, END, 2, 2, END, END]), Chain([1, 4, 3, END, 6, 2, END, END], sure=2.0)
    made = Chain([1, 4, 3, END, 2, 2, END, END], sure=9.0)

    def loss(sure: float, right: bool) -> float:
        return float(np.log(np.exp(sure) + VOCAB - 1) - (sure if right else 0.0))

    # said: 0 1 | 4 2 3 END and 5 | 2 3 END; the other model would say 6 after 4
    first = np.mean([loss(6, True)] * 4), np.mean([loss(2, True), loss(2, False), loss(2, True), loss(2, True)])
    second = loss(6, True), loss(2, True)
    reading = lm_fluency(subject(made, one, other))
    assert reading.value == pytest.approx(np.mean([np.mean(first), np.mean(second)]), rel=1e-5)
    assert reading.low <= reading.value <= reading.high


def test_a_model_that_runs_in_circles_is_outside_what_retrained_models_do():
    good = [Chain([1, 4, 3, END, 2, 2, END, END], sure=s) for s in (4.0, 5.0, 6.0)]
    circle = Chain([1, 2, 1, 1, 1, 1, 1, 1])
    report = ex.audit(subject(circle, *good, times=10), trust_references=True)
    reading = report.row("unlearned").readings["lm_repetition"]
    assert reading.value == pytest.approx(100 * (1 - 2 / 4))
    assert reading.verdict == "outside"
    assert report.row("retrain").readings["lm_repetition"].value == 0


def test_a_task_that_is_called_in_a_way_of_its_own_writes_nothing():
    called = CausalLM(VOCAB, call=lambda model, batch: model(batch["input_ids"]))
    made = ex.Subject(Chain([1] * 8), Chain([1] * 8), ex.Request(data()), called, retrained=(Chain([2] * 8),))
    assert lm_repetition(made) is None
    assert lm_fluency(made) is None
