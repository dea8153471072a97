"""What the outputs would be had some examples not been trained on, predicted from one model: linear data attribution.

f_r(x) = f(x) - sum over forget examples i of w_i(x), w_i(x) the effect of i on the outputs at x. Both ways of attribution
here have w_i(x) = -J(x) s_i, J(x) the derivative of the outputs in the weights and s_i a step in weight space: so the sum
over i is ONE step s, and f_r(x) = f(x) + J(x) s costs one pass for any number of examples and outputs. The n x n matrix
of effects is never made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge import runtime
from expunge.core import Batch, Case, Data, Grads, Key, Refused, require
from expunge.curvature import example_parts, mean_gradient, opened
from expunge.oracle import along, example_weights, prepared, sum_gradient
from expunge.random_projection import Projector

COLUMN = "predicted"
EPSILON = 1e-12  # of the first residual: below it a linear system is solved


@dataclass(frozen=True)
class Influence:
    """s = (G + damping I)^-1 g, the influence function of a group of examples (Koh and Liang, arXiv:1703.04730).

    g = (1/N_r) sum over D_f of the gradient of the NLL, G = mean over D_r of J^T H J with H the second derivative of an
    example's NLL in its outputs: the Gauss-Newton matrix, which is the Hessian where outputs are linear in the weights.
    Solved by conjugate gradients, which need no matrix.

    Departures: G is that of the RETAIN data, so that the whole group's removal is exact for a least-squares model (the
    paper's G is of all data, for single examples). It takes the weights for an optimum of all data with ridge N_r damping.

    Args:
        damping: > 0, in units of G.
        samples: retain examples that G is a mean over, >= 1; all where there are fewer.
        iterations: of conjugate gradients, >= 1; two passes over the samples each.
    """

    damping: float = 0.1
    samples: int = 1000
    iterations: int = 20

    def __post_init__(self) -> None:
        _check(self, ("samples", "iterations"))

    def step(self, case: Case, chunk: int, key: Key) -> Grads:
        """s, in scope.

        Args:
            chunk: examples per pass; the result does not depend on it, to rounding. key: of the samples, and of draws.
        """
        retain = case.request.data("retain")
        chosen = sampled(retain, self.samples, key.at("samples"))
        removed = _removed(case, chunk, key)
        removed = {name: grad / _weight(retain) for name, grad in removed.items()}

        def product(vector: Grads) -> Grads:
            curved = gauss_newton(case, chosen, vector, chunk, key.at("curvature"))
            return {name: self.damping * v + curved.get(name, torch.zeros_like(v)) for name, v in vector.items()}

        return conjugate_gradients(product, removed, self.iterations)


@dataclass(frozen=True)
class TRAK:
    """s = P (Phi^T R Phi + W damping I)^-1 P^T g, in a random projection P (Park et al., arXiv:2303.14186).

    A row of Phi is P^T grad m(z), m the log-odds log p_y / (1 - p_y) of a training example's true class, and g the sum
    over D_f of the gradient of the NLL, which is -(1 - p_y) grad m: the paper's -Phi^T Q. R = p_y (1 - p_y) is that of the
    paper's one-step Newton; its final formula leaves R out, since it ranks examples and no scale matters there. Here the
    scale does. For regression m is each target's prediction over the task's scale, and R = 1. W is the total weight.

    Args:
        dimensions: k of P, whose entries are +-1/sqrt(k) at random, >= 1; None projects nothing (small models).
        damping: > 0, in units of a squared gradient; the paper has none, and as many examples as dimensions at least.
        samples: retain examples in Phi, which then stand for all of them, >= 1; D_f is there whole.
        weighted: with R, or, as the paper's final formula, without.
    """

    dimensions: int | None = 512
    damping: float = 0.1
    samples: int = 1000
    weighted: bool = True

    def __post_init__(self) -> None:
        _check(self, ("samples",) if self.dimensions is None else ("samples", "dimensions"))

    def step(self, case: Case, chunk: int, key: Key) -> Grads:
        """s, in scope.

        Args:
            chunk: examples differentiated together; for memory only. key: of P, of the samples, and of draws.
        """
        projector = Projector(case.scope.parameters(case.model), self.dimensions, key.at("projector"))
        forget, retain = case.request.data("forget"), case.request.data("retain")
        chosen = sampled(retain, self.samples, key.at("samples"))
        system = torch.zeros(())
        for data, share in ((forget, 1.0), (chosen, _weight(retain) / _weight(chosen))):
            for output in _margins(case, data, self.weighted):
                for grads, weight in example_parts(case, data, output, chunk, key.at("features")):
                    rows = projector.down(grads).double() * (share * weight).sqrt()[:, None]
                    system = system + rows.T @ rows
        ridge = self.damping * (_weight(forget) + _weight(retain))
        system = system + ridge * torch.eye(len(system), dtype=system.dtype, device=system.device)
        removed = projector.down({name: grad[None] for name, grad in _removed(case, chunk, key).items()})[0]
        return projector.up(torch.linalg.solve(system, removed.double()))


Attribution = Influence | TRAK


def _check(part: Attribution, counts: tuple[str, ...]) -> None:
    require(math.isfinite(part.damping) and part.damping > 0, part, "damping", "above 0")
    for name in counts:
        require(isinstance(getattr(part, name), int) and getattr(part, name) >= 1, part, name, "at least 1")


def predicted(case: Case, data: Data, step: Grads, scale: float, chunk: int, key: Key) -> Tensor:
    """[n, ...] outputs f(x) + scale J(x) step of every example of `data`: what a retrained model is predicted to say.

    Args:
        step: of an attribution. scale: 1 for what is predicted. chunk: per pass. key: of what the task draws.
    """
    parts = []
    with torch.no_grad(), opened(case):
        for batch in prepared(case, data, chunk, key):
            said, change = _outputs_along(case, step, batch)
            parts.append((said + scale * change).cpu())
    return torch.cat(parts)


def _outputs_along(case: Case, step: Grads, batch: Batch) -> tuple[Tensor, Tensor]:
    return along(case.model, step, lambda model: case.task.outputs(model, batch))


@dataclass(frozen=True)
class MatchOutputs:
    """Mean over an example's outputs of (f - column)^2: datamodel matching, or oracle matching, by who made the column.

    Args:
        column: of the data, with an example's wanted outputs, [n, ...].
    """

    column: str = COLUMN

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        if self.column not in batch:
            raise Refused(
                f"objective MatchOutputs needs data with the column {self.column!r}, the outputs to match, and this has "
                f"{', '.join(batch)}: add it with data.annotate"
            )
        found = case.task.outputs(case.model, batch)
        wanted = batch[self.column]
        if found.shape != wanted.shape:
            raise Refused(
                f"objective MatchOutputs: column {self.column!r} has shape {tuple(wanted.shape)}, the outputs "
                f"{tuple(found.shape)}: expected the same"
            )
        return (found - wanted.to(found.dtype)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class _Loss:
    """The task's NLL of an example, summed over its units: what the weights are an optimum of."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return case.task.nll(case.model, batch)


