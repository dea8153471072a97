"""Losses per token against plain torch and at their known limits.

``test_benchmark_losses`` holds them to the benchmark's code.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.core import Batch, Case, Key, Objective
from expunge.objectives import NLL, NPO, Ascent
from expunge.oracle import example_weights, per_example
from expunge.token_objectives import CEU, TNPO, UNDIAL, WGA, SatImp
from tests.fixtures import retrained, tiny
from tests.golden.by_hand import ALL, descended, furthest, whole
from tests.golden.forgetting import accuracy, digits, small
from tests.golden.tiny_llama import VOCAB, answers, random_llama

TOKENS: list[Objective] = [WGA(0.7), TNPO(2.0), TNPO(2.0, 1.5), SatImp(0.8, 0.5), CEU(1), UNDIAL(3.0)]


def case_of(model: nn.Module, teacher: nn.Module, task: Any) -> Case:
    """A Case with no data: objectives are asked directly."""
    return Case(model, ex.Request(), task, ex.Scope.all(model), {"original": teacher})


def mean(case: Case, objective: Objective, batch: Batch) -> Tensor:
    """The loss of a logical batch, as the oracle forms it."""
    draw = getattr(objective, "draw", None)
    batch = batch if draw is None else draw(case, batch, Key(0))
    weight = example_weights(case, objective, batch)
    values = per_example(case, objective, batch)
    return (values * (weight / weight.sum()).to(values.dtype)).sum()


def slope(case: Case, loss: Tensor) -> Tensor:
    """Flat gradient on every parameter."""
    parameters = list(case.model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


class Bigram(nn.Module):
    """Logits of the next token from a table: [b, T] -> [b, T, V], in float64, small enough to reason about."""

    def __init__(self, seed: int, vocab: int = 13):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def bigram() -> tuple[Case, Batch]:
    """A Case of a Bigram with another one for its teacher, and the four examples in its vocabulary."""
    return case_of(Bigram(0), Bigram(1), ex.CausalLM(13)), answers(vocab=13)


def by_token(case: Case, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each answer token under model and teacher, and its example, by plain indexing of the table."""
    ids, labels = batch["input_ids"], batch["labels"]
    rows, places = torch.nonzero(labels[:, 1:] >= 0, as_tuple=True)
    before, after = ids[rows, places], ids[rows, places + 1]
    now = case.model.table.log_softmax(1)[before, after]
    then = case.teachers["original"].table.detach().log_softmax(1)[before, after]
    return now, then, rows


@pytest.mark.parametrize("objective", TOKENS, ids=repr)
def test_padding_and_cuts_change_nothing(objective: Objective) -> None:
    case = case_of(random_llama(0), random_llama(1), ex.CausalLM(VOCAB))
    expected = mean(case, objective, answers()).detach()
    for left, right in ((3, 0), (0, 4), (2, 2)):
        torch.testing.assert_close(mean(case, objective, answers(left, right)).detach(), expected, rtol=1e-5, atol=1e-7)
    parts = [{name: column[rows] for name, column in answers().items()} for rows in (slice(0, 1), slice(1, 4))]
    sums = [
        float((example_weights(case, objective, part).sum() * mean(case, objective, part)).detach()) for part in parts
    ]
    whole_weight = float(example_weights(case, objective, answers()).sum())
    assert sum(sums) / whole_weight == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("beta", "extra"), [(4.0, 0.0), (0.5, 0.0), (4.0, 1.5)])
def test_tnpo_token_by_token(beta: float, extra: float) -> None:
    """The published weight, in plain numbers."""
    case, batch = bigram()
    now, then, _ = by_token(case, batch)
    terms = []
    for p, q in zip(now.exp().tolist(), then.exp().tolist(), strict=True):
        weight = 2 * p ** (beta + extra) / (p**beta + q**beta + 1e-5)
        terms.append(-weight * -math.log(p))
    expected = sum(terms) / len(terms)
    assert float(mean(case, TNPO(beta, extra), batch).detach()) == pytest.approx(expected, rel=1e-10)


