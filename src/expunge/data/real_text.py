"""A suite on real text, from a user's own copy in the folder that EXPUNGE_DATA names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from expunge.core import Refused
from expunge.data.formats import data_file, data_folder
from expunge.data.recipe import Recipe, Suite, held_out, split_by_hash
from expunge.data.sources import as_data
from expunge.registry import need_extra
from expunge.tasks.classification import Classification

SHAKESPEARE = "the data set tiny Shakespeare (the file tinyshakespeare.txt of char-rnn)"
SPEAKERS = 8
WORDS = 48
"""Words and marks of a passage at most."""
VOCABULARY = 2000
PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*|[.,;:!?-]")


def text_speakers() -> Suite:
    """Which of eight speakers of tiny Shakespeare says a passage of 48 words; a small transformer encoder from scratch.

    Passages are pieces of what a speaker says, in the order of the text; a fifth of them, drawn by a hash, is the test set.
    Tokens are the 2,000 most frequent words and marks of the training passages: with letters, or the tokens of a language
    model of that size, an encoder that trains in a minute on one thread hardly learns who speaks.
    """
    need_extra("transformers", "llm", "the suite text_speakers")
    passages, speaker = read_passages(data_file(data_folder("text", SHAKESPEARE), ["tinyshakespeare.txt"], SHAKESPEARE))
    known = [words for words, test in zip(passages, held_out("text_speakers", len(passages)), strict=True) if not test]
    counts = Counter(word for words in known for word in words)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    places = {word: place for place, word in enumerate(frequent, UNKNOWN + 1)}
    tokens = np.full((len(passages), WORDS), PADDING, np.int64)
    for row, words in enumerate(passages):
        tokens[row, : len(words)] = [places.get(word, UNKNOWN) for word in words]
    x = {"input_ids": tokens, "attention_mask": (tokens != PADDING).astype(np.int64)}
    train, test = split_by_hash("text_speakers", as_data({"x": x, "y": speaker}))
    recipe = Recipe(epochs=20, lr=1e-3, weight_decay=0.01, batch=32, optimizer="adamw")
    return Suite("text_speakers", train, test, Classification(SPEAKERS), _encoder, recipe)


def read_passages(path: str | Path, speakers: int = SPEAKERS, words: int = WORDS) -> tuple[list[list[str]], np.ndarray]:
    """Passages of at most `words` words and marks, in lower case, and the number of who says each.

    Args:
        path: plays in which each speech is a paragraph that begins with ``NAME:`` on a line of its own.
        speakers: the ones who say most are taken, numbered by how many words they say, >= 2.
        words: of a passage, >= 1; what is left of a speaker's last one is kept where it is half as long at least.

    Raises:
        Refused: for a text that has fewer speakers.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read as text ({error}): get {SHAKESPEARE}") from error
    said: dict[str, list[str]] = {}
    for paragraph in text.split("\n\n"):
        name, mark, speech = paragraph.strip().partition(":\n")
        if mark and "\n" not in name:
            said.setdefault(name, []).extend(_WORD.findall(speech.lower()))
    if len(said) < speakers:
        raise Refused(f"{path} has {len(said)} speakers, expected at least {speakers}: get {SHAKESPEARE}")
    chosen = sorted(said, key=lambda name: (-len(said[name]), name))[:speakers]
    passages: list[list[str]] = []
    numbers: list[int] = []
    for number, name in enumerate(chosen):
        pieces = [said[name][start : start + words] for start in range(0, len(said[name]), words)]
        pieces = [piece for piece in pieces if 2 * len(piece) >= words]
        passages += pieces
        numbers += [number] * len(pieces)
    return passages, np.array(numbers, np.int64)


class Reader(nn.Module):
    """An encoder and a linear layer on the mean of what it makes of the tokens.

    Args:
        encoder: a transformers model with ``last_hidden_state``.
        width: of that state. classes: outputs.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[b, tokens] twice -> logits [b, classes]. The mask is 1 on tokens and 0 on padding."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1).clamp_min(1))


def _encoder() -> nn.Module:
    """BERT with two layers of 64: 200,000 parameters, of which 128,000 are the words."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=WORDS,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        pad_token_id=PADDING,
    )
    return Reader(BertModel(config, add_pooling_layer=False), 64, SPEAKERS)


REAL_TEXT: dict[str, Callable[[], Suite]] = {"text_speakers": text_speakers}
