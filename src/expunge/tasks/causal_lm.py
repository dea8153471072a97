"""Causal language models: an answer of several tokens after a prompt, from any model that gives next-token logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Batch, Data, Key, Refused
from expunge.registry import task
from expunge.tasks.classification import kl
from expunge.tasks.refusals import IGNORED, drawn, pasted, table
from expunge.tasks.regression import CACHED
from expunge.tasks.token_columns import COLUMNS, check_columns, refuse_rows


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

    Nor does padding cost anything: columns that are padding in every row asked for never reach the model, and of the
    prompt no row is multiplied with the vocabulary where a loss asks a model that can leave it out (transformers').

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
            check_columns(batch, name)
            ids, mask, labels = (batch[column] for column in COLUMNS)
            answer = labels != IGNORED
            refuse_rows(batch, (ids < 0) | (ids >= self.vocab), name, f"a token outside the vocabulary of {self.vocab}")
            refuse_rows(batch, (mask != 0) & (mask != 1), name, "an attention_mask that is not 0 or 1")
            refuse_rows(
                batch,
                answer & (labels != ids),
                name,
                "labels that are not the tokens themselves (give them unshifted, -100 on prompt and padding)",
            )
            real = ((mask == 1) | answer).int()
            starts = (real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0]
            refuse_rows(batch, (starts > 1)[:, None], name, "padding between its tokens")
            refuse_rows(
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
        real = _real(batch)
        order = torch.argsort(real.int(), dim=1, descending=True, stable=True)
        ids, labels, kept = (column.gather(1, order) for column in (batch["input_ids"], batch["labels"], real))
        return {"id": batch["id"], "input_ids": ids.long(), "attention_mask": kept.long(), "labels": labels.long()}

    def labels(self, batch: Batch) -> Tensor:
        """[b, T-1], the token that follows each position in the order of ``logits``; -100 where it is not answer."""
        return self.aligned(batch)["labels"][:, 1:]

    def lengths(self, batch: Batch) -> Tensor:
        """[b] real tokens of each example; examples of like length together make little padding."""
        return _real(batch).sum(1)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, T-1, V], what is predicted to follow each position: entry t is judged against ``labels`` entry t.

        0 at places that are padding in every row of the batch.
        """
        aligned = self.aligned(batch)
        found = self._called(model, batch, aligned)
        missing = aligned["input_ids"].shape[1] - found.shape[1]
        return F.pad(found, (0, 0, 0, missing - 1)) if missing else found[:, :-1]

    outputs = logits

    def answer_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[M, V], the rows of ``logits`` whose label is an answer token, in the order of ``labels != -100``.

        Equal to those rows up to rounding. A model of transformers computes no others.
        """
        aligned = self.aligned(batch)
        judged = aligned["labels"][:, 1:] != IGNORED
        found = self._called(model, batch, aligned, judged)
        return found if found.ndim == 2 else found[:, : judged.shape[1]][judged[:, : found.shape[1]]]

    def _called(self, model: nn.Module, batch: Batch, aligned: Batch, judged: Tensor | None = None) -> Tensor:
        """[b, W, V] on the W columns that are not padding in every row, or [M, V] where `judged` alone can be asked."""
        width = aligned["input_ids"].shape[1]
        if self.call is not None:  # it may read columns of the full width
            found = self.call(model, {**batch, **aligned})
        else:
            width = max(1, int(aligned["attention_mask"].sum(1).max()))
            trimmed = {name: aligned[name][:, :width] for name in COLUMNS}
            found = _logits(model, trimmed, judged)
        rows = (len(batch["id"]), width) if found.ndim == 3 or judged is None else (int(judged.sum()),)
        if found.shape != (*rows, self.vocab):
            raise Refused(
                f"the model returned logits of shape {tuple(found.shape)}: expected {(*rows, self.vocab)}, one row of "
                f"{self.vocab} per token; a model whose embedding is padded needs CausalLM(vocab=) of that size"
            )
        return found

    def token_nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b, T-1] nats in float32 (or the model's float64), 0 where ``labels`` is -100."""
        labels = self.labels(batch)
        judged = labels != IGNORED
        each = F.cross_entropy(_wide(self.answer_logits(model, batch)), labels[judged], reduction="none")
        return _spread(each, judged)

    def token_statistics(self, model: nn.Module, batch: Batch) -> TokenStatistics:
        """Log-probability of each answer token, and mean and variance of log p over the vocabulary at its place.

        Only rows of logits that are judged are widened, so a long prompt costs no vocabulary-sized memory of its own.
        The variance is that of deviations from the mean, not a difference of squares, which cancels where the model
        is sure.
        """
        labels = self.labels(batch)
        mask = labels != IGNORED
        logs = F.log_softmax(_wide(self.answer_logits(model, batch)), -1)
        chosen = logs.gather(1, labels[mask][:, None]).squeeze(1)
        weight = logs.exp()
        logs = torch.where(weight > 0, logs, torch.zeros_like(logs))  # a token ruled out has p log p = 0, not NaN
        mean = (weight * logs).sum(1)
        variance = (weight * (logs - mean[:, None]).square_()).sum(1)
        log_probs, mean, variance = (_spread(part, mask) for part in (chosen, mean, variance))
        return TokenStatistics(log_probs, mean, variance, mask)

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """[b] nats, summed over answer tokens: -log p(answer | prompt)."""
        return self.token_nll(model, batch).sum(1)

    def units(self, batch: Batch) -> Tensor:
        """[b] answer tokens."""
        return (self.labels(batch) != IGNORED).sum(1).float()

    def written(self, model: nn.Module, batch: Batch) -> Batch:
        """The same prompts with the model's own likeliest answers, at most half as long again as the longest true one.

        An answer ends with the token that all answers of the batch end with, where there is one. Not for a task with
        ``call=``, of which it is not known how the model goes on from a token.
        """
        from expunge.tasks.generation import continuations

        aligned = self.aligned(batch)
        labels, ids = aligned["labels"].cpu(), aligned["input_ids"].cpu()
        answers = [ids[row, label != IGNORED].tolist() for row, label in enumerate(labels)]
        starts = [max(1, int((label != IGNORED).nonzero()[0])) for label in labels]
        lasts = {answer[-1] for answer in answers}
        end = next(iter(lasts)) if len(lasts) == 1 else None
        most = 3 * max(map(len, answers)) // 2 + 1
        prompts = [ids[row, :start].tolist() for row, start in enumerate(starts)]
        said = continuations(model, prompts, end, new_tokens=most, batch=len(prompts))
        whole = [answer if end is None or len(answer) == most else [*answer, end] for answer in said]
        own = table(whole)[:, None]
        return {"id": batch["id"], **pasted(aligned, own, torch.zeros(len(whole), dtype=torch.int64))}

    def chance(self, batch: Batch) -> float:
        """log V."""
        return math.log(self.vocab)

    def divergence(self, model: nn.Module, batch: Batch, target: Tensor, temperature: float = 1.0) -> Tensor:
        """[b] KL(teacher || model) at the temperature, times its square, nats, summed over answer positions only."""
        judged = self.labels(batch) != IGNORED
        each = kl(_wide(self.answer_logits(model, batch)), _wide(target[judged]), temperature)
        return _spread(each, judged).sum(1)

    def relabel(self, batch: Batch, rng: Key) -> Batch:
        """The same prompts with a refusal for an answer; without refusals, with another random token at each answer.

        A refusal equal to the true answer is never drawn, nor is the true token at any place. Padding comes out on the
        right, and the batch may be wider.
        """
        kept = {name: column for name, column in batch.items() if name not in CACHED}
        aligned, generator = self.aligned(batch), rng.generator()
        refusals = self.refusals_of(batch)
        if refusals is not None:
            return {**kept, **pasted(aligned, refusals, drawn(aligned, refusals, generator))}
        ids, labels = aligned["input_ids"], aligned["labels"]
        step = torch.randint(1, self.vocab, ids.shape, generator=generator).to(ids.device)
        answer = labels != IGNORED
        wrong = torch.where(answer, (ids + step) % self.vocab, ids)
        return {**kept, **aligned, "input_ids": wrong, "labels": torch.where(answer, wrong, labels)}

    def refusals_of(self, batch: Batch) -> Tensor | None:
        """[b, n, L] on the CPU, filled up with -100; None where there are none."""
        if "refusals" in batch:
            return batch["refusals"].long().cpu()
        return table(self.refusals).expand(len(batch["id"]), -1, -1) if self.refusals else None

    def refuse(self, batch: Batch, chosen: Tensor) -> Batch:
        """The same prompts with the refusals of these numbers [b] for answers: what ``relabel`` may draw."""
        refusals = self.refusals_of(batch)
        if refusals is None:
            raise Refused("the task has no refusals: give CausalLM(refusals=) or data with a column 'refusals'")
        kept = {name: column for name, column in batch.items() if name not in CACHED}
        return {**kept, **pasted(self.aligned(batch), refusals, chosen.cpu())}


