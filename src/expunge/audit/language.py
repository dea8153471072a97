"""Membership in language models: zlib, reference model, Min-K % and Min-K++ %, beside the loss and the gradient norm.

The six usual attacks give each example one score, larger for what looks like training data, and are judged by the area
under the ROC curve of forget against unseen examples, with the true positive rate at 1 % in the detail. The loss attack is ``membership_auc``; the gradient norm is in
``attacks.gradient_norm``. As there, the target is the retrained model's value, not chance: texts differ in difficulty by
themselves. Every answer token counts, the end-of-sequence token too (open-unlearning leaves the last one out of Min-K).
No score depends on how examples are grouped into batches, but for rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge import runtime
from expunge.audit import intervals, roc
from expunge.audit.subject import Model, Reading, Subject
from expunge.core import Data, Key, Refused, Task, described, lent_stream, only_looked_at
from expunge.data.sources import fingerprint
from expunge.registry import measure

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SHARE = 0.4
"""The K of the readings, as the unlearning benchmarks take it; the paper of Min-K has 0.2. The detail has the others."""
_CELLS = 1 << 26  # logits held at once: bounds the memory of a pass, whatever the vocabulary


@measure
def lm_zlib(subject: Subject) -> Reading | None:
    """Membership AUC of minus the loss per answer token over the compressed size of the answer; DeLong interval.

    A text that compresses well is likely for any model: the size takes that out. The text is ``CausalLM(decode=)`` of
    the answer, as UTF-8. Departure where the task has no ``decode``: the token ids as whole numbers of the fewest
    bytes stand for the text.

    Paper: Carlini et al. 2021 (arXiv:2012.07805).
    """
    if not _applies(subject):
        return None
    forget, unseen = (zlib_score(subject.outputs(name).loss, _compressed(subject, name)) for name in ("forget", "test"))
    text = float(getattr(subject.task, "decode", None) is not None)
    return roc.separation("lm_zlib", forget, unseen, of_text=text)


@measure
def lm_reference(subject: Subject) -> Reading | None:
    """Membership AUC of the loss per token of models that never saw the data, less the model's own; DeLong interval.

    The reference is the mean over the retrained models: the same recipe without the forget examples, which is the
    best-matched reference there is, and the model before forgetting is none, since it saw them. Needs retrained models;
    each of these is judged by the others. The interval is over examples, not over references.

    Paper: Carlini et al. 2021 (arXiv:2012.07805), with a model of another size for reference.
    """
    if not (_applies(subject) and subject.retrained):
        return None
    forget, unseen = (
        reference_score(subject.outputs(name).loss, -subject.margins(name)) for name in ("forget", "test")
    )
    return roc.separation("lm_reference", forget, unseen, references=float(len(subject.retrained)))


@measure
def lm_min_k(subject: Subject) -> Reading | None:
    """Membership AUC of the mean log-probability of the 40 % least likely answer tokens; DeLong interval.

    The detail has MUSE's privacy leakage against the retrained mean, and the area at other shares of tokens.

    Paper: Shi et al. 2024 (arXiv:2310.16789); PrivLeak: MUSE (arXiv:2407.06460).
    """
    return _by_tokens(subject, "lm_min_k", "min_k")


@measure
def lm_min_k_plus(subject: Subject) -> Reading | None:
    """The same with each log-probability standardised over the vocabulary at its place (Min-K++); DeLong interval.

    Paper: Zhang et al. 2025 (arXiv:2404.02936).
    """
    return _by_tokens(subject, "lm_min_k_plus", "min_k_plus")


@measure(asked=True)
def lm_privacy_leakage(subject: Subject) -> Reading | None:
    """MUSE's PrivLeak of Min-40 %, 0 for a retrained model; bootstrap interval over forget and unseen examples.

    From -100, where every forget example is told from the unseen ones, to ``most`` in the detail, where each is the wrong
    way round: 100 A_r / (1 - A_r), so that its upper end depends on the retrained models' mean area A_r. Above 0 is no
    success: what is less like training data than texts never seen has been forgotten too much, and gives itself away.
    None without retrained models, or where their area is 1; each of these is judged by the others.

    Paper: MUSE (arXiv:2407.06460); the published constants of its own models are in ``benchmarks.muse``.
    """
    if not (_applies(subject) and subject.retrained):
        return None
    place, keys = SHARES.index(SHARE), (subject.key.at("resample", "forget"), subject.key.at("resample", "test"))

    def area(model: Model) -> tuple[float, np.ndarray]:
        forget, unseen = (_scores(subject, name, model)["min_k"][:, place] for name in ("forget", "test"))
        return intervals.auc(forget, unseen), intervals.resampled_auc(forget, unseen, subject.draws, keys)

    (ours, sampled), others = area(subject.after), [area(model) for model in subject.retrained]
    reference, drawn = float(np.mean([one for one, _ in others])), np.mean([draws for _, draws in others], axis=0)
    if reference >= 1:
        return None
    usable = drawn < 1
    low, high = intervals.percentile(100 * (drawn[usable] - sampled[usable]) / (1 - drawn[usable]))
    value, most = privacy_leakage(ours, reference), privacy_leakage(0.0, reference)
    size = len(subject.outputs("forget")) + len(subject.outputs("test"))
    detail = {"area": ours, "retrained_area": reference, "least": -100.0, "most": most}
    return Reading("lm_privacy_leakage", value, min(low, value), max(high, value), size, detail=detail)


def zlib_score(loss: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[n] -loss / size: larger for members.

    Args:
        loss: [n] nats per token. sizes: [n] bytes of the compressed text, > 0.
    """
    return -np.asarray(loss, np.float64) / np.asarray(sizes, np.float64)


