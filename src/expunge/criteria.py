"""Gradient surgery for any differentiable criteria: `surgery` combines their gradients into one update.

The rules are those of `expunge.gramian`; nothing here knows about models, forgetting or data.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from expunge.core import Grads, Refused
from expunge.gramian import RULES, Rule
from expunge.runtime import dot

Variables = TypeVar("Variables", Tensor, list[Tensor], tuple[Tensor, ...], dict[str, Tensor])
Criterion = Callable[[Any], Any]


@dataclass(frozen=True)
class Surgery(Generic[Variables]):
    """One combined step: ``variables - rate * update``, with what it was made of.

    ``values`` [n] are the criteria at `variables`, ``names`` [n] what they are called, ``weights`` [n] the
    rule's, ``gramian`` [n, n] the dot products of the gradients. ``cosine`` is between the two gradients of
    two criteria; None for another number of criteria, or where a gradient is zero. ``gramian @ weights`` is
    the first-order rate of decrease of each criterion.
    """

    update: Variables
    weights: Tensor
    values: Tensor
    gramian: Tensor
    cosine: float | None
    names: tuple[str, ...]
    mode: Literal["reverse", "forward"]


def surgery(
    criteria: Criterion | Sequence[Criterion],
    variables: Variables,
    rule: str | Rule = "upgrad",
    mode: Literal["auto", "reverse", "forward"] = "auto",
) -> Surgery[Variables]:
    """Differentiate the criteria at `variables` and combine their gradients; nothing is changed in place.

    Reverse mode runs one backward pass per criterion. Forward mode runs the criteria once per scalar
    variable, with a tangent, and gets the derivatives of all criteria at once; it stores no graph, so a long
    simulation costs no memory. In runs of the criteria, a backward pass counting for two, and so a run with a
    tangent:

    - one callable with n criteria and P scalars: reverse 1 + 2 n, forward 2 P. "auto" takes forward for P =
      1, and else runs it once to learn n: the choice is then between 2 n and 2 P more, forward where P < n.
    - a sequence of callables, each with its own graph: reverse 1 + 2, forward 2 P: forward where P = 1.

    "auto" does not see memory: ask for "forward" where the graph of one run would not fit.

    Not promised: that criteria decrease by a finite step (every statement of a rule is to first order);
    second derivatives. The n gradients are held at once; the update takes their place variable by variable,
    with no further copy of them.

    Args:
        criteria: a callable of `variables` that returns a dict, tuple, list or 1-D tensor of scalars, all to
            be minimised; or a sequence of callables that return one scalar each. They must be deterministic.
        variables: a floating tensor, or a list, tuple or dict of them. Pass parameters through
            ``torch.func.functional_call``, for a criterion must read what it is handed.
        rule: a name in `expunge.gramian.RULES`, or a callable from the Gramian (float64 CPU [n, n]) to
            weights [n], such as ``functools.partial(one_sided, tolerance=0.1)``.
        mode: "auto", "reverse" or "forward".

    Raises:
        Refused: a ValueError. A variable that no criterion depends on, a criterion that depends on none,
            gradients that are not finite, an unknown rule or mode.

    Example:
        >>> import torch
        >>> step = surgery(lambda x: (x.square().sum(), (x - 1).square().sum()), torch.tensor([0.5, 2.0]))
        >>> step.update
        tensor([0., 3.])
    """
    function = _rule(rule)
    if mode not in ("auto", "reverse", "forward"):
        raise Refused(f"mode is {mode!r}; expected 'auto', 'reverse' or 'forward'")
    leaves = _leaves(variables)
    runs: list[Criterion] = [criteria] if callable(criteria) else list(criteria)
    if not runs or not all(callable(run) for run in runs):
        raise Refused(f"criteria is {criteria!r}; expected a callable or a non-empty sequence of callables")
    separate = not callable(criteria)

    def evaluate(tensors: Grads) -> Iterator[dict[str, Tensor]]:
        """The criteria of one graph at a time, so that a caller can free it before the next."""
        for index, run in enumerate(runs):
            yield _named(run(_like(variables, tensors)), str(index) if separate else None)

    scalars = sum(leaf.numel() for leaf in leaves.values())
    if mode == "forward" or (mode == "auto" and scalars == 1):
        values, gradients = _forward(evaluate, leaves)
    else:
        # A joint callable that turns out to have more criteria than there are scalars is better run forward.
        most = scalars if mode == "auto" and not separate else None
        values, gradients = _reverse(evaluate, leaves, most) or _forward(evaluate, leaves)
    return _combine(variables, function, values, gradients)


def _combine(variables: Variables, rule: Rule, values: Grads, gradients: Gradients) -> Surgery[Variables]:
    leaves = _leaves(variables)
    names, rows = tuple(values), [gradients.rows[name] for name in values]
    for name in leaves:
        if not any(name in row for row in rows):
            raise Refused(f"no criterion depends on variable {name!r}; expected every one in use: drop it")
    for name, row in zip(names, rows, strict=True):
        if not row:
            raise Refused(f"criterion {name!r} depends on no variable; compute it from what it is handed")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in row.values()):
            raise Refused(f"criterion {name!r} has a gradient that is not finite (value {float(values[name])})")
    n = len(rows)
    gramian = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            gramian[i, j] = gramian[j, i] = dot(rows[i], rows[j])
    weights = rule(gramian)
    if not isinstance(weights, Tensor) or weights.shape != (n,) or not bool(torch.isfinite(weights).all()):
        raise Refused(f"rule returned {weights!r}; expected a finite tensor of {n} weights, one per criterion")
    lengths = gramian.diagonal().sqrt()
    cosine = float(gramian[0, 1] / lengths.prod()) if n == 2 and bool(lengths.all()) else None
    update = _weighted(leaves, rows, weights.tolist())
    stacked = torch.stack([value.detach() for value in values.values()])
    return Surgery(_like(variables, update), weights, stacked, gramian, cosine, names, gradients.mode)


def _weighted(leaves: Grads, rows: list[Grads], weights: list[float]) -> Grads:
    """``sum_i w_i g_i``, one variable after another, each freeing its gradients as it goes.

    Not in place: autograd may hand out one tensor as the gradient of two variables, or an expanded scalar.
    """
    update: Grads = {}
    for name in leaves:
        for weight, row in zip(weights, rows, strict=True):
            if name in update and name in row:
                update[name].add_(row.pop(name), alpha=weight)
            elif name in row:
                update[name] = row.pop(name) * weight
    return update


@dataclass
class Gradients:
    """criterion -> variable -> gradient; a variable that a criterion does not depend on is absent."""

    rows: dict[str, Grads]
    mode: Literal["reverse", "forward"]


Evaluate = Callable[[Grads], Iterator[dict[str, Tensor]]]


def _reverse(evaluate: Evaluate, leaves: Grads, most: int | None) -> tuple[Grads, Gradients] | None:
    """One backward pass per criterion; None if one graph has more than `most` criteria."""
    tensors = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    values: Grads = {}
    rows: dict[str, Grads] = {}
    with torch.enable_grad():
        for graph in evaluate(tensors):
            if most is not None and len(graph) > most:
                return None
            left = len(graph)
            while graph:
                name = next(iter(graph))
                value = graph.pop(name)
                left -= 1
                values[name] = value.detach()
                rows[name] = _backward(value, tensors, keep=left > 0)
    return values, Gradients(rows, "reverse")


def _backward(value: Tensor, tensors: Grads, keep: bool) -> Grads:
    if not value.requires_grad:
        return {}
    found = torch.autograd.grad(value, list(tensors.values()), retain_graph=keep, allow_unused=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


def _forward(evaluate: Evaluate, leaves: Grads) -> tuple[Grads, Gradients]:
    """One run with a tangent per scalar variable: column by column of the Jacobian."""
    values: Grads = {}
    rows: dict[str, Grads] = {}
    fixed = {name: leaf.detach() for name, leaf in leaves.items()}
    for name, leaf in fixed.items():
        for position in range(leaf.numel()):
            tangent = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
            tangent[position] = 1
            with torch.no_grad(), forward_ad.dual_level():
                dual = forward_ad.make_dual(leaf, tangent.reshape(leaf.shape))
                outputs = [pair for graph in evaluate({**fixed, name: dual}) for pair in graph.items()]
                for criterion, output in outputs:
                    value, slope = forward_ad.unpack_dual(output)
                    _check_repeats(criterion, values.setdefault(criterion, value.clone()), value)
                    row = rows.setdefault(criterion, {})
                    if slope is not None:
                        row.setdefault(name, torch.zeros_like(leaf, memory_format=torch.contiguous_format))
                        row[name].view(-1)[position] = slope
    return values, Gradients(rows, "forward")


def _check_repeats(name: str, first: Tensor, again: Tensor) -> None:
    """Forward mode runs the criteria once per scalar: columns of different functions make no gradient."""
    if not torch.allclose(first, again, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise Refused(
            f"criterion {name!r} gave {float(first)}, then {float(again)} at the same variables; expected the "
            "same: draw its randomness beforehand, or use mode='reverse'"
        )


def _rule(rule: str | Rule) -> Rule:
    if callable(rule):
        return rule
    if rule in RULES:
        return RULES[rule]
    near = difflib.get_close_matches(str(rule), RULES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Refused(f"rule is {rule!r}; expected a callable or one of {', '.join(RULES)}.{hint}")


def _leaves(variables: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Grads:
    """The tensors under a name each, in order."""
    if isinstance(variables, Tensor):
        leaves = {"variables": variables}
    elif isinstance(variables, dict):
        leaves = dict(variables)
    elif isinstance(variables, list | tuple):
        leaves = {str(index): leaf for index, leaf in enumerate(variables)}
    else:
        raise Refused(f"variables is a {type(variables).__name__}; expected a tensor, or a list, tuple or dict")
    if not leaves:
        raise Refused("variables is empty; expected at least one floating tensor")
    for name, leaf in leaves.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            found = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise Refused(f"variable {name!r} is {found}; expected a floating tensor with at least one element")
    return leaves


def _like(variables: Variables, leaves: Grads) -> Any:
    """`leaves` in the structure of `variables`."""
    if isinstance(variables, Tensor):
        return leaves["variables"]
    if isinstance(variables, dict):
        return {name: leaves[name] for name in variables}
    ordered = [leaves[str(index)] for index in range(len(variables))]
    return ordered if isinstance(variables, list) else tuple(ordered)


def _named(output: Any, alone: str | None) -> dict[str, Tensor]:
    """The scalars that a callable returned, by name. `alone` names the one of a callable in a sequence."""
    if alone is not None:
        named = {alone: output}
    elif isinstance(output, dict):
        named = dict(output)
    elif isinstance(output, list | tuple) or (isinstance(output, Tensor) and output.ndim == 1):
        named = {str(index): value for index, value in enumerate(output)}
    else:
        found = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise Refused(f"criteria returned {found}; expected a dict, tuple, list or 1-D tensor of scalars")
    if not named:
        raise Refused("criteria returned nothing; expected at least one scalar")
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise Refused(f"criterion {name!r} is {found}; expected a scalar tensor, already reduced")
    return {name: value.reshape(()) for name, value in named.items()}
