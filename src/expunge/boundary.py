"""Decision boundaries of a classifier: the wrong class across the nearest one, and one class more than there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Batch, Case, Data, Key, Refused, map_tensors, only_looked_at
from expunge.oracle import differentiable, gradient_graph, prepared
from expunge.scope import Scope


def nearest_wrong(
    case: Case, data: Data, bound: float, clip: tuple[float | None, float | None] | None, size: int, key: Key
) -> tuple[Tensor, Tensor]:
    """The wrong class nearest to each example of `data`, and whether one step of an attack reached it.

    One signed gradient step of length `bound` up the loss of the true class (FGSM), in eval mode; of the classes other
    than the true one, the class with the largest logit there. Where the step reached it, that is the prediction there.
    A bound of 0 differentiates nothing: the runner-up at the example itself.

    Args:
        data: examples with labels and, for a step, floating inputs; every floating tensor of the input is moved.
        bound: length of the step in every coordinate, in units of the input, >= 0.
        clip: the least and the largest value of an input, either of them None, or None.
        size: examples per pass; for memory only.
        key: of what the task draws.

    Returns:
        (int64 [n] classes, bool [n] whether the prediction was another than the true class).

    Raises:
        Refused: for a task without class logits, or a step along inputs that are not floating.
    """
    _check(case)
    classes, reached = [], []
    with differentiable(case), case.meter.watch(case.model):
        for batch in prepared(case, data, size, key):
            logits = _attacked(case, batch, bound, clip) if bound > 0 else _standing(case, batch)
            label = _task(case).labels(batch)[:, None]
            classes.append(logits.scatter(1, label, -torch.inf).argmax(1).cpu())
            reached.append((logits.argmax(1) != label[:, 0]).cpu())
    return torch.cat(classes), torch.cat(reached)


def _standing(case: Case, batch: Batch) -> Tensor:
    """[b, C] logits at the inputs as they are."""
    with torch.no_grad():
        return _task(case).logits(case.model, batch)


def _attacked(case: Case, batch: Batch, bound: float, clip: tuple[float | None, float | None] | None) -> Tensor:
    """[b, C] logits at the inputs after one signed step."""
    task = _task(case)
    leaves: dict[str, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves[str(len(leaves))] = tensor.detach().clone().requires_grad_(True)
        return leaves[str(len(leaves) - 1)]

    moving = {**batch, task.inputs: map_tensors(leaf, batch[task.inputs])}
    if not leaves:
        raise Refused("the search for the nearest class moves the input, and this one holds no floating number")
    case.meter.forget_graph()
    slopes = gradient_graph(lambda: task.nll(case.model, moving).sum(), leaves)
    case.meter.differentiated()
    signs = {id(tensor): slopes[name].detach().sign() for name, tensor in leaves.items() if name in slopes}

    def step(tensor: Tensor) -> Tensor:
        moved = tensor.detach() + bound * signs[id(tensor)] if id(tensor) in signs else tensor.detach()
        return moved if clip is None or not tensor.is_floating_point() else moved.clamp(*clip)

    with torch.no_grad():
        return task.logits(case.model, {**moving, task.inputs: map_tensors(step, moving[task.inputs])})


class Widened(nn.Module):
    """A classifier and one output unit more, which reads what its last linear layer reads. Its forward is the model's.

    Args:
        model: the classifier, not a copy of it.
        head: the linear layer whose output is the logits.
        unit: from the head's inputs to one number.
    """

    def __init__(self, model: nn.Module, head: nn.Linear, unit: nn.Linear):
        super().__init__()
        self.model, self.unit = model, unit
        self.training = model.training
        self._features: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says, without the unit."""
        return self.model(*args, **kwargs)

    def extra(self) -> Tensor:
        """[b] logits of the unit for the last batch that the model saw."""
        if self._features is None:
            raise Refused("the output unit was asked before the model: call the model on a batch first")
        return self.unit(self._features).squeeze(1)

    def close(self) -> nn.Module:
        """The model as it is now, without the unit."""
        self._hook.remove()
        return self.model


