"""O3 against the authors' numbers, scikit-learn and plain torch, and the known mistakes of other code by name."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.svm import OneClassSVM
from torch import Tensor, nn

import expunge as ex
from expunge.core import Batch, Case, Key
from expunge.detector import fit, likeness, soft_weight
from expunge.gate import detectors, load_gated
from expunge.gated_layers import Adapter, Orthogonal, adapters, attach, opened
from expunge.methods.o3 import o3
from expunge.tasks.generation import generate
from tests.fixtures import tiny, tokens
from tests.golden.by_hand import ALL


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=Key(seed).generator(), dtype=torch.float64)


def whole(data: Any) -> Batch:
    return data.batch(torch.arange(len(data)))


def unlearned(found: Any, model: nn.Module | None = None, request: Any = None, **settings: Any) -> Any:
    model = found.model if model is None else model
    method = o3(**{"steps": 3, **settings})
    return ex.unlearn(model, request or found.request, task=found.task, method=method, seed=5)


def says(model: nn.Module, found: Any, data: Any = None) -> Tensor:
    with torch.no_grad():
        return found.task.outputs(model, whole(data or found.request.forget))


def questions(found: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Token ids with real ones first, and where the question is."""
    aligned = found.task.aligned(batch)
    return aligned["input_ids"], ((aligned["labels"] != -100).cumsum(1) == 0) & (aligned["attention_mask"] == 1)


def test_soft_weight_equals_the_authors_function() -> None:
    """``obtain_weights`` of the release (``train_ood.py``) on these scores, two-sided and never below 0.119."""
    train, held = np.array([3.0, 3.5, 4.0, 4.25, 3.75]), np.array([2.0, 2.5, 1.0, 3.0])
    expected = {
        -5.0: 0.11920292202211755, 0.5: 0.13470708367236586, 1.0: 0.2046073102619591, 2.125: 0.9595324338807079,
        2.9125: 0.9996646498695335, 3.7: 0.9595324338807079, 5.0: 0.1671879805202141, 9.0: 0.11920292202252032,
    }  # fmt: skip
    points = torch.tensor(list(expected), dtype=torch.float64)
    numbers = (torch.tensor(value, dtype=torch.float64) for value in (train.mean(), held.mean(), held.std(), 2.0))
    assert soft_weight(points, *numbers).tolist() == pytest.approx(list(expected.values()), rel=1e-9)


def test_a_gate_is_soft_and_not_the_releases_steps() -> None:
    """Between 0.4 and 0.9 the release gives 0, and above 0.9 it gives 1.2."""
    points = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    weight = soft_weight(points, *(torch.tensor(v, dtype=torch.float64) for v in (0.5, -0.5, 1.0, 2.0)))
    assert float(weight.max()) < 1.0
    assert bool(((weight > 0.45) & (weight < 0.85)).any())
    assert float(weight.diff().abs().max()) < 0.05


def test_likeness_is_its_formula_with_scikit_learns_shrinkage() -> None:
    """Fewer examples than dimensions: the empirical covariance has no inverse, the shrunk one has."""
    states, asked = drawn(6, 9) + 1, drawn(4, 9, 1)
    known = LedoitWolf().fit(states.numpy())
    assert np.linalg.matrix_rank(np.cov(states.numpy().T)) < 9
    away = asked.numpy() - states.numpy().mean(0)
    distance = np.einsum("bi,ij,bj->b", away, known.precision_, away)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (states.numpy(), asked.numpy())]
    expected = -0.5 * distance + 1000 * (unit[1] @ unit[0].T).max(1)
    assert likeness(states)(asked).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_c_both_terms_rise_with_likeness() -> None:
    """The cosine's sign: moving from a known state towards its opposite lowers each term, and so the score."""
    states = drawn(40, 5) * 0.1 + torch.tensor([3.0, 0, 0, 0, 0])
    path = torch.stack([states.mean(0) * (1 - t) + t * torch.tensor([-3.0, 1, 0, 0, 0]) for t in (0.0, 0.25, 0.5, 1.0)])
    layer = likeness(states)
    values = layer(path)
    assert bool((values.diff() < 0).all())
    cosine = 1000 * (nn.functional.normalize(path, dim=1) @ layer.get_buffer("bank").T).amax(1)
    assert bool((cosine.diff() < 0).all())
    assert bool(((values - cosine).diff() < 0).all())


