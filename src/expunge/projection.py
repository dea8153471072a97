"""Projections that take directions out of a module's output (MRP, arXiv:2508.15449): attached, trained, folded, loaded.

A projection is a child of the module whose output it changes, called ``projection``, and a forward hook that is a plain
function, so that the model keeps its class, survives ``copy.deepcopy``, and its directions travel with its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import Refused
from expunge.states import first, wide
from expunge.weights import load_weights, read_tensors

CHILD = "projection"
TINY = 1e-10
"""Below this share of the forget states' energy, nothing of them is left outside of the retain span."""


class Projection(nn.Module):
    """h -> h (I - Q^T Q), the rows of Q orthonormal and spanning the kept directions and those being trained.

    Q is the QR factor of [kept; rows], in float32 at least whatever the model's precision, and the result is rounded
    once, to the precision of h. With no direction at all h comes back to the bit.

    Args:
        kept: [K, d], directions of earlier requests, orthonormal; K may be 0.
    """

    def __init__(self, kept: Tensor):
        super().__init__()
        self.register_buffer("kept", kept)
        self.rows: nn.Parameter | None
        self.register_parameter("rows", None)

    def basis(self) -> Tensor:
        """Q [K + k, d]; differentiable in the rows that are trained."""
        kept: Tensor = self.get_buffer("kept")
        if self.rows is None:
            return kept
        return torch.linalg.qr(torch.cat((kept, self.rows)).T, mode="reduced").Q.T

    def forward(self, states: Tensor) -> Tensor:
        """The states [..., d] without their part in the directions."""
        basis = self.basis()
        if not len(basis):
            return states
        h = states.to(basis.dtype)
        return (h - (h @ basis.T) @ basis).to(states.dtype)

    def begin(self, rows: Tensor) -> None:
        """Train these further rows [k, d]."""
        self.rows = nn.Parameter(rows.to(self.get_buffer("kept")))

    def settle(self) -> None:
        """Make what was trained part of the kept directions; nothing is left to train."""
        with torch.no_grad():
            self.register_buffer("kept", self.basis().detach().clone())
        self.register_parameter("rows", None)


def initial_rows(forget: Tensor, retain: Tensor, kept: Tensor, rank: int, energy: float) -> Tensor:
    """[rank, d], the directions that carry most of the FORGET states once the span of the RETAIN states is taken out.

    An uncentred PCA. The retain span is truncated to its leading directions, as few as carry the share `energy` of the
    retain states' squared norm, and never so many that fewer than `rank` directions remain: a whole span of as many
    tokens as dimensions is the whole space, and would leave nothing.

    Args:
        forget, retain: [d, d], second moments of the states, from ``states.second_moments``.
        kept: [K, d], orthonormal, directions taken out already.
        rank: directions wanted, >= 1. energy: share, in [0, 1].

    Raises:
        Refused: where taking `rank` directions would leave none, or the forget states have nothing outside of the span.
    """
    width = len(forget)
    room = width - len(kept) - rank
    if room < 1:
        raise Refused(
            f"cannot take {rank} more directions out of states of width {width}, of which {len(kept)} are out already: one "
            f"at least must be left, give a rank of at most {width - len(kept) - 1}"
        )
    values, vectors = torch.linalg.eigh(retain)
    values = values.flip(0).clamp_min(0)
    share = values.cumsum(0) / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    needed = 0 if energy == 0 else int((share < energy - 1e-12).sum()) + 1
    known = int((values > values[0] * 1e-12).sum())
    span = vectors.flip(1)[:, : min(needed, known, room)]
    out = torch.linalg.qr(torch.cat((kept.to(span), span.T)).T).Q
    rest = torch.eye(width, dtype=span.dtype, device=span.device) - out @ out.T
    values, vectors = torch.linalg.eigh(rest @ forget @ rest)
    if not float(values[-rank]) > TINY * float(forget.trace()):
        raise Refused(
            f"the forget states have fewer than {rank} directions outside of the span of the retain states: expected "
            f"something to take out; lower the rank, or the share of the retain states that is protected"
        )
    return vectors.flip(1)[:, :rank].T


def _project(module: nn.Module, _args: Any, output: Any) -> Any:
    """The forward hook: on a module's output, or on the first part of a tuple."""
    states = first(output)
    projection = module.get_submodule(CHILD)
    if states is None:
        raise Refused(f"a {type(module).__name__} gives no hidden states to project: name another module with layers=")
    done = projection(states)
    return done if isinstance(output, Tensor) else type(output)((done, *output[1:]))


