"""What a language model writes after a prompt: batched, the same text at any batch size, no global random stream.

Greedy at temperature 0: the likeliest token at each place. Above 0 a token is drawn from softmax(logits / temperature) by
the Gumbel maximum, argmax(logits / temperature + G), with noise that is a function of (key, prompt, step): what one prompt
gets does not depend on the prompts beside it. The longest prompts go first, so that memory runs out at once or never.

A model with a ``generate`` of its own (transformers, PEFT) is run by that, padded on the left with explicit masks, so a
pad token that is the end token, or is missing, is no matter. Any other module is called again for each token, without a
cache, as ``tasks.causal_lm`` calls it. Penalties and sampling settings stored with a checkpoint are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Key, Refused, RunFailed, only_looked_at
from expunge.progress import progress
from expunge.runtime import device_of
from expunge.tasks.causal_lm import IGNORED, _logits

TAIL = 12
"""Tokens beyond the length of a stop text, in bytes, that are read again for it: it may begin inside a token."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 200,
    batch: int = 16,
    temperature: float = 0.0,
    rng: Key | None = None,
    stop: Sequence[str] = (),
    streams: Sequence[int] | None = None,
) -> list[str]:
    """What the model writes after each prompt, in the order of the prompts.

    In float32 the texts are the same at any batch size, but for exact ties; in half precision a near-tie may fall either
    way. Model, its mode and the global random streams are left as they were.

    Args:
        model: a causal language model. tokenizer: of transformers, or with the same ``__call__``, ``decode`` and
            ``eos_token_id``.
        prompts: texts, each shorter than the model's context. A beginning-of-sequence token that is already in the text
            is not added again.
        new_tokens: most tokens to write, >= 1; cut where the context ends. batch: prompts at a time, >= 1.
        temperature: 0 for greedy, or above. rng: the stream that is drawn from, needed above 0.
        stop: texts at which the writing ends; what is returned ends before them.
        streams: numbers of the prompts' draws, by default their places.

    Raises:
        Refused: for a number out of range, a temperature without a key, an empty prompt, or one that fills the context.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return generate_ids(
        model,
        tokenizer,
        encoded,
        new_tokens=new_tokens,
        batch=batch,
        temperature=temperature,
        rng=rng,
        stop=stop,
        streams=streams,
    )


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt that an answer is to follow: one token that begins the sequence, none that ends it."""
    first, end = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token_id", None)
    begun = bool(first) and prompt.startswith(str(first))
    found = list(tokenizer(prompt, add_special_tokens=not begun)["input_ids"])
    if len(found) > 1 and found[-1] == end and not prompt.endswith(str(getattr(tokenizer, "eos_token", None))):
        found = found[:-1]  # some tokenizers end every text; a model would then answer after the end
    return found


def generate_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 200,
    batch: int = 16,
    temperature: float = 0.0,
    rng: Key | None = None,
    stop: Sequence[str] = (),
    streams: Sequence[int] | None = None,
) -> list[str]:
    """``generate`` for prompts that are token ids already; `streams` numbers their draws, by default by their place."""
    _check(new_tokens, batch, temperature, rng, stop)
    numbers = range(len(prompts)) if streams is None else streams
    rooms = _rooms(model, prompts, new_tokens)
    done, texts = 0, [""] * len(prompts)
    with progress("writing", sum(rooms)) as update, torch.no_grad(), only_looked_at(model):
        for rows in _batches(prompts, rooms, batch):
            budget = rooms[rows[0]]
            draws = _Draws(temperature, rng, tuple(numbers[row] for row in rows))
            stops = _Stops(tokenizer, tuple(stop), [len(prompts[row]) for row in rows], update, done)
            write = _with_generate if hasattr(model, "generate") else _one_by_one
            written = write(model, tokenizer, [list(prompts[row]) for row in rows], budget, draws, stops)
            for row, ids in zip(rows, written, strict=True):
                texts[row] = cut(tokenizer.decode(ids, skip_special_tokens=True), stop)
            done += budget * len(rows)
            update(done)
    return texts


@dataclass(frozen=True)
class _Ids:
    """A tokenizer for those who have none: it knows the end token, and leaves ids as they are."""

    eos_token_id: int | None

    def decode(self, ids: Sequence[int], **_: Any) -> Any:
        """The ids."""
        return list(ids)


def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], end: int | None, *, new_tokens: int, batch: int = 16
) -> list[list[int]]:
    """The token ids that a model writes greedily after each prompt, without the token that ends them.

    Args:
        prompts: token ids. end: the token that ends an answer, where there is one. new_tokens, batch: see ``generate``.
    """
    found: list[Any] = list(generate_ids(model, _Ids(end), prompts, new_tokens=new_tokens, batch=batch))
    return found


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts that it contains."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text


def ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those that the checkpoint names for generation."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    return {int(end) for end in (getattr(tokenizer, "eos_token_id", None), *several) if end is not None}