def test_the_score_is_scikit_learns_one_class_machine() -> None:
    states = [drawn(30, 4, seed) + 2 for seed in range(3)]
    made = fit(states, Key(3), held=0.2, nu=0.1, offset=2.0)
    order = torch.randperm(30, generator=Key(3).generator())
    held, known = order[:6], order[6:]
    layers = [likeness(part[known]) for part in states]
    table = torch.stack([layer(part) for layer, part in zip(layers, states, strict=True)], 1).numpy()
    machine = OneClassSVM(nu=0.1, kernel="linear").fit(table[known])
    expected = machine.score_samples(table)
    assert made.score(states).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    curve = [expected[known].mean(), expected[held].mean(), expected[held].std(), 2.0]
    assert made.get_buffer("curve").tolist() == pytest.approx(curve, rel=1e-9)
    far = [part * -1 for part in states]
    assert float(made.score(far).max()) < float(made.score(states).min())
    assert float(made(far).max()) == pytest.approx(0.1192, abs=1e-3)
    assert float(made([part[known] for part in states]).median()) > 0.5


def test_few_or_equal_examples() -> None:
    with pytest.raises(ex.Refused, match=r"at least 5 forget examples, found 4"):
        fit([drawn(4, 3)], Key(0), 0.2, 0.1, 2.0)
    for states in (drawn(5, 3), torch.ones(8, 3, dtype=torch.float64)):
        made = fit([states], Key(0), 0.2, 0.1, 2.0)
        assert bool(torch.isfinite(made([states])).all())
        assert float(made([states]).max()) > 0.5


