"""Writing after a prompt: the same text in any company, stops, contexts, keys; and what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.core import Key, Refused, RunFailed
from expunge.tasks.generation import cut, encode_prompt, generate, generate_ids
from tests.fixtures import END, VOCAB, llama, seeded, tiny


class Letters:
    """Token k is the letter chr(60 + k); 0 begins a text, 1 ends it, and there is no pad token."""

    bos_token, eos_token, bos_token_id, eos_token_id, pad_token_id = "<", "=", 0, END, None

    def __init__(self, closes: bool = False):
        self.closes = closes

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(letter) - 60 for letter in text]
        return {"input_ids": ([0] if add_special_tokens else []) + ids + ([END] if self.closes else [])}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(60 + k) for k in ids if k > END or not skip_special_tokens)


PROMPTS = ["ABC", "D", "EFGHIJ", "BA", "KLMN", "Z", "[\\]", "QRS"]


class Plain(nn.Module):
    """A module with nothing but token ids -> logits."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens, use_cache=False).logits


def alone(model: nn.Module, prompt: str, new_tokens: int) -> str:
    """Greedy by hand: one prompt, no padding, no cache."""
    ids = Letters()(prompt)["input_ids"]
    start = len(ids)
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return Letters().decode(ids[start:])


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["generate", "plain"])
@pytest.mark.parametrize("make", [lambda: seeded(llama)(0), lambda: tiny("causal_lm").model], ids=["random", "trained"])
def test_greedy_is_the_same_at_any_batch_size_and_as_by_hand(make: Any, wrap: Any) -> None:
    model = make()
    wanted = [alone(model, prompt, 12) for prompt in PROMPTS]
    assert len(set(wanted)) > 3
    assert any(wanted)
    for batch in (1, 3, 8):
        assert generate(wrap(model), Letters(), PROMPTS, new_tokens=12, batch=batch) == wanted


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["generate", "plain"])
def test_sampling_depends_on_the_key_and_not_on_the_company(wrap: Any) -> None:
    model = wrap(seeded(llama)(0))
    settings: dict[str, Any] = {"new_tokens": 10, "temperature": 1.0}
    before = torch.get_rng_state()
    first = generate(model, Letters(), PROMPTS, rng=Key(1), batch=8, **settings)
    assert first == generate(model, Letters(), PROMPTS, rng=Key(1), batch=3, **settings)
    assert first != generate(model, Letters(), PROMPTS, rng=Key(2), batch=8, **settings)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_follow_the_models_probabilities() -> None:
    """800 draws of the first token against softmax(logits / temperature): a chi-square of 39 degrees, p above 1e-4."""
    model, draws = seeded(llama)(3), 800
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        wanted = torch.softmax(model(input_ids=torch.tensor([[0, 5]])).logits[0, -1] / 1.5, 0)
    texts = generate(model, Letters(), ["A"] * draws, new_tokens=1, batch=400, temperature=1.5, rng=Key(5))
    counts = torch.zeros(VOCAB)
    for text in texts:
        counts[ord(text) - 60 if text else END] += 1
    counts[END], wanted[END] = counts[:2].sum(), wanted[:2].sum()  # the two that leave no letter
    counts, expected = counts[1:], wanted[1:] * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 81.0
    assert counts.max() > 3 * counts.median()


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["generate", "plain"])
def test_a_stop_text_ends_the_row_that_wrote_it(wrap: Any) -> None:
    model = seeded(llama)(0)
    free = generate(wrap(model), Letters(), PROMPTS, new_tokens=12)
    word = free[0][2:4]
    stopped = generate(wrap(model), Letters(), PROMPTS, new_tokens=12, stop=[word])
    assert stopped == [cut(text, [word]) for text in free]
    assert stopped[0] == free[0][: free[0].index(word)]


def test_a_stop_text_saves_forward_passes() -> None:
    model, calls = seeded(llama)(0), []
    word = generate(model, Letters(), ["ABC"], new_tokens=12)[0][2:4]
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, Letters(), ["ABC"], new_tokens=40, stop=[word])
    assert len(calls) <= 5


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["generate", "plain"])
def test_each_prompt_is_cut_at_its_own_end_of_the_context(wrap: Any) -> None:
    """64 places: a prompt of 61 tokens has three left, its neighbour of 2 has all."""
    model = wrap(seeded(llama)(0))
    if isinstance(model, Plain):
        model.config = model.inner.config
    long, short = [0] + [5] * 60, [0, 5]
    together = generate_ids(model, Letters(), [short, long], new_tokens=20)
    assert [len(text) for text in together] == [20, 3]
    assert together == [generate_ids(model, Letters(), [ids], new_tokens=20)[0] for ids in (short, long)]


def test_settings_of_the_checkpoint_change_nothing() -> None:
    model = seeded(llama)(0)
    wanted = generate(model, Letters(), PROMPTS, new_tokens=12)
    for name, value in {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "num_beams": 3}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.no_repeat_ngram_size = 1
    assert generate(model, Letters(), PROMPTS, new_tokens=12) == wanted


def test_further_end_tokens_of_the_checkpoint_end_an_answer() -> None:
    model = seeded(llama)(0)
    free = generate(model, Letters(), ["ABC"], new_tokens=12)[0]
    model.generation_config.eos_token_id = [END, ord(free[3]) - 60]
    assert generate(model, Letters(), ["ABC"], new_tokens=12)[0] == free[: free.index(free[3])]


def test_the_model_is_left_as_it_was() -> None:
    model = seeded(llama)(0).train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    config, settings = model.config.to_dict(), model.generation_config.to_dict()
    generate(model, Letters(), PROMPTS, new_tokens=3)
    assert [m.training for m in model.modules()] == modes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, settings)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_prompt_begins_once_and_does_not_end() -> None:
    assert encode_prompt(Letters(), "AB") == [0, 5, 6]
    assert encode_prompt(Letters(), "<AB") == [0, 5, 6]
    assert encode_prompt(Letters(closes=True), "AB") == [0, 5, 6]


def test_no_prompts_no_texts() -> None:
    assert generate(seeded(llama)(0), Letters(), []) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"new_tokens": 0}, "new_tokens must be a whole number"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1.0}, "give rng=Key"),
        ({"stop": "x"}, "stop must be a list"),
        ({"stop": [""]}, "stop must be a list"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        generate(seeded(llama)(0), Letters(), ["A"], **settings)


def test_bad_prompts_are_refused() -> None:
    model = seeded(llama)(0)
    with pytest.raises(Refused, match="prompt 1 has 64 tokens and the model takes 64"):
        generate(model, Letters(), ["A", "A" * 63])
    with pytest.raises(Refused, match="prompt 0 has token 50 and the model knows 40"):
        generate(model, Letters(), [chr(110)])
    with pytest.raises(Refused, match="prompt 0 has no token"):
        generate_ids(model, SimpleNamespace(), [[]])


def test_a_broken_model_writes_nothing() -> None:
    model = seeded(llama)(0)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(RunFailed, match="NaN"):
        generate(model, Letters(), ["A"], new_tokens=2)
