"""Membership attacks on language models: batches, padding, masks, known answers, and a real model where there is one."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from expunge.attacks.gradient_norm import gradient_norms, lm_gradient_norm
from expunge.attacks.perturbation import NOISE, PREFIX, input_perturbation, prefixed, worst
from expunge.audit.language import (
    SHARES,
    compressed_sizes,
    lm_min_k,
    lm_min_k_plus,
    lm_reference,
    lm_zlib,
    min_k,
    min_k_plus,
    privacy_leakage,
    token_scores,
)
from expunge.audit.membership import membership_auc
from expunge.audit.report import measured
from expunge.audit.subject import Subject
from expunge.core import Case, Data, Key, Refused, Request
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import AdamW
from expunge.registry import asked_for
from expunge.scope import Scope
from expunge.store import Kept, Store
from expunge.tasks.causal_lm import IGNORED, CausalLM
from tests.fixtures import END, VOCAB, retrained, tiny, tokens

ATTACKS = (lm_zlib, lm_reference, lm_min_k, lm_min_k_plus, lm_gradient_norm)


def subject(after: nn.Module | None = None, **changes: Any) -> Subject:
    found = tiny("causal_lm", "random")
    references = tuple(retrained("causal_lm", "random", seed) for seed in (1, 2, 3))
    made = Subject(found.model, after or found.model, found.request, found.task, found.test, references)
    return replace(made, **changes)


@pytest.mark.parametrize("left", [False, True])
def test_batches_and_padding_change_no_score(left: bool) -> None:
    found = tiny("causal_lm")
    data = found.request.forget
    batch = data.batch(torch.arange(len(data)))
    wide = {}
    for name, filler in (("input_ids", END), ("attention_mask", 0), ("labels", IGNORED)):
        extra = torch.full((len(data), 3), filler)
        wide[name] = torch.cat([extra, batch[name]] if left else [batch[name], extra], 1)
    key = Key(1)
    once = token_scores(found.model, found.task, data, 100, key)
    for other in (
        token_scores(found.model, found.task, data, 1, key),
        token_scores(found.model, found.task, data, 7, key),
        token_scores(found.model, found.task, as_data(wide, ids=data.ids), 9, key),
    ):
        for name in ("min_k", "min_k_plus"):
            np.testing.assert_allclose(other[name], once[name], rtol=2e-5, atol=2e-5)
    assert once["min_k"].shape == (len(data), len(SHARES))


def test_only_answer_tokens_count_and_impossible_tokens_are_no_nan() -> None:
    """A brute force over positions in float64, with logits of minus infinity in it."""
    rng = np.random.default_rng(3)
    table = torch.tensor(4 * rng.normal(size=(5, 7, 6)))
    table[:, :, 5] = -torch.inf
    ids = torch.tensor(rng.integers(0, 5, (5, 7)))
    start = torch.tensor([1, 2, 3, 4, 6])
    labels = torch.where(torch.arange(7) >= start[:, None], ids, IGNORED)
    task = CausalLM(6, call=lambda model, batch: model[0].data[batch["id"]])
    batch = {"id": torch.arange(5), "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    said = task.token_statistics(nn.ParameterList([nn.Parameter(table)]), batch)
    assert said.mask.sum(1).tolist() == [6, 5, 4, 3, 1]
    for row in range(5):
        for place in range(6):
            p = np.exp(table[row, place].numpy() - np.logaddexp.reduce(table[row, place].numpy()))
            logs = np.log(p[:5])
            wanted = (
                (logs[ids[row, place + 1]], (p[:5] * logs).sum(), (p[:5] * logs**2).sum() - (p[:5] * logs).sum() ** 2)
                if place + 1 >= start[row]
                else (0.0, 0.0, 0.0)
            )
            seen = [float(part[row, place]) for part in (said.log_probs, said.mean, said.variance)]
            np.testing.assert_allclose(seen, wanted, rtol=1e-9, atol=1e-12)


def test_statistics_agree_with_the_loss() -> None:
    """Min-K at share 1 is the loss attack, which is membership_auc and not registered twice."""
    made = subject()
    reading = lm_min_k(made)
    assert reading.detail["auc_at_share_1"] == pytest.approx(membership_auc(made).value)
    assert reading.detail["auc_at_share_0.4"] == reading.value
    assert len(reading.curves["roc"][0]) == len(reading.curves["roc"][1])
    batch = made.request.forget.batch(torch.arange(5))
    with torch.no_grad():
        logs = made.task.token_statistics(made.after, batch).log_probs
        torch.testing.assert_close(-logs.sum(1), made.task.nll(made.after, batch))


def test_a_model_that_forgot_nothing_a_retrained_and_a_random_one() -> None:
    made = subject()
    untrained = tiny("causal_lm").make(9)
    for attack in ATTACKS:
        kept = attack(made)
        others = [attack(made.held_out(number)) for number in range(3)]
        assert kept.value > 0.9, attack.__name__
        assert kept.low > np.mean([other.value for other in others]), attack.__name__
        assert 0.2 < attack(made.judging(untrained)).value < 0.8, attack.__name__
    row = measured(made, "nothing", "method", also=("lm_gradient_norm",))
    for name in ("lm_zlib", "lm_reference", "lm_min_k", "lm_min_k_plus", "lm_gradient_norm"):
        assert row.readings[name].reference is not None, name
    assert row.readings["lm_min_k"].value > row.readings["lm_min_k"].reference[1]
    assert row.readings["lm_min_k"].detail["privacy_leakage"] < -50


def test_scores_are_the_formulas() -> None:
    made = subject()
    losses = {n: [made.outputs(n, m).loss for m in (made.after, *made.retrained)] for n in ("forget", "test")}
    scores = [np.mean(losses[name][1:], axis=0) - losses[name][0] for name in ("forget", "test")]
    truth = np.r_[np.ones(len(scores[0])), np.zeros(len(scores[1]))]
    assert lm_reference(made).value == pytest.approx(roc_auc_score(truth, np.concatenate(scores)))
    task = replace(made.task, decode=lambda ids: " ".join(map(str, ids)))
    spoken = replace(made, task=task, cache=type(made.cache)())
    scores = []
    for name in ("forget", "test"):
        batch = made.data(name).batch(torch.arange(len(made.data(name))))
        said = [[token for token in row.tolist() if token >= 0] for row in batch["labels"]]
        sizes = [len(zlib.compress(" ".join(map(str, row)).encode())) for row in said]
        scores.append(-losses[name][0] / sizes)
    reading = lm_zlib(spoken)
    assert reading.value == pytest.approx(roc_auc_score(truth, np.concatenate(scores)))
    assert reading.detail["of_text"] == 1.0
    assert lm_zlib(made).detail["of_text"] == 0.0
    assert privacy_leakage(0.9, 0.5) == pytest.approx(-80)
    assert privacy_leakage(0.5, 0.5) == 0
    assert privacy_leakage(0.2, 0.5) == pytest.approx(60)


def test_compressed_sizes_without_a_tokenizer_are_of_the_ids() -> None:
    data = as_data(tokens([([0], [5] * 30 + [END]), ([0], [7, END])]))
    wanted = [len(zlib.compress(bytes(ids))) for ids in ([5] * 30 + [END], [7, END])]
    assert compressed_sizes(CausalLM(VOCAB), data).tolist() == wanted


def test_gradient_norms_by_brute_force() -> None:
    """One backward pass per example; modes, flags and weights stay; the batch size is of no account."""
    found = tiny("causal_lm")
    data = found.request.forget.select(torch.arange(5))
    model = found.model.train()
    first = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = gradient_norms(model, found.task, data, 4, Key(0))
    again = gradient_norms(model, found.task, data, 1, Key(0))
    assert model.training
    assert not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval().requires_grad_(True)
    for row in range(5):
        batch = data.batch(torch.tensor([row]))
        loss = found.task.nll(model, batch).sum() / found.task.units(batch).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        whole = torch.stack([grad.square().sum() for grad in grads])
        assert scores["norm"][row] == pytest.approx(float(whole.sum().sqrt()), rel=1e-4)
        assert scores["by_tensor"][row] == pytest.approx(float(whole.sqrt().mean()), rel=1e-4)
    np.testing.assert_allclose(again["norm"], scores["norm"], rtol=1e-4)


def test_a_filled_store_needs_no_weights(tmp_path: Path) -> None:
    made = subject(store=Store(tmp_path))
    first = [attack(made).value for attack in ATTACKS]

    def kept(model: nn.Module) -> Kept:
        return Kept(made.address(model), lambda: pytest.fail("the store has it"))

    stored = replace(
        made,
        before=kept(made.before),
        after=kept(made.after),
        retrained=tuple(map(kept, made.retrained)),
        family=(),
        cache=type(made.cache)(),
    )
    assert [attack(stored).value for attack in ATTACKS] == first


def test_where_they_do_not_apply() -> None:
    found = tiny("classification")
    other = Subject(found.model, found.model, found.request, found.task, found.test)
    assert [attack(other) for attack in ATTACKS] == [None] * len(ATTACKS)
    assert lm_reference(subject(retrained=(), family=())) is None
    without = subject(test=None)
    without = replace(without, request=replace(without.request, valid=None))
    assert [attack(without) for attack in ATTACKS] == [None] * len(ATTACKS)
    assert "lm_gradient_norm" not in asked_for()
    assert "input_perturbation" not in asked_for()


def test_bad_input_is_refused() -> None:
    values, mask = np.zeros((2, 3)), np.ones((2, 3), bool)
    for share in (0.0, 1.5):
        with pytest.raises(Refused, match="share"):
            min_k(values, mask, share)
    with pytest.raises(Refused, match="one shape"):
        min_k(values, mask[:, :2])
    mask[1] = False
    with pytest.raises(Refused, match="1 rows without"):
        min_k_plus(values, values, values, mask)


# ---- disturbed inputs ----------------------------------------------------------------------------------------


def test_the_worst_strength_by_hand() -> None:
    lead = np.array([[0.0, 0.2], [1.0, 0.0], [0.3, 0.3]])
    assert worst(lead, np.ones(2)) == (pytest.approx(0.5), 1)
    assert worst(lead, np.array([0.0, 1.0])) == (pytest.approx(0.3), 2)


def test_a_prefix_leaves_the_answer_as_it_was() -> None:
    found = tiny("causal_lm")
    batch = found.request.forget.batch(torch.arange(6))
    pool = torch.arange(20, 30)
    longer = prefixed(batch, found.task, pool, 4, Key(2))
    plain, aligned = found.task.aligned(batch), found.task.aligned(longer)
    assert torch.equal(aligned["input_ids"][:, 4:], plain["input_ids"])
    assert torch.equal(aligned["labels"][:, 4:], plain["labels"])
    assert bool((aligned["labels"][:, :4] == IGNORED).all())
    steps = aligned["input_ids"][:, 1:4] - aligned["input_ids"][:, :3]
    assert bool(torch.isin(steps, torch.tensor([1, -9])).all()), "consecutive tokens of the pool"
    assert torch.equal(found.task.units(longer), found.task.units(batch))


class Masked(nn.Module):
    """A model that hides its answer where the input is exactly one of those given: forgetting by look-up."""

    def __init__(self, inner: nn.Module, hidden: Tensor):
        super().__init__()
        self.inner, self.hidden = inner, hidden

    def forward(self, x: Tensor) -> Tensor:
        found = (x[:, None] == self.hidden[None]).flatten(2).all(2).any(1)
        return torch.where(found[:, None], self.inner(x).flip(1), self.inner(x))


def test_forgetting_that_hangs_on_the_exact_input_comes_back() -> None:
    """All of class 3 to be forgotten: retrained models never name it; the masked one does as soon as there is noise."""
    found = tiny("classification")
    references = tuple(retrained("classification", seed=seed) for seed in (1, 2, 3))
    hidden = found.request.forget.batch(torch.arange(20))["x"]
    masked = Masked(found.model, hidden)
    made = Subject(found.model, masked, found.request, found.task, found.test, references)
    reading = input_perturbation(made)
    assert reading.detail["undisturbed"] == 0
    assert reading.value > 90
    assert reading.low > 50
    assert reading.detail["strength"] > 0
    assert reading.curves["unlearned"][0] == NOISE
    assert reading.curves["original"][1][0] == 100
    held = input_perturbation(made.held_out(0))
    assert held.value <= 5
    assert input_perturbation(replace(made, cache=type(made.cache)())) == reading, "the same draws again"
    assert input_perturbation(replace(made, key=Key(5), cache=type(made.cache)())) != reading


@pytest.mark.parametrize("name", ["regression", "causal_lm"])
def test_disturbing_numbers_and_prompts(name: str, global_randomness: Any) -> None:
    """Doing nothing leads by its undisturbed advantage at least; a retrained model does not lead."""
    found = tiny(name, "random")
    references = tuple(retrained(name, "random", seed) for seed in (1, 2, 3))
    made = Subject(found.model, found.model, found.request, found.task, found.test, references)
    reading = input_perturbation(made)
    losses = [made.outputs("forget", model) for model in (found.model, *references)]
    each = [np.average(one.loss, weights=one.units) for one in losses]
    assert reading.detail["undisturbed"] == pytest.approx(np.mean(each[1:]) - each[0], abs=1e-5)
    assert reading.value >= reading.detail["undisturbed"]
    assert reading.low > 0
    assert input_perturbation(made.held_out(0)).low < 0
    assert len(reading.curves["retrained"][1]) == len(PREFIX if name == "causal_lm" else NOISE)
    assert global_randomness.unchanged()


def test_perturbation_where_it_does_not_apply() -> None:
    found = tiny("diffusion")
    assert (
        input_perturbation(Subject(found.model, found.model, found.request, found.task, None, (found.model,))) is None
    )
    assert input_perturbation(subject(retrained=(), family=())) is None


# ---- a real language model -----------------------------------------------------------------------------------


def stories(texts: list[str], folder: Path) -> list[list[int]]:
    """Token ids by the longest piece that fits, which is enough for a test."""
    pieces = json.loads((folder / "tok512.json").read_text())["tokens"]
    known = {piece: number for number, piece in enumerate(pieces) if number > 258}
    longest = max(map(len, known))
    found = []
    for text in texts:
        ids, at = [1], 0
        while at < len(text):
            size = next((n for n in range(longest, 0, -1) if text[at : at + n] in known), 0)
            ids.append(known[text[at : at + size]] if size else 3 + text.encode()[at])
            at += max(size, 1)
        found.append(ids)
    return found


@pytest.mark.skipif("EXPUNGE_DATA" not in os.environ, reason="EXPUNGE_DATA does not say where the real data are")
def test_a_real_model_gives_its_training_text_away() -> None:
    """Fine-tuned on some texts: members are told from others, and after training on none of them they are not."""
    root = Path(os.environ["EXPUNGE_DATA"])
    folder, book = root / "stories260K", root / "text/tinyshakespeare.txt"
    if not (folder.is_dir() and book.is_file()):
        pytest.skip("EXPUNGE_DATA has no stories260K and no text")
    pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM

    text = book.read_text()[:40_000].encode("ascii", "ignore").decode()
    parts = [text[start : start + 160] for start in range(0, len(text) - 160, 160)]
    order = torch.randperm(len(parts), generator=Key(1).generator()).tolist()
    ids = [row[:48] for row in stories([parts[place] for place in order[:180]], folder)]
    everything = as_data(
        {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), 48, dtype=torch.int64),
            "labels": torch.tensor(ids),
        }
    )
    forget, retain, test = (everything.select(range(*ends)) for ends in ((0, 60), (60, 120), (120, 180)))
    task = CausalLM(512)

    def tuned(data: Data, seed: int) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(folder).eval()
        case = Case(model, Request(retain=data), task, Scope.all(model), rng=Key(seed))
        Descend(retain=NLL(), optimizer=AdamW(3e-3), steps=40, batch=30)(case)
        return model

    model, others = tuned(everything.select(range(120)), 0), tuple(tuned(retain, seed) for seed in (1, 2))
    made = Subject(model, model, Request(forget, retain), task, test, others)
    for attack in (membership_auc, *ATTACKS):
        kept, held = attack(made), attack(made.held_out(0))
        assert kept.low > 0.55, f"{attack.__name__}: {kept}"
        assert kept.low > held.value, f"{attack.__name__}: {kept} beside {held}"
        assert abs(held.value - 0.5) < 0.17, f"{attack.__name__}: {held}"  # 3.2 standard errors of 60 against 60 texts
