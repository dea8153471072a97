"""Concept poisoning (arXiv:2405.15662): directions, head and attributions against sklearn, autograd and a path integral."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

import expunge as ex
from expunge import methods
from expunge.concept_bank import (
    Bottleneck,
    any_retained,
    bottleneck,
    clusters,
    concept_scores,
    direction,
    nearest_profiles,
)
from expunge.core import Case, Key
from expunge.scope import Scope
from tests.golden.forgetting import accuracy, digits

torch.set_num_threads(1)
TASK = ex.Classification(10)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_direction_is_sklearns_ridge() -> None:
    features = drawn(30, 4) * torch.tensor([1.0, 5.0, 0.2, 1.0]) + 3.0
    positive = torch.arange(30) < 7
    features[positive, 1] += 4.0
    weight = torch.where(positive, 0.5 / 7, 0.5 / 23).double()
    spread = weight @ (features - weight @ features).square()
    model = Ridge(alpha=0.3 * float(spread.mean())).fit(
        features, np.where(positive, 1, -1), sample_weight=weight.numpy()
    )
    torch.testing.assert_close(direction(features, positive, 0.3), torch.from_numpy(model.coef_))


def test_scores_by_hand() -> None:
    vectors = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert concept_scores(torch.tensor([[3.0, 5.0]]), vectors).tolist() == [[1.5, 4.0, 0.0]]


def test_the_sparse_head_is_at_the_optimum() -> None:
    """The conditions of Karush, Kuhn and Tucker, on standardised scores, with the gradient by autograd."""
    features, vectors = drawn(60, 5, seed=3), drawn(4, 5, seed=4)
    labels = (features @ drawn(5, 3, seed=5) + 0.5 * drawn(60, 3, seed=6)).argmax(1)
    net = bottleneck(vectors, features, labels, 3, sparsity=0.02)
    scores = concept_scores(features, vectors)
    mean, spread = scores.mean(0), scores.std(0, correction=0)
    weights = (net.weights * spread).requires_grad_(True)
    bias = (net.bias + net.weights @ mean).requires_grad_(True)
    loss = torch.nn.functional.cross_entropy((scores - mean) / spread @ weights.T + bias, labels)
    torch.testing.assert_close(
        torch.log_softmax(net.logits(features), 1).gather(1, labels[:, None]).mean(), -loss.detach()
    )
    slope, free = torch.autograd.grad(loss + 0.005 * 0.02 * weights.square().sum(), (weights, bias))
    assert float(free.abs().max()) < 1e-6
    out = weights.detach() == 0
    assert 0 < int(out.sum()) < 12
    assert float(slope[out].abs().max()) <= 0.99 * 0.02 + 1e-6
    torch.testing.assert_close(slope[~out], -0.99 * 0.02 * weights.detach()[~out].sign(), rtol=1e-4, atol=1e-6)


def test_attributions_are_integrated_gradients() -> None:
    """The mean over the path of the gradient in the scores, times the way; they sum to the change of the logit."""
    net = Bottleneck(drawn(4, 6, seed=1), drawn(3, 4, seed=2), drawn(3, seed=3), drawn(4, seed=4))
    features, labels = drawn(5, 6, seed=7), torch.tensor([0, 2, 1, 1, 0])
    found, scores = net.attributions(features, labels), net.scores(features)
    for row in range(5):
        slopes = []
        for share in torch.linspace(0, 1, 5):
            at = (net.baseline + share * (scores[row] - net.baseline)).requires_grad_(True)
            slopes.append(torch.autograd.grad((net.weights @ at + net.bias)[labels[row]], at)[0])
        torch.testing.assert_close(found[row], (scores[row] - net.baseline) * torch.stack(slopes).mean(0))
    start = net.weights @ net.baseline + net.bias
    torch.testing.assert_close(found.sum(1), net.logits(features).gather(1, labels[:, None])[:, 0] - start[labels])


def test_the_nearest_profile_by_hand() -> None:
    """Concepts are the axes. Class 0 is driven by concept 0; retained class 2 leans on it too, class 1 on concept 1."""
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).double()
    net = Bottleneck(torch.eye(3).double(), weights, torch.zeros(3).double(), torch.zeros(3).double())
    retain = (torch.tensor([[0.0, 1, 0], [0, 3, 0], [1, 0, 1], [2, 0, 2]]).double(), torch.tensor([1, 1, 2, 2]))
    forget = (torch.tensor([[4.0, 0, 0], [0, 2, 0]]).double(), torch.tensor([0, 1]))
    assert nearest_profiles(net, forget, retain, torch.tensor([1, 2])).tolist() == [2, 2]
    assert nearest_profiles(net, (forget[0], torch.tensor([0, 0])), retain, torch.tensor([0, 1])).tolist() == [1, 1]


def test_groups_are_found() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).double()
    features = centres[torch.arange(30) % 3] + 0.1 * drawn(30, 2)
    owner = clusters(features, 3, Key(1))
    assert all(len(torch.unique(owner[c::3])) == 1 for c in range(3))
    assert len(torch.unique(owner)) == 3
    assert torch.unique(clusters(torch.ones(5, 2).double(), 3, Key(1))).tolist() == [0]


def test_random_poison_is_another_retained_class() -> None:
    model, _ = digits(8)
    x, y = torch.zeros(40, 64), torch.tensor([0, 3, 5, 7] * 10)
    case = Case(model, ex.split((x, y), forget="y <= 3"), TASK, Scope.all(model))
    assert set(any_retained(case, Key(0)).tolist()) == {5, 7}
    part = Case(model, ex.split((x, y), forget=list(range(8))), TASK, Scope.all(model))
    found = any_retained(part, Key(0))
    assert not bool((found == y[:8]).any())
    assert torch.equal(found, any_retained(part, Key(0)))
    alone = Case(model, ex.split((x[:8], torch.full((8,), 2)), forget=[0]), TASK, Scope.all(model))
    with pytest.raises(ex.Refused, match="class 2 alone"):
        any_retained(alone, Key(0))


@pytest.mark.parametrize("poison", ["targeted", "random"])
def test_a_class_is_forgotten_and_the_others_are_kept(poison: str) -> None:
    model, request = digits(8)
    done = ex.unlearn(model, request, task=TASK, method=methods.concept_poison(poison=poison))
    assert accuracy(done.model, request.forget) < 0.1
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.03
    if poison == "targeted":
        row = done.record["history"][-1]
        assert row["bottleneck_accuracy"] > 0.9
        assert row["attribution_left"] < 0.5 * row["attribution"]


def test_named_concepts_are_read_and_a_missing_one_is_refused() -> None:
    model, request = digits(8)
    first = {f"concept:{c}": request.retain.select(torch.arange(20) + 20 * c) for c in range(2)}
    named = ex.Request(request.forget, request.retain, extra=first)
    done = ex.unlearn(model, named, task=TASK, method=methods.concept_poison(steps=1))
    assert done.record["history"][-1]["concepts"] == 2
    asked = ex.Request(request.forget, request.retain, concepts=("round",), extra=first)
    with pytest.raises(ex.Refused, match="'round' and has no examples"):
        ex.unlearn(model, asked, task=TASK, method=methods.concept_poison(steps=1))
