"""Label and feature mapping (DP4TL): votes counted by hand, and the choice as a stage of a chain."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import expunge as ex
from expunge import methods
from expunge.class_choice import ForgetOtherClasses, feature_votes, label_votes, most_voted, training_data
from expunge.core import Case, Key, Refused
from tests.contract.test_methods import Picture
from tests.fixtures import odd, tiny
from tests.golden.by_hand import whole
from tests.golden.forgetting import small

torch.set_num_threads(1)


def case_of(model: nn.Module, request: ex.Request, task: Any) -> Case:
    return Case(model, request, task, ex.Scope.all(model), rng=Key(0))


def by_hand() -> tuple[nn.Module, ex.Request]:
    """Features are the inputs, in the plane. Class means: 0 at (0, 0), 1 at (4, 0), 2 at (0, 4); none of class 3.

    The logits say something else: their largest is that of class 2 left of x = 1, and of class 3 right of it.
    """
    x = torch.tensor([[-1.0, 0], [1, 0], [4, 1], [4, -1], [0, 4], [0, 4]])
    head = nn.Linear(2, 4)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0], [0, 0], [0, 0], [1, 0]]))
        head.bias.copy_(torch.tensor([-9.0, -9, 1, 0]))
    target = torch.tensor([[0.5, 0.5], [3, 1], [3, 0], [2.5, 0.1], [0.9, 3.5]])
    data = ex.split((x, torch.tensor([0, 0, 1, 1, 2, 2])), forget=[0, 3])
    extra = {"target": ex.as_data({"x": target}, ids=list(range(100, 105)))}
    return nn.Sequential(nn.Identity(), head), replace(data, extra=extra)


def test_votes_by_hand() -> None:
    """Nearest means: (0.5, 0.5) is class 0's, three are class 1's, (0.9, 3.5) class 2's."""
    model, request = by_hand()
    case = case_of(model, request, ex.Classification(4))
    target = request.data("target")
    assert feature_votes(case, training_data(request), target, 2, Key(0)).tolist() == [1, 3, 1, 0]
    assert label_votes(case, target, 2, Key(0)).tolist() == [0, 0, 2, 3]
    assert case.meter.forward >= 5 + 5 + 6


@pytest.mark.parametrize(("by", "keep", "kept"), [("feature", 1, [1]), ("feature", 2, [0, 1]), ("label", 1, [2])])
def test_the_most_voted_classes_are_kept_and_the_others_forgotten(by: Any, keep: int, kept: list[int]) -> None:
    """Of equal votes the lower class; a class that the training data have not (3) is none to keep."""
    model, request = by_hand()
    done = ForgetOtherClasses(keep, by)(case_of(model, request, ex.Classification(4)))
    retain, forget = (whole(done.request.data(name))[1].unique().tolist() for name in ("retain", "forget"))
    assert retain == kept
    assert forget == [c for c in range(3) if c not in kept]
    ids = torch.cat([done.request.data(name).ids for name in ("retain", "forget")])
    assert sorted(ids.tolist()) == list(range(6))
    assert done.request.data("target") is request.data("target")


def test_feature_votes_of_a_network_by_loops() -> None:
    model, request = small()
    case = case_of(copy.deepcopy(model), request, ex.Classification(3))
    x, y = whole(training_data(request))
    target = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = torch.tanh(model[0](x)).detach()
    means = [hidden[y == c].mean(0) for c in range(3)]
    expected = [0, 0, 0]
    for row in torch.tanh(model[0](target)).detach():
        apart = [float((row - mean).norm()) for mean in means]
        expected[apart.index(min(apart))] += 1
    found = feature_votes(case, training_data(request), ex.as_data({"x": target}), 7, Key(0)).tolist()
    assert found == expected
    assert min(expected) > 0


def test_a_target_like_two_digits_keeps_these_and_a_method_then_forgets_the_others() -> None:
    found = tiny("classification")
    labels = whole(found.test)[1]
    target = found.test.select(torch.nonzero((labels == 1) | (labels == 4)).flatten())
    request = replace(found.request, extra={"target": target})
    for by in ("label", "feature"):
        choose = ForgetOtherClasses(2, by)  # type: ignore[arg-type]
        stage = ex.chain(choose, methods.finetune(steps=3))
        done = ex.unlearn(found.model, request, task=found.task, method=stage)
        assert whole(done.case.request.data("retain"))[1].unique().tolist() == [1, 4]
        assert len(done.case.request.data("forget")) == 60
        assert any("classes 1, 4 are kept" in note for note in done.notes)


@pytest.mark.parametrize("by", ["label", "feature"])
def test_an_odd_model_is_left_alone(by: Any) -> None:
    found = odd()
    found.model.train()
    before = Picture.of(found.model, found.request)
    request = replace(found.request, extra={"target": found.test})
    done = ForgetOtherClasses(3, by)(case_of(found.model, request, found.task))
    before.assert_unchanged(found.model, found.request)
    assert len(done.request.data("forget").ids) == 40


def test_what_cannot_be_is_refused() -> None:
    model, request = by_hand()
    case = case_of(model, request, ex.Classification(4))
    with pytest.raises(Refused, match="3 classes are to be kept of 3: expected 1 to 2"):
        ForgetOtherClasses(3)(case)
    with pytest.raises(Refused, match="no data called 'elsewhere'"):
        ForgetOtherClasses(1, target="elsewhere")(case)
    for bad, setting in (({"keep": 0}, "keep"), ({"keep": 1, "by": "hue"}, "by"), ({"keep": 1, "batch": 0}, "batch")):
        with pytest.raises(Refused, match=f"ForgetOtherClasses: {setting}"):
            ForgetOtherClasses(**bad)  # type: ignore[arg-type]
    regression = tiny("regression")
    extra = replace(regression.request, extra={"target": regression.test})
    with pytest.raises(Refused, match="class logits"):
        ForgetOtherClasses(1)(case_of(regression.model, extra, regression.task))
    with pytest.raises(Refused, match="neither forget nor retain"):
        training_data(ex.Request())
    assert most_voted(torch.tensor([2, 5, 5, 1]), [0, 1, 2, 3], 1) == [1]