@dataclass(frozen=True)
class _Along:
    """Inner product of an example's outputs with its column ``along``: its gradient is J^T along."""

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        return (case.task.outputs(case.model, batch) * batch["along"]).flatten(1).sum(1)


def gauss_newton(case: Case, data: Data, vector: Grads, chunk: int, key: Key) -> Grads:
    """G vector, G the weighted mean over `data` of J^T H J, H the second derivative of the NLL in the outputs.

    Args:
        vector: name -> Tensor, in scope. chunk: examples per pass, of which there are two. key: of what the task draws.
    """
    total: Grads = {}
    weights = 0.0
    with opened(case):
        for batch in prepared(case, data, chunk, key):
            weight = example_weights(case, _Loss(), batch)
            weights += float(weight.sum())
            with torch.no_grad():
                said, change = _outputs_along(case, vector, batch)
                pulled = _curved(case, said, change) * weight.to(said.dtype)[:, None]
            for name, grad in sum_gradient(case, _Along(), {**batch, "along": pulled}).items():
                total[name] = total[name] + grad if name in total else grad.clone()
    return {name: value / weights for name, value in total.items()}


def _curved(case: Case, said: Tensor, change: Tensor) -> Tensor:
    """H change, [b, outputs]."""
    task: Any = case.task
    if hasattr(task, "logits") and said.ndim == 2:
        p = said.softmax(1)
        return p * (change - (p * change).sum(1, keepdim=True))
    if hasattr(task, "scale") and said.ndim == 2:
        return change / task.scale**2
    raise Refused(f"attribution needs classification or regression, one row of outputs an example: found {task.name!r}")


