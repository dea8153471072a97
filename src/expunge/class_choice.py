"""Which classes of the training data a transfer needs, and which to forget before it: label and feature mapping.

DP4TL (Zhang et al., "Selectivity Drives Productivity", NeurIPS 2023). Each example of the target data votes for one class
of the training data; classes without votes are those that the target is least like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.core import Case, Data, Key, Refused, Request, only_looked_at, require
from expunge.data.joined import joined
from expunge.likeness import head_name, representations
from expunge.oracle import prepared


@dataclass(frozen=True)
class ForgetOtherClasses:
    """Set the request to keep the classes with the most votes of the target data, and forget all others.

    For the stages after this one: forget and retain data together are taken for the training data and split anew, by
    class. No weight changes. The votes are those of the Case's model, where the paper trains a small surrogate of its own.

    It does not promise that the target task does as well without the other classes: the paper trains anew on what is
    kept, and is on hundreds of classes.

    Args:
        keep: classes, 1 to one less than there are.
        by: "label": a vote is the class that the model predicts (``label_votes``); "feature": the class whose mean
            representation is nearest (``feature_votes``).
        target: name of the target data among the request's ``extra``; its labels are not read.
        batch: examples per pass; for memory only.

    Raises:
        Refused: for a task without class logits, or a number of classes out of range.
    """

    keep: int
    by: Literal["label", "feature"] = "label"
    target: str = "target"
    batch: int = 256

    def __post_init__(self) -> None:
        require(self.by in ("label", "feature"), self, "by", "'label' or 'feature'")
        for name in ("keep", "batch"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, self, name, "a whole number of at least 1")

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        source, target = training_data(case.request), case.request.data(self.target)
        labels = _labels(case, source)
        if self.by == "label":
            votes = label_votes(case, target, self.batch, key)
        else:
            votes = feature_votes(case, source, target, self.batch, key)
        kept = most_voted(votes, labels.unique().tolist(), self.keep)
        inside = torch.isin(labels, torch.tensor(kept))
        forget, retain = (source.select(torch.nonzero(part).flatten()) for part in (~inside, inside))
        case.meter.note(f"classes {', '.join(map(str, kept))} are kept, by {self.by} votes; all others are forgotten")
        return replace(case, request=replace(case.request, forget=forget, retain=retain), rng=rng)


def training_data(request: Request) -> Data:
    """Forget and retain data together; the one of them that there is."""
    parts = [data for data in (request.forget, request.retain) if data is not None]
    if not parts:
        raise Refused(
            "the request has neither forget nor retain data: expected the training data in one or both of them"
        )
    return joined(*parts) if len(parts) == 2 else parts[0]


def label_votes(case: Case, target: Data, size: int, key: Key) -> Tensor:
    """[C] int64, label mapping: how many target examples the model takes for each of its classes.

    Args:
        target: in the form of the model's inputs; labels are not read. size: examples per pass. key: of the task's draws.
    """
    task = _task(case)
    votes = torch.zeros(task.classes, dtype=torch.int64)
    with torch.no_grad(), only_looked_at(case.model), case.meter.watch(case.model):
        for batch in prepared(case, target, size, key):
            votes += torch.bincount(task.logits(case.model, batch).argmax(1).cpu(), minlength=task.classes)
    return votes


def feature_votes(case: Case, source: Data, target: Data, size: int, key: Key) -> Tensor:
    """[C] int64, feature mapping: how many target examples are nearest to each class's mean representation, in L2.

    A representation is the input of the last linear layer, a mean that over the class's examples in `source`. A class
    without examples there has no votes; of means equally near the lowest class takes the vote.

    Departure: the released loop writes each distance into the place of the target example, not of the class, so that its
    nearest class is none; here it is the class.

    Args:
        source: labelled training data. target: labels are not read. size: examples per pass. key: of the task's draws.
    """
    task, head = _task(case), head_name(case)
    votes = torch.zeros(task.classes, dtype=torch.int64)
    with torch.no_grad(), only_looked_at(case.model), case.meter.watch(case.model):
        means, there = _class_means(case, source, head, size, key)
        for batch in prepared(case, target, size, key.at("target")):
            found = representations(case, case.model, batch, head).double()
            apart = torch.cdist(found, means, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = apart.masked_fill(~there, torch.inf).argmin(1)
            votes += torch.bincount(nearest.cpu(), minlength=task.classes)
    return votes


def _class_means(case: Case, source: Data, head: str, size: int, key: Key) -> tuple[Tensor, Tensor]:
    """([C, d] float64 mean representation of each class, [C] bool whether it has examples)."""
    task = _task(case)
    total, count = torch.zeros(()), torch.zeros(())
    for batch in prepared(case, source, size, key.at("source")):
        member = torch.nn.functional.one_hot(task.labels(batch), task.classes).double()
        total = total + member.T @ representations(case, case.model, batch, head).double()
        count = count + member.sum(0)
    return total / count.clamp_min(1)[:, None], count > 0


def most_voted(votes: Tensor, classes: Sequence[int], keep: int) -> list[int]:
    """The `keep` of these classes with the most votes, in order of class; of equal votes the lower class is kept.

    Raises:
        Refused: for as many classes as there are, or more: nothing would be forgotten.
    """
    if not 1 <= keep < len(classes):
        raise Refused(f"{keep} classes are to be kept of {len(classes)}: expected 1 to {len(classes) - 1}")
    return sorted(sorted(classes, key=lambda c: (-int(votes[c]), c))[:keep])


def _labels(case: Case, data: Data) -> Tensor:
    return torch.cat([_task(case).labels(batch) for batch in data.batches(4096)])


def _task(case: Case) -> Any:
    task: Any = case.task
    if not all(hasattr(task, name) for name in ("logits", "labels", "classes")):
        raise Refused(f"classes are chosen by one label per example and class logits: task {task.name!r} has none")
    return task