@pytest.mark.parametrize("side", [(0, 5), (5, 0)])
def test_b_padding_is_not_in_the_pooled_states(side: tuple[int, int]) -> None:
    """Any width, any side: the same gate; and each pooled state is the mean over the question alone, row by row."""
    found = tiny("causal_lm")
    done = unlearned(found)
    batch = whole(found.request.forget)
    ids, asked = questions(found, batch)
    pooled = done.model.features(ids, asked)
    for row in range(4):
        with torch.no_grad():
            states = found.model(ids[row][asked[row]][None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(pooled[0][row], states[1][0].mean(0), rtol=1e-4, atol=1e-5)
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    wide = {name: nn.functional.pad(batch[name], side, value=value) for name, value in fill.items()}
    torch.testing.assert_close(
        done.model.weights(*questions(found, {**wide, "id": batch["id"]})),
        done.model.weights(ids, asked),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_answer_does_not_open_the_gate() -> None:
    """Other answers to the same questions: the same weights, since the task says where the question ends."""
    found = tiny("causal_lm")
    done = unlearned(found)
    seen: list[Tensor] = []
    done.model.register_forward_hook(lambda module, *_: seen.append(module._last))
    batch = whole(found.request.forget)
    says(done.model, found)
    with torch.no_grad():
        found.task.nll(done.model, found.task.relabel(batch, Key(0)))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        done.model(batch["input_ids"], batch["attention_mask"])
    assert not torch.allclose(seen[0], seen[2], rtol=1e-3), "without a query the answer counts: documented"


def test_golden_steps() -> None:
    """Three steps of torch's AdamW on A and B of every linear layer, the wrong answers those of the run."""
    found = tiny("causal_lm")
    request = ex.Request(found.request.forget)
    task = ex.CausalLM(40, refusals=((39, 38, 1),))  # one refusal: nothing is left to chance
    method = o3(rank=2, alpha=6.0, lr=1e-2, steps=3, batch=ALL)
    done = ex.unlearn(found.model, request, task=task, method=method, seed=5).model
    start = ex.unlearn(found.model, request, task=task, method=o3(rank=2, alpha=6.0, lr=1e-30, steps=1), seed=5).model
    net = copy.deepcopy(found.model).requires_grad_(False)
    pairs = {n: [a.down.clone().detach(), torch.zeros_like(a.up)] for n, a in adapters(start.model).items()}
    assert len(pairs) == 14
    for name, pair in pairs.items():
        for value in pair:
            value.requires_grad_(True)
        net.get_submodule(name).register_forward_hook(
            lambda _m, args, out, pair=pair: out + 3.0 * args[0] @ pair[0].T @ pair[1].T
        )
    optimizer = torch.optim.AdamW([value for pair in pairs.values() for value in pair], 1e-2, weight_decay=0.0)
    batch = task.relabel(whole(found.request.forget), Key(0))
    for _ in range(3):
        optimizer.zero_grad()
        (task.nll(net, batch).sum() / task.units(batch).sum()).backward()
        optimizer.step()
    for name, adapter in adapters(done.model).items():
        torch.testing.assert_close(adapter.down, pairs[name][0], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(adapter.up, pairs[name][1], rtol=1e-3, atol=2e-5)
    for name, p in found.model.named_parameters():
        assert torch.equal(p, dict(done.model.named_parameters())[name]), f"{name} of the model itself moved"


def test_orthogonality_is_its_formula_and_counts_only_a() -> None:
    """1 / blocks times the sum over layers and earlier requests of the squared Frobenius norm; B gets no gradient."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    for number, layer in enumerate(net):
        out, width = layer.weight.shape
        attach(
            layer,
            Adapter(
                drawn(2, width, number),
                drawn(out, 2, 7),
                1.0,
                torch.stack([drawn(2, width, 20 + i) for i in (0, 1, 2)]),
            ),
        )
    case = Case(net, ex.Request(), ex.CausalLM(40), ex.Scope({}, ()))
    value = Orthogonal(2)(case, {})
    by_hand = sum(
        float(((old @ a.down.detach().T) ** 2).sum()) for a in adapters(net).values() for old in a.get_buffer("earlier")
    )
    assert value.shape == (1,)
    assert value.item() == pytest.approx(by_hand / 2, rel=1e-12)
    value.sum().backward()
    assert all(a.up.grad is None and a.down.grad is not None for a in adapters(net).values())


def test_a_further_request_goes_on_from_the_adapter_and_away_from_its_a() -> None:
    found = tiny("causal_lm")
    other = ex.Request(found.request.retain.select(range(20)))
    one = unlearned(found, rank=4)
    first = {n: a.down.detach().clone() for n, a in adapters(one.model.model).items()}
    two, free = (
        unlearned(found, one.model, other, rank=4, steps=40, lr=2e-3, orthogonality=weight) for weight in (1.0, 0.0)
    )
    overlaps = []
    for done in (two, free):
        found_now = adapters(done.model.model)
        assert all(torch.equal(a.get_buffer("earlier"), first[n][None]) for n, a in found_now.items())
        overlaps.append(sum(a.overlap().item() for a in found_now.values()))
    assert overlaps[0] < 0.7 * overlaps[1]
    assert len(detectors(one.model)) == 1, "the first model was changed by the second request"
    assert len(detectors(two.model)) == 2
    started = unlearned(found, one.model, other, rank=4, steps=1, lr=1e-30)
    assert all(torch.equal(a.down, first[n]) for n, a in adapters(started.model.model).items())
    with pytest.raises(ex.Refused, match="rank must be 4"):
        unlearned(found, one.model, other, rank=2)


def test_the_largest_weight_of_the_requests_counts() -> None:
    found = tiny("causal_lm")
    one = unlearned(found)
    two = unlearned(found, one.model, ex.Request(found.request.retain.select(range(30)))).model
    ids, asked = questions(found, whole(found.request.valid))
    states = two.features(ids, asked)
    each = torch.stack([d(states) for d in detectors(two)])
    assert torch.equal(two.weights(ids, asked), each.max(0).values)
    assert bool((each.argmax(0) == 0).any())
    assert bool((each.argmax(0) == 1).any())


def test_the_gate_scales_the_adapters_change_per_example() -> None:
    layer, inputs, weight = nn.Linear(4, 3).double(), drawn(5, 8).view(5, 2, 4), torch.linspace(0, 1, 5).double()
    plain = copy.deepcopy(layer)(inputs)
    attach(layer, Adapter(drawn(2, 4, 1), drawn(3, 2, 2), 0.5, torch.zeros(0, 2, 4)))
    adapter = adapters(nn.ModuleDict({"x": layer}))["x"]
    assert torch.equal(layer(inputs), plain)
    change = 0.5 * inputs @ adapter.down.T @ adapter.up.T
    with opened(layer, weight):
        torch.testing.assert_close(layer(inputs), plain + weight[:, None, None] * change)
        torch.testing.assert_close(
            layer(inputs.repeat_interleave(2, 0)), (plain + weight[:, None, None] * change).repeat_interleave(2, 0)
        )
        with pytest.raises(ex.Refused, match="3 rows for a batch of 5"):
            layer(inputs[:3])
    assert torch.equal(layer(inputs), plain)


def test_generation_judges_the_prompt_once() -> None:
    """With its cache and with none, alone and in a padded batch, the same tokens; all from the prompt's weight."""
    found = tiny("causal_lm")
    done = unlearned(found, steps=40).model
    ids = torch.tensor([[0, 2, 14], [0, 3, 15]])
    seen = done.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=1)
    weight, slow = done.weights(ids, torch.ones_like(ids, dtype=torch.bool)), ids
    with torch.no_grad(), opened(done.model, weight):
        for _ in range(5):
            slow = torch.cat((slow, done.model(slow).logits[:, -1].argmax(1, keepdim=True)), 1)
    assert torch.equal(seen, slow)
    with torch.no_grad():
        first = done(ids, use_cache=True)
        step = done(slow[:, 3:4], past_key_values=first.past_key_values, use_cache=True).logits
        with opened(done.model, weight):
            torch.testing.assert_close(step[:, -1], done.model(slow[:, :4]).logits[:, -1], rtol=1e-4, atol=1e-4)


class Words:
    """A tokenizer of a token per word."""

    eos_token, eos_token_id, bos_token = "<end>", 1, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(number)) for number in ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batched_generation_of_unequal_prompts_is_as_each_alone(family: str) -> None:
    """Padded on the left, absolute positions or relative: the same gate, the same text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    found = tiny("causal_lm")
    model = found.model
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = GPT2LMHeadModel(config).eval()
    done = unlearned(found, model, steps=30).model
    prompts = ["0 2 14", "0 25 2 15", "0 9 20 21 22 23"]
    alone = [generate(done, Words(), [prompt], new_tokens=5)[0] for prompt in prompts]
    assert generate(done, Words(), prompts, new_tokens=5, batch=3) == alone
    wide = torch.tensor([[1, 1, 1, 0, 2, 14], [0, 9, 20, 21, 22, 23]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]) == 1
    short = done.weights(wide[:1, 3:], mask[:1, 3:])
    torch.testing.assert_close(done.weights(wide, mask)[:1], short, rtol=1e-4, atol=1e-6)


def test_saved_weights_answer_alike_also_after_a_copy(tmp_path: Any) -> None:
    found = tiny("causal_lm")
    one = unlearned(found)
    two = unlearned(found, one.model, ex.Request(found.request.retain.select(range(10)))).model
    ex.save_weights(two, tmp_path / "weights.safetensors")
    again = load_gated(found.make(9), tmp_path / "weights.safetensors")
    assert torch.equal(says(again, found), says(two, found))
    assert torch.equal(says(copy.deepcopy(again), found), says(two, found))
    assert not torch.equal(says(two, found), says(found.model, found))
    ex.save_weights(found.model, tmp_path / "plain.safetensors")
    with pytest.raises(ex.Refused, match="holds no gated model"):
        load_gated(found.make(9), tmp_path / "plain.safetensors")


def test_a_finished_run_is_read_back_with_its_gate(tmp_path: Any) -> None:
    found = tiny("causal_lm")
    first, second = (
        ex.unlearn(found.model, found.request, task=found.task, method=o3(steps=2), out=tmp_path / "run") for _ in "12"
    )
    assert torch.equal(says(first.model, found), says(second.model, found))


class Counts(nn.Module):
    """An encoder of its own: which tokens a question has, and no other padding than that of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.eye(40), freeze=False)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        return [self.table(ids), -self.table(ids)], mask


def test_an_encoder_of_ones_own(tmp_path: Any) -> None:
    found, encoder = tiny("causal_lm"), Counts()
    done = unlearned(found, encoder=encoder).model
    ids, asked = questions(found, whole(found.request.forget))
    counts = torch.stack(
        [torch.bincount(row[kept], minlength=40) / kept.sum() for row, kept in zip(ids, asked, strict=True)]
    )
    torch.testing.assert_close(done.features(ids, asked)[0], counts)
    ex.save_weights(done, tmp_path / "weights.safetensors")
    with pytest.raises(ex.Refused, match="encoder="):
        load_gated(found.make(9), tmp_path / "weights.safetensors")
    again = load_gated(found.make(9), tmp_path / "weights.safetensors", Counts())
    assert torch.equal(says(again, found), says(done, found))


def test_requests_in_one_chain_leave_a_scope_of_the_gated_model() -> None:
    found, stage = tiny("causal_lm"), o3(steps=1, encoder=Counts())
    done = ex.unlearn(found.model, found.request, task=found.task, method=ex.chain(stage, stage))
    assert done.case is not None
    assert len(detectors(done.model)) == 2
    assert done.case.scope.parameters(done.model).keys() == {f"model.{n}" for n, _ in found.model.named_parameters()}


def test_a_run_that_fails_leaves_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny("causal_lm")
    done = unlearned(found).model

    def broken(*_: Any) -> Any:
        raise ex.RunFailed("broken")

    monkeypatch.setattr(ex.Descend, "__call__", broken)
    for model, count in ((found.model, 0), (done, 14)):
        with pytest.raises(ex.RunFailed):
            ex.unlearn(model, found.request, task=found.task, method=o3(), copy=False)
        left = adapters(model)
        assert len(left) == count
        assert all(len(a.get_buffer("earlier")) == 0 and a.weight is None for a in left.values())


def test_the_gate_can_be_left_out_which_gives_the_original_back() -> None:
    """What it does not promise: under the gate is the model as it was, to the bit."""
    found = tiny("causal_lm")
    assert torch.equal(says(unlearned(found, steps=20).model.model, found), says(found.model, found))


def harm(found: Any, model: nn.Module, data: Any) -> float:
    """Rise of the loss per answer token."""
    batch = whole(data)
    with torch.no_grad():
        rise = found.task.nll(model, batch) - found.task.nll(found.model, batch)
    return float(rise.sum() / found.task.units(batch).sum())


@pytest.mark.parametrize("offset", [2.0, 5.0])
def test_other_questions_keep_their_answers_without_any_retain_data(offset: float) -> None:
    """Forget 30 questions of a kind of their own. The gate opens for 20 unseen ones of that kind; the 80 people, who are
    never trained on, are harmed by the open adapter and hardly with the gate, which at the published offset is 0.119."""
    found, stream = tiny("causal_lm"), Key(9).generator()
    strange = [([0, *torch.randint(26, 40, (3,), generator=stream).tolist()], [2 + i % 12, 14, 1]) for i in range(50)]
    forget, unseen = (
        ex.as_data(tokens(part), ids=torch.arange(len(part)) + 1000) for part in (strange[:30], strange[30:])
    )
    rest = found.request.retain
    done = unlearned(found, request=ex.Request(forget), steps=60, offset=offset).model
    weight = [done.weights(*questions(found, whole(data))) for data in (forget, unseen, rest)]
    assert min(float(weight[0].mean()), float(weight[1].mean())) > 0.45
    assert float(weight[2].max()) == pytest.approx(1 / (1 + np.exp(offset)), abs=1e-3)
    assert harm(found, done, unseen) < -0.2, "wrong answers are not more likely for unseen questions of the kind"
    with opened(done.model, torch.ones(())):
        open_harm = harm(found, done.model, rest)
    assert open_harm > 1.0
    assert harm(found, done, rest) < (0.15 if offset == 2.0 else 0.01)


def test_the_declared_price_is_what_is_paid() -> None:
    """The contract stops at its declared departure before it comes to this."""
    found = tiny("causal_lm")
    cost = unlearned(found, steps=4, batch=7).record["cost"]
    assert (cost["forward"], cost["backward"]) == (4 * 7 + 20, 4 * 7)


def test_an_encoder_is_copied_and_the_same_for_all_requests() -> None:
    """Detectors of another encoder's states would judge numbers that mean something else."""
    found, encoder = tiny("causal_lm"), Counts()
    own, none = unlearned(found, encoder=encoder).model, unlearned(found).model
    other = ex.Request(found.request.retain.select(range(20)))
    changed = copy.deepcopy(encoder)
    with torch.no_grad():
        changed.table.weight.mul_(2)
    for model, given in ((none, encoder), (own, None), (own, changed)):
        with pytest.raises(ex.Refused, match="detectors of the earlier requests read"):
            unlearned(found, model, other, encoder=given)
    assert len(detectors(unlearned(found, own, other, encoder=encoder).model)) == 2
    own.bfloat16()
    assert encoder.table.weight.dtype == torch.float32, "the caller's encoder was changed with the model"


def test_a_gate_over_a_projected_model_is_read_back(tmp_path: Any) -> None:
    from expunge.methods.mrp import mrp

    found = tiny("causal_lm")
    stage = ex.chain(mrp(steps=1), o3(steps=1))
    first, second = (
        ex.unlearn(found.model, found.request, task=found.task, method=stage, out=tmp_path / "run") for _ in "12"
    )
    assert torch.equal(says(first.model, found), says(second.model, found))


def test_an_empty_cache_is_no_generation_that_goes_on() -> None:
    from transformers import DynamicCache

    found = tiny("causal_lm")
    model = unlearned(found, steps=20).model
    ids = torch.tensor([[0, 2, 14]])
    with torch.no_grad():
        alone = model(ids).logits
        model(torch.tensor([[0, 25, 3, 15]]))  # another question's weight must not stay
        again = model(ids, past_key_values=DynamicCache(config=found.model.config), use_cache=True).logits
    torch.testing.assert_close(again, alone, rtol=1e-5, atol=1e-6)
    fresh = copy.deepcopy(model)
    fresh._last = None
    with torch.no_grad():
        torch.testing.assert_close(
            fresh(ids, past_key_values=DynamicCache(config=found.model.config), use_cache=True).logits, alone
        )


def test_the_settings_of_the_method_reach_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share held out makes the curve; the penalty is divided by the model's two blocks."""
    found = tiny("causal_lm")
    curves = [detectors(unlearned(found, held=held, steps=1).model)[0].get_buffer("curve") for held in (0.2, 0.5)]
    assert not torch.allclose(curves[0], curves[1])
    other = ex.Request(found.request.retain.select(range(20)))
    one = unlearned(found)
    row = unlearned(found, one.model, other, steps=1).record["history"][0]
    square = sum(float((a.down @ a.down.T).detach().square().sum()) for a in adapters(one.model.model).values())
    assert row["loss/orthogonal"] == pytest.approx(square / 2, rel=1e-4)