@dataclass(frozen=True)
class _LogOdds:
    """sqrt(R) times the log-odds of the true class; R = p (1 - p), held constant, or 1."""

    weighted: bool

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task
        logits, label = task.logits(case.model, batch), task.labels(batch)[:, None]
        odds = logits.gather(1, label)[:, 0] - logits.scatter(1, label, -torch.inf).logsumexp(1)
        if not self.weighted:
            return odds
        return odds * (0.5 * (F.logsigmoid(odds) + F.logsigmoid(-odds))).exp().detach()


@dataclass(frozen=True)
class _Prediction:
    """One target's prediction, over the task's scale."""

    number: int

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task
        return task.outputs(case.model, batch)[:, self.number] / task.scale


def _margins(case: Case, data: Data, weighted: bool) -> list[Any]:
    """The model output functions whose gradients are the features."""
    task: Any = case.task
    if all(hasattr(task, name) for name in ("logits", "labels", "classes")):
        return [_LogOdds(weighted)]
    if hasattr(task, "targets") and hasattr(task, "scale"):
        width = task.targets(data.batch(torch.arange(1))).shape[1]
        return [_Prediction(number) for number in range(width)]
    raise Refused(f"attribution needs classification or regression, found task {task.name!r}")


def _removed(case: Case, chunk: int, key: Key) -> Grads:
    """Gradient of the summed NLL of the forget data, 0 where they do not reach."""
    forget = case.request.data("forget")
    mean = mean_gradient(case, forget, _Loss(), chunk, key.at("forget"))
    parameters = case.scope.parameters(case.model)
    return {n: mean[n] * _weight(forget) if n in mean else torch.zeros_like(p) for n, p in parameters.items()}


def conjugate_gradients(product: Callable[[Grads], Grads], goal: Grads, iterations: int) -> Grads:
    """x with product(x) = goal, `product` linear, symmetric and positive; `iterations` products, or fewer if solved.

    Inner products in float64. Not solved to the end it is x on the first directions of steepest fall: a damped answer.
    """
    solution = {name: torch.zeros_like(value) for name, value in goal.items()}
    residual, direction = dict(goal), dict(goal)
    size = first = runtime.dot(goal, goal)
    for _ in range(iterations):
        if size <= EPSILON**2 * first:
            break
        image = product(direction)
        length = size / runtime.dot(direction, image)
        solution = _plus(solution, length, direction)
        residual = _plus(residual, -length, image)
        size, before = runtime.dot(residual, residual), size
        direction = _plus(residual, size / before, direction)
    return solution


def _plus(a: Mapping[str, Tensor], factor: float, b: Mapping[str, Tensor]) -> Grads:
    return {name: torch.add(value, b[name], alpha=factor) for name, value in a.items()}


def sampled(data: Data, count: int, key: Key) -> Data:
    """`count` examples of the data, drawn without putting back, in the order of the data; all where there are fewer."""
    if count >= len(data):
        return data
    order = torch.randperm(len(data), generator=key.generator())
    return data.select(order[:count].sort().values)


def _weight(data: Data) -> float:
    """How much the examples weigh together."""
    return float(data.columns["weight"].double().sum()) if "weight" in data.columns else float(len(data))
