"""EL2N and GraNd (arXiv:2107.07075) as choosers of a small retain set: loops by hand, a closed form, mislabelled examples."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.challenges.difficulty import el2n
from expunge.core import Case, Key, Refused, RunFailed
from expunge.descend import Descend, _Run
from expunge.objectives import NLL
from expunge.optim import SGD, Adam
from expunge.retain_choice import KeepHardest, error_norms, gradient_norms
from tests.contract.test_methods import Killed, Picture, same, state
from tests.fixtures import odd, tiny
from tests.golden.by_hand import whole
from tests.golden.forgetting import small

torch.set_num_threads(1)
SHORT = Descend(retain=NLL(), optimizer=Adam(1e-2), steps=20, norm_stats="live")


def case_of(model: nn.Module, request: ex.Request, task: Any, seed: int = 0) -> Case:
    return Case(copy.deepcopy(model), request, task, ex.Scope.all(model), rng=Key(seed))


def test_el2n_by_a_loop_and_beside_the_measure() -> None:
    model, request = small()
    x, y = whole(request.data("retain"))
    found = error_norms(case_of(model, request, ex.Classification(3)), request.data("retain"), 7, Key(0))
    probabilities = [[math.exp(v) for v in row] for row in model(x).tolist()]
    expected = [
        math.sqrt(sum((v / sum(row) - (c == label)) ** 2 for c, v in enumerate(row)))
        for row, label in zip(probabilities, y.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    said = torch.softmax(model(x).detach(), 1).numpy()
    assert np.allclose(found.numpy(), el2n(said, y.numpy()), rtol=1e-12)


def test_grand_by_one_backward_pass_at_a_time() -> None:
    model, request = small()
    x, y = whole(request.data("retain"))
    case = case_of(model, request, ex.Classification(3))
    found = gradient_norms(case, request.data("retain"), NLL(), 7, Key(0))
    expected = []
    for row, label in zip(x, y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(row[None]), label[None]), list(model.parameters()))
        expected.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert case.meter.backward == len(x)


def test_grand_of_a_linear_classifier_is_el2n_times_the_length_of_its_input() -> None:
    """The gradient of the logits is p - y, and each passes to a weight by its input, to a bias as it is."""
    _, request = small()
    model = nn.Linear(5, 3).double()
    case = case_of(model, request, ex.Classification(3))
    x, _ = whole(request.data("retain"))
    length = (x.square().sum(1) + 1).sqrt()
    norms = gradient_norms(case, request.data("retain"), NLL(), 64, Key(0))
    errors = error_norms(case, request.data("retain"), 64, Key(0))
    torch.testing.assert_close(norms, errors * length, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by", ["el2n", "grand"])
def test_the_highest_mean_scores_are_kept_in_the_order_of_the_data(by: str) -> None:
    """Networks by hand: drawn by `make`, all steps of plain SGD on all retain data."""
    model, request = small()
    x, y = whole(request.data("retain"))
    made: list[nn.Module] = []

    def make() -> nn.Module:
        net = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(len(made))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        made.append(copy.deepcopy(net))
        return net

    train = Descend(retain=NLL(), optimizer=SGD(0.5, momentum=0.0, weight_decay=0.0), steps=4, batch=1000)
    stage = KeepHardest(9, by=by, fresh=3, train=train, offset=2, make=make)  # type: ignore[arg-type]
    kept = stage(case_of(model, request, ex.Classification(3))).request.data("retain")
    total = torch.zeros(len(y), dtype=torch.float64)
    assert len(made) == 3
    for net in made:
        for _ in range(4):
            grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.sub_(0.5 * g)
        for n in range(len(y)):
            if by == "el2n":
                total[n] += (net(x[n]).softmax(0) - F.one_hot(y[n], 3)).norm().detach()
            else:
                grads = torch.autograd.grad(F.cross_entropy(net(x[n : n + 1]), y[n : n + 1]), list(net.parameters()))
                total[n] += torch.cat([g.flatten() for g in grads]).norm()
    ranked = sorted(range(len(y)), key=lambda n: -float(total[n]))
    expected = request.data("retain").ids[sorted(ranked[2:11])]
    assert torch.equal(kept.ids, expected)


@pytest.mark.parametrize("by", ["el2n", "grand"])
def test_mislabelled_examples_are_the_hardest_and_the_offset_leaves_them_out(by: str) -> None:
    found = tiny("classification")
    retain = found.request.data("retain")
    labels = torch.cat([batch["y"] for batch in retain.batches(100)])
    wrong = torch.tensor([3, 22, 41, 60, 77])
    labels[wrong] = torch.tensor([{0: 1, 1: 2, 2: 4, 4: 0}[int(label)] for label in labels[wrong]])
    request = replace(found.request, retain=retain.annotate("y", labels))
    mislabelled = set(retain.ids[wrong].tolist())

    def kept(**settings: Any) -> set[int]:
        stage = KeepHardest(by=by, fresh=3, train=SHORT, **settings)  # type: ignore[arg-type]
        return set(stage(case_of(found.model, request, found.task)).request.data("retain").ids.tolist())

    assert len(kept(examples=5) & mislabelled) >= 4, "of the 5 hardest of 80"
    assert len(kept(examples=20, offset=5) & mislabelled) <= 1


@pytest.mark.parametrize("by", ["el2n", "grand"])
def test_the_choice_is_a_function_of_the_key_and_never_of_the_model_or_the_forget_data(
    by: str, global_randomness: Any
) -> None:
    found = tiny("classification")

    def chosen(seed: int, model: nn.Module = found.model, request: ex.Request = found.request) -> list[int]:
        stage = KeepHardest(15, by=by, fresh=2, train=SHORT)  # type: ignore[arg-type]
        return stage(case_of(model, request, found.task, seed)).request.data("retain").ids.tolist()

    first = chosen(0)
    assert len(set(first)) == 15
    assert chosen(0) == first
    assert chosen(1) != first
    assert chosen(0, found.make(9).eval()) == first
    other = replace(found.request, forget=found.test.select(torch.arange(7)))
    assert chosen(0, request=other) == first
    assert global_randomness.unchanged()


@pytest.mark.parametrize("fresh", [0, 2])
@pytest.mark.parametrize("by", ["el2n", "grand"])
def test_an_odd_model_is_left_alone_and_the_next_stage_sees_what_was_kept(by: str, fresh: int) -> None:
    found = odd()
    found.model.train()
    before = Picture.of(found.model, found.request)
    choose = KeepHardest(12, by=by, fresh=fresh, train=SHORT)  # type: ignore[arg-type]
    done = choose(replace(case_of(found.model, found.request, found.task), model=found.model))
    before.assert_unchanged(found.model, found.request)
    rows = done.meter.forward
    assert rows == fresh * 20 * 64 + max(1, fresh) * 80
    kept = set(done.request.data("retain").ids.tolist())
    assert len(kept) == 12
    assert kept < set(found.request.data("retain").ids.tolist())
    SEEN.clear()
    task = replace(found.task, call=_noting(found.task.call))
    stage = ex.chain(choose, methods.finetune(steps=3, batch=5))
    ex.unlearn(found.model, found.request, task=task, method=stage)
    assert SEEN[-3:] == [5, 5, 5]


def test_shared_and_tied_parts_count_once_and_come_back_as_they_were() -> None:
    """The odd model: a module that is called twice, a weight in two places, a frozen bias."""
    found = odd()
    own = {id(p) for p in found.model.parameters()}
    data = found.request.data("retain").select(torch.arange(6))
    case = Case(found.model, found.request, found.task, ex.Scope.all(found.model))
    norms = gradient_norms(case, data, NLL(), 4, Key(0))
    assert not case.meter.notes, "the batched pass was given up"
    assert {id(p) for module in found.model.modules() for p in module._parameters.values() if p is not None} == own
    trainable = [p for p in found.model.parameters() if p.requires_grad]
    for row in range(6):
        loss = found.task.nll(found.model, data.batch(torch.tensor([row]))).sum()
        grads = torch.autograd.grad(loss, trainable)
        assert float(norms[row]) == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-5)


SEEN: list[int] = []


def _noting(call: Any) -> Any:
    def noted(model: nn.Module, batch: ex.core.Batch) -> Tensor:
        if torch.is_grad_enabled() and not torch._C._functorch.is_batchedtensor(batch["y"]):
            SEEN.append(len(batch["y"]))
        return call(model, batch)

    return noted


def test_grand_is_for_any_task_and_el2n_says_what_it_needs() -> None:
    found = tiny("regression")
    case = case_of(found.model, found.request, found.task)
    assert len(KeepHardest(10, by="grand", fresh=1, train=SHORT)(case).request.data("retain")) == 10
    with pytest.raises(Refused, match="el2n needs one label per example"):
        KeepHardest(10, fresh=0)(case)


def test_what_cannot_be_is_refused() -> None:
    found = tiny("classification")
    case = case_of(found.model, found.request, found.task)
    for settings, setting in (
        ({"examples": 0}, "examples"),
        ({"examples": 2.5}, "examples"),
        ({"examples": 3, "by": "loss"}, "by"),
        ({"examples": 3, "fresh": -1}, "fresh"),
        ({"examples": 3, "offset": -1}, "offset"),
    ):
        with pytest.raises(Refused, match=f"KeepHardest: {setting}"):
            KeepHardest(**settings)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="70 retain examples are to be kept after the 11 hardest, and there are 80"):
        KeepHardest(70, offset=11)(case)
    with torch.no_grad():
        next(iter(case.model.parameters())).fill_(float("nan"))
    with pytest.raises(RunFailed, match="80 scores of retain examples are not finite"):
        KeepHardest(5, fresh=0)(case)


def test_killed_at_every_step_the_choice_and_the_weights_are_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, count, at, step = tiny("classification"), 0, -1, _Run._step
    stage = ex.chain(KeepHardest(12, fresh=2, train=replace(SHORT, steps=3)), methods.finetune(steps=3, batch=5))

    def stepping(run: _Run) -> None:
        nonlocal count
        step(run)
        count += 1
        if count == at:
            raise Killed

    monkeypatch.setattr(_Run, "_step", stepping)

    def once(name: str) -> Any:
        return ex.unlearn(
            found.model, found.request, task=found.task, method=stage, seed=3, out=tmp_path / name, every=0.0
        )

    undisturbed = once("whole")
    total = count
    assert total == 9
    for moment in range(1, total + 1):
        count, at = 0, moment
        with pytest.raises(Killed):
            once(str(moment))
        at = -1
        resumed = once(str(moment))
        assert same(state(resumed.model), state(undisturbed.model))
        assert resumed.record["cost"]["forward"] == undisturbed.record["cost"]["forward"]
        assert resumed.case.request.data("retain").ids.tolist() == undisturbed.case.request.data("retain").ids.tolist()
