"""Corrective unlearning: bad data were found in training, but only a share of them is identified.

A manipulation (a poison trigger, or labels of two classes swapped) changes the examples S_m of a training set; S_f, a
share gamma of them, is known. A method sees S_f as forget data and D \\ S_f as retain data, which still holds the
manipulated examples that nobody found. **Retraining on D \\ S_f is not the gold standard**: for gamma < 1 it learns the
manipulation again. The reference is a model that was trained on ``Manipulation.clean``: give such models as ``retrained``.

Paper: Goel et al., "Corrective Machine Unlearning" (TMLR 2024, arXiv:2402.14015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audit import intervals
from expunge.audit.subject import Curve, Outputs, Reading, Subject, run
from expunge.challenges.confusion import confuse, labels_of, of_classes
from expunge.core import Data, Key, Refused, Request, Stage, Task
from expunge.data.sources import as_data, collect
from expunge.registry import measure
from expunge.run import unlearn

AFFECTED_TEST, UNAFFECTED_TEST = "affected_test", "unaffected_test"


@dataclass(frozen=True)
class Manipulation:
    """A training set with manipulated examples, and where their effect is to be seen.

    Attributes:
        kind: "poison" or "confusion".
        data: the training set as it was used; train the original on it.
        clean: the training set without the manipulated examples; train the references on it.
        ids: int64 [k], the manipulated examples S_m.
        affected: unseen examples of the affected domain with their true labels: with the trigger, or of the two classes.
        unaffected: unseen examples outside of it: without the trigger, or of the other classes.
    """

    kind: Literal["poison", "confusion"]
    data: Data
    clean: Data
    ids: Tensor
    affected: Data
    unaffected: Data

    def request(self, identified: float, key: Key = Key(0)) -> Request:
        """Forget the identified share gamma of the manipulated examples; retain all others, good or bad.

        Args:
            identified: gamma, in (0, 1]; at least one example is identified.
            key: of the draw.
        """
        if not 0 < identified <= 1:
            raise Refused(f"identified must lie in (0, 1], found {identified!r}: it is a share of the manipulated data")
        order = torch.randperm(len(self.ids), generator=key.at("identified").generator())
        found = self.ids[order[: max(1, round(identified * len(self.ids)))]]
        return Request(
            forget=self.data.select(torch.nonzero(torch.isin(self.data.ids, found)).flatten()),
            retain=self.data.without(found),
            extra={AFFECTED_TEST: self.affected, UNAFFECTED_TEST: self.unaffected},
        )


def poison(
    train: Any,
    test: Any,
    *,
    target: int,
    count: int,
    patch: int = 3,
    value: float | None = None,
    inputs: str = "x",
    label: str = "y",
    key: Key = Key(0),
) -> Manipulation:
    """Put a patch in a corner of some training images and call them `target`: a backdoor.

    The published setting is 100 of CIFAR-10's 50,000 images, a 3 x 3 patch at the bottom right, label 0. It does not
    promise that a network learns the backdoor: compare the original's accuracy on ``affected`` and ``unaffected``.

    Args:
        train, test: in any form that ``as_data`` takes; they are read into memory.
        target: the label that poisoned images get; images that have it already are not chosen (the authors' draw is over
            all images).
        count: images to poison, >= 1.
        patch: side of the square at the bottom right, pixels, >= 1.
        value: of its pixels; the largest of the training images by default, as in the authors' code.
        inputs, label: columns with images [n, ..., h, w] and labels.
        key: of the draw.

    Raises:
        Refused: for inputs that are no images, too large a patch, or too few images.
    """
    data, unseen = as_data(train), as_data(test)
    labels = labels_of(data, label)
    places = torch.nonzero(labels != target).flatten()
    if not 1 <= count <= len(places):
        raise Refused(f"count must lie in 1 to {len(places)}, the images that are not of class {target}, found {count}")
    chosen = places[torch.randperm(len(places), generator=key.at("poison").generator())[:count]].sort().values
    batch = collect(data)
    images = _images(batch, inputs)
    value = float(images.max()) if value is None else value
    patched, targets = images.clone(), labels.clone()
    patched[chosen], targets[chosen] = trigger(images[chosen], patch, value), target
    bad = as_data({**_without_id(batch), inputs: patched, label: targets}, ids=data.ids)
    shown = collect(unseen)
    affected = as_data({**_without_id(shown), inputs: trigger(_images(shown, inputs), patch, value)}, ids=unseen.ids)
    return Manipulation("poison", bad, data.without(data.ids[chosen]), data.ids[chosen], affected, unseen)


def mislabel(
    train: Any, test: Any, classes: tuple[int, int], *, count: int, label: str = "y", key: Key = Key(0)
) -> Manipulation:
    """Swap the labels of some training examples of two classes; published: 500 examples of CIFAR-10.

    Args:
        train, test: in any form that ``as_data`` takes.
        classes: two different labels.
        count: examples to mislabel, half of each class: even, >= 2.
        label: column with the labels. key: of the draw.
    """
    data, unseen = as_data(train), as_data(test)
    made = confuse(data, classes, count=count, label=label, key=key)
    affected, others = of_classes(unseen, classes, label), of_classes(unseen, classes, label, others=True)
    return Manipulation("confusion", made.data, data.without(made.ids), made.ids, affected, others)


def trigger(images: Tensor, patch: int, value: float) -> Tensor:
    """The images with a square of `patch` x `patch` pixels of `value` at the bottom right; a copy.

    Args:
        images: [n, ..., height, width].
    """
    smallest = min(images.shape[-2:])
    if not 1 <= patch <= smallest:
        raise Refused(f"patch must lie in 1 to {smallest} pixels, the smaller side of the images, found {patch!r}")
    copied = images.clone()
    copied[..., -patch:, -patch:] = value
    return copied


def _images(batch: Mapping[str, Any], inputs: str) -> Tensor:
    found = batch.get(inputs)
    if not isinstance(found, Tensor) or found.ndim < 3:
        raise Refused(
            f"column {inputs!r} holds no images: expected a tensor [n, ..., height, width]; a patch needs pixels, use "
            f"mislabel() for other inputs"
        )
    return found


def _without_id(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in batch.items() if name != "id"}


@measure
def corrected_accuracy(subject: Subject) -> Reading | None:
    """Accuracy on unseen examples of the affected domain with their true labels (Acc_corr); Wilson interval.

    Applies where the request carries ``affected_test``, as ``Manipulation.request`` makes it. The retrained models must
    be trained on clean data; those trained on D \\ S_f learn the manipulation again.
    """
    return _accuracy(subject, "corrected_accuracy", AFFECTED_TEST)


@measure
def unaffected_accuracy(subject: Subject) -> Reading | None:
    """Accuracy on unseen examples outside the affected domain (Acc_retain): the price of the correction."""
    return _accuracy(subject, "unaffected_accuracy", UNAFFECTED_TEST)


def _accuracy(subject: Subject, name: str, data: str) -> Reading | None:
    if data not in subject.request.extra or (correct := subject.outputs(data).correct) is None:
        return None
    low, high = intervals.wilson(correct.sum(), len(correct))
    return Reading(name, 100 * float(correct.mean()), 100 * float(low), 100 * float(high), len(correct), "%")


@dataclass(frozen=True)
class Correction:
    """What one method made of the same manipulation, more and more of it identified.

    Attributes:
        gammas: [g] identified shares.
        corrected, unaffected: [g, draws] accuracy in % on the affected and the unaffected domain, one column per draw
            of the identified examples.
    """

    gammas: np.ndarray
    corrected: np.ndarray
    unaffected: np.ndarray

    def lines(self) -> dict[str, Curve]:
        """name -> (gamma, mean, low, high): Student's interval over the draws, for a reading's curves."""
        return {name: self._line(getattr(self, name)) for name in ("corrected", "unaffected")}

    def _line(self, values: np.ndarray) -> Curve:
        ends = np.clip([intervals.t_interval(row) for row in values], 0.0, 100.0)
        parts = (self.gammas, values.mean(1), ends[:, 0], ends[:, 1])
        return tuple(tuple(float(point) for point in part) for part in parts)


def over_identified(
    model: nn.Module,
    manipulation: Manipulation,
    methods: Mapping[str, str | Stage],
    task: Task,
    *,
    gammas: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0),
    draws: int = 3,
    key: Key = Key(0),
) -> dict[str, Correction]:
    """Run each method at each identified share, on several draws of the identified examples.

    The draws are the same for every method. Settings of a method must be chosen without S_m, or the comparison is
    unfair. The row "original" is the model as it came.

    Args:
        model: trained on ``manipulation.data``.
        methods: name -> registered name or stage.
        gammas: each in (0, 1]; published: 0.1 to 1. draws: of S_f per share, >= 1; five or more are advised.
        key: of the draws and the runs.
    """
    if draws < 1 or not len(gammas):
        raise Refused(f"expected at least one draw and one identified share, found draws={draws}, gammas={gammas!r}")
    if "original" in methods:
        raise Refused("a method is called 'original', which is the name of doing nothing: give it another name")
    before = _accuracies(model, manipulation, task)
    found = {name: np.empty((2, len(gammas), draws)) for name in methods}
    for place, gamma in enumerate(gammas):
        for draw in range(draws):
            request = manipulation.request(gamma, key.at("draw", draw))
            for name, method in methods.items():
                seed = key.at("run", place, draw).seed % 2**31
                done = unlearn(model, request, task=task, method=method, seed=seed)
                found[name][:, place, draw] = _accuracies(done.model, manipulation, task)
    found["original"] = np.broadcast_to(np.array(before)[:, None, None], (2, len(gammas), draws)).copy()
    return {name: Correction(np.asarray(gammas, float), both[0], both[1]) for name, both in found.items()}


def _accuracies(model: nn.Module, manipulation: Manipulation, task: Task) -> tuple[float, float]:
    """% on the affected and the unaffected domain."""
    return (_percent(model, manipulation.affected, task), _percent(model, manipulation.unaffected, task))


def _percent(model: nn.Module, data: Data, task: Task) -> float:
    correct = Outputs.of(run(model, task, data, 256, Key(0))).correct
    if correct is None:
        raise Refused(f"corrective unlearning is measured by accuracy: task {task.name!r} has no classes")
    return 100 * float(correct.mean())
