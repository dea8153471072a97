"""Metrics of the soft confusion matrix: sklearn's in the limit of hard predictions, gradients, and cuts of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

import expunge as ex
from expunge.combine import OfMeans, Weighted
from expunge.confusion_objectives import METRICS, SoftMetric, confusion, metric_of
from expunge.core import Batch, Case, Key
from expunge.objectives import Ascent
from expunge.oracle import Draws, On, Oracle
from expunge.scope import Scope
from tests.golden.forgetting import accuracy, digits

torch.set_num_threads(1)
TASK = ex.Classification(4)
SKLEARN: dict[str, Callable[..., float]] = {
    "accuracy": metrics.accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "matthews": metrics.matthews_corrcoef,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(weights: bool = True) -> Case:
    """23 examples of 4 classes, of unequal weight, and a linear classifier that is right of some."""
    x, y = drawn(23, 5), torch.arange(23) % 4
    model = nn.Sequential(nn.Linear(5, 4)).double()
    with torch.no_grad():
        model[0].weight.copy_(drawn(4, 5, seed=1))
        model[0].bias.copy_(drawn(4, seed=2))
    columns = {
        "x": x,
        "y": y,
        **({"weight": torch.rand(23, generator=torch.Generator().manual_seed(3)) + 0.1} if weights else {}),
    }
    return Case(model, ex.split(columns, forget=list(range(20))), TASK, Scope.all(model))


def oracle_of(case: Case, roles: dict[str, On], pieces: int = 1) -> Oracle:
    return Oracle(
        case, roles, Draws(case, roles, Key(2), 0, dict.fromkeys(roles, 20), lambda role, step: step), accumulate=pieces
    )


def directly(case: Case, objective: SoftMetric, model: nn.Module) -> Tensor:
    """1 - the metric of the whole forget batch, as one expression."""
    batch = case.request.data("forget").batch(torch.arange(20))
    p = torch.softmax(model(batch["x"]) / objective.temperature, 1)
    weight = batch["weight"].double() if "weight" in batch else torch.ones(20).double()
    return 1.0 - metric_of(confusion(p, batch["y"], weight), objective.metric, objective.of_class, objective.beta)


EACH = [SoftMetric(m) for m in METRICS] + [SoftMetric(m, of_class=2) for m in ("precision", "recall")]
EACH += [SoftMetric("f_beta", 1, beta=2.0), SoftMetric("f_beta", beta=0.5, temperature=0.7)]


@pytest.mark.parametrize("objective", EACH, ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_hard_predictions_give_sklearns_number(objective: SoftMetric, weights: bool) -> None:
    case = setting(weights)
    sharp = SoftMetric(objective.metric, objective.of_class, objective.beta, temperature=1e-4)
    found = 1.0 - oracle_of(case, {"forget": On("forget", sharp)}).losses["forget"]
    batch = case.request.data("forget").batch(torch.arange(20))
    true, said = batch["y"], case.model(batch["x"]).argmax(1)
    given: dict[str, Any] = {"sample_weight": batch["weight"].numpy()} if weights else {}
    if objective.metric in SKLEARN:
        expected = SKLEARN[objective.metric](true, said, **given)
    else:
        beta = {"precision": 1e-9, "recall": 1e9}.get(objective.metric, objective.beta)
        labels = [objective.of_class] if objective.of_class is not None else [0, 1, 2, 3]
        expected = metrics.fbeta_score(true, said, beta=beta, labels=labels, average="macro", zero_division=0, **given)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.01 < expected < 0.99


@pytest.mark.parametrize("objective", EACH, ids=str)
def test_value_and_gradient_are_the_metrics_however_the_batch_is_cut(objective: SoftMetric) -> None:
    case = setting()
    value = directly(case, objective, case.model)
    expected = torch.autograd.grad(value, list(case.model.parameters()))
    for pieces in (1, 3, 20):
        oracle = oracle_of(case, {"forget": On("forget", objective)}, pieces)
        grads, _ = Weighted().combine(oracle, {})
        assert oracle.losses["forget"] == pytest.approx(float(value.detach()), rel=1e-12)
        for name, grad in zip(("0.weight", "0.bias"), expected, strict=True):
            torch.testing.assert_close(grads[name], grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("objective", EACH, ids=str)
def test_gradient_by_differences(objective: SoftMetric) -> None:
    case = setting()
    grads, _ = Weighted().combine(oracle_of(case, {"forget": On("forget", objective)}), {})
    direction, values = drawn(4, 5, seed=9), []
    for sign in (1, -2):
        with torch.no_grad():
            case.model[0].weight.add_(sign * 1e-6 * direction)
            values.append(float(directly(case, objective, case.model)))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(
        float((grads["0.weight"] * direction).sum()), rel=1e-6, abs=1e-9
    )


@dataclass(frozen=True)
class Count:
    """p_2, of examples of class 2 alone where `right`."""

    right: bool

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        p = torch.softmax(TASK.logits(case.model, batch), 1)[:, 2]
        return p * (TASK.labels(batch) == 2) if self.right else p


def test_it_is_the_function_of_means_with_one_gradient_instead_of_one_per_count() -> None:
    case = setting(weights=False)
    share = float((case.request.data("forget").batch(torch.arange(20))["y"] == 2).double().mean())
    f = OfMeans(lambda means: 1.0 - 5.0 * means["right"] / (4.0 * share + means["said"]))
    roles = {"right": On("forget", Count(True)), "said": On("forget", Count(False))}
    expected, _ = f.combine(oracle_of(case, roles), {})
    found, _ = Weighted().combine(oracle_of(case, {"forget": On("forget", SoftMetric("f_beta", 2, 2.0))}), {})
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-12)


def test_corners_are_numbers() -> None:
    """One class only, a class that is not there, all right, all wrong."""
    one, right = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.eye(2) / 2
    for counts in (one, right, right.flip(0)):
        for metric in METRICS:
            for of_class in (None, 1) if metric in ("precision", "recall", "f_beta") else (None,):
                leaf = counts.double().requires_grad_(True)
                value = metric_of(leaf, metric, of_class)
                (slope,) = torch.autograd.grad(value, leaf)
                assert bool(torch.isfinite(slope).all())
                assert -1.0 <= float(value.detach()) <= 1.0
    assert [float(metric_of(c.double(), "matthews")) for c in (one, right, right.flip(0))] == [0.0, 1.0, -1.0]


@pytest.mark.parametrize(
    "wrong", [{"metric": "auc"}, {"beta": 0.0}, {"temperature": 0.0}, {"metric": "accuracy", "of_class": 1}]
)
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ex.Refused, match="SoftMetric"):
        SoftMetric(**wrong)


def test_a_class_that_is_none_is_refused() -> None:
    with pytest.raises(ex.Refused, match="of_class is 4"):
        _ = oracle_of(setting(), {"forget": On("forget", SoftMetric("recall", 4))}).losses["forget"]


def test_recall_of_a_class_is_brought_down_and_balanced_accuracy_kept() -> None:
    model, request = digits(8)
    stage = ex.Descend(
        forget=Ascent(SoftMetric("recall", 8)),
        retain=SoftMetric("balanced_accuracy"),
        optimizer=ex.optim.Adam(2e-3),
        steps=40,
    )
    done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
    assert accuracy(done.model, request.forget) < 0.1
    assert accuracy(done.model, request.retain) > 0.95
    assert done.record["cost"]["forward"] == 2 * done.record["cost"]["backward"]
