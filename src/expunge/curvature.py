"""Second-order quantities from per-example gradients: diagonal Fisher, mean gradients, inverse Fisher-vector products.

Everything here is a mean over EXAMPLES, so it does not depend on how they are batched (Fisher information taken from
batch gradients does, by a factor of the batch size). A ``weight`` column is respected. All in the Case's scope.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge import runtime
from expunge.core import Batch, Case, Data, Grads, Key, Objective, Refused, map_tensors, rows_of
from expunge.oracle import differentiable, example_gradients, example_weights, prepared, sum_gradient

MEMORY = 1 << 28  # bytes of per-example gradients held at once by a pass
EXACT_MEMORY = 1 << 31  # bytes of gradients that the exact inverse may hold


@contextlib.contextmanager
def opened(case: Case) -> Iterator[None]:
    """The Case's model ready to be differentiated, and metered."""
    with differentiable(case), case.meter.watch(case.model):
        yield


def example_parts(case: Case, data: Data, objective: Objective, chunk: int, key: Key) -> Iterator[tuple[Grads, Tensor]]:
    """(gradient of each example [b, ...] per name, weights [b] float64); `chunk` examples drawn at once, cut to memory."""
    width = sum(p.numel() * p.element_size() for p in case.scope.parameters(case.model).values())
    size = max(1, min(chunk, MEMORY // max(1, width)))
    with opened(case):
        for batch in prepared(case, data, chunk, key, objective):
            for start in range(0, rows_of(batch), size):
                part = _rows(batch, start, start + size)
                yield example_gradients(case, objective, part), example_weights(case, objective, part)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    return map_tensors(lambda t: t[start:stop], batch)


def squares(case: Case, data: Data, objective: Objective, chunk: int, key: Key) -> tuple[Grads, float]:
    """(sum over examples of w_i g_i^2, sum of w_i): what ``fisher`` divides, so that data sets can be added up."""
    return _summed(case, data, objective, chunk, key, torch.square)


def absolutes(case: Case, data: Data, objective: Objective, chunk: int, key: Key) -> tuple[Grads, float]:
    """(sum over examples of w_i |g_i|, sum of w_i)."""
    return _summed(case, data, objective, chunk, key, torch.abs)


def _summed(
    case: Case, data: Data, objective: Objective, chunk: int, key: Key, size: Callable[[Tensor], Tensor]
) -> tuple[Grads, float]:
    total: Grads = {}
    weights = 0.0
    for grads, weight in example_parts(case, data, objective, chunk, key):
        weights += float(weight.sum())
        for name, grad in grads.items():
            wide = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
            part = torch.tensordot(weight.to(wide.dtype), size(wide), 1)
            total[name] = total[name].add_(part) if name in total else part
    if weights <= 0:
        raise Refused(f"the weights of {len(data)} examples sum to {weights:g}: expected at least one positive weight")
    return total, weights


def fisher(case: Case, data: Data, objective: Objective, chunk: int = 64, key: Key = Key(0)) -> Grads:
    """Diagonal of the empirical Fisher information: the weighted mean over examples of the squared gradient.

    F_j = sum_i w_i (d l_i / d theta_j)^2 / sum_i w_i, each l_i differentiated on its own; equal for any `chunk`, to
    rounding, unless the task draws noise. "Empirical": at the true answers, not at answers drawn from the model.

    Args:
        data: the examples. objective: their loss.
        chunk: examples differentiated together; fewer where their gradients would not fit in memory.
        key: of what the task and the objective draw.

    Returns:
        name -> Tensor of the parameter's shape, >= 0, 0 out of scope.
    """
    total, weights = squares(case, data, objective, chunk, key)
    return {name: value.div_(weights) for name, value in total.items()}


@dataclass(frozen=True)
class _Times:
    """An objective times its example weights."""

    of: Objective

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        values = self.of(case, batch)
        return values * example_weights(case, self.of, batch).to(values.dtype)


def mean_gradient(case: Case, data: Data, objective: Objective, chunk: int = 64, key: Key = Key(0)) -> Grads:
    """Gradient of the objective's weighted mean over all of `data`, in batches of `chunk`.

    Args:
        data: the examples. objective: their loss.
        chunk: examples per pass; equal for any, to rounding.
        key: of what the task and the objective draw.
    """
    total: Grads = {}
    weights = 0.0
    with opened(case):
        for batch in prepared(case, data, chunk, key, objective):
            weights += float(example_weights(case, objective, batch).sum())
            grads = sum_gradient(case, _Times(objective), batch)
            total = runtime.linear((1.0, total), (1.0, grads)) if total else grads
    return runtime.linear((1.0 / weights, total))


def woodfisher_exact(
    case: Case, data: Data, objective: Objective, vector: Grads, damping: float, chunk: int = 64, key: Key = Key(0)
) -> Grads:
    """``(damping I + 1/n sum_i g_i g_i^T)^-1 vector``, the inverse that WoodFisher's recursion builds one g at a time.

    All rank-one updates are made at once (Woodbury): with G the [n, P] matrix of per-example gradients, the result is
    ``(vector - G^T (n damping I + G G^T)^-1 G vector) / damping``. The n x n system is solved in float64.

    Paper: Singh and Alistarh, "WoodFisher", NeurIPS 2020 (arXiv:2004.14340), eq. 8 to 11.

    Args:
        data: n examples; a ``weight`` column weighs their outer products.
        vector: name -> Tensor.
        damping: > 0, in units of a squared gradient.

    Raises:
        Refused: where n x P gradients do not fit in memory (2 GiB).
    """
    if not damping > 0:
        raise Refused(f"damping is {damping}: expected a positive number")
    names = list(case.scope.parameters(case.model))
    width = sum(p.numel() * p.element_size() for p in case.scope.parameters(case.model).values())
    if len(data) * width > EXACT_MEMORY:
        raise Refused(
            f"the exact inverse keeps {len(data)} gradients of {width >> 20} MiB each: give at most "
            f"{EXACT_MEMORY // width} examples, a smaller scope, or use recursion='released'"
        )
    blocks, weights = [], []
    for grads, weight in example_parts(case, data, objective, chunk, key):
        blocks.append(_flat(grads, names))
        weights.append(weight)
    weight = torch.cat(weights)
    share = (weight * len(weight) / weight.sum()).sqrt()
    rows = torch.cat(blocks).mul_(share.to(blocks[0].dtype)[:, None])
    flat = _flat({name: vector[name][None] for name in names}, names)[0].to(rows.dtype)
    ridge = len(rows) * damping * torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    system = (rows @ rows.T).double() + ridge
    solved = torch.linalg.solve(system, (rows @ flat).double()).to(rows.dtype)
    return _unflat((flat - rows.T @ solved) / damping, vector, names)


def released(case: Case, data: Data, objective: Objective, vector: Grads, chunk: int = 64, key: Key = Key(0)) -> Grads:
    """The recursion of the code released for influence unlearning, which is NOT the inverse that it is named after.

    o <- g_1, k <- v; then for each further g: t = <o, g>; k <- k - <k, g> / (n + t) o; o <- o - t / (n + t) o. Since o
    is only ever rescaled, k = v - s g_1 for one number s: a damped identity less a multiple of the FIRST gradient. It
    is computed as that, one pass, two inner products per example. n is the number of examples after the first.

    Args:
        data: n + 1 examples, in the order that matters; weights are not used.
        vector: name -> Tensor.
    """
    first: Grads = {}
    removed, scale, count = 0.0, 1.0, len(data) - 1
    for grads, _ in example_parts(case, data, objective, chunk, key):
        rows = len(next(iter(grads.values())))
        start = 0
        if not first:
            first, start = {name: grad[0].clone() for name, grad in grads.items()}, 1
        onto_first, onto_vector = _against(grads, first, vector)
        for row in range(start, rows):
            along, left = scale * onto_first[row], onto_vector[row] - removed * onto_first[row]
            removed += left / (count + along) * scale
            scale -= along / (count + along) * scale
    return {name: value - removed * first[name].to(value.dtype) for name, value in vector.items()}


def _against(grads: Grads, *vectors: Grads) -> list[list[float]]:
    """Inner products of each example's gradient with each vector, in float32 at least, read once for all vectors."""
    total = torch.zeros(())
    for name, grad in grads.items():
        wide = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
        columns = torch.stack([vector[name].flatten().to(wide) for vector in vectors], 1)
        total = total.to(wide.device) + (wide.flatten(1) @ columns).double()
    return total.T.tolist()


def _flat(grads: Grads, names: list[str]) -> Tensor:
    """[b, P]."""
    return torch.cat([grads[name].flatten(1) for name in names], 1)


def _unflat(flat: Tensor, like: Grads, names: list[str]) -> Grads:
    parts = flat.split([like[name].numel() for name in names])
    return {name: part.reshape(like[name].shape).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


def expected_fisher(case: Case, data: Data, chunk: int = 64, key: Key = Key(0)) -> Grads:
    """Diagonal of the Fisher information itself: the mean over examples of what the model itself expects of g^2.

    F_j = mean_i sum_y p(y | x_i) (d -log p(y | x_i) / d theta_j)^2 over all C answers of a classifier; of a regression,
    whose answers are Gaussian, mean_i sum_k (d f_k(x_i) / d theta_j)^2 / scale^2 over its k targets. No true answer is
    read. C (or k) passes over the data, each example differentiated on its own; equal for any `chunk`, to rounding.

    Args:
        data: the examples; a ``weight`` column is respected.
        chunk: examples differentiated together; fewer where their gradients would not fit in memory.
        key: of what the task draws.

    Raises:
        Refused: for a task whose answers cannot be gone through one by one.
    """
    total: Grads = {}
    weights = 0.0
    for answer in _answers(case, data):
        part, weights = squares(case, data, answer, chunk, key)
        total = runtime.linear((1.0, total), (1.0, part)) if total else part
    return {name: value.div_(weights) for name, value in total.items()}


def _answers(case: Case, data: Data) -> list[Objective]:
    """One objective per answer, whose squared gradients add up to the expectation."""
    task: Any = case.task
    if hasattr(task, "classes") and hasattr(task, "logits"):
        return [_OfClass(answer) for answer in range(task.classes)]
    if hasattr(task, "targets") and hasattr(task, "scale"):
        width = task.targets(data.batch(torch.arange(1))).shape[1]
        return [_OfTarget(number) for number in range(width)]
    raise Refused(
        f"the Fisher information goes through every possible answer, which task {task.name!r} has too many of: it is for "
        f"classification and regression"
    )


@dataclass(frozen=True)
class _OfClass:
    """The NLL of one class times the square root of its probability, which is held constant."""

    answer: int

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task
        log_p = torch.log_softmax(task.logits(case.model, batch), -1)[:, self.answer]
        return -log_p * (0.5 * log_p.detach()).exp()


@dataclass(frozen=True)
class _OfTarget:
    """One prediction, in units of the noise's standard deviation."""

    number: int

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task
        return task.outputs(case.model, batch)[:, self.number] / task.scale