def test_gradients_are_those_of_the_losses_they_integrate_to() -> None:
    """With weights held constant, each is the gradient of another, closed loss of p: sign and size of every pull."""
    case, batch = bigram()
    now, then, rows = by_token(case, batch)
    p, q = now.exp(), then.exp()
    pairs: list[tuple[Objective, Tensor]] = [
        (WGA(0.7), (p**0.7 / 0.7).mean()),
        (TNPO(2.0), (torch.log(p**2 + q**2 + 1e-5)).mean()),
        (SatImp(1.0, 1.0), (p - p**2 / 2).mean()),
        (CEU(0), -torch.log1p(-p).mean()),
    ]
    for objective, closed in pairs:
        found = slope(case, mean(case, objective, batch))
        torch.testing.assert_close(found, slope(case, closed), rtol=1e-9, atol=1e-12)
        assert float(found.norm()) > 1e-3
    later = torch.cat([torch.tensor([False]), rows[1:] == rows[:-1]])
    closed = -torch.log1p(-p[later]).mean()
    torch.testing.assert_close(slope(case, mean(case, CEU(1), batch)), slope(case, closed), rtol=1e-9, atol=1e-12)


def test_limits_are_gradient_ascent() -> None:
    case, batch = bigram()
    ascent = mean(case, Ascent(NLL()), batch)
    for objective in (WGA(0.0), SatImp(0.0, 0.0)):
        torch.testing.assert_close(mean(case, objective, batch), ascent, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean(case, SatImp(1.3, 0.0), batch), mean(case, WGA(1.3), batch), rtol=1e-12, atol=0)
    same = case_of(case.model, case.model, case.task)
    found, expected = slope(same, mean(same, TNPO(1.0), batch)), slope(case, ascent)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_tnpo_with_one_label_is_npo_up_to_the_small_constant() -> None:
    model, request = small()
    other, batch = copy.deepcopy(model), request.forget.batch(torch.arange(20))
    with torch.no_grad():
        other[0].weight.mul_(1.1)
    case = case_of(model, other, ex.Classification(3))
    found, expected = (slope(case, mean(case, objective, batch)) for objective in (TNPO(1.0), NPO(1.0)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_undial_rests_at_its_teacher_with_strength_zero_and_only_there() -> None:
    case, batch = bigram()
    case = case_of(case.model, case.model, case.task)
    assert float(slope(case, mean(case, UNDIAL(0.0), batch)).abs().max()) < 1e-12
    assert float(slope(case, mean(case, UNDIAL(1.0), batch)).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ceu_in_low_precision_is_finite_and_computed_in_float32(dtype: torch.dtype) -> None:
    """Also where the model is sure to the last bit, and where it rules a token out itself."""
    logits = torch.zeros(4, 7, 13, dtype=dtype)
    logits[:, :, 3], logits[:, :, 4], logits[:, :, 5] = 300.0, -torch.inf, 0.01
    logits.requires_grad_()
    batch = answers(vocab=13)
    width = batch["input_ids"].shape[1]
    task = ex.CausalLM(13, call=lambda _model, _batch: logits[:, :width])
    case = case_of(nn.Linear(1, 1), nn.Linear(1, 1), task)
    loss = mean(case, CEU(0), batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    labels, (rows, places) = batch["labels"][:, 1:], torch.nonzero(batch["labels"][:, 1:] >= 0, as_tuple=True)
    wide = logits.detach().float()[rows, places]
    p = wide.softmax(1)
    q = wide.scatter(1, labels[rows, places][:, None], -torch.inf).softmax(1)
    torch.testing.assert_close(logits.grad[rows, places].float(), (p - q) / len(rows), rtol=1e-2, atol=1e-7)


def test_an_answer_no_longer_than_what_is_skipped_has_no_weight() -> None:
    case, batch = bigram()
    assert CEU(2).weigh(case, batch).tolist() == [1, 3, 0, 2]
    assert CEU(2)(case, batch)[2] == 0.0
    with pytest.raises(ex.Refused, match="one label"):
        mean(case_of(small()[0], small()[0], ex.Classification(3)), CEU(1), small()[1].forget.batch(torch.arange(3)))


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (WGA, "beta", -0.1),
        (TNPO, "beta", 0.0),
        (TNPO, "extra", -1.0),
        (SatImp, "saturation", -1.0),
        (SatImp, "importance", -1.0),
        (CEU, "skip", -1),
        (UNDIAL, "strength", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, setting: str, value: float) -> None:
    with pytest.raises(ex.Refused, match=f"{kind.__name__}: {setting} must be"):
        kind(**{setting: value})


def closed_loss(name: str, before: nn.Module, x: Tensor, y: Tensor) -> Any:
    """A method's forget loss on one label, in plain torch, with its default settings."""
    rows = torch.arange(len(y))
    with torch.no_grad():
        told, start = before(x), before(x).softmax(1)[rows, y]
    lowered = told.clone()
    lowered[rows, y] -= 10.0

    def loss(net: nn.Module) -> Tensor:
        p = net(x).softmax(1)[rows, y]
        held = p.detach()
        if name == "simnpo":
            return (2 / 2.5 * torch.log1p(p**2.5)).mean()
        if name == "wga":
            return (held * p.log()).mean()
        if name == "tnpo":
            return (2 * held**4 / (held**4 + start**4 + 1e-5) * p.log()).mean()
        if name == "sat_imp":
            return (held**5 * (1 - held) * p.log()).mean()
        return F.cross_entropy(net(x), lowered.softmax(1))

    return loss


@pytest.mark.parametrize(("name", "weight"), [("simnpo", 5), ("wga", 5), ("tnpo", 1), ("sat_imp", 1), ("undial", 1)])
def test_golden_steps(name: str, weight: float) -> None:
    """Six steps of Adam on the whole data, defaults but for those."""
    model, request = small()
    (xf, yf), (xr, yr) = whole(request.forget), whole(request.retain)
    forget = closed_loss(name, model, xf, yf)
    expected = descended(model, [lambda net: forget(net) + weight * F.cross_entropy(net(xr), yr)] * 6, 1e-3)
    method = ex.registry.methods()[name].build(lr=1e-3, steps=6, batch=ALL)
    done = ex.unlearn(model, request, task=ex.Classification(3), method=method)
    assert furthest(done.model, expected) < 1e-10
    assert furthest(done.model, model) > 1e-3


def nats(model: nn.Module, task: Any, data: ex.Data) -> float:
    """Mean loss per token."""
    batch = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return float(task.nll(model, batch).sum() / task.units(batch).sum())


@pytest.mark.parametrize("name", ["simnpo", "wga", "tnpo", "sat_imp", "ce_u", "undial"])
def test_a_language_model_forgets_towards_one_that_never_saw_the_people(name: str) -> None:
    """Defaults: the loss on forgotten people goes most of the way to the retrained model's or past it by less than one
    nat; the retain loss stays."""
    found = tiny("causal_lm")
    forget, retain = found.request.forget, found.request.retain
    done = ex.unlearn(found.model, found.request, task=found.task, method=name)
    start, now, goal = (nats(m, found.task, forget) for m in (found.model, done.model, retrained("causal_lm")))
    assert goal - start > 1.0
    assert start + 0.7 * (goal - start) < now < goal + 1.0
    assert nats(done.model, found.task, retain) < nats(found.model, found.task, retain) + 0.05


@pytest.mark.parametrize("name", ["simnpo", "wga", "tnpo", "sat_imp", "undial"])
def test_a_class_is_forgotten_and_the_rest_stays(name: str) -> None:
    """As the baselines' defaults are held to."""
    model, request = digits(3)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=name)
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
