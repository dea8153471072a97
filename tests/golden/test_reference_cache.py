"""References cached for every method that asks the original model: the same run as with a teacher, and no second copy."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge.core import Case, Key, Request, Stage
from expunge.journal import load_tree
from expunge.methods.idk_dpo import idk_dpo
from expunge.methods.kl import kl
from expunge.methods.npo import npo
from expunge.methods.prune_first import prune_first
from expunge.methods.tnpo import tnpo
from expunge.methods.undial import undial
from expunge.preference import DPO
from expunge.reference import CacheReference
from expunge.single import Cached, lean
from expunge.token_objectives import TNPO
from expunge.wrap import LoRA, in_adapter
from tests.fixtures import VOCAB, tiny
from tests.golden.tiny_llama import FORGET, REFUSALS, RETAIN, batch_of, by_formula

TASK = ex.CausalLM(VOCAB, refusals=((39, 38, 1), (37, 1), (38, 37, 36, 1)))


def asked() -> Request:
    """Three forget and two retain examples, padded wider than any of them."""
    forget, retain = batch_of(FORGET, 12), batch_of(RETAIN, 12)
    return Request(ex.as_data(_plain(forget)), ex.as_data(_plain(retain), ids=[10, 11]))


def _plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: column for name, column in batch.items() if name != "id"}


def with_win() -> Request:
    request = asked()
    win = {name: column for name, column in batch_of(REFUSALS, 9).items() if name != "id"}
    forget = ex.as_data({**_plain(request.forget.batch(torch.arange(3))), "win": win})
    return replace(request, forget=forget)


def case_of(model: nn.Module, request: Request, **more: Any) -> Case:
    return Case(model, request, TASK, ex.Scope.all(model), **more)


def by_hand(model: nn.Module, prompt: list[int], answer: list[int]) -> list[float]:
    """-log p of each answer token, one forward without padding each."""
    found = []
    for place, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:place]])).logits[0, -1].double()
        found.append(-float(logits.log_softmax(0)[token]))
    return found


@torch.no_grad()
def test_columns_are_what_the_model_says_by_hand() -> None:
    """Tokens in the order of ``labels``; every refusal of the list after each prompt; sums, not means."""
    model = by_formula(0.3).double()
    data = CacheReference(tokens=True, preferred=True, batch=2)(case_of(model, asked())).request.forget
    columns = data.columns
    labels = TASK.labels(data.batch(torch.arange(3)))
    for row, (prompt, answer) in enumerate(FORGET):
        each = by_hand(model, prompt, answer)
        assert float(columns["reference"][row]) == pytest.approx(sum(each), rel=1e-9)
        assert columns["reference_tokens"][row][labels[row] != -100].tolist() == pytest.approx(each, rel=1e-9)
        expected = [sum(by_hand(model, prompt, list(refusal))) for refusal in TASK.refusals]
        assert columns["refusal_references"][row].tolist() == pytest.approx(expected, rel=1e-9)
    told = CacheReference(preferred=True)(case_of(model, with_win())).request.forget.columns
    expected = [sum(by_hand(model, *pair)) for pair in REFUSALS]
    assert told["win_reference"].tolist() == pytest.approx(expected, rel=1e-9)
    assert "refusal_references" not in told


METHODS: dict[str, tuple[Any, Any]] = {
    "npo": (npo, asked),
    "tnpo": (tnpo, asked),
    "wtnpo": (lambda **more: tnpo(extra=1.5, **more), asked),
    "idk_dpo, drawn refusals": (idk_dpo, asked),
    "idk_dpo, given answers": (idk_dpo, with_win),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_a_lean_run_is_the_run_with_a_teacher_and_holds_one_model(name: str) -> None:
    """Weights after five steps agree to rounding; the caller's model is the one that changed; no teacher was there."""
    build, request = METHODS[name]
    stage = build(steps=5, batch=2, lr=1e-3)
    model = by_formula(0.3).double()
    expected = ex.unlearn(copy.deepcopy(model), request(), task=TASK, method=stage, seed=3)
    ready = lean(stage, request(), TASK)
    done = ex.unlearn(model, request(), task=TASK, method=ready, seed=3, copy=False)
    assert done.model is model
    assert not done.case.teachers
    assert (done.record["method"], done.record["paper"]) == (stage.name, expected.record["paper"])
    losses = [[row["loss/forget"] for row in run.record["history"]] for run in (expected, done)]
    assert losses[0] != [losses[0][0]] * 5
    # Cached sets its own seed aside, so its batches are those of the second stage of a chain
    again = ex.unlearn(
        by_formula(0.3).double(), request(), task=TASK, method=ex.chain(lambda case: _skip(case), stage), seed=3
    )
    for (parameter, value), other in zip(model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=lambda text, p=parameter: f"{p}: {text}")


