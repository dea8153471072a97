"""What a language model writes by itself when it is asked what it was to forget: fluency and repetition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from expunge import runtime
from expunge.audit import intervals
from expunge.audit.language import is_language
from expunge.audit.subject import Reading, Subject
from expunge.core import only_looked_at
from expunge.registry import measure

ANSWERED = 64
"""Forget prompts that a model answers in its own words."""


@measure
def lm_fluency(subject: Subject) -> Reading | None:
    """Nats per token that retrained models give to the model's own likeliest answers to the forget prompts.

    What a model says that never saw the answers is plausible to others that never saw them. The true answers of a model
    that forgot nothing are not, nor is a refusal that no retrained model would give: the loss of the TRUE answer does not
    tell one of these from forgetting. Mean over up to 64 examples, evenly spread, and over the retrained models; bootstrap
    interval over the examples. Needs retrained models; each of these is judged by the others.

    Ours, in place of open-unlearning's classifier of gibberish, which is of one language and one style.
    """
    written = _written(subject)
    if written is None or not subject.retrained:
        return None
    losses = [_per_token(subject.opened(model), subject.task, written) for model in subject.retrained]
    return _of_answers(subject, "lm_fluency", np.stack(losses).mean(0), "nats per token")


@measure
def lm_repetition(subject: Subject) -> Reading | None:
    """Percent of token pairs in the model's own likeliest answers to the forget prompts that came before in that answer.

    A model that was pushed too far often runs in circles, which neither its loss on the true answer nor other models, to
    whom a repetition is likely, give away. Over the same answers as ``lm_fluency``; bootstrap interval over the examples.

    Ours; distinct-2 of Li et al. 2016 (arXiv:1510.03055) within one answer, subtracted from one.
    """
    written = _written(subject)
    if written is None:
        return None
    labels = subject.task.labels(written).cpu().numpy()  # type: ignore[attr-defined]
    return _of_answers(subject, "lm_repetition", 100 * np.array([repeated(row[row >= 0]) for row in labels]), "%")


def repeated(tokens: np.ndarray) -> float:
    """Share of neighbouring pairs that stood earlier in the same answer, in [0, 1); 0 for fewer than two pairs.

    Args:
        tokens: [n] ids.
    """
    pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _of_answers(subject: Subject, name: str, values: np.ndarray, unit: str) -> Reading:
    low, high = intervals.percentile(intervals.resampled_mean(values, subject.draws, subject.key.at(name)))
    return Reading(name, float(values.mean()), low, high, len(values), unit=unit, better="nearer_retrained")


def _written(subject: Subject) -> Any:
    """The judged model's own answers to up to ``ANSWERED`` forget prompts; None where the task cannot write."""
    task: Any = subject.task
    if not (is_language(task) and hasattr(task, "written")) or getattr(task, "call", None) is not None:
        return None

    def write() -> Any:
        data, module = subject.data("forget"), subject.opened(subject.after)
        size = min(len(data), ANSWERED)
        batch = data.batch(torch.tensor([place * len(data) // size for place in range(size)]))
        return task.written(module, runtime.to_device(batch, runtime.device_of(module)))

    return subject.cache.get(subject.after, "written", write)


def _per_token(model: nn.Module, task: Any, batch: Any) -> np.ndarray:
    """[b] nats per answer token; 0 for an answer that is empty."""
    with torch.no_grad(), only_looked_at(model):
        loss = task.nll(model, runtime.to_device(batch, runtime.device_of(model))) / task.units(batch).clamp_min(1)
    return loss.double().cpu().numpy()
