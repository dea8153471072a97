"""Boundary unlearning (arXiv:2303.11570): beside the authors' code, and what it does at the edges.

The numbers were computed by the functions of the authors' release (TY-LEE-KR/Boundary-Unlearning-Code, commit 86c2f1f)
on the network below, in float64: ten steps of SGD over all twelve images, its attack in pixels of [0, 1] with a bound of
26/255, which its rounding to 1/255 leaves as it is.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import boundary, methods
from expunge.boundary import nearest_wrong
from expunge.core import Case, Key, Refused
from expunge.runner_up import RunnerUp
from expunge.scope import Scope
from expunge.wrap import LoRA, in_adapter
from tests.golden.by_hand import ALL, furthest, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
PREDICTED = [1, 6, 8, 6, 7, 1, 6, 5, 7, 7, 5, 1]
RUNNER_UP = [0, 6, 8, 6, 7, 6, 6, 5, 7, 7, 5, 8]
SHRUNK = {
    "0.weight": 22.287432977238726,
    "0.bias": 8.970377748914185,
    "3.weight": 14.106335763790424,
    "3.bias": 6.3084529841476185,
    "5.weight": 13.80605992812734,
    "5.bias": 2.568383298504802,
}
"""1e4 times the length of each weight's change."""


def images() -> tuple[nn.Module, ex.Request]:
    """Twelve images of one class, a convolutional network that gets them right by a hair."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 3, 4, 4), generator=generator).double() / 255
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 96), nn.Tanh(), nn.Linear(96, 10)
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4)
        logits = net(x)
        net[-1].bias[1] += (logits.amax(1) - logits[:, 1]).max() * 1.01
    return net, ex.Request(forget=ex.as_data((x, torch.ones(12, dtype=torch.int64))))


def changes(before: nn.Module, after: nn.Module) -> dict[str, float]:
    old = dict(before.named_parameters())
    return {name: 1e4 * float((p - old[name]).detach().norm()) for name, p in after.named_parameters()}


def test_the_nearest_classes_are_those_of_the_authors_attack() -> None:
    net, request = images()
    case = Case(net, request, ex.Classification(10), Scope.all(net))
    nearest, reached = nearest_wrong(case, request.data("forget"), 26 / 255, (0.0, 1.0), 5, Key(0))
    assert nearest.tolist() == RUNNER_UP
    assert reached.tolist() == [label != 1 for label in PREDICTED]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_shrinking_is_that_of_the_authors_code() -> None:
    net, request = images()
    stage = methods.boundary_shrink(bound=26 / 255, low=0.0, high=1.0, failed="true", lr=1e-5, steps=10, batch=ALL)
    done = ex.unlearn(net, request, task=ex.Classification(10), method=stage)
    assert changes(net, done.model) == pytest.approx(SHRUNK, rel=1e-8)
    assert done.record["history"][0]["reached"] == 0.75


def test_where_the_step_crosses_no_boundary_the_runner_up_is_taught() -> None:
    net, request = images()
    x, _ = whole(request.data("forget"))
    expected = nn.Sequential(*images()[0])
    optimizer = torch.optim.SGD(expected.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(x), torch.tensor(RUNNER_UP)).backward()
        optimizer.step()
    stage = methods.boundary_shrink(bound=26 / 255, low=0.0, high=1.0, lr=0.01, steps=3, batch=ALL)
    done = ex.unlearn(net, request, task=ex.Classification(10), method=stage)
    assert furthest(done.model, expected) < 1e-12


def test_a_step_of_length_zero_teaches_the_runner_up_of_the_example_itself() -> None:
    model, request = small()
    x, y = whole(request.data("forget"))
    with torch.no_grad():
        runner = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    case = Case(model, request, ex.Classification(3), Scope.all(model))
    assert torch.equal(nearest_wrong(case, request.data("forget"), 0.0, None, 64, Key(0))[0], runner)


def test_with_retain_data_by_hand_and_a_search_of_length_zero_differentiates_nothing() -> None:
    """Three steps of Adam, its rate along half a cosine, on the runner-up's loss plus 3 times that of the retain data."""
    model, request = small()
    (x, y), (kept, right) = whole(request.data("forget")), whole(request.data("retain"))
    with torch.no_grad():
        runner = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.Adam(expected.parameters(), 0.01)
    for share in (1.0, 0.75, 0.25):
        optimizer.param_groups[0]["lr"] = 0.01 * share
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(expected(x), runner)
        (loss + 3 * nn.functional.cross_entropy(expected(kept), right)).backward()
        optimizer.step()
    settings = {"bound": 0.0, "retain_weight": 3.0, "optimizer": "adam", "schedule": "cosine", "lr": 0.01}
    stage = methods.boundary_shrink(**settings, steps=3, batch=ALL)  # type: ignore[arg-type]
    done = ex.unlearn(model, request, task=ex.Classification(3), method=stage)
    assert furthest(done.model, expected) < 1e-12
    assert done.record["cost"]["backward"] == 3 * (len(x) + len(kept))
    assert done.record["cost"]["forward"] == 3 * (len(x) + len(kept)) + len(x)


def test_retain_data_that_are_asked_for_and_not_there_are_refused() -> None:
    model, request = small()
    alone = ex.Request(forget=request.forget)
    with pytest.raises(Refused, match="no data called 'retain'"):
        ex.unlearn(model, alone, task=ex.Classification(3), method=methods.boundary_shrink(retain_weight=1.0))


