"""Every task against independent arithmetic: closed forms, brute force over tokens, finite differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from expunge.core import Batch, Case, Key, Refused, map_tensors, rows_of
from expunge.data.sources import as_data
from expunge.objectives import Margin, RandomLabel
from expunge.scope import Scope
from expunge.tasks.causal_lm import CausalLM
from expunge.tasks.classification import Classification
from expunge.tasks.diffusion import Cosine, Diffusion, LinearBetas
from expunge.tasks.regression import Regression
from tests.fixtures import NAMES, Tiny, llama, odd, retrained, seeded, sentences, tiny, tokens

torch.set_num_threads(1)
ALL = (*NAMES, "odd")


def drawn(name: str, rows: int = 9) -> tuple[Tiny, Batch]:
    """A tiny model and a prepared batch of retain and forget examples."""
    found = tiny(name)
    batch = found.request.forget.batch(torch.arange(rows))
    return found, found.task.prepare(batch, Key(1))


def case_of(found: Tiny) -> Case:
    return Case(found.model, found.request, found.task, Scope.all(found.model))


@pytest.mark.parametrize("name", ALL)
def test_losses_are_one_number_per_example_and_nothing_is_drawn_globally(name: str, poisoned_randomness: Any) -> None:
    found, batch = drawn(name)
    task, model = found.task, found.model
    with torch.no_grad():
        values = task.nll(model, batch)
        assert values.shape == task.units(batch).shape == (9,)
        assert torch.equal(values, task.nll(model, batch))
        assert (values >= 0).all()
        assert (task.units(batch) >= 1).all()
        assert math.isfinite(task.chance(batch))
        assert len(task.outputs(model, batch)) == 9
        task.relabel(batch, Key(2))
    for data in (found.request.forget, found.request.retain, found.request.valid, found.test):
        task.check(data, "some")


def test_units_are_unequal_where_a_task_has_them() -> None:
    found, batch = drawn("causal_lm")
    assert len(set(found.task.units(batch).tolist())) > 1
    assert set(drawn("regression")[0].task.units(batch={"y": torch.zeros(3, 2), "id": torch.arange(3)}).tolist()) == {
        2.0
    }
    assert drawn("diffusion")[0].task.units(drawn("diffusion")[1])[0] == 64


@pytest.mark.parametrize("name", ALL)
def test_slices_are_the_whole(name: str) -> None:
    found, batch = drawn(name)
    model = found.model.double()
    batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    with torch.no_grad():
        target = found.task.outputs(model, batch) + 0.1
        whole = found.task.nll(model, batch), found.task.divergence(model, batch, target)
        pieces = [map_tensors(lambda t, i=i: t[i], batch) for i in (slice(0, 4), slice(4, 5), slice(5, 9))]
        cut = (
            torch.cat([found.task.nll(model, piece) for piece in pieces]),
            torch.cat(
                [found.task.divergence(model, p, t) for p, t in zip(pieces, target.split([4, 1, 4]), strict=True)]
            ),
        )
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_divergence_is_zero_at_itself_and_positive_elsewhere(name: str) -> None:
    found, batch = drawn(name)
    other = found.make(5).eval()
    with torch.no_grad():
        target = found.task.outputs(found.model, batch)
        assert found.task.divergence(found.model, batch, target).abs().max() <= 1e-6
        assert (found.task.divergence(other, batch, target) > 1e-3).all()
        assert (found.task.divergence(other, batch, target, temperature=3.0) > 1e-4).all()


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """In float64; a Llama computes its norms in float32, so a plain table of bigrams stands in for it."""
    found, batch = drawn(name, rows=4)
    model = (seeded(Bigrams)(0) if name == "causal_lm" else found.model).double()
    batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    other = gpt2() if name == "causal_lm" else found.make(5)
    wanted = found.task.outputs(other.double().eval(), batch).detach()
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = Key(8).generator()
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def loss(shift: float = 0.0) -> Tensor:
        with torch.no_grad():
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.add_(step, alpha=shift)
        return found.task.nll(model, batch).sum() + found.task.divergence(model, batch, wanted).sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), parameters), direction, strict=True))
    step = 1e-6
    with torch.no_grad():
        measured = (loss(step) - loss(-2 * step)) / (2 * step)
    assert float(measured) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_answer_is_never_the_truth(name: str, seed: int) -> None:
    found, batch = drawn(name, rows=20)
    wrong = found.task.relabel({**batch, "reference": torch.zeros(20)}, Key(seed))
    assert torch.equal(wrong["id"], batch["id"])
    if name == "causal_lm":
        assert all(a != b for a, b in zip(answers(wrong), answers(batch), strict=True))
        assert all(a == b for a, b in zip(prompts(wrong), prompts(batch), strict=True))
    elif name == "regression":
        assert ((wrong["y"] - batch["y"]).square().mean(1).sqrt() >= 0.5 - 1e-6).all()
    else:
        assert (wrong["y"] != batch["y"]).all()
        assert len(set(wrong["y"].tolist())) == 4
    if name != "classification" and name != "odd":
        assert "reference" not in wrong


def answers(batch: Batch) -> list[list[int]]:
    return [row[label != -100].tolist() for row, label in zip(batch["input_ids"], batch["labels"], strict=True)]


def prompts(batch: Batch) -> list[list[int]]:
    return [
        row[(label == -100) & (mask == 1)].tolist()
        for row, label, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_fixture_remembers_what_the_retrained_model_does_not(name: str) -> None:
    found, again = tiny(name), retrained(name)
    batch = found.task.prepare(found.request.forget.batch(torch.arange(20)), Key(4))
    with torch.no_grad():
        before, after = (
            float(found.task.nll(m, batch).sum() / found.task.units(batch).sum()) for m in (found.model, again)
        )
    assert before < 0.5 * found.task.chance(found.request.retain.batch(torch.arange(80)))
    assert after > 2 * before
    assert len(found.request.forget), len(found.request.retain) == (20, 80)


# Regression


def test_regression_is_the_gaussian_likelihood_up_to_its_constant() -> None:
    task, model = Regression(scale=2.5), nn.Linear(3, 2)
    x, y = torch.randn(6, 3, generator=Key(0).generator()), torch.randn(6, 2, generator=Key(1).generator())
    normal = torch.distributions.Normal(model(x), 2.5)
    constant = -torch.distributions.Normal(0.0, 2.5).log_prob(torch.zeros(()))
    expected = (-normal.log_prob(y) - constant).sum(1)
    torch.testing.assert_close(task.nll(model, {"x": x, "y": y, "id": torch.arange(6)}), expected)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(y, 2.5), normal).sum(1)
    torch.testing.assert_close(task.divergence(model, {"x": x, "y": y, "id": torch.arange(6)}, y), kl)


def test_regression_chance_is_the_loss_of_the_mean() -> None:
    y = torch.randn(50, 3, generator=Key(1).generator()) * 4
    expected = float(((y - y.mean(0)) ** 2).mean() / (2 * 3.0**2))
    assert Regression(scale=3.0).chance({"y": y, "id": torch.arange(50)}) == pytest.approx(expected, rel=1e-6)
    assert Regression(scale=3.0, variance=18.0).chance({}) == 1.0


def test_a_column_of_predictions_is_not_broadcast_against_a_row_of_targets() -> None:
    model, x, y = nn.Linear(3, 1), torch.ones(4, 3), torch.arange(4.0)
    values = Regression().nll(model, {"x": x, "y": y, "id": torch.arange(4)})
    torch.testing.assert_close(values, (model(x).squeeze(1) - y) ** 2 / 2)
    with pytest.raises(Refused, match="predictions of shape"):
        Regression().nll(nn.Linear(3, 2), {"x": x, "y": y, "id": torch.arange(4)})


def test_a_wrong_target_is_anothers_or_where_all_are_near_a_shift() -> None:
    task = Regression(apart=1.0)
    spread = {"x": torch.zeros(4, 1), "y": torch.tensor([0.0, 5.0, 10.0, 10.2]), "id": torch.arange(4)}
    seen = [task.relabel(spread, Key(seed))["y"] for seed in range(40)]
    assert {float(value) for draw in seen for value in draw} == {float(v) for v in spread["y"]}
    assert all(float(draw[2]) in (0.0, 5.0) for draw in seen)
    near = {**spread, "y": torch.tensor([1.0, 1.1, 1.2, 1.3])}
    torch.testing.assert_close((task.relabel(near, Key(0))["y"] - near["y"]).abs(), torch.ones(4))


@pytest.mark.parametrize(
    ("y", "sentence"),
    [
        (torch.tensor([1.0, math.nan, 2.0]), "NaN or infinite targets, first at id 1"),
        (torch.tensor([1.0, 2.0, math.inf]), "first at id 2"),
        (torch.zeros(3, 2, 2), "shape"),
        (torch.zeros(3, dtype=torch.bool), "bool"),
    ],
)
def test_regression_refuses_bad_targets(y: Tensor, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        Regression().check(as_data({"x": torch.zeros(3, 2), "y": y}), "forget")


def test_bad_settings_are_refused() -> None:
    for build in (
        lambda: Regression(scale=0.0),
        lambda: Regression(variance=-1.0),
        lambda: CausalLM(1),
        lambda: Diffusion(1, (4,)),
        lambda: CausalLM(10, refusals=((),)),
        lambda: CausalLM(10, refusals=((10,),)),
        lambda: LinearBetas(0.5, 0.1),
    ):
        with pytest.raises(Refused):
            build()


# Causal language models


def by_hand(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """-log p(answer | prompt), one token at a time, one forward each, no padding, no batch."""
    total = 0.0
    for place, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:place]])).logits[0, -1]
        total -= float(logits.double().log_softmax(0)[token])
    return total


@torch.no_grad()
def test_nll_is_the_sum_over_answer_tokens_one_forward_each() -> None:
    found = tiny("causal_lm")
    pairs = sentences()[:7]
    batch = {**tokens(pairs), "id": torch.arange(7)}
    expected = torch.tensor([by_hand(found.model, prompt, answer) for prompt, answer in pairs])
    torch.testing.assert_close(found.task.nll(found.model, batch), expected, rtol=1e-4, atol=1e-5)
    assert found.task.units(batch).tolist() == [len(answer) for _, answer in pairs]
    each = found.task.token_nll(found.model, batch)
    torch.testing.assert_close(each.sum(1), expected, rtol=1e-4, atol=1e-5)
    assert found.task.chance(batch) == math.log(40)


def left(batch: Batch, extra: int) -> Batch:
    """The same examples with all padding, and `extra` more, on the left."""
    width = batch["input_ids"].shape[1] + extra
    out = {"id": batch["id"]}
    for name, filler in (("input_ids", 1), ("attention_mask", 0), ("labels", -100)):
        rows = [row[: int(mask.sum())].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]
        out[name] = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_padding_changes_nothing(kind: str) -> None:
    """On either side, any amount, any filler, and with the end token masked; GPT-2 has absolute positions."""
    model, task = (tiny("causal_lm").model if kind == "llama" else gpt2()).double(), CausalLM(40)
    pairs = sentences()[:7]
    plain = {**tokens(pairs), "id": torch.arange(7)}
    wider = {**tokens(pairs, width=20), "id": torch.arange(7)}
    filler = {**wider, "input_ids": torch.where(wider["attention_mask"] == 0, 33, wider["input_ids"])}
    hidden = {**wider, "attention_mask": (wider["input_ids"] != 1).long()}  # pad == end: the real end is masked too
    hidden_left = left(plain, 3)
    hidden_left["attention_mask"] = (hidden_left["input_ids"] != 1).long()
    target = gpt2(3).double()
    values, distance = task.nll(model, plain), task.divergence(model, plain, task.outputs(target, plain))
    for other in (wider, filler, hidden, left(plain, 0), left(plain, 5), hidden_left):
        assert torch.equal(task.units(other), task.units(plain))
        torch.testing.assert_close(task.nll(model, other), values, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            task.divergence(model, other, task.outputs(target, other)), distance, rtol=1e-9, atol=1e-9
        )


def gpt2(seed: int = 0) -> nn.Module:
    """A GPT-2 of one layer, random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    return seeded(lambda: GPT2LMHeadModel(config))(seed).eval()