def widened(case: Case, key: Key) -> Case:
    """The Case with a unit for one class more, in scope beside all that was: its model is a ``Widened``.

    Args:
        case: of a classifier that ends in a linear layer.
        key: of the unit's weights (Xavier normal; its bias is 0).

    Raises:
        Refused: where no linear layer of the model gives the logits.
    """
    head = logits_layer(case)
    wrapped = Widened(case.model, head, fresh_unit(head, key))
    names = tuple(f"model.{name}" for name in case.scope.universe)
    units = ("unit.weight", *(("unit.bias",) if head.bias is not None else ()))
    masks = {**{f"model.{name}": mask for name, mask in case.scope.masks.items()}, **dict.fromkeys(units, True)}
    return replace(case, model=wrapped, scope=Scope(masks, (*names, *units)))


def fresh_unit(head: nn.Linear, key: Key) -> nn.Linear:
    """One output more for a layer, as the whole wider layer would be drawn by Xavier's rule."""
    unit = nn.Linear(head.in_features, 1, head.bias is not None, device="meta").to_empty(device=head.weight.device)
    spread = (2.0 / (head.in_features + head.out_features + 1)) ** 0.5
    drawn = torch.randn(1, head.in_features, generator=key.generator(), dtype=torch.float64)
    with torch.no_grad():
        unit.to(head.weight.dtype).weight.copy_(spread * drawn)
        if unit.bias is not None:
            unit.bias.zero_()
    return unit


def logits_layer(case: Case) -> nn.Linear:
    """The last linear layer that the model calls, where what it gives are the logits.

    Raises:
        Refused: where they are not.
    """
    _check(case)
    seen: list[tuple[nn.Linear, Tensor]] = []

    def keep(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            seen.append((layer, output))

    hooks = [m.register_forward_hook(keep) for m in case.model.modules() if isinstance(m, nn.Linear)]
    data = case.request.data("forget")
    batch = next(prepared(case, data.select([0]), 1, Key(0)))
    try:
        with torch.no_grad(), only_looked_at(case.model):
            logits = _task(case).logits(case.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = [layer for layer, said in seen if said.shape == logits.shape and torch.equal(said, logits)]
    if not found:
        raise Refused(
            "expected a model whose last layer is linear and gives the logits, and this one's does not: boundary_expand adds "
            "a row to that layer, fisher_forgetting draws rows of it anew unless reset=False, laf and concept_poison read what goes into it"
        )
    return found[-1]


@dataclass(frozen=True)
class ExtraClass:
    """Cross-entropy of the class that ``widened`` added, over all of the classes and it; labels are not read."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        if not isinstance(case.model, Widened):
            raise Refused(
                "objective ExtraClass needs a model with a unit for it: use it on boundary.widened(case, key)"
            )
        logits = _task(case).logits(case.model, batch)
        extra = case.model.extra()
        return torch.cat([logits, extra[:, None]], 1).logsumexp(1) - extra


def whole_classes(case: Case) -> list[int]:
    """The classes that the forget data have and the retain data have not."""
    _check(case)
    found = [
        {int(label) for batch in data.batches(1024) for label in _task(case).labels(batch)}
        for data in (case.request.data("forget"), case.request.data("retain"))
    ]
    return sorted(found[0] - found[1])


def only_whole_classes(case: Case) -> list[int]:
    """``whole_classes``, and a refusal where the retain data have any example of a class that is to be forgotten."""
    found = whole_classes(case)
    labels = {int(label) for batch in case.request.data("forget").batches(1024) for label in _task(case).labels(batch)}
    if labels - set(found):
        kept = ", ".join(map(str, sorted(labels - set(found))[:5]))
        raise Refused(
            f"this method forgets whole classes, and examples of class {kept} are to be kept as well: expected every example "
            f"of a class in the forget data, or none"
        )
    return found


def _task(case: Case) -> Any:
    """The task, whose labels and logits are capabilities that not every Task has."""
    return case.task


def _check(case: Case) -> None:
    if not all(hasattr(case.task, name) for name in ("logits", "labels", "label", "inputs", "classes")):
        raise Refused(
            f"the nearest class needs one label per example and class logits, which task {case.task.name!r} does not have"
        )
