"""Tiny Llamas whose weights are a formula or drawn from one generator, and token batches by hand.

Numbers that other code computed on them can stand in a test.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core import Batch
from expunge.tasks.causal_lm import IGNORED
from tests.fixtures import llama, seeded, tokens

FORGET = [([0, 3, 14], [26, 30, 31, 1]), ([0, 25, 4, 15], [27, 1]), ([0, 5, 16], [28, 33, 36, 39, 1])]
REFUSALS = [([0, 3, 14], [39, 38, 1]), ([0, 25, 4, 15], [37, 1]), ([0, 5, 16], [38, 37, 36, 1])]
RETAIN = [([0, 6, 17], [29, 34, 1]), ([0, 25, 7, 18], [30, 35, 32, 1])]

VOCAB = 120
ROWS = [
    ([0, 5, 6], [79, 63, 106]),
    ([0, 7], [84, 109, 1, 116, 116]),
    ([0, 8, 9, 10], [63, 63]),
    ([0, 11], [21, 69, 3, 115]),
]
"""Prompt and answer of four examples of unequal lengths; the answers are likely tokens of ``random_llama(0)``."""
WINS = [([0, 5, 6], [70, 1]), ([0, 7], [40, 41, 42, 1]), ([0, 8, 9, 10], [90, 17, 1]), ([0, 11], [33, 1])]
"""The same prompts with other answers."""


def by_formula(shift: float) -> nn.Module:
    """The tiny Llama with weight k of all equal to 0.4 sin(0.7 k + shift), norms 1 + that over 4."""
    model, at = seeded(llama)(0), 0
    with torch.no_grad():
        for parameter in model.parameters():
            k = torch.arange(at, at + parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            wave = 0.4 * torch.sin(0.7 * k + shift)
            parameter.copy_(wave if parameter.ndim > 1 else 1 + wave / 4)
            at += parameter.numel()
    return model


def batch_of(pairs: list[tuple[list[int], list[int]]], width: int = 0) -> Batch:
    """Token columns with ids."""
    return {**tokens(pairs, width), "id": torch.arange(len(pairs))}


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """All gradients in one row."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def random_llama(seed: int) -> nn.Module:
    """A Llama of two layers, 16 wide, 120 tokens, every weight from one generator in the order of names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng([]):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=32,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=None,
            )
        ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1.0 + 0.1 * noise if "norm" in name else 0.6 * noise)
    return model


def answers(left: int = 0, right: int = 0, vocab: int = VOCAB, rows: list[tuple[list[int], list[int]]] = ROWS) -> Batch:
    """The four examples, padded on the right to the longest, and by so many tokens more on either side."""
    width = max(len(p) + len(a) for p, a in rows) + right

    def table(filler: int, rows: list[list[int]]) -> Tensor:
        return torch.tensor([[filler] * left + row + [filler] * (width - len(row)) for row in rows])

    found = table(IGNORED, [[IGNORED] * len(p) + a for p, a in rows])
    return {
        "id": torch.arange(len(rows)),
        "input_ids": table(1, [p + a for p, a in rows]) % vocab,
        "attention_mask": table(0, [[1] * len(p + a) for p, a in rows]),
        "labels": torch.where(found < 0, found, found % vocab),
    }