def context_of(model: nn.Module) -> int | None:
    """Tokens that the model takes at most; None where it does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _check(new_tokens: int, batch: int, temperature: float, rng: Key | None, stop: Sequence[str]) -> None:
    for name, value in (("new_tokens", new_tokens), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refused(f"{name} must be a whole number of at least 1, found {value!r}")
    if not 0 <= temperature < float("inf"):
        raise Refused(f"temperature must be 0 (greedy) or a number above it, found {temperature!r}")
    if temperature > 0 and rng is None:
        raise Refused(
            f"temperature {temperature:g} draws tokens and there is no stream to draw from: give rng=Key(seed)"
        )
    if isinstance(stop, str) or not all(stop):
        raise Refused(f"stop must be a list of texts that are not empty, found {stop!r}")


def _rooms(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
    """How many tokens may follow each prompt."""
    context, table = context_of(model), _embedding_rows(model)
    rooms = []
    for number, ids in enumerate(prompts):
        if len(ids) == 0:
            raise Refused(f"prompt {number} has no token: there is nothing to go on from; give it a text")
        if table is not None and max(ids) >= table:
            raise Refused(
                f"prompt {number} has token {max(ids)} and the model knows {table}: the tokenizer is of another model"
            )
        if context is not None and len(ids) >= context:
            raise Refused(
                f"prompt {number} has {len(ids)} tokens and the model takes {context}, the answer among them: shorten it"
            )
        rooms.append(new_tokens if context is None else min(new_tokens, context - len(ids)))
    return rooms


def _embedding_rows(model: nn.Module) -> int | None:
    table: Any = getattr(model, "get_input_embeddings", None)
    return None if table is None else getattr(table(), "num_embeddings", None)


def _batches(prompts: Sequence[Sequence[int]], rooms: Sequence[int], size: int) -> Iterator[list[int]]:
    """Longest first; a batch has one budget, so that no prompt is cut short, or run too far, for another's sake."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    rows: list[int] = []
    for row in order:
        if rows and (len(rows) == size or rooms[row] != rooms[rows[0]]):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


@dataclass
class _Draws:
    """Logits to what is maximised: as they are, or with Gumbel noise, one stream for each prompt."""

    temperature: float
    rng: Key | None
    numbers: tuple[int, ...]
    streams: list[torch.Generator] = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng if self.temperature > 0 else None
        self.streams = [] if rng is None else [rng.at("write", number).generator() for number in self.numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.isnan(scores).any():
            raise RunFailed("the model's logits are NaN: its weights are broken, so it can write nothing")
        if not self.streams:
            return scores
        size = scores.shape[1]
        uniform = torch.stack([torch.rand(size, generator=stream, dtype=torch.float64) for stream in self.streams])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        return scores / self.temperature + noise.to(scores.device, scores.dtype)


@dataclass
class _Stops:
    """Which rows have written a stop text; tells the progress bar as well."""

    tokenizer: Any
    stop: tuple[str, ...]
    lengths: list[int]
    update: Callable[[int], None]
    done: int

    def __call__(self, input_ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        width = max(self.lengths)
        self.update(self.done + (input_ids.shape[1] - width) * len(input_ids))
        if not self.stop:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tail = max(width, input_ids.shape[1] - TAIL - max(len(word.encode()) for word in self.stop))
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in input_ids[:, tail:].tolist()]
        found = [any(word in text for word in self.stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _with_generate(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], budget: int, draws: _Draws, stops: _Stops
) -> list[list[int]]:
    """Through the model's own ``generate``, which keeps keys and values."""
    from transformers import GenerationConfig

    width, final = max(map(len, prompts)), ends(model, tokenizer)
    filler = min(final, default=0)
    device = device_of(model)
    ids = torch.tensor([[filler] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    # every setting that a checkpoint may bring is given: what is left out would be filled in from it
    neutral: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
    neutral |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_return_sequences": 1}
    config = GenerationConfig(
        max_new_tokens=budget,
        do_sample=False,
        num_beams=1,
        pad_token_id=filler,
        eos_token_id=sorted(final) or None,
        **neutral,
    )
    write: Any = model.generate
    found = write(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=[draws],
        stopping_criteria=[stops],
    )
    return [_until(row, final) for row in found[:, width:].tolist()]


def _one_by_one(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], budget: int, draws: _Draws, stops: _Stops
) -> list[list[int]]:
    """One forward pass per token over the whole text, real tokens first: for modules that take nothing but tokens."""
    final, device = ends(model, tokenizer), device_of(model)
    width, filler = max(map(len, prompts)), min(final, default=0)
    lengths = torch.tensor([len(row) for row in prompts], device=device)
    ids = torch.tensor([row + [filler] * (width + budget - len(row)) for row in prompts], device=device)
    written = torch.full((len(prompts), budget), filler, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows, places = torch.arange(len(prompts), device=device), torch.arange(ids.shape[1], device=device)
    for step in range(budget):
        upto = width + step
        mask = (places[None, :upto] < (lengths + step)[:, None]).long()
        answered = (places[None, :upto] >= lengths[:, None]) & (mask == 1)
        labels = ids[:, :upto].masked_fill(~answered, IGNORED)
        logits = _logits(model, {"input_ids": ids[:, :upto], "attention_mask": mask, "labels": labels})
        scores = draws(ids, logits[rows, lengths + step - 1].float())
        chosen = torch.where(finished, filler, scores.argmax(1))
        ids[rows, lengths + step] = written[:, step] = chosen
        finished |= torch.isin(chosen, torch.tensor(sorted(final), device=device, dtype=chosen.dtype))
        seen = torch.cat([ids.new_zeros(len(prompts), width), written[:, : step + 1]], 1)
        finished |= stops(seen)
        if bool(finished.all()):
            break
    return [_until(row, final) for row in written[:, : step + 1].tolist()]


def _until(ids: list[int], final: set[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return next((ids[:place] for place, token in enumerate(ids) if token in final), ids)