def projections(model: nn.Module) -> dict[str, Projection]:
    """Name of the module -> the projection of its output."""
    return {
        name: child
        for name, module in model.named_modules()
        if isinstance(child := module._modules.get(CHILD), Projection)
    }


def outside(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the modules that are no projection themselves, which a pattern may match as well."""
    return [name for name in names if not isinstance(model.get_submodule(name), Projection)]


def attach(module: nn.Module, kept: Tensor) -> Projection:
    """Project the module's output from now on; `kept` [K, d] may be empty. Refused where a child has that name."""
    if hasattr(module, CHILD):
        raise Refused(f"the {type(module).__name__} to project has an attribute {CHILD!r} already: name another module")
    projection = Projection(kept)
    projection.training = module.training
    module.add_module(CHILD, projection)
    module.register_forward_hook(_project)
    return projection


def detach(module: nn.Module) -> None:
    """Undo ``attach``."""
    del module._modules[CHILD]
    for number, hook in list(module._forward_hooks.items()):
        if hook is _project:
            del module._forward_hooks[number]


@contextlib.contextmanager
def trained(model: nn.Module, rows: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """Names of the parameters to train inside: further directions of each module, starting at `rows` [k, d].

    Afterwards they are part of what is kept. Where what is inside fails, the projections are as they were before.
    """
    before = projections(model)
    try:
        for name, start in rows.items():
            module = model.get_submodule(name)
            (before.get(name) or attach(module, empty(model, start.shape[1]))).begin(start)
        yield tuple(f"{name}.{CHILD}.rows" for name in rows)
    except BaseException:
        for name, projection in projections(model).items():
            projection.register_parameter("rows", None)
            if name not in before:
                detach(model.get_submodule(name))
        raise
    for name in rows:
        projections(model)[name].settle()


def empty(like: nn.Module, width: int) -> Tensor:
    """[0, width], no direction, on the module's device and in float32 at least: not a row of zeros, which a QR turns
    into an axis of its own choice."""
    place = next((p for p in like.parameters() if p.is_floating_point()), torch.zeros(()))
    return wide(torch.zeros(0, width, dtype=place.dtype, device=place.device))


def fold(model: nn.Module) -> nn.Module:
    """Multiply every projection into the weight of the linear layer that it follows, in place; the model is then plain.

    Possible where the projected module is an ``nn.Linear`` (``layers="*.mlp.down_proj"``, the paper's place after the
    perceptron): W <- (I - Q^T Q) W, and the bias alike, rounded once to the weight's precision. A block's output cannot
    be folded, since its residual path has no weight. Folded directions cannot be told any more, so a further request no
    longer keeps clear of them: fold after the last one.

    Raises:
        Refused: for a projection on another module, or on a weight that is used in several places; nothing is changed.
    """
    found = {name: (model.get_submodule(name), projection) for name, projection in projections(model).items()}
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, (module, _) in found.items():
        if type(module) is not nn.Linear or any(names.count(id(p)) > 1 for p in module.parameters()):
            raise Refused(
                f"the projection of {name!r} cannot be folded: expected a torch.nn.Linear with weights of its own, found "
                f"a {type(module).__name__}; keep the projection, or train it with layers='*.mlp.down_proj'"
            )
    with torch.no_grad():
        for module, projection in found.values():
            detach(module)
            for value in module.parameters():  # a weight [d, m] and a bias [d]: the output's d comes first
                value.copy_(projection(wide(value).movedim(0, -1)).movedim(-1, 0))
    return model


def rebuilt(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model with empty projections in the places and shapes that saved `weights` have them, to be read into."""
    end = f".{CHILD}.kept"
    for name, value in weights.items():
        if name.endswith(end):
            path, known = name.removesuffix(end), dict(model.named_modules())
            module = known.get(path) or known.get(path.removeprefix("model."))  # a gate was put over the model since
            if module is None:
                raise Refused(
                    f"the weights project {path!r}, which the model does not have: give a model of the same kind"
                )
            if not isinstance(module._modules.get(CHILD), Projection):
                attach(module, torch.empty(0))
            module.get_submodule(CHILD).register_buffer("kept", value.new_zeros(value.shape))
    return model


def load_projected(model: nn.Module, path: str | Path) -> nn.Module:
    """Read weights that ``save_weights`` wrote of a model with projections into a plain model, in place."""
    return load_weights(rebuilt(model, read_tensors(Path(path))), path)
