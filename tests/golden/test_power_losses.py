"""Generalised cross-entropy (arXiv:1805.07836): its members by hand, and beside another implementation of its truncation.

``PRUNED`` was computed by ``TruncatedLoss`` of AlanChou/Truncated-Loss in float64: (power, least), examples kept, the loss,
and of its gradient on the logits below the norm, the sum over the first class, and a weighted sum.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Batch, Case, Refused
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import SGD, Adam
from expunge.oracle import example_weights, per_example
from expunge.power_losses import GeneralisedCrossEntropy
from expunge.token_objectives import WGA
from tests.fixtures import tiny
from tests.golden.by_hand import ALL, furthest, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
PRUNED = {
    (0.7, 0.5): (1, -0.04960758672050196, 0.01873501284747437, 0.0033570810999806245, 0.007026843577401409),
    (0.7, 0.001): (8, -0.43047116883755443, 0.08199365644363554, -0.028763705223692693, 0.23367111150381303),
    (0.3, 0.2): (4, -0.23723610821148342, 0.12740039574499157, -0.041840300662641924, 0.3079493133784057),
}


class Given(nn.Module):
    """Logits that are parameters, by row number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, rows: Tensor) -> Tensor:
        return self.logits[rows]


def asked(logits: Tensor, labels: Tensor) -> tuple[Case, Batch]:
    model = Given(logits)
    case = Case(model, ex.Request(), ex.Classification(logits.shape[1]), ex.Scope.all(model))
    rows = torch.arange(len(labels))
    return case, {"x": rows, "y": labels, "id": rows}


def drawn() -> tuple[Tensor, Tensor]:
    """Logits of eight examples and five classes, and labels."""
    generator = torch.Generator().manual_seed(23)
    logits = 2 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 5, (8,), generator=generator)


@pytest.mark.parametrize("power", [-1.0, -0.4, 0.0, 0.3, 0.7, 1.0])
def test_values_by_hand(power: float) -> None:
    logits, labels = drawn()
    found = GeneralisedCrossEntropy(power)(*asked(logits, labels))
    p = [float(torch.softmax(row, 0)[y]) for row, y in zip(logits, labels, strict=True)]
    expected = [-float(torch.tensor(v).double().log()) if power == 0 else (1 - v**power) / power for v in p]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_members_of_the_family_by_their_other_names() -> None:
    logits, labels = drawn()
    case, batch = asked(logits, labels)
    found = {power: GeneralisedCrossEntropy(power)(case, batch) for power in (-1.0, 0.0, 1.0)}
    absolute = (torch.softmax(logits, 1) - F.one_hot(labels, 5)).abs().sum(1) / 2
    others = torch.stack(
        [sum(torch.exp(z[j] - z[y]) for j in range(5) if j != y) for z, y in zip(logits, labels, strict=True)]
    )
    torch.testing.assert_close(found[1.0], absolute, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[-1.0], others, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0.0], NLL()(case, batch))
    near = GeneralisedCrossEntropy(1e-9)(case, batch)
    torch.testing.assert_close(near, found[0.0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("setting", list(PRUNED))
def test_truncation_beside_another_implementation(setting: tuple[float, float]) -> None:
    """That one leaves the constant of what was cut out of the loss; here every example keeps its value."""
    power, least = setting
    case, batch = asked(*drawn())
    values = GeneralisedCrossEntropy(power, least)(case, batch)
    constant = (1 - least**power) / power
    (grad,) = torch.autograd.grad(values.mean(), [case.model.logits])  # type: ignore[list-item]
    assert (
        int((values.detach() < constant - 1e-12).sum()),
        float(values.detach().mean()) - constant,
        float(grad.norm()),
        float(grad[:, 0].sum()),
        float((grad * torch.arange(40).reshape(8, 5)).sum()),
    ) == pytest.approx(PRUNED[setting], rel=1e-9)


@pytest.mark.parametrize("name", ["classification", "causal_lm"])
def test_ascent_has_the_gradient_of_weighted_gradient_ascent(name: str) -> None:
    found = tiny(name)
    case = Case(found.model.double(), found.request, found.task, ex.Scope.all(found.model))
    batch = found.request.data("forget").batch(torch.arange(9))
    batch = {column: t.double() if t.is_floating_point() else t for column, t in batch.items()}
    slopes = []
    for objective in (Ascent(GeneralisedCrossEntropy(0.6)), WGA(0.6)):
        values, weight = per_example(case, objective, batch), example_weights(case, objective, batch)
        grads = torch.autograd.grad((values * weight).sum(), list(found.model.parameters()))
        slopes.append(torch.cat([g.flatten() for g in grads]))
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


def test_tokens_count_each_and_padding_not_at_all() -> None:
    found = tiny("causal_lm")
    case = Case(found.model, found.request, found.task, ex.Scope.all(found.model))
    batch = found.request.data("forget").batch(torch.arange(9))
    objective = GeneralisedCrossEntropy(0.5, 0.01)
    total = count = 0.0
    for row in range(9):
        with torch.no_grad():
            logits = found.model(batch["input_ids"][row : row + 1]).logits[0]
        for place, label in enumerate(batch["labels"][row].tolist()):
            if label != -100:
                p = max(float(torch.softmax(logits[place - 1], 0)[label]), 0.01)
                total, count = total + (1 - p**0.5) / 0.5, count + 1
    weight = example_weights(case, objective, batch)
    assert float(weight.sum()) == count
    mean = float((weight * objective(case, batch).detach()).sum() / count)
    assert mean == pytest.approx(total / count, rel=1e-4)


def test_far_from_the_label_it_is_its_bound_and_has_no_pull() -> None:
    logits = torch.tensor([[0.0, 300.0], [300.0, 0.0], [0.0, 0.0]])
    case, batch = asked(logits, torch.zeros(3, dtype=torch.int64))
    values = GeneralisedCrossEntropy(0.7)(case, batch)
    assert values.tolist() == pytest.approx([1 / 0.7, 0.0, (1 - 0.5**0.7) / 0.7])
    (grad,) = torch.autograd.grad(values.sum(), [case.model.logits])  # type: ignore[list-item]
    assert bool(torch.isfinite(grad).all())
    assert float(grad[:2].abs().max()) < 1e-30
    assert float(grad[2, 0]) == pytest.approx(-(0.5**0.7) / 2)


def test_steps_of_plain_torch() -> None:
    model, request = small()
    x, y = whole(request.data("forget"))
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    for _ in range(5):
        p = torch.softmax(expected(x), 1)[torch.arange(len(y)), y]
        optimizer.zero_grad()
        ((1 - p**0.7) / 0.7).mean().neg().backward()
        optimizer.step()
    stage = Descend(
        forget=Ascent(GeneralisedCrossEntropy()), optimizer=SGD(0.1, momentum=0.0, weight_decay=0.0), steps=5, batch=ALL
    )
    assert furthest(ex.unlearn(model, request, task=ex.Classification(3), method=stage).model, expected) < 1e-12


def test_bounded_ascent_forgets_a_class_and_keeps_the_rest() -> None:
    model, request = digits(3)
    stage = Descend(
        forget=Ascent(GeneralisedCrossEntropy()), retain=NLL(), optimizer=Adam(1e-3), steps=100, batch=32, guard=Guard()
    )
    done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
    assert accuracy(done.model, request.forget) < 0.1
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.03


@pytest.mark.parametrize("settings", [{"power": 1.5}, {"power": float("nan")}, {"least": 1.0}, {"least": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(Refused, match=next(iter(settings))):
        GeneralisedCrossEntropy(**settings)
