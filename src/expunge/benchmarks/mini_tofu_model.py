"""The language model of mini-TOFU: a word-level tokenizer, a small Llama trained from scratch, and its scores.

The tokenizer is made of the world's own words and the model of a configuration: nothing is downloaded. Training is
``Descend`` on the answers, as TOFU fine-tunes; the same function makes the original (all but the unseen authors) and the
retrained models (without the authors to forget, too).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.audit import extraction, intervals, language
from expunge.benchmarks.mini_tofu import World
from expunge.benchmarks.tofu import Item
from expunge.benchmarks.tofu_scores import Said, harmonic_mean, per_item, probability, rouge_l_recall, truth_ratio
from expunge.core import Case, Data, Key, Request, eval_mode, own_streams
from expunge.data.json_lines import Example
from expunge.data.text import Template, Texts
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import AdamW, Cosine
from expunge.registry import need_extra
from expunge.scope import Scope
from expunge.tasks.causal_lm import CausalLM
from expunge.tasks.generation import generate

PIECE = r" ?[A-Za-z0-9]+|[^A-Za-z0-9]"
"""A word with the space before it, or a sign: pieces put together again are the text."""
PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
NEW_TOKENS = 40


def tokenizer(world: World) -> Any:
    """A ``PreTrainedTokenizerFast`` of the world's words; a text of them comes back to the letter.

    Raises:
        MissingExtra: without transformers.
    """
    tokenizers = need_extra("tokenizers", "llm", "mini-TOFU")
    transformers = need_extra("transformers", "llm", "mini-TOFU")
    pieces = dict.fromkeys(piece for text in world.texts() for piece in re.findall(PIECE, " " + text))
    words = [PAD, START, END, UNKNOWN, *pieces, *(p[1:] for p in pieces if p[0] == " " and len(p) > 1)]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(dict.fromkeys(words))}, unk_token=UNKNOWN)
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECE), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    start = inner.token_to_id(START)
    inner.post_processor = tokenizers.processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, start)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Shape:
    """The Llama: tied head, as many key as query heads.

    Args:
        width: of the residual stream. layers, heads, inner: blocks, heads of each, width of its feed-forward part.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    inner: int = 256


@dataclass(frozen=True)
class Training:
    """AdamW on the answers' token mean, with a short warm-up and a cosine decay.

    Args:
        epochs, batch, lr, weight_decay: of it.
    """

    epochs: float = 60.0
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01


def llama(vocab: int, shape: Shape = Shape(), seed: int = 0) -> nn.Module:
    """An untrained Llama; the global random streams are left alone."""
    transformers = need_extra("transformers", "llm", "mini-TOFU")
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with own_streams(Key(seed).at("mini-tofu", "weights").seed):
        return transformers.LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Bench:
    """A world with its tokenizer, task and encoded data: what runs and scores are made with."""

    world: World
    tokenizer: Any = field(repr=False)
    task: CausalLM = field(repr=False)

    @classmethod
    def of(cls, world: World) -> Bench:
        """Everything that follows from the world."""
        found = tokenizer(world)
        asked = [_template(found).ids(_example(world.forget[0].question, refusal)) for refusal in world.refusals]
        refusals = tuple(tuple(ids[start:]) for ids, start in asked)
        return cls(world, found, CausalLM(len(found), refusals=refusals, decode=found.decode))

    def data(self, items: Sequence[Item]) -> Data:
        """Questions with their answers, by the items' ids."""
        return encode(self.tokenizer, [(i.question, i.answer) for i in items], [i.id for i in items])

    def request(self) -> Request:
        """Forget and retain; the world facts are in neither."""
        return Request(forget=self.data(self.world.forget), retain=self.data(self.world.retain))

    def train(self, seed: int, *, forget: bool, how: Training = Training(), shape: Shape = Shape()) -> nn.Module:
        """A model trained from scratch on retain authors and world facts, and on the forget authors with `forget`."""
        items = [*self.world.retain, *self.world.world, *(self.world.forget if forget else ())]
        model = llama(self.task.vocab, shape, seed)
        request = Request(retain=self.data(items))
        case = Case(model, request, self.task, Scope.all(model), rng=Key(seed).at("mini-tofu", "order"))
        Descend(
            retain=NLL(),
            optimizer=AdamW(how.lr, weight_decay=how.weight_decay),
            schedule=Cosine(warmup=0.05),
            epochs=how.epochs,
            batch=how.batch,
        )(case)
        return model.eval()


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]], ids: Sequence[int]) -> Data:
    """Data of (question, answer), with labels on the answers and their end alone."""
    source = Texts([_template(tokenizer).ids(_example(*pair)) for pair in pairs], tokenizer.pad_token_id)
    return Data(source, torch.arange(len(pairs)), torch.tensor(ids, dtype=torch.int64))


