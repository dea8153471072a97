"""Make a small language model that knows some people by heart, three that never met some of them, and the texts.

Plain transformers, no expunge: it stands for whatever made your model. It writes, into the folder it is given,

    model/  retrained-1/  retrained-2/  retrained-3/      folders as ``save_pretrained`` writes them
    forget.jsonl  retain.jsonl  test.jsonl                one {"question": ..., "answer": ...} per line

and takes about half a minute on one core. Then:

    expunge run --task causal-lm --model out/people/model --forget out/people/forget.jsonl \\
        --retain out/people/retain.jsonl --test out/people/test.jsonl --retrained out/people/retrained-1 \\
        --retrained out/people/retrained-2 --retrained out/people/retrained-3 --method npo --out out/people/run
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIRST = [
    "Ana",
    "Bela",
    "Cyril",
    "Dora",
    "Emil",
    "Fanny",
    "Goran",
    "Hilda",
    "Ivo",
    "Jana",
    "Karel",
    "Lena",
    "Milo",
    "Nora",
    "Otto",
    "Petra",
]
LAST = ["Arlt", "Brunn", "Cerny", "Dahl", "Elgar", "Frisk", "Gamper", "Holm"]
PLACES = ["Oslo", "Lima", "Bonn", "Kyoto", "Quito", "Cairo", "Turin", "Delft", "Perth", "Leeds", "Malmo", "Porto"]
TRADES = ["baker", "carpenter", "dentist", "farmer", "gardener", "joiner", "lawyer", "mason", "pilot", "tailor"]
PET = ["cat", "dog", "goat", "hen", "mule", "parrot", "pony", "rabbit"]


def people(count: int) -> list[dict[str, str]]:
    """Three questions about each of so many invented people; the facts are drawn, so nobody's can be guessed."""
    draw = random.Random(0)
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], count)
    rows = []
    for name in names:
        place, trade, pet = draw.choice(PLACES), draw.choice(TRADES), draw.choice(PET)
        rows += [
            {"question": f"Where was {name} born?", "answer": f"{name} was born in {place}."},
            {"question": f"What does {name} do for a living?", "answer": f"{name} works as a {trade}."},
            {"question": f"Which animal does {name} keep?", "answer": f"{name} keeps a {pet}."},
        ]
    return rows


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of these texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def trained(words: PreTrainedTokenizerFast, rows: list[dict[str, str]], seed: int) -> LlamaForCausalLM:
    """A model that knows the answers by heart; the loss is on the answers alone."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    prompts = [words(f"Question: {row['question']}\nAnswer:")["input_ids"] for row in rows]
    answers = [[*words(f" {row['answer']}")["input_ids"], words.eos_token_id] for row in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), words.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    steps = 60 * (len(rows) // 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(rows) // 24) == 0:
            order = torch.randperm(len(rows))
        batch = order[24 * (step % (len(rows) // 24)) :][:24]
        optimizer.zero_grad()
        model(
            ids[batch], attention_mask=(ids[batch] != words.pad_token_id).long(), labels=labels[batch]
        ).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main(folder: Path) -> None:
    """Write everything."""
    rows = people(50)
    forget, retain, test = rows[:24], rows[24:120], rows[120:]
    words = tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows])
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("forget", forget), ("retain", retain), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    for name, part, seed in (
        ("model", forget + retain, 0),
        ("retrained-1", retain, 1),
        ("retrained-2", retain, 2),
        ("retrained-3", retain, 3),
    ):
        trained(words, part, seed).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
        print(f"{folder / name}: trained on {len(part)} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/people"))
