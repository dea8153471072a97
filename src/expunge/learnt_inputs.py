"""Inputs that are learnt against a classifier: the model stands still, a batch of noise descends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Batch, Case, Data, Key, Refused, map_tensors
from expunge.data.sources import as_data
from expunge.scope import Scope


class Inputs(nn.Module):
    """A classifier, and a batch of inputs for it that are parameters. Its forward is the model's.

    Args:
        model: the classifier, not a copy of it.
        like: one example's input, [1, ...] in every leaf: floating tensors in any nest.
        labels: int64 [n], the class of each input.
        key: of the standard normal numbers that they start from.
    """

    def __init__(self, model: nn.Module, like: Any, labels: Tensor, key: Key):
        super().__init__()
        self.model, self.like, self.training = model, like, model.training
        self.register_buffer("labels", labels, persistent=False)
        self.leaves = nn.ParameterList()

        def grow(leaf: Tensor) -> Tensor:
            self.leaves.append(nn.Parameter(fresh(leaf, len(labels), key.at("leaf", len(self.leaves)))))
            return leaf

        map_tensors(grow, like)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says."""
        return self.model(*args, **kwargs)

    def batch(self, task: Any) -> Batch:
        """The inputs and their labels, under the task's names of them."""
        leaves = iter(self.leaves)
        labels: Any = self.labels
        made = map_tensors(lambda _: next(leaves), self.like)
        return {task.inputs: made, task.label: labels, "id": torch.arange(len(labels), device=labels.device)}


def fresh(like: Tensor, count: int, key: Key) -> Tensor:
    """`count` inputs, standard normal, of the type and place of `like` [1, ...]."""
    if not like.is_floating_point():
        raise Refused(f"inputs are learnt by their gradient, and these hold {like.dtype}: expected floating numbers")
    return torch.randn((count, *like.shape[1:]), generator=key.generator(), dtype=torch.float64).to(like)


def on_inputs(case: Case, classes: Sequence[int], count: int, key: Key) -> Case:
    """The Case with fresh inputs for these classes in scope and nothing else: its model is an ``Inputs``.

    Args:
        case: of a classifier; its retain data say what an input looks like.
        classes: dealt out in turn over the inputs.
        count: of inputs, at least one for each class.
        key: of what they start from.

    Raises:
        Refused: for fewer inputs than classes, or inputs that are not floating.
    """
    if count < len(classes):
        raise Refused(f"{count} inputs are to be learnt for {len(classes)} classes: expected at least one for each")
    batch = runtime.to_device(case.request.data("retain").batch(torch.arange(1)), runtime.device_of(case.model))
    task: Any = case.task
    dealt = torch.tensor([classes[i % len(classes)] for i in range(count)], device=runtime.device_of(case.model))
    model = Inputs(case.model, batch[task.inputs], dealt, key)
    names = tuple(name for name, _ in model.named_parameters() if name.startswith("leaves."))
    return replace(case, model=model, scope=Scope(dict.fromkeys(names, True), names))


def learnt(case: Case) -> Data:
    """The inputs of such a Case as they are now, as data."""
    model: Any = case.model
    made = map_tensors(lambda t: t.detach().cpu(), model.batch(case.task))
    return as_data({name: column for name, column in made.items() if name != "id"})


@dataclass(frozen=True)
class AgainstClass:
    """Minus the NLL of learnt inputs under their classes, and a penalty on their length (UNSIR, arXiv:2111.08947).

    sum over classes of the mean over its inputs of -NLL + penalty |v|^2. Reads no data: the inputs are parameters.

    Args:
        penalty: >= 0.
    """

    penalty: float = 0.1
    parameters_only: bool = field(default=True, init=False)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        inputs: Any = case.model
        made = inputs.batch(case.task)
        lengths = torch.stack([leaf.flatten(1).square().sum(1) for leaf in inputs.leaves]).sum(0)
        values = self.penalty * lengths - case.task.nll(inputs.model, made)
        return (values / torch.bincount(inputs.labels)[inputs.labels]).sum().reshape(1)
