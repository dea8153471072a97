"""Causal language models: an answer of several tokens after a prompt, from any model that gives next-token logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Batch, Data, Key, Refused
from expunge.registry import task
from expunge.tasks.classification import kl
from expunge.tasks.regression import CACHED

IGNORED = -100
"""The label of a token that is not part of the answer, and the filler of a refusal shorter than the longest."""
COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class TokenStatistics:
    """What a model says of each token, [b, T-1] in the order of ``CausalLM.labels``; 0 where `mask` is False.

    Attributes:
        log_probs: log p of the token that follows, nats.
        mean: expected log p of a token drawn from the model itself, sum_v p_v log p_v. variance: of the same, >= 0.
        mask: True on answer tokens.
    """

    log_probs: Tensor
    mean: Tensor
    variance: Tensor
    mask: Tensor


@task
@dataclass(frozen=True)
class CausalLM:
    """Next-token cross-entropy of the answer; unit: one answer token.

    Columns: ``input_ids`` [b, T], ``attention_mask`` [b, T] (1 on real tokens), ``labels`` [b, T]: the token itself on
    the answer, -100 on the prompt and on padding. The shift by one is done here, so labels are NOT shifted. A label on
    the very first token cannot be predicted and does not count.

    Padding changes no value, on whichever side it is: every row is moved to start with its first real token before the
    model sees it, and what comes back (``logits``, ``outputs``, ``labels``) stands in that order. A token is real when
    it is attended or has a label, so the end-of-sequence token counts even where a mask was made as ``ids != pad``.

    Args:
        vocab: number of tokens V, >= 2.
        refusals: token ids of answers that give nothing away, end-of-sequence token included where answers have it.
            A batch column ``refusals`` [b, n, L], filled up with -100, comes before these.
        call: ``(model, batch) -> logits [b, T, V]`` for a model of another shape. By default the model is called with
            ``input_ids`` and ``attention_mask`` (as far as it takes them by name) and returns logits, or has them as
            ``.logits`` or ``["logits"]``.
        decode: token ids of one answer -> its text, for attacks that need text (zlib). It changes nothing else.

    Raises:
        Refused: for fewer than two tokens, or refusals that are empty or outside the vocabulary.
    """

    vocab: int
    refusals: tuple[tuple[int, ...], ...] = ()
    call: Callable[[nn.Module, Batch], Tensor] | None = None
    decode: Callable[[Sequence[int]], str] | None = field(default=None, repr=False)
    name: str = field(default="causal_lm", init=False)
    unit: str = field(default="nats per answer token", init=False)
    stochastic: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.vocab < 2:
            raise Refused(f"vocab must be at least 2 tokens, found {self.vocab}")
        for refusal in self.refusals:
            if not refusal or not all(0 <= token < self.vocab for token in refusal):
                raise Refused(f"refusal {refusal!r} must be one or more token ids of 0 to {self.vocab - 1}")

    def check(self, data: Data, name: str) -> None:
        """Refuse tokens outside the vocabulary, masks with holes, shifted labels, and examples without an answer."""
        for batch in data.batches(256):
            _check_columns(batch, name)
            ids, mask, labels = (batch[column] for column in COLUMNS)
            answer = labels != IGNORED
            _refuse(batch, (ids < 0) | (ids >= self.vocab), name, f"a token outside the vocabulary of {self.vocab}")
            _refuse(batch, (mask != 0) & (mask != 1), name, "an attention_mask that is not 0 or 1")
            _refuse(
                batch,
                answer & (labels != ids),
                name,
                "labels that are not the tokens themselves (give them unshifted, -100 on prompt and padding)",
            )
            real = ((mask == 1) | answer).int()
            starts = (real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0]
            _refuse(batch, (starts > 1)[:, None], name, "padding between its tokens")
            _refuse(
                batch,
                (self.units(batch) == 0)[:, None],
                name,
                "no answer token to predict (all labels are -100, or there is no prompt before the only one)",
            )

    def prepare(self, batch: Batch, rng: Key) -> Batch:
        """Nothing is random."""
        return batch

    def aligned(self, batch: Batch) -> Batch:
        """The three columns with real tokens first and all padding behind them."""
        real = (batch["attention_mask"] != 0) | (batch["labels"] != IGNORED)
        order = torch.argsort(real.int(), dim=1, descending=True, stable=True)
        ids, labels, kept = (column.gather(1, order) for column in (batch["input_ids"], batch["labels"], real))
        return {"id": batch["id"], "input_ids": ids.long(), "attention_mask": kept.long(), "labels": labels.long()}

    def labels(self, batch: Batch) -> Tensor:
        """[b, T-1], the token that follows each position in the order of ``logits``; -100 where it is not answer."""
        return self.aligned(batch)["labels"][:, 1:]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, T-1, V], what is predicted to follow each position: entry t is judged against ``labels`` entry t."""
        aligned = self.aligned(batch)
        found = self.call(model, {**batch, **aligned}) if self.call is not None else _logits(model, aligned)
        wanted = (*aligned["input_ids"].shape, self.vocab)
        if found.shape != wanted:
            raise Refused(
                f"the model returned logits of shape {tuple(found.shape)}: expected {wanted}, one row of {self.vocab} "
                f"per token; a model whose embedding is padded needs CausalLM(vocab=) of that size"
            )
        return found[:, :-1]

    outputs = logits

    def token_nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, T-1] nats in float32 (or the model's float64), 0 where ``labels`` is -100."""
        logits, labels = _wide(self.logits(model, batch)), self.labels(batch)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")

    def token_statistics(self, model: nn.Module, batch: Batch) -> TokenStatistics:
        """Log-probability of each answer token, and mean and variance of log p over the vocabulary at its place.

        Only rows of logits that are judged are widened, so a long prompt costs no vocabulary-sized memory of its own.
        The variance is that of deviations from the mean, not a difference of squares, which cancels where the model
        is sure.
        """
        labels = self.labels(batch)
        mask = labels != IGNORED
        logs = F.log_softmax(_wide(self.logits(model, batch)[mask]), -1)
        chosen = logs.gather(1, labels[mask][:, None]).squeeze(1)
        weight = logs.exp()
        logs = torch.where(weight > 0, logs, torch.zeros_like(logs))  # a token ruled out has p log p = 0, not NaN
        mean = (weight * logs).sum(1)
        variance = (weight * (logs - mean[:, None]).square_()).sum(1)
        empty = torch.zeros(mask.shape, dtype=logs.dtype, device=logs.device)
        log_probs, mean, variance = (empty.masked_scatter(mask, part) for part in (chosen, mean, variance))
        return TokenStatistics(log_probs, mean, variance, mask)

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b] nats, summed over answer tokens: -log p(answer | prompt)."""
        return self.token_nll(model, batch).sum(1)

    def units(self, batch: Batch) -> Tensor:
        """[b] answer tokens."""
        return (self.labels(batch) != IGNORED).sum(1).float()

    def chance(self, batch: Batch) -> float:
        """log V."""
        return math.log(self.vocab)

    def divergence(self, model: nn.Module, batch: Batch, target: Tensor, temperature: float = 1.0) -> Tensor:
        """[b] KL(teacher || model) at the temperature, times its square, nats, summed over answer positions only."""
        each = kl(_wide(self.logits(model, batch)), _wide(target), temperature)
        return torch.where(self.labels(batch) != IGNORED, each, torch.zeros_like(each)).sum(1)

    def relabel(self, batch: Batch, rng: Key) -> Batch:
        """The same prompts with a refusal for an answer; without refusals, with another random token at each answer.

        A refusal equal to the true answer is never drawn, nor is the true token at any place. Padding comes out on the
        right, and the batch may be wider.
        """
        kept = {name: column for name, column in batch.items() if name not in CACHED}
        aligned, generator = self.aligned(batch), rng.generator()
        refusals = self._refusals(batch)
        if refusals is not None:
            return {**kept, **_refused(aligned, refusals, generator)}
        ids, labels = aligned["input_ids"], aligned["labels"]
        step = torch.randint(1, self.vocab, ids.shape, generator=generator).to(ids.device)
        answer = labels != IGNORED
        wrong = torch.where(answer, (ids + step) % self.vocab, ids)
        return {**kept, **aligned, "input_ids": wrong, "labels": torch.where(answer, wrong, labels)}

    def _refusals(self, batch: Batch) -> Tensor | None:
        """[b, n, L] on the CPU, filled up with -100; None where there are none."""
        if "refusals" in batch:
            return batch["refusals"].long().cpu()
        if not self.refusals:
            return None
        longest = max(map(len, self.refusals))
        table = torch.tensor([[*r, *[IGNORED] * (longest - len(r))] for r in self.refusals])
        return table.expand(len(batch["id"]), -1, -1)


def _logits(model: nn.Module, aligned: Batch) -> Tensor:
    """Call a model as Hugging Face's are called, or as a plain module of token ids."""
    takes = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())  # a wrapper that passes all on
    if "input_ids" not in takes and not anything:
        output = model(aligned["input_ids"])
    else:
        named: dict[str, Any] = {"input_ids": aligned["input_ids"]}
        if "attention_mask" in takes or anything:
            named["attention_mask"] = aligned["attention_mask"]
        if "use_cache" in takes:
            named["use_cache"] = False  # keys and values of a batch that is never continued
        output = model(**named)
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise Refused(
        f"the model returned a {type(output).__name__} without logits: say how to read it with "
        f"CausalLM(call=lambda model, batch: ...)"
    )