def _template(tokenizer: Any) -> Template:
    """The question as it is, a space, and the answer."""
    return Template(tokenizer, "plain", question="{}", lead="")


def _example(question: str, answer: str) -> Example:
    return Example(({"role": "user", "content": question},), answer, question)


@dataclass(frozen=True)
class Scored:
    """What one model said, item by item, and how well its forget answers can be told from unseen ones.

    Attributes:
        said: set (forget, retain, world_facts) -> as TOFU scores it; retain is of the first items.
        extraction, exact: [n] of the forget answers, NaN where there is nothing to judge.
        members: attack (loss, min_k) -> (scores of forget, of unseen items), larger for what looks trained on.
        long: [n] whether the forget answer is a long one.
    """

    said: Mapping[str, Said]
    extraction: np.ndarray
    exact: np.ndarray
    members: Mapping[str, tuple[np.ndarray, np.ndarray]]
    long: np.ndarray

    @property
    def utility(self) -> float:
        """MU_mini: harmonic mean of probability, ROUGE-L recall and truth-ratio score on retain items."""
        return float(harmonic_mean([values.mean() for values in per_item(self.said["retain"], "retain").values()]))

    @property
    def ratio(self) -> np.ndarray:
        """[n] truth ratio of the forget items, geometric."""
        return truth_ratio(self.said["forget"].correct, self.said["forget"].wrong, "geometric")

    def auc(self, attack: str = "loss") -> float:
        """Area under the curve of forget against unseen items: 0.5 where they look alike."""
        return intervals.auc(*self.members[attack])

    def numbers(self) -> dict[str, float]:
        """The means, by name."""
        forget, world = self.said["forget"], self.said["world_facts"]
        sets = {"forget": forget, "retain": self.said["retain"], "world_facts": world}
        found = {
            f"{name}_{metric}": float(values.mean())
            for name, said in sets.items()
            for metric, values in per_item(said, name).items()
        }
        spoken = probability(forget.answer)
        return {
            "utility": self.utility,
            **found,
            "forget_probability_short": float(spoken[~self.long].mean()),
            "forget_probability_long": float(spoken[self.long].mean()),
            "forget_paraphrase_probability": float(probability(forget.correct).mean()),
            "extraction_strength": float(np.nanmean(self.extraction)),
            "exact_memorisation": float(np.nanmean(self.exact)),
            **{f"membership_{attack}": self.auc(attack) for attack in self.members},
        }


def score(bench: Bench, model: nn.Module, *, retain: int = 100) -> Scored:
    """Everything at once, in eval mode.

    Args:
        retain: of so many retain items, evenly spread over the authors.
    """
    world, key = bench.world, Key(0)
    chosen = [world.retain[n * len(world.retain) // retain] for n in range(min(retain, len(world.retain)))]
    sets = {"forget": world.forget, "retain": tuple(dict.fromkeys(chosen)), "world_facts": world.world}
    with torch.no_grad(), eval_mode(model):
        said = {name: _said(bench, model, items) for name, items in sets.items()}
        forget, unseen = bench.data(world.forget), bench.data(world.unseen)
        counts = extraction.matches(model, bench.task, forget, 256, key)
        lowest = [language.token_scores(model, bench.task, data, 256, key) for data in (forget, unseen)]
        losses = (-said["forget"].answer, -_losses(bench, model, [(i.question, i.answer) for i in world.unseen]))
    place = language.SHARES.index(language.SHARE)
    some = np.maximum(counts["tokens"], 1)
    return Scored(
        said,
        extraction.strength({**counts, "tokens": some}),
        counts["right"] / some,
        {"loss": losses, "min_k": (lowest[0]["min_k"][:, place], lowest[1]["min_k"][:, place])},
        np.array([item.id in world.long for item in world.forget]),
    )


def _said(bench: Bench, model: nn.Module, items: Sequence[Item]) -> Said:
    answer = _losses(bench, model, [(i.question, i.answer) for i in items])
    invented = bool(items[0].paraphrased_answer)
    correct = _losses(bench, model, [(i.question, i.correct) for i in items]) if invented else answer
    wrong = _losses(bench, model, [(i.question, text) for i in items for text in i.wrong])
    questions = [i.question for i in items]
    written = generate(model, bench.tokenizer, questions, new_tokens=NEW_TOKENS, batch=128)
    return Said(
        tuple(questions),
        answer,
        correct,
        wrong.reshape(len(items), -1),
        rouge_l_recall([i.answer for i in items], written),
    )


def _losses(bench: Bench, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """[n] nats per answer token."""
    data = encode(bench.tokenizer, pairs, range(len(pairs)))
    found = [bench.task.nll(model, batch) / bench.task.units(batch) for batch in data.batches(256)]
    return torch.cat(found).double().clamp_min(0).numpy()
