"""Language models in bfloat16: losses and sums in float32, weights kept in their own precision, Adam as documented."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Request, Scope, chain, unlearn
from expunge.core import Data
from expunge.methods.npo import npo
from expunge.methods.simnpo import simnpo
from expunge.objectives import NLL, NPO, Distill, SimNPO
from expunge.oracle import per_example
from expunge.preference import DPO
from expunge.reference import CacheReference
from expunge.registry import methods
from expunge.tasks.causal_lm import CausalLM
from expunge.token_objectives import CEU, TNPO, UNDIAL, WGA, SatImp
from expunge.wrap import LoRA, in_adapter
from tests.fixtures import given, tiny

BFLOAT = torch.bfloat16


def setting() -> tuple[nn.Module, Request, CausalLM]:
    """The tiny Llama in bfloat16."""
    found = tiny("causal_lm")
    assert isinstance(found.task, CausalLM)
    return found.model.to(BFLOAT), found.request, found.task


def history(stage: Any, **settings: Any) -> list[dict[str, float]]:
    model, request, task = setting()
    return unlearn(model, request, task=task, method=stage, **settings).record["history"]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("how", ["teacher", "column", "adapter"])
def test_npo_starts_at_two_over_beta_log_two(how: str, beta: float) -> None:
    """To float32 where model and reference take the same path, in batches of the same shape; else to 1e-3 of a nat."""
    stage: Any = npo(beta=beta, steps=1, batch=20)
    stage = {"teacher": stage, "column": chain(CacheReference(), stage), "adapter": in_adapter(LoRA(2), stage)}[how]
    first = history(stage)[0]["loss/forget"]
    assert first == pytest.approx(2 / beta * math.log(2), rel=1e-6 if how == "teacher" else 1e-3)


@pytest.mark.parametrize("name", [name for name, spec in methods().items() if "causal_lm" in spec.tasks])
def test_every_method_keeps_the_precision_and_no_weight_becomes_nan(name: str) -> None:
    """A few steps each; whatever a method records is a number."""
    spec = methods()[name]
    model, request, task = setting()
    small = {"steps": 3, "epochs": 1, "batch": 8, "forget_batch": 8, "samples": 8}
    few = {key: value for key, value in small.items() if key in spec.settings()}
    request = Request(request.data("forget").select(range(8)), request.data("retain").select(range(16)))
    request = given(spec.needs, request, task)
    done = unlearn(model, request, task=task, method=spec.build(**few))
    kept = dict(model.named_parameters())
    for parameter_name, value in done.model.named_parameters():
        assert torch.isfinite(value).all(), parameter_name
        if parameter_name in kept:
            assert value.dtype == BFLOAT, parameter_name
    for row in done.record["history"]:
        assert all(math.isfinite(number) for number in row.values()), row


@pytest.mark.parametrize(
    "objective",
    [NLL(), NPO(), SimNPO(), DPO(), Distill(), WGA(), TNPO(), SatImp(), CEU(), UNDIAL()],
    ids=lambda objective: type(objective).__name__,
)
def test_losses_are_computed_in_float32(objective: Any) -> None:
    """Of the very logits that the model gives in bfloat16: equal to the same objective on these logits in float32."""
    model, request, task = setting()
    batch = request.data("forget").batch(torch.arange(20))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.1)
    values = {}
    for name in ("half", "wide"):
        case = Case(model, request, _Wide(task) if name == "wide" else task, Scope.all(model), {"original": teacher})
        drawn = objective.draw(case, batch, case.rng) if hasattr(objective, "draw") else batch
        with torch.no_grad():
            values[name] = per_example(case, objective, drawn)
    assert values["half"].dtype == torch.float32
    torch.testing.assert_close(values["half"], values["wide"], rtol=1e-6, atol=1e-7)


def _Wide(task: CausalLM) -> CausalLM:
    """The task with logits widened before anything is done with them."""

    def call(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()

    return CausalLM(task.vocab, task.refusals, call)


def test_a_loss_over_many_tokens_is_summed_in_float32() -> None:
    """In bfloat16 a sum of 400 nats stops growing by less than 2."""
    model, _, _ = setting()
    ids = torch.randint(2, 40, (1, 60), generator=torch.Generator().manual_seed(0))
    batch = {"id": torch.arange(1), "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
        found = CausalLM(40).nll(model, batch)
    assert float(found) == pytest.approx(float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")), rel=1e-6)


def test_adam_moves_bfloat16_weights_only_by_whole_steps_of_theirs() -> None:
    """Weights and moments in bfloat16: a step below 1/256 of a weight is rounded away, as the guide says, and in an
    adapter, which starts at 0, it is not."""
    model, request, task = setting()
    still, moved = (
        unlearn(model, request, task=task, method=method(steps=3, lr=1e-6, batch=20)) for method in (npo, simnpo)
    )
    for done in (still, moved):
        changed = [
            (p != before) & (before.abs() > 1e-3)
            for p, before in zip(done.model.parameters(), model.parameters(), strict=True)
        ]
        assert not any(bool(part.any()) for part in changed)
    adapted = unlearn(model, request, task=task, method=in_adapter(LoRA(2), npo(steps=3, lr=1e-2, batch=20)))
    assert any(not torch.equal(p, q) for p, q in zip(adapted.model.parameters(), model.parameters(), strict=True))


def test_data_and_model_of_the_caller_are_not_widened() -> None:
    model, request, task = setting()
    data: Data = request.data("forget")
    unlearn(model, request, task=task, method=npo(steps=1))
    assert {p.dtype for p in model.parameters()} == {BFLOAT}
    assert data.batch(torch.arange(2))["input_ids"].dtype == torch.int64