def reference_score(loss: np.ndarray, references: np.ndarray) -> np.ndarray:
    """[n] mean loss of the references less the model's loss: larger for members.

    Args:
        loss: [n] nats per token. references: [m, n] the same of m models that never saw the examples.
    """
    return np.asarray(references, np.float64).mean(0) - np.asarray(loss, np.float64)


def min_k(log_probs: np.ndarray, mask: np.ndarray, share: float = SHARE) -> np.ndarray:
    """[n] mean of the floor(share T) smallest log-probabilities of the T tokens of each row, at least one of them.

    At share 1 it is minus the loss per token. Departure: where share T is below 1 the authors' code averages nothing
    and gives NaN.

    Args:
        log_probs: [n, t] nats. mask: [n, t] bool, the tokens that count, at least one per row. share: in (0, 1].

    Raises:
        Refused: for a share out of range, shapes that differ, or a row without tokens.
    """
    return _lowest(log_probs, mask, (share,))[:, 0]


def min_k_plus(
    log_probs: np.ndarray, mean: np.ndarray, variance: np.ndarray, mask: np.ndarray, share: float = SHARE
) -> np.ndarray:
    """[n] as ``min_k``, of (log p - mean) / sqrt(variance), both over the vocabulary under the model itself.

    Departure: the variance is at least 1e-6, as in open-unlearning; the authors divide by 0 where a model is certain.

    Args:
        log_probs, mean, variance: [n, t] as ``CausalLM.token_statistics`` gives them. mask, share: see ``min_k``.
    """
    return _lowest(standardised(log_probs, mean, variance), mask, (share,))[:, 0]