def test_the_objective_of_the_runner_up_is_the_loss_of_that_label_kept_or_asked_anew() -> None:
    model, request = small()
    x, y = whole(request.data("forget"))
    with torch.no_grad():
        logits = model(x)
        runner = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    case = Case(copy.deepcopy(model), request, ex.Classification(3), Scope.all(model), {"original": model})
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(-0.5)  # the runner-up is the teacher's, not the model's own
        wanted = nn.functional.cross_entropy(case.model(x), runner, reduction="none")
    objective = RunnerUp()
    for batch in ({"id": torch.arange(len(x)), "x": x, "y": y}, {"x": x, "y": y, "told/original": logits}):
        drawn = objective.draw(case, batch, Key(0))
        assert torch.equal(drawn["y"], runner)
        torch.testing.assert_close(objective(case, drawn).detach(), wanted, rtol=0, atol=1e-12)
    assert bool((runner != y).all())


def test_clipping_holds_the_search_inside_the_range() -> None:
    net, request = images()
    seen: list[Tensor] = []

    def call(model: nn.Module, batch: ex.core.Batch) -> Tensor:
        seen.append(batch["x"].detach())
        return model(batch["x"])

    stage = methods.boundary_shrink(bound=0.5, low=0.25, high=0.75, steps=1)
    ex.unlearn(net, request, task=ex.Classification(10, call=call), method=stage)
    moved = [x for x in seen if float(x.min()) >= 0.25]
    assert len(moved) == 1
    assert float(moved[0].max()) <= 0.75


def test_later_stages_see_the_true_labels() -> None:
    model, request = small()
    done = ex.unlearn(model, request, task=ex.Classification(3), method=methods.boundary_shrink(steps=2))
    assert done.case is not None
    assert torch.equal(whole(done.case.request.data("forget"))[1], whole(request.data("forget"))[1])


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(Refused, match="low must be below high"):
        methods.boundary_shrink(low=1.0, high=1.0)
    numbers = ex.split((torch.zeros(20, 5), torch.zeros(20)), forget=list(range(5)))
    with pytest.raises(Refused, match="class logits"):
        ex.unlearn(nn.Linear(5, 1), numbers, task=ex.Regression(), method="boundary_shrink")
    tokens = ex.split((torch.zeros(9, 4).long(), torch.arange(9) % 3), forget=[0, 3])
    net = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(Refused, match="no floating number"):
        ex.unlearn(net, tokens, task=ex.Classification(3), method="boundary_shrink")


EXPANDED = {
    "0.weight": 22.04022893259639,
    "0.bias": 8.671788297898535,
    "3.weight": 16.545758346759463,
    "3.bias": 7.221083504978309,
    "5.weight": 17.939879554638214,
    "5.bias": 3.2909090271834893,
}


def fixed_unit(head: nn.Linear, _key: Key) -> nn.Linear:
    """The eleventh row that the authors' code was given."""
    generator = torch.Generator().manual_seed(6)
    unit = nn.Linear(head.in_features, 1).double()
    with torch.no_grad():
        unit.weight.copy_(torch.randn(1, 96, generator=generator, dtype=torch.float64) * 0.1)
        unit.bias.copy_(torch.randn(1, generator=generator, dtype=torch.float64) * 0.1)
    return unit


def test_expanding_is_that_of_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "fresh_unit", fixed_unit)
    net, request = images()
    stage = methods.boundary_expand(lr=1e-5, steps=10, batch=ALL)
    done = ex.unlearn(net, request, task=ex.Classification(10), method=stage)
    assert changes(net, done.model) == pytest.approx(EXPANDED, rel=1e-8)


def test_the_unit_is_gone_afterwards() -> None:
    model, request = small()
    stage = ex.chain(methods.boundary_expand(steps=2), methods.boundary_expand(steps=2))
    done = ex.unlearn(model, request, task=ex.Classification(3), method=stage)
    assert {n: p.shape for n, p in done.model.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in done.model.modules())
    assert done.case is not None
    assert set(done.case.scope.masks) == {name for name, _ in model.named_parameters()}


def test_a_fresh_unit_is_drawn_by_xaviers_rule() -> None:
    head = nn.Linear(4000, 9)
    first, again, other = (boundary.fresh_unit(head, Key(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert float(first.weight.detach().std()) == pytest.approx((2 / 4010) ** 0.5, rel=0.05)
    assert float(first.bias.detach()) == 0.0
    assert boundary.fresh_unit(nn.Linear(3, 2, bias=False), Key(0)).bias is None


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused() -> None:
    model, request = small()
    net = nn.Sequential(*model, nn.LogSoftmax(1))
    with pytest.raises(Refused, match="last layer is linear"):
        ex.unlearn(net, request, task=ex.Classification(3), method="boundary_expand")


@pytest.mark.parametrize("name", ["boundary_shrink", "boundary_expand"])
def test_a_class_is_forgotten_and_the_rest_stays(name: str) -> None:
    model, request = digits(8)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=name)
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05


def test_in_an_adapter_the_unit_reads_what_the_last_layer_reads() -> None:
    model, request = digits(8)
    stage = in_adapter(LoRA(4), methods.boundary_expand())
    done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
    assert accuracy(done.model, request.data("forget")) < 0.3
    assert torch.equal(done.model[0].bias, model[0].bias), "an adapter moves no bias"
