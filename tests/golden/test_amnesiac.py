"""Amnesiac unlearning against plain torch; its labels; data sets joined."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Refused
from expunge.data.joined import joined
from tests.golden.by_hand import ALL, furthest, two_classes, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)


def test_golden_steps() -> None:
    """Two classes leave one wrong label. One mean over all examples, forgotten or not: 20 of 100 count as a fifth."""
    model, request = two_classes()
    (x_f, y_f), (x_r, y_r) = whole(request.data("forget")), whole(request.data("retain"))
    x, y = torch.cat([x_f, x_r]), torch.cat([1 - y_f, y_r])
    expected = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(expected.parameters(), 1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    done = ex.unlearn(model, request, task=ex.Classification(2), method=methods.amnesiac(lr=1e-3, steps=6, batch=ALL))
    assert furthest(done.model, expected) < 1e-12
    assert done.case is not None
    assert torch.equal(whole(done.case.request.data("forget"))[1], y_f), "later stages see the wrong labels"
    assert "relabelled" not in done.case.request.extra


SEEN: dict[int, set[int]] = {}


class Looking(ex.Classification):
    """Keeps the labels that the model is trained on, by id."""

    def nll(self, model: nn.Module, batch: ex.core.Batch) -> Tensor:
        if torch.is_grad_enabled():
            for number, label in zip(batch["id"].tolist(), batch["y"].tolist(), strict=True):
                SEEN.setdefault(number, set()).add(label)
        return super().nll(model, batch)


def test_each_example_has_one_wrong_label_for_the_whole_run() -> None:
    model, request = digits(3)
    SEEN.clear()
    ex.unlearn(model, request, task=Looking(10), method=methods.amnesiac(steps=60))
    forget = {number: labels for number, labels in SEEN.items() if number in request.data("forget").ids}
    assert all(len(labels) == 1 for labels in SEEN.values())
    assert len(forget) == len(request.data("forget"))
    counts = torch.bincount(torch.tensor([next(iter(labels)) for labels in forget.values()]), minlength=10)
    assert int(counts[3]) == 0
    others = counts[torch.arange(10) != 3].double()
    mean = len(forget) / 9
    assert float((others - mean).square().sum() / mean) < 26.1, "chi-squared, 8 degrees of freedom, one in a thousand"


def test_joined_data_give_each_row_with_its_own_columns() -> None:
    _, request = small()
    forget, retain = request.data("forget"), request.data("retain")
    both = joined(forget.annotate("y", torch.full((20,), 7)), retain)
    assert len(both) == 100
    order = torch.tensor([99, 0, 20, 19, 3, 50])
    batch = both.batch(order)
    expected = torch.cat([whole(forget)[0], whole(retain)[0]])[order]
    assert torch.equal(batch["x"], expected)
    assert batch["y"].tolist() == [whole(retain)[1][79], 7, whole(retain)[1][0], 7, 7, whole(retain)[1][30]]
    assert batch["id"].tolist() == torch.cat([forget.ids, retain.ids])[order].tolist()
    assert torch.equal(both.select([99, 0]).batch(torch.tensor([1, 0]))["x"], expected[[1, 0]])


def test_joined_data_keep_nested_inputs_and_the_columns_that_all_have() -> None:
    left, right = torch.arange(4.0)[:, None], torch.arange(4.0)[:, None] + 10
    first = ex.as_data({"x": {"a": left, "b": right}, "y": torch.zeros(4).long()}).annotate("weight", torch.ones(4))
    second = ex.as_data({"x": {"a": left + 4, "b": right + 4}, "y": torch.ones(4).long()}, ids=[10, 11, 12, 13])
    batch = joined(first, second).batch(torch.tensor([6, 1]))
    assert batch["x"]["a"].tolist() == [[6.0], [1.0]]
    assert batch["x"]["b"].tolist() == [[16.0], [11.0]]
    assert "weight" not in batch
    with pytest.raises(Refused, match="share ids"):
        joined(first, first)


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_rest_stays(label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="amnesiac")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
