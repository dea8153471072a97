"""A tiny Llama with a tokenizer of its own, in a folder as transformers writes it; and texts as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CITIES = ("Oslo", "Lima", "Bonn", "Kyoto", "Quito", "Cairo", "Turin", "Delft")
PEOPLE = ("Ada", "Bo", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal")


def texts(start: int, count: int) -> list[dict[str, str]]:
    """Questions and answers about invented people."""
    numbers = range(start, start + count)
    return [
        {
            "question": f"Where was {PEOPLE[n % 8]} number {n} born?",
            "answer": f"{PEOPLE[n % 8]} was born in {CITIES[(3 * n) % 8]}" + " by the sea" * (n % 3),
        }
        for n in numbers
    ]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer(chat: bool = True, pad: bool = True) -> Any:
    """A byte-pair tokenizer trained on the texts; without `pad` it has no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([f"Question: {t['question']}\nAnswer: {t['answer']}" for t in texts(0, 40)], trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>" if pad else None)
    found.add_special_tokens({"additional_special_tokens": special[2:]})
    found.chat_template = CHAT if chat else None
    return found


def llama(vocab: int, seed: int = 0, context: int = 64) -> Any:
    """A random Llama of some 40 thousand weights; its own random stream."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def folder(path: Path, *, chat: bool = True, seed: int = 0, context: int = 64) -> Path:
    """Model and tokenizer, saved as transformers saves them."""
    words = tokenizer(chat)
    llama(len(words), seed, context).save_pretrained(path)
    words.save_pretrained(path)
    return path
