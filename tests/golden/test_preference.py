"""DPO, and the methods kl, idk_nll and idk_dpo, against plain torch; ``test_benchmark_losses`` has the benchmark's numbers.

The number named "benchmark" was computed by locuslab/open-unlearning at d3d7cf9 (src/trainer/utils.py) on the Llama of
``tiny_llama``, student ``by_formula(0.0)`` and reference ``by_formula(0.5)``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.constrained import Pooled
from expunge.core import Batch, Case, Key, Stage, map_tensors
from expunge.data.sources import as_data
from expunge.methods.idk_dpo import idk_dpo
from expunge.methods.idk_nll import idk_nll
from expunge.methods.kl import kl
from expunge.objectives import NLL, RandomLabel
from expunge.oracle import Draws, On, Oracle, example_weights
from expunge.preference import DPO
from tests.contract.test_methods import loss
from tests.fixtures import retrained, tiny
from tests.golden.by_hand import ALL, descended, furthest, whole
from tests.golden.by_hand import kl as divergence
from tests.golden.forgetting import small
from tests.golden.tiny_llama import FORGET, REFUSALS, RETAIN, batch_of, by_formula, flat_gradient

TASK = ex.CausalLM(40)
BENCHMARK_DPO = 1.0596810579299927
"""At beta 1, each refusal the winner."""


def case_of(refusals: Tensor | None = None) -> Case:
    """Student and reference by formula; the data of ``tiny_llama``, with one refusal each where they are given."""
    model = by_formula(0.0)
    return Case(model, request(refusals), TASK, ex.Scope.all(model), {"original": by_formula(0.5)})


def request(refusals: Tensor | None = None) -> ex.Request:
    parts = []
    for number, pairs in enumerate((FORGET, RETAIN)):
        columns = {name: column for name, column in batch_of(pairs).items() if name != "id"}
        if refusals is not None:
            columns["refusals"] = refusals[: len(pairs)]
        parts.append(as_data(columns, ids=torch.arange(len(pairs)) + 100 * number))
    return ex.Request(*parts)


def one_each() -> Tensor:
    """[3, 1, 4], the refusals as the column from which the task draws: only one to draw."""
    rows = [answer + [-100] * (4 - len(answer)) for _, answer in REFUSALS]
    return torch.tensor(rows)[:, None]


def pair(width: int = 0, win_width: int = 0) -> Batch:
    """Forget answers with refusals as winners."""
    return {**batch_of(FORGET, width), "win": batch_of(REFUSALS, win_width)}


def drawn(case: Case, objective: Any, batch: Batch) -> Batch:
    return objective.draw(case, batch, Key(0))


def test_a_refusal_drawn_by_the_task_is_the_winner() -> None:
    case = case_of(one_each())
    batch = drawn(case, DPO(1.0), case.request.data("forget").batch(torch.arange(3)))
    assert DPO(1.0)(case, batch).mean().item() == pytest.approx(BENCHMARK_DPO, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_dpo_first_step_is_two_over_beta_log_two(beta: float) -> None:
    found = tiny("causal_lm")
    done = ex.unlearn(found.model, found.request, task=found.task, method=idk_dpo(beta=beta, steps=1))
    assert done.record["history"][0]["loss/forget"] == pytest.approx(2 / beta * math.log(2), rel=1e-6)


def test_dpo_takes_both_references_from_columns() -> None:
    """The same bits as with a teacher, and then no teacher is asked."""
    case = case_of()
    with torch.no_grad():
        lose, win = (TASK.nll(case.teachers["original"], batch_of(pairs)) for pairs in (FORGET, REFUSALS))
    alone = replace(case, teachers={})
    cached = {**pair(), "reference": lose, "win_reference": win}
    assert torch.equal(
        DPO()(alone, drawn(alone, DPO(), cached)).detach(), DPO()(case, drawn(case, DPO(), pair())).detach()
    )
    for missing in ("reference", "win_reference"):
        with pytest.raises(ex.Refused, match="no teacher 'original'"):
            drawn(alone, DPO(), {name: column for name, column in cached.items() if name != missing})


def test_idk_dpo_without_a_second_model() -> None:
    """Columns win, reference and win_reference meet its needs: it changes the caller's model in place, as with a copy."""
    model, plain = by_formula(0.0), request()
    win = {name: column for name, column in batch_of(REFUSALS).items() if name != "id"}
    with torch.no_grad():
        lose, other = (TASK.nll(model, batch_of(pairs)) for pairs in (FORGET, REFUSALS))
    columns = {name: column for name, column in batch_of(FORGET).items() if name != "id"}
    given = as_data({**columns, "win": win}, ids=torch.arange(3))
    method = idk_dpo(steps=3, lr=1e-3)
    expected = ex.unlearn(model, replace(plain, forget=given), task=TASK, method=method)
    cached = given.annotate("reference", lose).annotate("win_reference", other)
    done = ex.unlearn(model, replace(plain, forget=cached), task=TASK, method=method, copy=False)
    assert done.model is model
    assert furthest(done.model, expected.model) < 1e-6
    assert expected.record["cost"]["forward"] - done.record["cost"]["forward"] == 3 * 2 * len(FORGET)


