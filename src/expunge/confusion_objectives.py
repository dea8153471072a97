"""Metrics of the confusion matrix as losses: counts are sums of probabilities, so that they have gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.core import Batch, Case, Key, Refused, require

Metric = Literal["accuracy", "balanced_accuracy", "precision", "recall", "f_beta", "matthews"]
METRICS = ("accuracy", "balanced_accuracy", "precision", "recall", "f_beta", "matthews")


@dataclass(frozen=True)
class SoftMetric:
    """1 - a metric of the batch's soft confusion matrix, in which an example counts for every class by its probability.

    M_jk = sum_i w_i 1[y_i = j] p_k(x_i) / sum_i w_i, p = softmax(logits / temperature); as the temperature tends to 0 it
    is the confusion matrix of the predictions. A metric is a quotient of such sums, no mean of losses per example, so
    what is minimised is its first-order expansion: with M_0 the whole batch's matrix at the weights at which the batch was
    drawn, which costs one forward pass more, and G = d(1 - metric)/dM there,
    v_i = 1 - metric(M_0) + sum_k G_{y_i k} p_k(x_i) - <G, M_0>.
    The mean of v is 1 - metric, and its gradient that of 1 - metric, to rounding, however the batch is cut.

    It does not promise that at other weights than those of the draw (SAM, a look after the step), where it stays the
    expansion. With live normalisation or dropout the counts are those of a pass of their own. ``Ascent(SoftMetric(...))``
    lowers a metric. A metric of one class on a batch without it is 0, with no gradient.

    Args:
        metric: "accuracy"; "balanced_accuracy", the mean recall; "precision", "recall" or "f_beta" of one class, or their
            mean over the classes that the batch has; "matthews", the correlation, for any number of classes.
        of_class: the class that precision, recall or F are of; None takes the mean.
        beta: of F, how many times as much recall counts as precision, > 0.
        temperature: > 0.

    Raises:
        Refused: for a setting out of range, and for a task without one row of class logits per example.
    """

    metric: Metric = "f_beta"
    of_class: int | None = None
    beta: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.metric in METRICS, self, "metric", f"one of {', '.join(METRICS)}")
        require(self.beta > 0, self, "beta", "above 0")
        require(self.temperature > 0, self, "temperature", "above 0")
        single = self.metric in ("precision", "recall", "f_beta")
        good = self.of_class is None or (single and isinstance(self.of_class, int) and self.of_class >= 0)
        require(good, self, "of_class", "None, or a class number, which precision, recall and f_beta alone are of")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the expansion's constants: ``slopes`` [b, C] and ``offset`` [b]."""
        with torch.no_grad(), _buffers_kept(case.model):
            probabilities, labels = self._probabilities(case, batch)
        weight = batch["weight"].to(probabilities) if "weight" in batch else torch.ones_like(probabilities[:, 0])
        counts = confusion(probabilities.double(), labels, weight.double())
        if self.of_class is not None and self.of_class >= len(counts):
            raise Refused(
                f"SoftMetric: of_class is {self.of_class}: expected one of the {len(counts)} classes, 0 to {len(counts) - 1}"
            )
        with torch.enable_grad():
            leaf = counts.requires_grad_(True)
            value = 1.0 - metric_of(leaf, self.metric, self.of_class, self.beta)
            (slope,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
        slope = torch.zeros_like(counts) if slope is None else slope
        offset = (value - (slope * counts).sum()).detach().to(probabilities)
        return {**batch, "slopes": slope.to(probabilities)[labels], "offset": offset.expand(len(labels))}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        probabilities, _ = self._probabilities(case, batch)
        return batch["offset"] + (batch["slopes"] * probabilities).sum(1)

    def _probabilities(self, case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
        """([b, C], int64 [b])."""
        task: Any = case.task  # logits and labels are capabilities, which not every Task has
        if not all(hasattr(task, name) for name in ("logits", "labels")):
            raise Refused(f"objective SoftMetric needs class logits, which task {task.name!r} does not have")
        logits = task.logits(case.model, batch)
        if logits.ndim != 2:
            raise Refused(
                f"objective SoftMetric needs one row of class logits per example; task {task.name!r} gives "
                f"{logits.ndim - 1} dimensions of them"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.softmax(wide / self.temperature, 1), task.labels(batch)


def confusion(probabilities: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """[C, C] shares of the weight: rows are true classes, columns predicted ones; they sum to 1.

    Args:
        probabilities: [b, C], one-hot for predictions. labels: int64 [b]. weight: [b], of positive sum.
    """
    counts = torch.zeros(
        probabilities.shape[1], probabilities.shape[1], dtype=probabilities.dtype, device=labels.device
    )
    return counts.index_add(0, labels, probabilities * weight[:, None]) / weight.sum()


def metric_of(counts: Tensor, metric: Metric, of_class: int | None = None, beta: float = 1.0) -> Tensor:
    """A metric of a confusion matrix, 0-dim and differentiable; a quotient of 0 by 0 is 0.

    Args:
        counts: [C, C], rows true classes. metric, of_class, beta: see ``SoftMetric``.
    """
    right, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    if metric == "accuracy":
        return right.sum() / counts.sum()
    if metric == "matthews":
        return _matthews(right.sum(), true, said, counts.sum())
    share = beta * beta if metric == "f_beta" else 0.0
    below = {"precision": said, "f_beta": share * true + said}.get(metric, true)
    each = _over((1.0 + share) * right, below)
    return each[true > 0].mean() if of_class is None else each[of_class]


def _matthews(right: Tensor, true: Tensor, said: Tensor, whole: Tensor) -> Tensor:
    """The correlation of two groupings (Gorodkin 2004); -1 or more, 1 where they are the same, 0 where one has one group."""
    above = right * whole - true @ said
    below = (whole * whole - true @ true) * (whole * whole - said @ said)
    return _over(
        above, torch.where(below > 0, below, 0.0).clamp_min(torch.finfo(below.dtype).tiny).sqrt() * (below > 0)
    )


def _over(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where below is 0, with gradients that are numbers."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass changes (running statistics) put back: the pass is one to count by."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
