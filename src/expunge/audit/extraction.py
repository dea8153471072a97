"""Memorisation of answers under teacher forcing: exact memorisation and extraction strength.

With the model told the true tokens so far, which of the next ones would it write itself? Over the T answer tokens of an
example but for its last, with the argmax as what the model writes:

    exact memorisation     right tokens / T
    extraction strength    length of the longest suffix that is all right / T

The last answer token is left out, as in open-unlearning: it ends the sequence, and any model that answers knows it. Both are
per example and then averaged; neither depends on how examples are grouped into batches, but for ties within rounding.

Departures from open-unlearning: where not even the last of the T tokens is right, extraction strength is 0; as released it is
1/T there, the same as with that token right (``released_strength``, in the detail). An example of one answer token has T = 0 and
is left out of both; as released it counts as 0 in extraction strength. The target is the retrained models' value: common words
are guessed by models that never saw the answer.

Papers: exact memorisation, Tirumala et al. 2022 (arXiv:2205.10770); extraction strength, Carlini et al. 2021
(arXiv:2012.07805); forms as in open-unlearning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.audit import intervals
from expunge.audit.language import is_language, kept_scores
from expunge.audit.subject import Reading, Subject
from expunge.core import Data, Key, Refused, lent_stream, only_looked_at
from expunge.registry import measure

_CELLS = 1 << 26  # logits held at once: bounds the memory of a pass, whatever the vocabulary


@measure
def exact_memorisation(subject: Subject) -> Reading | None:
    """Share of the forget answers' tokens that the model would write itself, after the true ones; bootstrap interval.

    A mean over examples of shares of tokens, so that a long answer counts no more than a short one. For tasks with
    logits of tokens; None where every answer is one token.
    """
    found = _matched(subject)
    return None if found is None else _reading(subject, "exact_memorisation", exact_share(found), found)


@measure
def extraction_strength(subject: Subject) -> Reading | None:
    """Largest end of each forget answer that the model completes from what comes before, as a share; bootstrap interval.

    0 where it completes nothing, unlike the released code, whose floor of 1/T is in the detail as ``released``.
    """
    found = _matched(subject)
    if found is None:
        return None
    released = 100 * float(released_strength(found).mean())
    return _reading(subject, "extraction_strength", strength(found), found, released=released)


def exact_share(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n] right / tokens.

    Args:
        found: as ``matched`` gives it, for examples with tokens > 0.
    """
    return found["right"] / found["tokens"]


def strength(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n] suffix / tokens: 1 - k/T with k the first token from which all are right, T where there is none.

    Args:
        found: as ``matched`` gives it, for examples with tokens > 0.
    """
    return found["suffix"] / found["tokens"]


def released_strength(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n] the same with k at most T - 1, as open-unlearning computes it: at least 1/T, whatever the model says."""
    return np.maximum(found["suffix"], 1) / found["tokens"]


def matched(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``tokens``, ``right`` and ``suffix`` [b] int64: counts over the answer tokens of each row but for its last.

    Args:
        logits: [b, t, V], entry s judged against entry s of the labels. labels: [b, t], below 0 where no answer token
            stands, at whichever places.

    Raises:
        Refused: for logits that are not a number at an answer token.
    """
    answer = labels >= 0
    if bool(torch.isnan(logits[answer]).any()):
        raise Refused(
            "a model gives logits that are not numbers: it cannot be audited; was its run stopped by a guard?"
        )
    after = answer.flip(1).cumsum(1).flip(1)  # answer tokens from here to the end
    counted = answer & (after > 1)
    right = counted & (logits.argmax(-1) == labels)
    wrong = counted & ~right
    clean = wrong.flip(1).cumsum(1).flip(1) == 0  # no wrong one from here to the end
    return {"tokens": counted.sum(1), "right": right.sum(1), "suffix": (right & clean).sum(1)}


def matches(model: nn.Module, task: Any, data: Data, size: int, key: Key) -> dict[str, np.ndarray]:
    """``id`` and the counts of ``matched`` [n], in one pass in eval mode.

    Args:
        size: examples per batch at most; fewer where the logits of so many would not fit into 256 MiB.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("tokens", "right", "suffix")}
    device = runtime.device_of(model)
    width = task.labels(data.batch(torch.arange(1))).shape[1] + 1
    size = max(1, min(size, _CELLS // (width * task.vocab)))
    with torch.no_grad(), only_looked_at(model), lent_stream(key):
        for number, batch in enumerate(data.batches(size)):
            batch = task.prepare(runtime.to_device(batch, device), key.at("prepare", number))
            for name, counts in matched(task.logits(model, batch), task.labels(batch)).items():
                found[name].append(counts.cpu().numpy())
    return {"id": data.ids.numpy(), **{name: np.concatenate(parts) for name, parts in found.items()}}


def _matched(subject: Subject) -> dict[str, np.ndarray] | None:
    """The counts of the judged model on forget examples that have tokens to judge, once for both measures."""
    if not (is_language(subject.task) and hasattr(subject.task, "logits")):
        return None

    def compute(module: nn.Module, data: Data) -> dict[str, np.ndarray]:
        return matches(module, subject.task, data, subject.batch, subject.key.at("audit", "forget"))

    found = kept_scores(subject, "memorisation 1", "forget", subject.after, compute)
    there = found["tokens"] > 0
    return {name: part[there] for name, part in found.items()} if there.any() else None


def _reading(
    subject: Subject, name: str, shares: np.ndarray, found: Mapping[str, np.ndarray], **detail: float
) -> Reading:
    sampled = intervals.resampled_mean(shares, subject.draws, subject.key.at("resample", "forget"))
    low, high = intervals.share_interval(sampled, len(shares))
    about = {"tokens_per_answer": float(found["tokens"].mean()), **detail}
    skipped = len(subject.outputs("forget")) - len(shares)
    if skipped:
        about["answers_of_one_token"] = float(skipped)
    return Reading(name, 100 * float(shares.mean()), 100 * low, 100 * high, len(shares), "%", detail=about)
