"""PrimalDual and PDU against a problem with a known solution and against the released code, where that is right.

Numbers named "released" were computed by locuslab/open-unlearning at d3d7cf9 (src/trainer/unlearn/pdu.py) on the Llama
of ``tiny_llama``, ``by_formula(0.0)``: multiplier 2, epsilon 0.3, dual step 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.compose import Clip
from expunge.confidence import LogitSpread
from expunge.constrained import PrimalDual
from expunge.core import Batch, Case, Key
from expunge.data.sources import as_data
from expunge.methods.pdu import pdu
from expunge.objectives import NLL
from expunge.oracle import Draws, On, Oracle
from tests.contract.test_combiners import oracle_of, trained
from tests.contract.test_methods import loss
from tests.fixtures import retrained, tiny
from tests.golden.by_hand import ALL, descended, furthest, whole
from tests.golden.forgetting import small
from tests.golden.tiny_llama import FORGET, RETAIN, batch_of, by_formula, flat_gradient

RELEASED_FORGET, RELEASED_RETAIN, RELEASED_MULTIPLIER = 6.404974460601807, 4.1700439453125, 3.935021996498108
RELEASED_NORM = 291.7304382324219


@dataclass(frozen=True)
class Square:
    """(theta - centre)^2 of a model of one number."""

    centre: float
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        (theta,) = case.scope.parameters(case.model).values()
        return (theta - self.centre).square()


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def solved(epsilon: float, combiner: PrimalDual, steps: int) -> tuple[float, float]:
    """theta and multiplier after gradient descent on (theta - 3)^2 subject to theta^2 <= epsilon."""
    model = One()
    case = Case(model, ex.Request(), ex.Classification(2), ex.Scope.all(model))
    roles = {"forget": On(None, Square(3.0)), "retain": On(None, Square(0.0))}
    state = combiner.init()
    for step in range(steps):
        oracle = Oracle(case, roles, Draws(case, roles, Key(0), step, {}, lambda role, s: s), step=step)
        grads, state = combiner.combine(oracle, state)
        with torch.no_grad():
            model.theta.sub_(0.05 * grads["theta"])
    return model.theta.item(), state["w"]


def test_it_finds_the_constrained_minimum_and_its_multiplier() -> None:
    """min (t - 3)^2 subject to t^2 <= 1: t = 1, and 2 (t - 3) + w 2 t = 0 gives w = 2."""
    theta, multiplier = solved(1.0, PrimalDual(1.0, 0.1, 0.0), 800)
    assert theta == pytest.approx(1.0, abs=1e-6)
    assert multiplier == pytest.approx(2.0, abs=1e-6)


def test_a_constraint_that_does_not_bind_lets_go() -> None:
    """t^2 <= 16 holds at the free minimum t = 3: the multiplier ends at 0 exactly, whatever it was at first."""
    theta, multiplier = solved(16.0, PrimalDual(16.0, 0.1, 5.0), 800)
    assert theta == pytest.approx(3.0, abs=1e-6)
    assert multiplier == 0.0


def test_the_multiplier_step_by_step() -> None:
    """Two steps of warm-up, then ascent on the loss less the bound, of the weights before each step."""
    model, data = small()
    x, y = whole(data.retain)
    method = pdu(epsilon=0.01, start=3.0, dual_lr=2.0, warmup=2, lr=1e-3, steps=6, batch=ALL)
    done = ex.unlearn(model, data, task=ex.Classification(3), method=method)
    history = done.record["history"]
    expected = 3.0
    for step, row in enumerate(history):
        assert row["multiplier"] == pytest.approx(expected, rel=1e-12)
        if step >= 2:
            expected = max(0.0, expected + 2.0 * (row["loss/retain"] - 0.01))
    assert history[0]["loss/retain"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)
    assert history[5]["multiplier"] != pytest.approx(3.0, rel=1e-3)


def test_golden_steps() -> None:
    """The weights after Adam on spread + multiplier * retain loss, both written out."""
    model, data = small()
    (xf, _), (xr, yr) = whole(data.forget), whole(data.retain)
    method = pdu(epsilon=0.01, start=3.0, dual_lr=2.0, warmup=2, lr=1e-3, steps=6, batch=ALL)
    done = ex.unlearn(model, data, task=ex.Classification(3), method=method)

    def at(multiplier: float):
        def hand(net: nn.Module) -> Tensor:
            z = net(xf)
            spread = (z.max(1).values - z.sum(1) / 3) ** 2
            return spread.mean() + multiplier * F.cross_entropy(net(xr), yr)

        return hand

    multipliers = [row["multiplier"] for row in done.record["history"]]
    assert furthest(done.model, descended(model, [at(w) for w in multipliers], 1e-3)) < 1e-10


@pytest.mark.parametrize("pieces", [3, 11])
def test_one_dual_step_per_update_however_a_batch_is_cut(pieces: int) -> None:
    """The released code makes one per micro-batch: the multiplier would move `pieces` times as far."""
    case, combiner = trained(), Clip(PrimalDual(0.1, 0.5, 1.0), 1e3)
    whole_state = combiner.combine(oracle_of(case, combiner, 1), combiner.init())[1]
    cut_state = combiner.combine(oracle_of(case, combiner, pieces), combiner.init())[1]
    assert whole_state["w"] != 1.0
    assert cut_state["w"] == pytest.approx(whole_state["w"], rel=1e-12)


def test_a_multiplier_of_zero_still_sees_the_retain_loss() -> None:
    """With w = 0 the update is the forget gradient alone, and w rises again once the bound is broken."""
    case, combiner = trained(), PrimalDual(0.0, 0.5, 0.0)
    oracle = oracle_of(case, combiner, 1)
    grads, state = combiner.combine(oracle, combiner.init())
    alone = oracle_of(case, combiner, 1).grad({"forget": 1.0})
    assert all(torch.equal(grads[name], alone[name]) for name in grads)
    assert state["w"] == pytest.approx(0.5 * oracle.losses["retain"], rel=1e-12)


@pytest.mark.parametrize("setting", ["dual_lr", "start", "warmup"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ex.Refused, match=f"PrimalDual: {setting} must be at least 0, found -1"):
        PrimalDual(**{setting: -1})


def spread_by_hand(model: nn.Module) -> Tensor:
    """(max - mean)^2 of the logits AT the labelled tokens, as released; mean over the batch's tokens."""
    batch = batch_of(FORGET)
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (z.amax(-1) - z.mean(-1)).square()[batch["labels"] != -100].mean()


