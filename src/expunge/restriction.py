"""Training under a penalty on the size of the loss's own gradient, so that one step can forget later (IAU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expunge import runtime
from expunge.combine import State
from expunge.core import Grads, require
from expunge.oracle import Oracle

TINY = 1e-12


@dataclass(frozen=True)
class GradientRestriction:
    """Gradient of ``L + alpha sum over tensors t of ||grad_t L||``, L the sum of all roles' losses (IAU).

    The models that IAU forgets from are trained so: ``Descend(retain=NLL(), forget=NLL(),
    combine=GradientRestriction(), ...)``. The norm is that of each tensor on its own, summed, as in the authors' code,
    not the norm of the whole gradient. Its gradient is a Hessian-vector product: one more pass, differentiated twice. A
    tensor whose gradient is 0 adds nothing.

    It does not promise that a model trained so generalises as well.

    Paper: arXiv:2507.23257.

    Args:
        alpha: weight of the norms, >= 0; 0 is the plain gradient, and costs no more.
    """

    alpha: float = 0.005

    def __post_init__(self) -> None:
        require(self.alpha >= 0, self, "alpha", "at least 0")

    def init(self) -> State:
        return {}

    def combine(self, oracle: Oracle, state: State) -> tuple[Grads, State]:
        grads = oracle.grad(dict.fromkeys(oracle.roles, 1.0))
        if self.alpha == 0:
            return grads, state
        norms = {name: runtime.dot({name: grad}, {name: grad}) ** 0.5 for name, grad in grads.items()}
        oracle.report["gradient_norms"] = sum(norms.values())
        along = {name: grad / norms[name] for name, grad in grads.items() if norms[name] > TINY}
        bent = oracle.hvp(dict.fromkeys(oracle.roles, along)) if along else {}
        return runtime.linear((1.0, grads), (self.alpha, bent)), state


def adam_first_step(gradient: Grads, lr: float) -> Grads:
    """What the first step of a fresh Adam adds to the weights: ``-lr g / (|g| + 1e-8)``, by coordinate.

    Of length lr wherever the gradient is above about 1e-8, whatever its size; computed in float32 at least.
    """
    wide = {name: grad.to(torch.promote_types(grad.dtype, torch.float32)) for name, grad in gradient.items()}
    return {name: grad / (grad.abs() + 1e-8) * -lr for name, grad in wide.items()}