@torch.no_grad()
def test_divergence_is_kl_on_answer_positions_only() -> None:
    found = tiny("causal_lm")
    teacher = gpt2()
    pairs = sentences()[:5]
    batch = {**tokens(pairs), "id": torch.arange(5)}
    expected = []
    for prompt, answer in pairs:
        ids = torch.tensor([prompt + answer])
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        p, q = (
            torch.distributions.Categorical(logits=m(input_ids=ids).logits[0].double()) for m in (teacher, found.model)
        )
        every = torch.distributions.kl_divergence(p, q)
        expected.append(float(every[list(places)].sum()))
    values = found.task.divergence(found.model, batch, found.task.outputs(teacher, batch))
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-4)


class Bigrams(nn.Module):
    """A plain module of token ids that returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_plain_modules_dicts_wrappers_and_wrong_shapes() -> None:
    plain, batch = seeded(Bigrams)(0), {**tokens(sentences()[:3]), "id": torch.arange(3)}

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            assert set(kwargs) == {"input_ids", "attention_mask"}
            return {"logits": self.inner(kwargs["input_ids"])}

    task, values = CausalLM(40), CausalLM(40).nll(plain, batch)
    prompt, answer = sentences()[0]
    table = plain.table.weight.detach().log_softmax(1)
    chain = [*prompt[-1:], *answer]
    assert float(values[0].detach()) == pytest.approx(
        -float(sum(table[a, b] for a, b in itertools.pairwise(chain))), rel=1e-5
    )
    assert torch.equal(task.nll(Wrapper(), batch), values)
    called = CausalLM(40, call=lambda model, batch: model(batch["input_ids"]))
    assert torch.equal(called.nll(plain, left(batch, 4)), values)
    with pytest.raises(Refused, match="logits of shape"):
        CausalLM(41).nll(plain, batch)
    with pytest.raises(Refused, match="without logits"):
        CausalLM(40).nll(_Silent(), batch)


class _Silent(nn.Module):
    def forward(self, ids: Tensor) -> tuple[int, int]:
        return (1, 2)


def test_half_precision_logits_are_summed_in_single_precision() -> None:
    model, batch = gpt2(), {**tokens(sentences()[:4]), "id": torch.arange(4)}
    half = gpt2().bfloat16()
    values = CausalLM(40).nll(half, batch)
    assert values.dtype == torch.float32
    logits = CausalLM(40).logits(half, batch).float().log_softmax(-1)
    labels = CausalLM(40).labels(batch)
    expected = -(logits.gather(2, labels.clamp_min(0)[..., None]).squeeze(2) * (labels != -100)).sum(1)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values, CausalLM(40).nll(model, batch), rtol=0.02, atol=0.05)


def test_refusals_are_pasted_after_the_prompt() -> None:
    pairs = [*sentences()[:6], ([0, 5, 6], [37, 1])]
    batch = left({**tokens(pairs), "id": torch.arange(7)}, 2)
    refusals = ((37, 1), (38, 38, 38, 38, 38, 38, 38, 1))
    seen = set()
    for seed in range(20):
        wrong = CausalLM(40, refusals).relabel(batch, Key(seed))
        assert prompts(wrong) == [prompt for prompt, _ in pairs]
        assert {tuple(answer) for answer in answers(wrong)} <= set(refusals)
        assert answers(wrong)[6] == list(refusals[1])  # the other one is its truth
        seen |= {tuple(answer) for answer in answers(wrong)}
        CausalLM(40).check(as_data({k: v for k, v in wrong.items() if k != "id"}), "wrong")
    assert seen == set(refusals)
    carried = {**batch, "refusals": torch.tensor([[[30, 1, -100], [-100, -100, -100]]]).expand(7, 2, 3)}
    assert answers(CausalLM(40, refusals).relabel(carried, Key(0))) == [[30, 1]] * 7
    with pytest.raises(Refused, match="example 6"):
        CausalLM(40, ((37, 1),)).relabel(batch, Key(0))


def test_random_answers_differ_from_the_truth_at_every_token() -> None:
    batch = {**tokens(sentences()[:30]), "id": torch.arange(30)}
    wrong = CausalLM(40).relabel(left(batch, 3), Key(0))
    pairs = list(zip(answers(wrong), answers(batch), strict=True))
    assert all(len(a) == len(b) and all(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs)
    assert prompts(wrong) == prompts(batch)
    many = [answers(CausalLM(40).relabel(batch, Key(seed))) for seed in range(10)]
    assert {token for rows in many for answer in rows for token in answer} == set(range(40))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": lambda b: torch.full_like(b["labels"], -100)}, "example 10 has no answer token"),
        (
            {"labels": lambda b: torch.where(torch.arange(len(b["labels"]))[:, None] == 1, -100, b["labels"])},
            "example 11 has no answer",
        ),
        ({"labels": lambda b: b["labels"].roll(-1, 1)}, "unshifted"),
        ({"input_ids": lambda b: b["input_ids"] + 20}, "outside the vocabulary"),
        ({"attention_mask": lambda b: b["attention_mask"] * 2}, "not 0 or 1"),
        (
            {"attention_mask": lambda b: b["attention_mask"].clone().index_fill_(1, torch.tensor([1]), 0)},
            "padding between",
        ),
        ({"attention_mask": lambda b: b["attention_mask"][:, :-1]}, "expected whole numbers"),
        ({"labels": lambda b: b["labels"].float()}, "expected whole numbers"),
    ],
)
def test_causal_lm_refuses_bad_data(change: dict[str, Any], sentence: str) -> None:
    batch = tokens(sentences()[:5])
    changed = {**batch, **{name: make(batch) for name, make in change.items()}}
    data = as_data(_Raw(changed), ids=range(10, 15))
    with pytest.raises(Refused, match=sentence):
        CausalLM(40).check(data, "forget")


class _Raw:
    """A map-style dataset over columns, which need not have one width."""

    def __init__(self, columns: Batch):
        self.columns = columns

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> Batch:
        return {name: value[row] for name, value in self.columns.items()}


def test_a_missing_column_is_named() -> None:
    for task, columns in (
        (CausalLM(40), {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}),
        (Regression(), {"x": torch.zeros(2, 3)}),
        (Diffusion(3, (3,)), {"x": torch.zeros(2, 3)}),
    ):
        with pytest.raises(Refused, match="has no column"):
            task.check(as_data(columns), "forget")


def test_margin_refuses_a_task_with_many_labels_per_example() -> None:
    found, batch = drawn("causal_lm")
    with pytest.raises(Refused, match="class logits"):
        Margin()(case_of(found), batch)


# Diffusion


@torch.no_grad()
def test_the_loss_is_the_summed_squared_error_of_the_noise() -> None:
    found, batch = drawn("diffusion")
    task, model = found.task, found.model
    kept = 1.0
    for time in range(int(batch["t"][0]) + 1):
        kept *= 1 - (1e-3 + (0.1 - 1e-3) * time / 99)
    noised = math.sqrt(kept) * batch["x"][:1] + math.sqrt(1 - kept) * batch["noise"][:1]
    expected = ((model(noised, batch["t"][:1], batch["y"][:1]) - batch["noise"][:1]) ** 2).sum()
    assert float(task.nll(model, batch)[0]) == pytest.approx(float(expected), rel=1e-5)

    class Nothing(nn.Module):
        def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return torch.zeros_like(images)

    many = task.prepare(
        {"x": torch.zeros(4000, 1, 8, 8), "y": torch.zeros(4000).long(), "id": torch.arange(4000)}, Key(0)
    )
    ignorant = task.nll(Nothing(), many) / task.units(many)
    assert float(ignorant.mean()) == pytest.approx(task.chance(many), abs=4 * math.sqrt(2 / (4000 * 64)))
    assert many["t"].min() == 0
    assert many["t"].max() == 99


def test_prepare_is_a_function_of_its_key_and_raw_batches_are_refused() -> None:
    found = tiny("diffusion")
    raw = found.request.forget.batch(torch.arange(5))
    one, two, three = (found.task.prepare(raw, key) for key in (Key(1), Key(1), Key(2)))
    assert torch.equal(one["noise"], two["noise"])
    assert torch.equal(one["t"], two["t"])
    assert not torch.equal(one["noise"], three["noise"])
    with pytest.raises(Refused, match="prepare"):
        found.task.nll(found.model, raw)


@pytest.mark.parametrize("schedule", [LinearBetas(), Cosine()])
def test_schedules_lose_the_signal_step_by_step(schedule: LinearBetas | Cosine) -> None:
    left_over = schedule.signal(1000)
    assert (left_over.diff() < 0).all()
    assert 0 < left_over[-1] < 1e-3
    assert left_over[0] > 0.99
    if isinstance(schedule, Cosine):
        ratio = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert float(left_over[499]) == pytest.approx(ratio, rel=1e-9)


@torch.no_grad()
def test_a_wrong_target_is_what_the_model_says_under_another_condition() -> None:
    found, batch = drawn("diffusion", rows=20)
    case = case_of(found)
    drawn_batch = RandomLabel().draw(case, batch, Key(3))
    assert torch.equal(drawn_batch["y"], batch["y"])
    noised = found.task.noised(batch)
    options = torch.stack([found.model(noised, batch["t"], torch.full_like(batch["y"], c)) for c in range(5)])
    matches = (options - drawn_batch["wanted"]).abs().flatten(2).amax(2) < 1e-6
    assert (matches.sum(0) == 1).all()
    assert (matches.int().argmax(0) != batch["y"]).all()
    own = options[3]
    expected = (own - drawn_batch["wanted"]).square().flatten(1).mean(1)
    torch.testing.assert_close(RandomLabel()(case, drawn_batch), expected, rtol=1e-4, atol=1e-6)
    assert not drawn_batch["wanted"].requires_grad


def test_samples_follow_the_condition() -> None:
    """Judged by a classifier trained on real digits that the denoiser never saw."""
    found = tiny("diffusion")
    real = tiny("classification").test.batch(torch.arange(300))
    judge = LogisticRegression(max_iter=300).fit(real["x"].flatten(1).numpy(), real["y"].numpy())
    labels = torch.arange(5).repeat_interleave(12)
    images = found.task.sample(found.model, labels, Key(0), steps=25, guidance=1.5)
    assert images.shape == (60, 1, 8, 8)
    assert not images.requires_grad
    assert (judge.predict(images.flatten(1).numpy()) == labels.numpy()).mean() > 0.85
    assert torch.equal(images, found.task.sample(found.model, labels, Key(0), steps=25, guidance=1.5))
    forgot = found.task.sample(retrained("diffusion"), torch.full((40,), 3), Key(0), steps=25)
    assert (judge.predict(forgot.flatten(1).numpy()) == 3).mean() < 0.5
    with pytest.raises(Refused, match="steps"):
        found.task.sample(found.model, labels, Key(0), steps=101)


@torch.no_grad()
def test_the_sampler_is_exact_where_the_noise_is_known() -> None:
    """For data that are one point, the best denoiser is known, and every DDIM path ends at the point."""
    point, schedule = torch.full((1, 2, 2), 0.7), LinearBetas(1e-3, 0.1)
    levels = schedule.signal(50)

    class Knows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Parameter(point)

        def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            level = levels[time].float().reshape(-1, 1, 1, 1)
            return (images - level.sqrt() * self.point) / (1 - level).sqrt()

    task = Diffusion(2, (1, 2, 2), 50, schedule)
    for steps in (1, 7, 50):
        torch.testing.assert_close(
            task.sample(Knows(), torch.zeros(3).long(), Key(0), steps), point.expand(3, 1, 2, 2), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (torch.zeros(3, 2, 2), [0, 1, 2], "shape"),
        (torch.full((3, 4), math.nan), [0, 1, 2], "NaN"),
        (torch.zeros(3, 4, dtype=torch.int64), [0, 1, 2], "floating"),
        (torch.zeros(3, 4), [0, 1, 5], "first at id 2"),
        (torch.zeros(3, 4), [0.0, 1.0, 2.0], "whole number"),
    ],
)
def test_diffusion_refuses_bad_data(x: Tensor, y: list[float], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        Diffusion(3, (4,)).check(as_data({"x": x, "y": torch.tensor(y)}), "forget")


# Fixtures


def test_the_odd_model_is_odd_and_fixtures_are_fresh() -> None:
    found = odd()
    assert not found.model.head.bias.requires_grad
    assert found.model.mirror.weight is found.model.mix.weight
    assert found.model.again is found.model.shared
    assert found.model.calls.dtype == torch.int64
    first, second = tiny("classification").model, tiny("classification").model
    with torch.no_grad():
        first[0].weight.zero_()
    assert float(second[0].weight.detach().abs().sum()) > 0
    assert rows_of(found.request.forget.batch(torch.arange(3))) == 3
    assert dataclasses.is_dataclass(found.train)
    assert isinstance(llama(), nn.Module)
    assert isinstance(found.task, Classification)


def test_inputs_that_are_not_finite_are_found_and_large_ones_are_none() -> None:
    """The quick look is at a sum, which overflows where inputs are large, and where two infinities cancel is no number."""
    task, labels = Classification(2), torch.tensor([0, 1, 0])
    task.check(as_data((torch.full((3, 4), 3e38), labels)), "forget")
    for bad in ([math.inf, -math.inf], [math.nan, 1.0], [math.inf, 1.0]):
        rows = torch.tensor([[1.0, 2.0], bad, [0.0, 0.0]])
        with pytest.raises(Refused, match="first at id 1 \\(1 examples\\)"):
            task.check(as_data((rows, labels)), "forget")