def _skip(case: Case) -> Case:
    """A stage that takes a seed and does nothing."""
    return replace(case, rng=case.rng.take()[1])


@pytest.mark.parametrize("build", [kl, undial])
def test_what_asks_the_original_about_every_batch_is_refused_or_runs_in_an_adapter(build: Any) -> None:
    stage = build(steps=2, batch=2)
    with pytest.raises(ex.Refused, match=r"asks the original model about every batch.*adapter.*copy=True"):
        lean(stage, asked(), TASK)
    carried = in_adapter(LoRA(2), stage)
    assert lean(carried, asked(), TASK) is carried
    model = by_formula(0.3)
    done = ex.unlearn(model, asked(), task=TASK, method=carried, copy=False)
    assert done.model is model
    assert len(done.record["history"]) == 2


def test_a_refusal_drawn_without_a_list_is_refused() -> None:
    task = ex.CausalLM(VOCAB)
    with pytest.raises(ex.Refused, match="drawn anew at every step"):
        lean(idk_dpo(), asked(), task)
    model = by_formula(0.3)
    with pytest.raises(ex.Refused, match="no answers to ask about"):
        CacheReference(preferred=True)(Case(model, asked(), task, ex.Scope.all(model)))


def test_nothing_is_cached_where_nothing_is_asked_or_all_is_there() -> None:
    from expunge.methods.simnpo import simnpo

    plain = simnpo()
    assert lean(plain, asked(), TASK) is plain
    request = asked()
    request = replace(request, forget=request.forget.annotate("reference", torch.zeros(3)))
    stage = npo()
    assert lean(stage, request, TASK) is stage
    ready = lean(ex.chain(npo(), tnpo()), asked(), TASK)
    assert isinstance(ready, Cached)
    assert ready.reference.tokens
    assert isinstance(lean(in_adapter(LoRA(2), npo()), asked(), TASK), Cached), (
        "a cached column saves the teacher's pass"
    )


def test_a_method_that_another_runs_is_asked_too() -> None:
    """Pruned first: the reference is that of the model before the pruning, as the teacher would be."""
    found = tiny("classification")
    given = {"request": found.request, "task": found.task}
    stage = prune_first(inner=npo(steps=2, batch=100), steps=1, batch=100)  # whole: the order is another one
    ready = lean(stage, found.request, found.task)
    assert isinstance(ready, Cached), "the method inside prune_first asks the original model"
    with_teacher = ex.unlearn(found.model, method=stage, **given)
    alone = ex.unlearn(tiny("classification").model, method=ready, copy=False, **given)
    for name, p in with_teacher.model.named_parameters():
        torch.testing.assert_close(alone.model.get_parameter(name), p, rtol=1e-5, atol=1e-6)
    with pytest.raises(ex.Refused, match="kl asks the original model about every batch"):
        lean(prune_first(inner=kl()), found.request, found.task)


def test_noise_cannot_be_cached() -> None:
    found = tiny("diffusion")
    with pytest.raises(ex.Refused, match="method npo"):
        lean(npo(), found.request, found.task)


