"""WAGLE's attribution and mask against plain torch and a closed form, and the known mistakes of other code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import expunge as ex
from expunge.core import Case, Key
from expunge.methods.wagle import wagle
from expunge.objectives import NLL
from expunge.saliency import Attribution, attribution, mean_gradient
from tests.fixtures import tiny
from tests.golden.by_hand import ALL, furthest, gradients, whole
from tests.golden.forgetting import small

TASK = ex.Classification(3)


def case_of(model: torch.nn.Module, request: ex.Request, task: object = TASK) -> Case:
    return Case(model, request, task, ex.Scope.all(model))


def scores_by_hand(mu: float) -> dict[str, torch.Tensor]:
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    forget, retain = (gradients(model, F.cross_entropy(model(x), y)) for x, y in ((xf, yf), (xr, yr)))
    return {n: ((p.detach() - retain[n] / mu) * forget[n]).abs() for n, p in model.named_parameters()}


def test_attribution_is_its_formula() -> None:
    """(2 - 3 / 0.5) * -4 = 16, and without a retain gradient 2 * -4."""
    two, three, minus = (torch.tensor([v]) for v in (2.0, 3.0, -4.0))
    assert float(attribution({"w": two}, {"w": minus}, {"w": three}, 0.5)["w"]) == 16.0
    assert float(attribution({"w": two}, {"w": minus}, {}, 0.5)["w"]) == 8.0
    assert attribution({"w": two}, {}, {"w": three}, 0.5) == {}
    half = attribution({"w": two.half()}, {"w": minus.half()}, {"w": three.half()}, 1e-6)["w"]
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(1.2e7, rel=1e-5)  # beyond the largest number in half precision


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_mask_is_the_top_share_over_all_tensors(mu: float, keep: float) -> None:
    scores = scores_by_hand(mu)
    flat = torch.cat([s.flatten() for s in scores.values()])
    positive = flat[flat > 0]
    level = flat.sort(descending=True).values[round(keep * len(flat)) - 1]
    model, request = small()
    found = Attribution(keep, mu, batch=7)(case_of(model, request)).scope
    for name, score in scores.items():
        assert torch.equal(found.masks[name], (score >= level) & (score > 0)), name
    assert sum(int(mask.sum()) for mask in found.masks.values()) <= len(positive)


def test_gradients_are_means_over_all_examples_whatever_the_batch() -> None:
    """Not sums over mini-batches: another batch size changes no score."""
    model, request = small()
    (xr, yr) = whole(request.retain)
    wanted = gradients(model, F.cross_entropy(model(xr), yr))
    for size in (3, 64):
        found = mean_gradient(case_of(model, request), request.retain, NLL(), size, Key(0))
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-14)


def test_of_a_language_model_the_mean_is_over_tokens() -> None:
    found = tiny("causal_lm")
    batch = found.request.forget.batch(torch.arange(20))
    units = found.task.units(batch)
    assert len(units.unique()) > 1
    wanted = gradients(found.model, found.task.nll(found.model, batch).sum() / units.sum())
    case = case_of(found.model, found.request, found.task)
    for name, grad in mean_gradient(case, found.request.forget, NLL(), 6, Key(0)).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_at_the_published_hessian_the_weight_itself_hardly_counts() -> None:
    """A known mistake: the ranking is that of |g_r g_f|; at a large one it is that of |theta g_f|."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    forget, retain = (gradients(model, F.cross_entropy(model(x), y)) for x, y in ((xf, yf), (xr, yr)))
    weights = dict(model.named_parameters())
    for mu, other in ((1e-6, retain), (1e6, {n: p.detach() for n, p in weights.items()})):
        scores = attribution(weights, forget, retain, mu)
        mine = torch.cat([scores[n].flatten() for n in weights]).argsort(descending=True)[:20]
        plain = torch.cat([(other[n] * forget[n]).abs().flatten() for n in weights]).argsort(descending=True)[:20]
        assert set(mine.tolist()) == set(plain.tolist())


def test_golden_steps_inside_the_mask() -> None:
    """Gradient difference by torch's Adam on masked gradients; without decay a masked weight then never moves."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    scores = scores_by_hand(1e-6)
    level = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    level = level[round(0.5 * len(level)) - 1]
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    net.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        (F.cross_entropy(net(xr), yr) - 0.2 * F.cross_entropy(net(xf), yf)).backward()
        for name, p in net.named_parameters():
            p.grad.mul_((scores[name] >= level) & (scores[name] > 0))
        optimizer.step()
    method = wagle(keep=0.5, forget_weight=0.2, lr=1e-3, steps=6, batch=ALL)
    done = ex.unlearn(model, request, task=TASK, method=method)
    assert furthest(done.model, net) < 1e-11
    for (name, p), q in zip(done.model.named_parameters(), model.parameters(), strict=True):
        held = ~((scores[name] >= level) & (scores[name] > 0))
        assert torch.equal(p[held], q[held])


def test_keep_one_scores_nothing_and_keep_zero_moves_nothing() -> None:
    model, request = small()
    whole_cost = ex.unlearn(model, request, task=TASK, method=wagle(keep=1.0, steps=2, batch=8)).record["cost"]
    assert whole_cost["forward"] == 2 * 2 * 8
    for wrong in ({"keep": 2.0}, {"hessian": 0.0}):
        with pytest.raises(ex.Refused, match=next(iter(wrong))):
            Attribution(**wrong)
    done = ex.unlearn(model, request, task=TASK, method=wagle(keep=0.0, steps=2))
    assert furthest(done.model, model) == 0.0