def _real(batch: Batch) -> Tensor:
    """[b, T] True on tokens that are attended or judged."""
    return (batch["attention_mask"] != 0) | (batch["labels"] != IGNORED)


def _spread(values: Tensor, judged: Tensor) -> Tensor:
    """[M] values at the M places of [b, U] that are judged, 0 elsewhere."""
    return torch.zeros(judged.shape, dtype=values.dtype, device=values.device).masked_scatter(judged, values)


def _keeps_places(model: nn.Module) -> bool:
    """Whether the model's forward cuts its hidden states with transformers' helper, which takes a mask of places."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    return code is not None and "slice_logits_to_keep" in code.co_names


def _logits(model: nn.Module, aligned: Batch, judged: Tensor | None = None) -> Tensor:
    """Call a model as Hugging Face's are called, or as a plain module of token ids.

    The places that are `judged` [b, T-1] are asked for alone where the model can be: it then returns [M, V].
    """
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
        if "query_mask" in takes and "labels" in aligned:  # what decides by the question must not see the answer
            answered = (aligned["labels"] != IGNORED).cumsum(1) > 0
            named["query_mask"] = aligned["attention_mask"] * ~answered
        if judged is not None and _keeps_places(model):
            places = F.pad(judged, (0, 1))[:, : aligned["input_ids"].shape[1]]  # nothing follows the last token
            named["logits_to_keep"] = places
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