def test_pdu_is_the_released_one_but_for_the_shift() -> None:
    """Retain loss, next multiplier, and gradient of the Lagrangian with the shift taken back out."""
    model = by_formula(0.0)
    case = Case(model, ex.Request(), ex.CausalLM(40), ex.Scope.all(model))
    batch = batch_of(RETAIN)
    weight = NLL().weigh(case, batch)
    retain = (NLL()(case, batch) * weight).sum() / weight.sum()
    assert retain.item() == pytest.approx(RELEASED_RETAIN, rel=1e-5)
    assert spread_by_hand(model).item() == pytest.approx(RELEASED_FORGET, rel=1e-5)
    released = flat_gradient(spread_by_hand(model) + 2.0 * (retain - 0.3), model)
    assert float(released.norm()) == pytest.approx(RELEASED_NORM, rel=1e-5)
    roles = {"forget": On("forget", LogitSpread()), "retain": On("retain", NLL())}
    parts = [
        as_data({n: c for n, c in batch_of(p).items() if n != "id"}, ids=[*range(len(p))]) for p in (FORGET, RETAIN)
    ]
    case = Case(model, ex.Request(*parts), case.task, case.scope)
    oracle = Oracle(case, roles, Draws(case, roles, Key(0), 0, {"forget": 3, "retain": 2}, lambda role, s: s))
    combiner = PrimalDual(0.3, 0.5, 2.0)
    assert combiner.combine(oracle, combiner.init())[1]["w"] == pytest.approx(RELEASED_MULTIPLIER, rel=1e-5)


def test_spread_is_nothing_where_logits_are_equal() -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(7.0)
    case = Case(model, ex.Request(), ex.Classification(3), ex.Scope.all(model))
    assert (
        LogitSpread()(case, {"id": torch.arange(2), "x": torch.ones(2, 2), "y": torch.tensor([0, 2])}).abs().max() == 0
    )


@pytest.mark.parametrize("by", ["group", "random"])
def test_a_language_model_forgets_and_keeps_its_bound(by: str) -> None:
    """With the defaults: at least as unsure of the forget data as a retrained model, the retain loss not above before."""
    found, goal = tiny("causal_lm", by), retrained("causal_lm", by)
    forget, retain = found.request.forget, found.request.retain
    done = ex.unlearn(found.model, found.request, task=found.task, method=pdu())
    assert loss(done.model, found.task, forget) > loss(goal, found.task, forget) - 0.1
    assert loss(done.model, found.task, retain) <= max(loss(found.model, found.task, retain), 0.1)