def test_dpo_refuses_half_a_pair() -> None:
    case = case_of()
    with pytest.raises(ex.Refused, match="'win_reference' and no column 'win'"):
        drawn(case, DPO(), {**batch_of(FORGET), "win_reference": torch.zeros(3)})
    with pytest.raises(ex.Refused, match="'win' is a Tensor: expected a nested batch"):
        drawn(case, DPO(), {**batch_of(FORGET), "win": torch.zeros(3)})
    blank = {**batch_of(REFUSALS), "labels": torch.full_like(batch_of(REFUSALS)["labels"], -100)}
    with pytest.raises(ex.Refused, match="of example 0 has nothing to predict"):
        drawn(case, DPO(), {**batch_of(FORGET), "win": blank})
    with pytest.raises(ex.Refused, match="beta must be above 0"):
        DPO(0.0)


def test_kl_steps_are_ascent_and_divergence() -> None:
    """Steps of Adam by hand, with torch's own divergence; at the first one that is nothing."""
    model, data = small()
    (xf, yf), (xr, _) = whole(data.forget), whole(data.retain)
    target = model(xr).detach()

    def hand(net: nn.Module) -> Tensor:
        return 3.0 * divergence(target, net(xr)) - 0.05 * F.cross_entropy(net(xf), yf)

    method = kl(forget_weight=0.05, retain_weight=3.0, lr=1e-3, steps=6, batch=ALL)
    done = ex.unlearn(model, data, task=ex.Classification(3), method=method)
    assert not done.notes
    history = done.record["history"]
    assert history[0]["loss/retain"] == pytest.approx(0.0, abs=1e-12)
    assert history[1]["loss/retain"] > 1e-6
    assert furthest(done.model, descended(model, [hand] * 6, 1e-3)) < 1e-10


def pooled_gradient(accumulate: int = 1) -> tuple[Tensor, Case]:
    """The update of Pooled on refusals (forget) and answers (retain)."""
    case = case_of(one_each())
    roles = {"forget": On("forget", RandomLabel()), "retain": On("retain", NLL())}
    draws = Draws(case, roles, Key(1), 0, {"forget": 3, "retain": 2}, lambda role, step: step)
    oracle = Oracle(case, roles, draws, accumulate=accumulate)
    grads, _ = Pooled().combine(oracle, {})
    assert oracle.report["share/forget"] == pytest.approx(9 / 16)  # 3 + 2 + 4 refusal tokens, 3 + 4 of answers
    return torch.cat([grads[name].flatten() for name, _ in case.model.named_parameters()]), case


@pytest.mark.parametrize("accumulate", [1, 2])
def test_idk_nll_is_one_token_mean_over_refusals_and_retain_answers(accumulate: int) -> None:
    """The model's own loss on the concatenated batch, which is not the sum of the two batches' losses."""
    found, case = pooled_gradient(accumulate)
    both = {name: column for name, column in batch_of(REFUSALS + RETAIN).items() if name != "id"}
    expected = flat_gradient(case.model(**both).loss, case.model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parts = [{n: c for n, c in batch_of(pairs).items() if n != "id"} for pairs in (REFUSALS, RETAIN)]
    separate = flat_gradient(sum(case.model(**part).loss for part in parts) / 2, case.model)
    assert float((separate - expected).norm() / expected.norm()) > 0.02


def test_pooled_counts_weights_of_examples() -> None:
    """A weight column counts as so many copies of an example."""
    case = case_of()
    data = case.request.data("retain").annotate("weight", torch.tensor([0.0, 2.0]))
    case = replace(case, request=replace(case.request, retain=data))
    roles = {"forget": On("forget", NLL()), "retain": On("retain", NLL())}
    oracle = Oracle(case, roles, Draws(case, roles, Key(1), 0, {"forget": 3, "retain": 2}, lambda r, s: s))
    Pooled().combine(oracle, {})
    assert oracle.report["share/retain"] == pytest.approx(8 / 19)
    assert example_weights(case, NLL(), oracle.draws.batch("retain")).sum() == 8


@pytest.mark.parametrize("method", [kl(), idk_nll(), idk_dpo()], ids=["kl", "idk_nll", "idk_dpo"])
@pytest.mark.parametrize("by", ["group", "random"])
def test_a_language_model_forgets_towards_a_retrained_one_and_keeps_the_rest(method: Stage, by: str) -> None:
    """With the defaults, at least half of the way to the retrained model's loss on the forget data."""
    found, goal = tiny("causal_lm", by), retrained("causal_lm", by)
    forget, retain = found.request.forget, found.request.retain
    done = ex.unlearn(found.model, found.request, task=found.task, method=method)
    start, now, wanted = (loss(m, found.task, forget) for m in (found.model, done.model, goal))
    assert now > start + 0.5 * (wanted - start)
    chance = found.task.chance(retain.batch(torch.arange(2)))
    kept = loss(found.model, found.task, retain)
    assert loss(done.model, found.task, retain) < kept + 0.05 * (chance - kept)


def test_dpo_does_not_change_what_it_is_given() -> None:
    case, batch = case_of(), pair()
    held = map_tensors(lambda t: t.clone(), batch)
    DPO()(case, drawn(case, DPO(), batch))
    assert all(torch.equal(batch[name], held[name]) for name in ("input_ids", "labels"))
    assert batch["win"].keys() == held["win"].keys()