def _wide(logits: Tensor) -> Tensor:
    """At least float32: sums of bfloat16 log-probabilities lose three digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _refused(aligned: Batch, refusals: Tensor, generator: torch.Generator) -> Batch:
    """Prompt + drawn refusal, row by row, padded on the right."""
    ids, labels, mask = (aligned[column].cpu() for column in ("input_ids", "labels", "attention_mask"))
    prompts, answers = [], []
    for row, choices in enumerate(refusals):
        answer = torch.nonzero(labels[row] != IGNORED).flatten()
        start = int(answer[0]) if len(answer) else int(mask[row].sum())
        true = ids[row, answer].tolist()
        wrong = [r for choice in choices if (r := choice[choice != IGNORED].tolist()) and r != true]
        if not wrong:
            raise Refused(
                f"every refusal of example {int(aligned['id'][row])} is empty or its true answer: give another one"
            )
        prompts.append(ids[row, :start].tolist())
        answers.append(wrong[int(torch.randint(len(wrong), (1,), generator=generator))])
    width = max(ids.shape[1], *(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))

    def table(filler: int, rows: Iterable[list[int]]) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows]).to(aligned["input_ids"].device)

    both = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": table(0, (p + a for p, a in both)),
        "attention_mask": table(0, ([1] * (len(p) + len(a)) for p, a in both)),
        "labels": table(IGNORED, ([IGNORED] * len(p) + a for p, a in both)),
    }


def _check_columns(batch: Batch, name: str) -> None:
    for column in COLUMNS:
        if column not in batch:
            raise Refused(
                f"{name} data has no column {column!r}: it has {', '.join(batch)}; a language model needs "
                f"{', '.join(COLUMNS)}"
            )
        value = batch[column]
        if value.ndim != 2 or value.shape != batch["input_ids"].shape or value.is_floating_point():
            raise Refused(
                f"{name} column {column!r} is {value.dtype} of shape {tuple(value.shape)}: expected whole numbers "
                f"[examples, tokens], the same for {', '.join(COLUMNS)}"
            )


def _refuse(batch: Batch, bad: Tensor, name: str, what: str) -> None:
    rows = torch.nonzero(bad.any(1)).flatten()
    if len(rows):
        raise Refused(
            f"{name} example {int(batch['id'][rows[0]])} has {what} ({len(rows)} such examples): correct or drop them"
        )
