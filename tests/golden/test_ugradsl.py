"""UGradSL and UGradSL+ (arXiv:2406.07698) against plain torch; the objective against its closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Case, Refused
from expunge.label_smoothing import SmoothedLabel
from expunge.scope import Scope
from tests.golden.by_hand import ALL, furthest, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(3)


def smoothed(logits: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Torch's own cross-entropy against the smoothed labels themselves."""
    classes = logits.shape[1]
    target = (1 - rate) * F.one_hot(labels, classes).to(logits) + rate / classes
    return F.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("rate", [-3.0, -0.5, 0.0, 0.2, 1.0])
def test_the_objective_is_cross_entropy_against_smoothed_labels(rate: float) -> None:
    model, request = small()
    batch = request.data("forget").batch(torch.arange(20))
    case = Case(model, request, TASK, Scope.all(model))
    expected = smoothed(model(batch["x"]), batch["y"], rate)
    torch.testing.assert_close(SmoothedLabel(rate)(case, batch), expected, rtol=1e-12, atol=1e-12)


def test_under_ascent_a_negative_rate_lowers_the_loss_of_every_other_class() -> None:
    """Gradient with respect to the losses l_j themselves: + (1 + |rate| (C - 1) / C) for y, - |rate| / C for the others."""
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Linear(1, 4).double()
    case = Case(net, ex.Request(), ex.Classification(4, call=lambda model, batch: logits), Scope.all(net))
    batch = {"x": torch.zeros(1, 1), "y": torch.tensor([2]), "id": torch.zeros(1, dtype=torch.int64)}
    losses = -torch.log_softmax(logits, 1)[0]
    weights = torch.full((4,), -2.0 / 4, dtype=torch.float64)
    weights[2] = 1 + 2.0 * 3 / 4
    assert float(SmoothedLabel(-2.0)(case, batch)) == pytest.approx(float(weights @ losses), rel=1e-12)


@pytest.mark.parametrize(("name", "momentum"), [("ugradsl", 0.0), ("ugradsl", 0.9), ("ugradsl_plus", 0.9)])
def test_golden_steps(name: str, momentum: float) -> None:
    """Both sources whole in each step, so that an epoch is a step; the update's norm is bounded after weighing."""
    model, request = small()
    (x_f, y_f), (x_r, y_r) = whole(request.data("forget")), whole(request.data("retain"))
    expected = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(expected.parameters(), 0.05, momentum=momentum)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = 0.7 * F.cross_entropy(expected(x_r), y_r) - 0.3 * smoothed(expected(x_f), y_f, -0.8).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)))
        optimizer.step()
    assert max(norms) > 0.05, "nothing was clipped: no test of it"
    build = getattr(methods, name)
    stage = build(rate=-0.8, retain_weight=0.7, max_norm=0.05, lr=0.05, momentum=momentum, epochs=5, batch=ALL)
    done = ex.unlearn(model, request, task=TASK, method=stage)
    assert len(done.record["history"]) == 5
    assert furthest(done.model, expected) < 1e-6  # torch divides the bound by the norm + 1e-6, ours by the norm + 1e-8


def test_epochs_are_of_the_forget_data_or_of_the_retain_data() -> None:
    model, request = small()
    for name, steps in (("ugradsl", 2 * 4), ("ugradsl_plus", 2 * 16)):  # 20 and 80 examples by 5
        done = ex.unlearn(model, request, task=TASK, method=getattr(methods, name)(epochs=2, batch=5, lr=1e-6))
        assert len(done.record["history"]) == steps
        seen = {"loss/forget", "loss/retain"}
        assert all(seen <= row.keys() for row in done.record["history"])


def test_rates_above_the_range_and_tasks_without_classes_are_refused() -> None:
    with pytest.raises(Refused, match="rate"):
        methods.ugradsl(rate=0.1)
    with pytest.raises(Refused, match="SmoothedLabel: rate must be a finite number of at most 1"):
        SmoothedLabel(1.5)


@pytest.mark.parametrize("label", [3, 8])
@pytest.mark.parametrize("name", ["ugradsl", "ugradsl_plus"])
def test_a_class_is_forgotten_and_the_rest_stays(name: str, label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=name)
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
