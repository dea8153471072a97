"""How far predictions of real targets lie from the targets or from a teacher's, as distances: losses for regression.

The task's own NLL is a squared error; these are for methods that were published with an absolute one, or with either.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Batch, Case, Key, Refused, require

Distance = Literal["absolute", "squared"]
"""|a - b| or (a - b)^2, averaged over the targets of an example; in units of the task's ``scale``, or its square."""


@dataclass(frozen=True)
class TargetError:
    """Distance of the prediction from the true target: mean over the k targets of |f - y| / scale, or of its square.

    Args:
        distance: "absolute" or "squared".
    """

    distance: Distance = "absolute"

    def __post_init__(self) -> None:
        require(self.distance in ("absolute", "squared"), self, "distance", "'absolute' or 'squared'")

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task = _regression(self, case)
        return _apart(task, task.outputs(case.model, batch), task.targets(batch), self.distance)


@dataclass(frozen=True)
class FollowTeacher:
    """Distance of the prediction, and of attention maps inside the network, from a teacher's (arXiv:2210.08196, eq. 2).

    mean over the k targets of |f - t| / scale (or its square) + attention * sum over layers of the mean over positions of
    (m(a) - m(a_t))^2, m(a) = the mean over dimension 1 of a^2, flattened and divided by its Euclidean length
    (Zagoruyko and Komodakis, 2017). Dimension 1 is the channel of an image, and time where a sequence comes
    batch-first, as in the authors' code. A layer that gives one vector per example has no positions: its map is the number
    1, which is the same in every network, and it is left out. Targets are not read. The teacher must have the layers of
    the model.

    Args:
        teacher: name of the teacher in the Case.
        distance: of predictions, "absolute" or "squared".
        attention: weight of the maps, >= 0; without a layer that has positions there is no such term.
        layers: names or shell-style patterns of modules; none takes every convolution and recurrent layer.
    """

    teacher: str = "original"
    distance: Distance = "absolute"
    attention: float = 50.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.distance in ("absolute", "squared"), self, "distance", "'absolute' or 'squared'")
        require(0 <= self.attention < float("inf"), self, "attention", "a finite number of at least 0")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the teacher's predictions and maps, computed once per step and without a graph."""
        task = _regression(self, case)
        with case.teacher(self.teacher) as model:
            said, maps = self._seen(task, model, batch)
        return {**batch, "teacher": said, "teacher_maps": {str(number): one for number, one in enumerate(maps)}}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task = _regression(self, case)
        said, maps = self._seen(task, case.model, batch)
        loss = _apart(task, said, batch["teacher"], self.distance)
        told = batch["teacher_maps"]
        if len(told) != len(maps) or any(told[str(n)].shape != one.shape for n, one in enumerate(maps)):
            raise Refused("the teacher's layers give maps of other shapes than the model's: expected the same network")
        for number, one in enumerate(maps):
            loss = loss + self.attention * (one - told[str(number)]).square().mean(1).to(loss.dtype)
        return loss

    def _seen(self, task: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The predictions, and [b, positions] for every call of every layer that has positions."""
        maps: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.ndim > 2:
                maps.append(attention_map(first.clone()))  # what comes next may write over it

        chosen = mapped_layers(model, self.layers) if self.attention > 0 else []
        hooks: list[Any] = [module.register_forward_hook(keep) for module in chosen]
        try:
            return task.outputs(model, batch), maps
        finally:
            for hook in hooks:
                hook.remove()


def attention_map(activation: Tensor) -> Tensor:
    """[b, positions]: the mean over dimension 1 of the square of [b, c, ...], flattened, of Euclidean length 1.

    In float32 at least. A map of zeros stays one.
    """
    wide = activation if activation.dtype == torch.float64 else activation.float()
    return F.normalize(wide.square().mean(1).flatten(1))


def mapped_layers(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules whose name matches a pattern, or every convolution and recurrent layer; in the order of their names.

    Raises:
        Refused: for a pattern that matches no module.
    """
    named = dict(model.named_modules())
    if not patterns:
        kinds = (nn.modules.conv._ConvNd, nn.RNNBase)
        return [module for module in named.values() if isinstance(module, kinds)]
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            names = [name for name in named if name][:8]
            raise Refused(f"layer pattern {pattern!r} matches no module of the model; it has {', '.join(names)}")
    return [module for name, module in named.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _apart(task: Any, found: Tensor, wanted: Tensor, distance: Distance) -> Tensor:
    """[b], the mean over targets."""
    apart = (found - wanted.to(found.dtype)) / task.scale
    return (apart.abs() if distance == "absolute" else apart.square()).mean(1)


def _regression(objective: object, case: Case) -> Any:
    """The task, whose targets and scale are capabilities that not every Task has."""
    task: Any = case.task
    if not (hasattr(task, "targets") and hasattr(task, "scale")):
        raise Refused(
            f"objective {type(objective).__name__} needs real targets, which task {task.name!r} does not have: it is for "
            f"task regression"
        )
    return task