def standardised(log_probs: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """[n, t] (log p - mean) / sqrt(max(variance, 1e-6))."""
    scale = np.sqrt(np.maximum(np.asarray(variance, np.float64), 1e-6))
    return (np.asarray(log_probs, np.float64) - mean) / scale


def privacy_leakage(area: float, retrained: float) -> float:
    """MUSE's PrivLeak in percent: 0 is retrained, towards -100 remembered, above 0 forgotten too much.

    100 ((1 - area) - (1 - retrained)) / (1 - retrained), for areas that are larger where forget looks like training
    data (the paper writes it with its areas turned round). NaN at a retrained area of 1.
    """
    return 100 * (retrained - area) / (1 - retrained) if retrained < 1 else float("nan")


def _lowest(values: np.ndarray, mask: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """[n, len(shares)] means of the smallest values of each row."""
    values, mask = np.asarray(values, np.float64), np.asarray(mask, bool)
    if values.shape != mask.shape or values.ndim != 2 or not mask.any(1).all():
        raise Refused(
            f"Min-K needs values and a mask of one shape [examples, tokens] with a token in each row, found "
            f"{values.shape} and {mask.shape} with {int((~mask.reshape(len(mask), -1).any(1)).sum())} rows without"
        )
    if not all(0 < share <= 1 for share in shares):
        raise Refused(f"Min-K: share must lie in (0, 1], found {', '.join(map(str, shares))}")
    ordered = np.sort(np.where(mask, values, np.inf), axis=1)
    counts = np.maximum(1, np.floor(mask.sum(1)[:, None] * np.array(shares) + 1e-9)).astype(np.int64)
    return np.take_along_axis(np.cumsum(ordered, axis=1), counts - 1, axis=1) / counts


def token_scores(model: nn.Module, task: Any, data: Data, size: int, key: Key) -> dict[str, np.ndarray]:
    """``id`` [n], ``min_k`` and ``min_k_plus`` [n, len(SHARES)], in one pass in eval mode; per-token values are not kept.

    Args:
        size: examples per batch at most; fewer where the logits of so many would not fit into 256 MiB.
    """
    found: dict[str, list[np.ndarray]] = {"min_k": [], "min_k_plus": []}
    device = runtime.device_of(model)
    width = task.labels(data.batch(torch.arange(1))).shape[1] + 1
    size = max(1, min(size, _CELLS // (width * task.vocab)))
    with torch.no_grad(), only_looked_at(model), lent_stream(key):
        for number, batch in enumerate(data.batches(size)):
            batch = task.prepare(runtime.to_device(batch, device), key.at("prepare", number))
            said = task.token_statistics(model, batch)
            logs, mean, variance, mask = (
                part.cpu().numpy() for part in (said.log_probs, said.mean, said.variance, said.mask)
            )
            found["min_k"].append(_lowest(logs, mask, SHARES))
            found["min_k_plus"].append(_lowest(standardised(logs, mean, variance), mask, SHARES))
    return {"id": data.ids.numpy(), **{name: np.concatenate(parts) for name, parts in found.items()}}


def compressed_sizes(task: Any, data: Data) -> np.ndarray:
    """[n] bytes of each answer compressed by zlib: of its text, or of its token ids where the task has no ``decode``.

    The answer is what the loss is over: without the prompt, and without a first token that nothing predicts.
    """
    decode = getattr(task, "decode", None)
    kind = np.min_scalar_type(task.vocab - 1)
    sizes = []
    for batch in data.batches(1024):
        labels = task.labels(batch).numpy()
        for row in labels:
            answer = row[row >= 0]
            content = answer.astype(kind).tobytes() if decode is None else decode(answer.tolist()).encode()
            sizes.append(len(zlib.compress(content)))
    return np.array(sizes)


def is_language(task: Task) -> bool:
    """Whether a task has answers of tokens whose statistics it can give."""
    return all(hasattr(task, name) for name in ("token_statistics", "labels", "vocab"))


def _applies(subject: Subject) -> bool:
    return is_language(subject.task) and subject.has("test")


def _compressed(subject: Subject, name: str) -> np.ndarray:
    sizes = subject.cache.get(
        subject.request, f"zlib {name}", lambda: compressed_sizes(subject.task, subject.data(name))
    )
    return sizes


def kept_scores(
    subject: Subject, what: str, name: str, model: Model, compute: Callable[[nn.Module, Data], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """What ``compute(module, data)`` gives, with its ``id``: once per audit, and from the store where there is one.

    Args:
        what: a name for what is computed; it has to change with what the scores depend on besides model and data.
        name: of the data, as for ``Subject.outputs``. model: of the subject.
    """

    def once() -> Mapping[str, np.ndarray]:
        return compute(subject.opened(model), subject.data(name))

    def kept() -> Mapping[str, np.ndarray]:
        if subject.store is None:
            return once()
        content = subject.cache.get(subject.request, f"content {name}", lambda: fingerprint(subject.data(name)))
        address = Key(0).at(what, content, described(subject.task)).seed
        return subject.store.fill(subject.address(model), f"{address:016x}", once)

    return subject.cache.get(model, f"{what} {name}", kept)


def _scores(subject: Subject, name: str, model: Model) -> Mapping[str, np.ndarray]:
    def compute(module: nn.Module, data: Data) -> dict[str, np.ndarray]:
        return token_scores(module, subject.task, data, subject.batch, subject.key.at("audit", name))

    return kept_scores(subject, "token scores 1", name, model, compute)


def _by_tokens(subject: Subject, name: str, kind: str) -> Reading | None:
    if not _applies(subject):
        return None
    place = SHARES.index(SHARE)
    forget, unseen = (_scores(subject, data, subject.after)[kind] for data in ("forget", "test"))
    areas = _areas(forget, unseen)
    detail = {f"auc_at_share_{share:g}": area for share, area in zip(SHARES, areas, strict=True)}
    if subject.retrained:
        others = [
            _areas(*(_scores(subject, data, model)[kind] for data in ("forget", "test")))[place]
            for model in subject.retrained
        ]
        detail["privacy_leakage"] = privacy_leakage(areas[place], float(np.mean(others)))
    return roc.separation(name, forget[:, place], unseen[:, place], **detail)


def _areas(forget: np.ndarray, unseen: np.ndarray) -> list[float]:
    return [intervals.auc(*columns) for columns in zip(forget.T, unseen.T, strict=True)]
