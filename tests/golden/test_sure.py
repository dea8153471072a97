"""SURE: which rows are kept, by hand; that the rest of the gradient is 0; that the mask costs no pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.combine import OneSidedProjection, Weighted
from expunge.core import Case, Combiner, Grads, Key, Refused
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.oracle import Draws, On, Oracle, differentiable
from expunge.salient_rows import SalientRows, salient_rows
from expunge.scope import Scope
from tests.fixtures import tiny
from tests.golden.by_hand import ALL, two_classes, whole

torch.set_num_threads(1)


def gradients(model: nn.Module, data: ex.Data) -> dict[str, Tensor]:
    x, y = whole(data)
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def rows(grad: Tensor) -> Tensor:
    """[rows] norms: of a matrix's rows, of a vector's entries."""
    return grad.abs() if grad.ndim == 1 else grad.flatten(1).norm(dim=1)


def update(combiner: Combiner, scope: Scope | None = None) -> tuple[Grads, dict[str, float], nn.Module, ex.Request]:
    model, request = two_classes()
    case = Case(model, request, ex.Classification(2), scope or Scope.all(model))
    roles = {"forget": On("forget", NLL()), "retain": On("retain", NLL())}
    oracle = Oracle(case, roles, Draws(case, roles, Key(0), 0, dict.fromkeys(roles, ALL), lambda role, step: step))
    with differentiable(case), case.meter.watch(model):
        grads, _ = combiner.combine(oracle, combiner.init())
    assert case.meter.forward == case.meter.backward == len(request.forget) + len(request.retain)
    return grads, oracle.report, model, request


@pytest.mark.parametrize("percentile", [0.0, 50.0, 90.0, 100.0])
def test_the_update_is_the_whole_gradient_on_the_salient_rows(percentile: float) -> None:
    grads, report, model, request = update(SalientRows(Weighted({"retain": 0.5}), percentile))
    forget, retain = gradients(model, request.forget), gradients(model, request.retain)
    norms = {name: rows(grad) for name, grad in forget.items()}
    every = np.concatenate([n.numpy() for n in norms.values()])
    level = np.percentile(every, percentile)
    kept = 0
    for name, grad in grads.items():
        mask = norms[name] >= level
        kept += int(mask.sum())
        expected = (forget[name] + 0.5 * retain[name]) * mask.reshape(-1, *[1] * (grad.ndim - 1))
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)
    assert kept == {0.0: len(every), 100.0: 1}.get(percentile, kept)
    assert report["rows_kept"] == pytest.approx(kept / len(every))


def test_the_mask_meets_surgery() -> None:
    """It is on the update, and the projection is of the whole gradients."""
    grads, *_ = update(SalientRows(OneSidedProjection(), 50.0))
    plain, *_ = update(OneSidedProjection())
    for name, grad in grads.items():
        on = grad != 0
        assert torch.equal(grad[on], plain[name][on])
    kept = [bool(row.any()) for g in grads.values() for row in g]
    assert sum(kept) == len(kept) // 2


def test_rows_out_of_scope_are_not_ranked() -> None:
    """With two of six rows of one matrix in scope, the median is of those two."""
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[[1, 4], :3] = True
    model, request = two_classes()
    names = tuple(name for name, _ in model.named_parameters())
    grads, *_ = update(SalientRows(Weighted(), 50.0), Scope({"0.weight": mask}, names))
    norms = rows(gradients(model, request.forget)["0.weight"] * mask)
    best = 1 if norms[1] > norms[4] else 4
    assert [row for row in range(6) if bool(grads["0.weight"][row].any())] == [best]
    assert not bool(grads["0.weight"][best, 3:].any())


def test_a_row_without_a_forget_gradient_is_never_kept() -> None:
    """Most rows are 0, so the percentile is 0 too: the released rule would keep every row."""
    norms = {"embedding": torch.tensor([0.0] * 9), "head": torch.tensor([0.0, 2.0, 1.0])}
    kept = salient_rows(norms, 80.0)
    assert np.percentile(torch.cat(list(norms.values())).numpy(), 80) == 0
    assert kept["head"].tolist() == [False, True, True]
    assert not bool(kept["embedding"].any())


def test_rows_are_drawn_anew_and_one_step_moves_no_other() -> None:
    """Plain SGD: after one step of the method's Descend only the salient rows differ; after three, more of them."""
    model, request = two_classes()

    def moved(steps: int) -> set[tuple[str, int]]:
        stage = Descend(
            forget=NLL(), retain=NLL(), combine=SalientRows(), optimizer=SGD(0.5, 0.0), steps=steps, batch=4
        )
        after = ex.unlearn(model, request, task=ex.Classification(2), method=stage).model
        return {
            (name, row)
            for name, p in model.named_parameters()
            for row in range(len(p))
            if not torch.equal(p[row], after.get_parameter(name)[row])
        }

    every = sum(len(p) for p in model.parameters())
    assert len(moved(1)) == every - int(np.ceil(0.9 * (every - 1)))
    assert len(moved(6)) > len(moved(1))


def test_settings_are_checked() -> None:
    with pytest.raises(Refused, match="percentile"):
        SalientRows(percentile=101)
    with pytest.raises(Refused, match="names role 'forgett'"):
        update(SalientRows(of="forgett"))


def test_on_a_language_model_the_embedding_of_absent_tokens_stays(global_randomness: Any) -> None:
    found = tiny("causal_lm")
    done = ex.unlearn(found.model, found.request, task=found.task, method=methods.sure(steps=2, batch=4))
    before, after = (m.get_parameter("lm_head.weight") for m in (found.model, done.model))
    assert 0 < int((before != after).any(1).sum()) < len(before)
    assert global_randomness.unchanged()


def test_a_tensor_that_the_forget_loss_does_not_reach_stays() -> None:
    class Head:
        """A loss of the last layer alone."""

        parameters_only = True

        def __call__(self, case: Case, batch: Any) -> Tensor:
            *_, last = case.scope.parameters(case.model).values()
            return last.sum().reshape(1)

    model, request = two_classes()
    case = Case(model, request, ex.Classification(2), Scope.all(model))
    roles = {"forget": On(None, Head()), "retain": On("retain", NLL())}
    oracle = Oracle(case, roles, Draws(case, roles, Key(0), 0, dict.fromkeys(roles, ALL), lambda role, step: step))
    with differentiable(case):
        grads, _ = SalientRows(Weighted(), 0.0).combine(oracle, {})
    reached = list(case.scope.parameters(model))[-1]
    assert len(grads) > 2
    assert {name for name, grad in grads.items() if bool(grad.any())} == {reached}
