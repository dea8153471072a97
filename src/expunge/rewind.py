"""Weight rewinding: put the weights that pruning left back to those of early training (lottery tickets)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Case, Refused, Stage
from expunge.data.joined import joined
from expunge.scope import edit
from expunge.weights import load_weights


@dataclass(frozen=True)
class Rewind:
    """Give every coordinate in scope its value in an earlier checkpoint; what was pruned is out of scope and stays 0.

    Between ``Prune`` and training again, as OMP and IMP do (arXiv:2304.04934). Buffers (running statistics) are rewound
    where every trainable parameter is in scope, in whole or in part. It does not promise that anything is forgotten: the
    checkpoint may have seen the forget data, and with an untrained one the model must be trained again to be of use.

    Args:
        to: a model like the one given, as it was early in its training or before it; or a weights file of it.

    Raises:
        Refused: for a checkpoint of another model, or of another number of blocks or widths.
    """

    to: nn.Module | str | Path = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.to, (nn.Module, str, Path)):
            raise Refused(
                f"rewind is a {type(self.to).__name__}: expected a model as it was early in training, or a weights file"
            )

    def __call__(self, case: Case) -> Case:
        early = self.to if isinstance(self.to, nn.Module) else load_weights(copy.deepcopy(case.model), self.to)
        old = _fitting(early, case.model)
        edit(case, {name: old[name] for name in case.scope.parameters(case.model)})
        if {name for name, p in case.model.named_parameters() if p.requires_grad} <= set(case.scope.masks):
            with torch.no_grad():
                for name, buffer in case.model.named_buffers():
                    runtime.local(buffer).copy_(runtime.local(old[name]))
        return case


def _fitting(early: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """name -> value in the checkpoint, on the model's device."""
    old = {name: value.detach() for name, value in (*early.named_parameters(), *early.named_buffers())}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        found = tuple(old[name].shape) if name in old else "absent"
        if found != tuple(value.shape):
            raise Refused(
                f"rewind: the checkpoint is of another model: {name!r} is {found} there and {tuple(value.shape)} here; "
                f"give the same model as it was early in its training"
            )
        old[name] = old[name].to(device=value.device, dtype=value.dtype)
    return old


@dataclass(frozen=True)
class OnAll:
    """Run a stage with the forget and retain data together as its retain data, as training was before any request."""

    inner: Stage

    def __call__(self, case: Case) -> Case:
        everything = joined(case.request.data("retain"), case.request.data("forget"))
        done = self.inner(replace(case, request=replace(case.request, retain=everything)))
        return replace(done, request=case.request)
