"""What an audit is given wrong is said in one sentence that names what was expected and found, before any result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import expunge
from expunge.audit import audit, compare
from expunge.audit.lira import offline_scores
from expunge.audit.rmia import scores
from expunge.audit.roc import tpr_at
from expunge.audit.subject import Shadows
from expunge.core import Refused, Request
from expunge.store import Kept, Store
from tests.unit.test_audit_measures import Answers, C, answers, retrained_models, subject


def with_outputs(number: int) -> Answers:
    """A model of another number of classes."""
    return Answers(torch.zeros(len(answers(0, 0.5).logits), number))


def broken() -> Answers:
    model = answers(1, 0.5)
    model.logits.data[3, 1] = float("nan")
    return model


def unnamed() -> object:
    return replace(subject(answers(1, 0.5)), retrained=(Kept("abc", lambda: answers(2, 0.5)),))


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "more classes than the task": (lambda: audit(subject(with_outputs(C + 2))), f"expected .*{C}"),
    "a retrained model of other classes": (
        lambda: audit(subject(answers(1, 0.5), None, (with_outputs(C - 1), *retrained_models(3)))),
        "is it of another task",
    ),
    "outputs that are not finite": (lambda: audit(subject(broken())), "not finite"),
    "no forget data": (lambda: replace(subject(answers(1, 0.5)), request=Request()), "needs forget data"),
    "a model by name without its store": (unnamed, "give the audit that store"),
    "the same retrained model twice": (
        lambda: audit(subject(answers(1, 0.5), None, (answers(7, 0.6),) * 3)),
        "retrained models 1 and 2 are the same",
    ),
    "an unknown measure": (lambda: audit(subject(answers(1, 0.5)), also=["relern"]), "did you mean 'relearn'"),
    "a method called like a control": (
        lambda: compare(
            answers(1, 0.5), {"original": (answers(1, 0.5), None)}, subject(answers(1, 0.5)).request, object()
        ),  # type: ignore[arg-type]
        "name of a control",
    ),
    "shadow states of another shape": (
        lambda: Shadows((answers(1, 0.5),), np.arange(4), np.zeros((2, 4), np.int8)),
        r"expected \(1, 4\), found \(2, 4\)",
    ),
    "too few examples for an attack": (lambda: tpr_at(np.arange(50.0), np.arange(50.0), 0.001), "too few examples"),
    "a false positive rate out of range": (lambda: tpr_at(np.arange(50.0), np.arange(50.0), 1.5), "1.5"),
    "too few models for LiRA": (
        lambda: offline_scores(np.zeros(4), np.zeros((1, 4)), np.zeros((1, 4), bool)),
        "LiRA|models",
    ),
    "no population for RMIA": (lambda: scores(np.ones(3), np.ones(3), np.ones(0), np.ones(0)), "population"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_sentence(case: str) -> None:
    call, said = CASES[case]
    with pytest.raises(Refused, match=said) as found:
        call()
    assert "\n" not in str(found.value)


class Plain(nn.Module):
    """Says what it was given, and keeps no count of it, which would be part of its address."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("logits", answers(1, 0.5).logits.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[x[:, 0].long()]


def test_a_damaged_store_names_the_file_and_the_way_out(tmp_path: Path) -> None:
    store, model = Store(tmp_path), Plain()
    made = replace(subject(model), store=store)
    first = expunge.audit(made)
    path = next(tmp_path.rglob("*.npz"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    again = replace(subject(model), store=store)
    with pytest.raises(Refused, match=f"{path.name}.*delete it"):
        expunge.audit(again)
    path.unlink()
    assert expunge.audit(replace(subject(model), store=store)).rows[0].readings.keys() == first.rows[0].readings.keys()


def test_a_model_that_answers_another_number_of_examples(tmp_path: Path) -> None:
    class Short(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x) - 1, C)

    with pytest.raises(Refused, match="expected"):
        audit(subject(Short()))  # type: ignore[arg-type]
