"""A model whose outputs are moved by what a change of its weights would do to them, to first order; no weight changes.

This is an edit of outputs, not of weights: under it stands the model as it was, to the bit. Who holds the weights can
leave the step out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Refused
from expunge.oracle import along
from expunge.scope import Scope
from expunge.weights import load_weights, read_tensors

STEP = "step/"


class LinearisedModel(nn.Module):
    """x -> f(x) + J(x) step: the model's outputs, moved along a step in weight space that is never taken.

    J(x) is the derivative of the outputs in the weights. Exact where the outputs are linear in the weights; elsewhere
    it is the first-order term. Each call costs about two of the model. Of a nest of outputs every floating tensor moves.

    Args:
        model: any module. step: canonical name of a parameter -> tensor of its shape.
    """

    def __init__(self, model: nn.Module, step: Mapping[str, Tensor]):
        super().__init__()
        self.model = model
        for name, value in step.items():
            self.register_buffer(STEP + name.replace(".", "/"), value.detach().clone())
        self.training = model.training

    @property
    def step(self) -> dict[str, Tensor]:
        """Canonical name in the inner model -> its part of the step."""
        names = {STEP + name.replace(".", "/"): name for name, _ in self.model.named_parameters()}
        return {names[place]: value for place, value in self.named_buffers(recurse=False) if place in names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says, moved."""
        said, change = along(self.model, self.step, lambda model: model(*args, **kwargs))
        return _moved(said, change)


def _moved(said: Any, change: Any) -> Any:
    if isinstance(said, Tensor):
        return said + change if said.is_floating_point() else said
    if isinstance(said, Mapping):
        return type(said)({name: _moved(said[name], change[name]) for name in said})  # type: ignore[call-arg]
    if isinstance(said, (list, tuple)):
        return type(said)(_moved(a, b) for a, b in zip(said, change, strict=True))
    return said


def outer_scope(scope: Scope) -> Scope:
    """The scope of a model under the names that it has in a linearised one."""
    names = tuple(f"model.{name}" for name in scope.universe)
    return Scope({f"model.{name}": mask for name, mask in scope.masks.items()}, names)


def rebuilt(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """`model` linearised as saved `weights` are, to be read into; as it is where they are of a plain model."""
    saved = {name for name in weights if name.startswith(STEP)}
    names = {STEP + name.replace(".", "/"): name for name, _ in model.named_parameters()}
    if not saved:
        return model
    if unknown := saved - names.keys():
        raise Refused(
            f"these weights move the outputs along {sorted(unknown)[0].removeprefix(STEP).replace('/', '.')!r}, a "
            f"parameter that the model does not have: give the model that was saved"
        )
    return LinearisedModel(model, {names[place]: torch.zeros_like(weights[place]) for place in sorted(saved)})


def load_linearised(model: nn.Module, path: str | Path) -> LinearisedModel:
    """Read weights that ``save_weights`` wrote of a linearised model; `model` is plain, and becomes the one inside.

    Raises:
        Refused: for a file that holds no linearised model, or does not fit.
    """
    whole = rebuilt(model, read_tensors(Path(path)))
    if not isinstance(whole, LinearisedModel):
        raise Refused(f"{path} holds no linearised model: read it with expunge.load_weights")
    load_weights(whole, path)
    return whole