def test_a_cached_token_loss_is_as_wide_as_the_batch_that_reads_it() -> None:
    """Ragged data give batches of their own width: behind the answer stand zeros, which are cut or filled up."""
    model = by_formula(0.3)
    batch, objective = batch_of(FORGET), TNPO()
    case = case_of(model, asked(), teachers={"original": by_formula(0.7)})
    told = objective.draw(case, batch, Key(0))["teacher_tokens"]
    wide = torch.cat([told, torch.zeros(3, 4)], 1)
    narrow = batch_of(FORGET[:1])
    for cached, one in ((wide, batch), (told, batch_of(FORGET, 20))):
        drawn = objective.draw(case, {**one, "reference_tokens": cached}, Key(0))
        assert torch.equal(objective(case, drawn), objective(case, objective.draw(case, one, Key(0))))
    short = objective.draw(case, {**narrow, "reference_tokens": wide[:1]}, Key(0))["teacher_tokens"]
    assert short.shape == TASK.labels(narrow).shape


def test_the_drawn_refusal_finds_its_own_reference() -> None:
    """Each step draws others: the reference is that of the one drawn, and of the example, whatever the slice."""
    model = by_formula(0.3)
    case = case_of(model, asked(), teachers={"original": by_formula(0.7)})
    told = CacheReference(preferred=True)(replace(case, model=by_formula(0.7)))
    batch = told.request.forget.batch(torch.tensor([2, 0, 1]))
    seen = set()
    for seed in range(6):
        cached = DPO().draw(replace(case, teachers={}), batch, Key(seed))
        asked_anew = DPO().draw(case, batch_of([FORGET[2], FORGET[0], FORGET[1]], 12), Key(seed))
        seen.add(tuple(cached["win"]["refusal"].tolist()))
        torch.testing.assert_close(cached["win"]["reference"], asked_anew["win"]["reference"])
        torch.testing.assert_close(cached["reference"], asked_anew["reference"])
    assert len(seen) > 2


def test_references_of_another_list_are_refused() -> None:
    model = by_formula(0.3)
    batch = {**batch_of(FORGET), "refusal_references": torch.zeros(3, 1), "reference": torch.zeros(3)}
    draws = (DPO().draw(case_of(model, asked()), batch, Key(seed)) for seed in range(5))
    with pytest.raises(ex.Refused, match="another list"):
        list(draws)


class Asked:
    """Counts the rows that a model is asked about."""

    def __init__(self, model: nn.Module):
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: nn.Module, _args: Any, named: dict[str, Tensor]) -> None:
        self.rows += len(named["input_ids"])


def run(stage: Stage, out: Path | None, shift: float = 0.3, request: Request | None = None) -> tuple[ex.Outcome, int]:
    model = by_formula(shift)
    asked_rows = Asked(model)
    done = ex.unlearn(model, request or asked(), task=TASK, method=stage, out=out, copy=False)
    return done, asked_rows.rows


def test_the_file_is_used_again_only_for_the_same_model_data_and_task(tmp_path: Path) -> None:
    store = tmp_path / "store"
    stage = ex.chain(CacheReference(tokens=True, folder=str(store)), npo(steps=0))
    first, rows = run(stage, None)
    (file,) = store.iterdir()
    assert file.suffix == ".safetensors"
    assert set(load_tree(file)) == {"reference", "reference_tokens"}
    second, fewer = run(stage, None)
    assert rows - fewer == 3, "the same run asks nothing"
    for name, column in first.case.request.forget.columns.items():
        assert torch.equal(column, second.case.request.forget.columns[name])
    _, more = run(stage, None, shift=0.4)
    assert more == rows, "another model is asked anew"
    other = asked()
    other = replace(other, forget=other.forget.select([0, 2]))
    run(stage, None, request=other)
    run(ex.chain(CacheReference(folder=str(store)), npo(steps=0)), None)
    assert len(list(store.iterdir())) == 4, "one file for each model, data and question"


def test_a_run_with_a_folder_keeps_its_references_there_and_a_broken_file_is_named(tmp_path: Path) -> None:
    stage = lean(npo(steps=1, batch=2), asked(), TASK)
    run(stage, tmp_path / "run")
    (file,) = (tmp_path / "run").glob("reference-*.safetensors")
    (tmp_path / "other").mkdir()
    shared = CacheReference(folder=str(tmp_path / "other"))
    (tmp_path / "other" / file.name).write_bytes(file.read_bytes()[:50])
    with pytest.raises(ex.Refused, match=r"reference-.*not a whole"):
        run(ex.chain(shared, npo(steps=1, batch=2)), None)
