"""Losses, gradients and curvature products of the roles of one step: the only place that differentiates.

Forget and retain examples are disjoint, so each role has its own forward and backward graph, freed before the next:
two gradients then cost what one joint gradient costs, at lower peak memory.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import (
    Batch,
    Case,
    Data,
    Grads,
    Key,
    Objective,
    Refused,
    RunFailed,
    map_tensors,
    only_looked_at,
    rows_of,
)
from expunge.scope import Scope


class Diverged(RunFailed):
    """A loss or a weight stopped being a finite number."""


Weight = float | Callable[[float], float]


@dataclass(frozen=True)
class On:
    """An objective and the data it reads: the name of a Data of the request, or None for a penalty on parameters."""

    source: str | None
    objective: Objective


def positions(key: Key, size: int, batch: int, index: int, lengths: Tensor | None = None) -> Tensor:
    """Batch number `index` of an endless stream of shuffles of 0 .. size-1: a pure function, so feeds have no state.

    With `lengths` [size] each epoch is cut into batches of like length, which come in a drawn order.
    """
    batch = min(batch, size)
    start, stop = index * batch, (index + 1) * batch
    parts = []
    for epoch in range(start // size, (stop - 1) // size + 1):
        order = _shuffle(key, size, epoch) if lengths is None else _buckets(key, lengths, batch, epoch)
        parts.append(order[max(0, start - epoch * size) : min(size, stop - epoch * size)])
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _shuffle(key: Key, size: int, epoch: int) -> Tensor:
    """Kept for the steps of an epoch, or each would shuffle all of the data again; never written to."""
    return torch.randperm(size, generator=key.at("epoch", epoch).generator())


def _buckets(key: Key, lengths: Tensor, batch: int, epoch: int) -> Tensor:
    """0 .. size-1, sorted by length and cut where the batches of the stream begin, the cuts in a drawn order.

    An epoch begins and ends inside a batch unless `batch` divides its size: which lengths these parts have is drawn too,
    and which examples of one length stand together.
    """
    size = len(lengths)
    shuffled = _shuffle(key, size, epoch)
    ranked = shuffled[torch.argsort(lengths[shuffled], stable=True)]
    head = -epoch * size % batch
    whole, tail = divmod(size - head, batch)
    sizes = [head, *[batch] * whole, tail]
    order = torch.randperm(len(sizes), generator=key.at("buckets", epoch).generator()).tolist()
    cut = dict(zip(order, ranked.split([sizes[part] for part in order]), strict=True))
    middle = torch.randperm(whole, generator=key.at("batches", epoch).generator()).tolist()
    return torch.cat([cut[0], *(cut[1 + part] for part in middle), cut[whole + 1]])


class Draws:
    """The batches of one step: drawn on first use, then the same for every reader.

    Roles that read as many examples of one source see the same ones, and the same randomness of the modality.
    """

    def __init__(
        self,
        case: Case,
        roles: Mapping[str, On],
        key: Key,
        step: int,
        sizes: Mapping[str, int],
        clock: Callable[[str, int], int],
        lengths: Mapping[str, Tensor] | None = None,
    ):
        self.lengths = lengths or {}
        self.case, self.roles, self.key, self.step, self.sizes, self.clock = case, roles, key, step, sizes, clock
        self._prepared: dict[tuple[str, int, int], Batch] = {}
        self._drawn: dict[str, Batch] = {}

    def batch(self, role: str) -> Batch:
        """The role's batch, prepared by the task and drawn by its objective; whole, on the model's device."""
        if role not in self._drawn:
            on = self.roles[role]
            batch = (
                self._source(role, on.source) if on.source is not None else {"id": torch.zeros(1, dtype=torch.int64)}
            )
            draw = getattr(on.objective, "draw", None)
            if draw is not None:
                batch = draw(self.case, batch, self.key.at("draw", role, self.clock(role, self.step)))
            self._drawn[role] = runtime.to_device(batch, runtime.device_of(self.case.model))
        return self._drawn[role]

    def _source(self, role: str, source: str) -> Batch:
        index, size = self.clock(role, self.step), self.sizes[role]
        if (source, index, size) not in self._prepared:
            data = self.case.request.data(source)
            chosen = positions(self.key.at("order", source), len(data), size, index, self.lengths.get(source))
            batch = runtime.to_device(data.batch(chosen), runtime.device_of(self.case.model))
            self._prepared[source, index, size] = self.case.task.prepare(batch, self.key.at("prepare", source, index))
        return self._prepared[source, index, size]


class Losses(Mapping[str, float]):
    """role -> mean loss over the logical batch; a forward pass is spent only on a role that was not differentiated."""

    def __init__(self, oracle: Oracle):
        self._oracle = oracle
        self.known: dict[str, float] = {}

    def __getitem__(self, role: str) -> float:
        if role not in self._oracle.roles:
            raise KeyError(role)
        if role not in self.known:
            self.known[role] = self._oracle.evaluate(role)
        return self.known[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._oracle.roles)

    def __len__(self) -> int:
        return len(self._oracle.roles)


def _always(weight: float) -> Callable[[float], float]:
    return lambda _loss: weight


class Oracle:
    """What a combiner asks: losses, gradients, Hessian-vector products, and the same at shifted weights. All lazy.

    The loss of a role is sum(w v) / sum(w) over the logical batch, whatever the split into pieces and processes; the
    divisor is computed in float64.

    Attributes:
        roles: role -> On(source, objective).
        losses: role -> float, lazy.
        step, progress, lr: the step's number, the share of the run that is done (0 .. 1), the learning rate.
        report: what a combiner wants recorded of this step (norms, cosine, multiplier).

    `named` are the model's parameters, from a caller that has them; walking over the modules for them takes its time.
    """

    def __init__(
        self,
        case: Case,
        roles: Mapping[str, On],
        draws: Draws,
        *,
        accumulate: int = 1,
        step: int = 0,
        progress: float = 0.0,
        lr: float = 0.0,
        shift: Grads | None = None,
        named: Mapping[str, nn.Parameter] | None = None,
    ):
        self.case, self.roles, self.draws = case, roles, draws
        self.accumulate, self.step, self.progress, self.lr, self.shift = accumulate, step, progress, lr, shift
        self._named = dict(case.model.named_parameters()) if named is None else named
        self.parameters = case.scope.among(self._named)
        self.losses = Losses(self)
        self.report: dict[str, float] = {}

    def again(self) -> Oracle:
        """The same drawn batches, nothing known yet: for a look at new weights."""
        return self._like(self.shift)

    def at(self, shift: Grads) -> Oracle:
        """The same drawn batches at weights + shift; the weights are restored to the bit after each look.

        Of an oracle that is shifted already, the two shifts add up.
        """
        before = self.shift or {}
        both = {name: before[name] + shift[name] for name in before.keys() & shift.keys()}
        return self._like({**before, **shift, **both})

    def view(self, roles: tuple[str, ...], pattern: str | None = None) -> Oracle:
        """Only these roles, and only the part of the scope that a name pattern selects; losses learnt are shared."""
        case = self.case
        if pattern is not None:
            found = {name: mask for name, mask in case.scope.masks.items() if fnmatch.fnmatchcase(name, pattern)}
            if not found:
                raise Refused(f"turn pattern {pattern!r} matches no parameter in scope")
            case = replace(case, scope=Scope(found, case.scope.universe))
        for role in roles:
            if role not in self.roles:
                raise Refused(f"a turn names role {role!r}: expected one of {', '.join(self.roles)}")
        view = self._like(self.shift, case, {role: self.roles[role] for role in roles})
        view.losses.known, view.report = self.losses.known, self.report
        return view

    def _like(self, shift: Grads | None, case: Case | None = None, roles: Mapping[str, On] | None = None) -> Oracle:
        return Oracle(
            case or self.case,
            self.roles if roles is None else roles,
            self.draws,
            accumulate=self.accumulate,
            step=self.step,
            progress=self.progress,
            lr=self.lr,
            shift=shift,
            named=self._named,
        )

    def evaluate(self, role: str) -> float:
        """The role's loss, without a graph."""
        with torch.no_grad(), self._shifted():
            return self._finish(role, sum(float(loss.double()) for loss in self._pieces(role)))

    def grad(self, weights: Mapping[str, Weight], scope: Scope | None = None) -> Grads:
        """Gradient of sum_k weights[k] losses[k]; a role of weight 0 costs nothing.

        Args:
            weights: role -> weight; or a function of that role's own loss, known by the time its graph is there, so
                that a weight that depends on the loss costs no extra pass and no second gradient.
            scope: differentiate these coordinates only (default: the Case's scope).

        Raises:
            RunFailed: when no parameter receives a gradient.
        """
        scope = self.case.scope if scope is None else scope
        parameters = {name: p for name, p in self.parameters.items() if name in scope}
        with self._only(parameters), self._shifted():
            for role, *others in self._passes(weights):
                weight = weights[role]
                if others:
                    self._backward_together({name: weights[name] for name in (role, *others)})
                elif callable(weight):
                    self._backward_by_loss(role, weight, parameters)
                elif weight != 0.0:
                    self.losses.known[role] = self._finish(role, self._backward(role, _always(weight)))
        if all(weight == 0.0 for weight in weights.values()):
            return {}
        grads = self.case.scope.cut(runtime.gradient(parameters), self.case.model)
        return grads if scope is self.case.scope else scope.cut(grads, self.case.model)

    def _passes(self, weights: Mapping[str, Weight]) -> list[list[str]]:
        """Roles by forward pass: those whose objectives name one ``one_pass`` of one batch share it, where it is whole.

        Cut into pieces, the loss of a role is known only when its graphs are gone, so that each has passes of its own.
        """
        whole = self.accumulate == 1 and runtime.world() == 1
        groups: dict[Any, list[str]] = {}
        for role, weight in weights.items():
            on = self.roles[role]
            named = getattr(on.objective, "one_pass", None)
            alone = named is None or not whole or hasattr(on.objective, "draw") or weight == 0.0
            batch = None if alone else (named, on.source, self.draws.sizes[role], self.draws.clock(role, self.step))
            groups.setdefault(role if alone else batch, []).append(role)
        return list(groups.values())

    def _backward_together(self, weights: Mapping[str, Weight]) -> None:
        """Differentiate once the weighted sum of the losses of roles that share a forward pass."""
        roles = list(weights)
        shared: Any = self.roles[roles[0]].objective
        batch = self.draws.batch(roles[0])
        self.case.meter.forget_graph()
        made, parts = shared.one_pass(self.case, batch), []
        for role, weight in weights.items():
            objective: Any = self.roles[role].objective
            share = self._shares(role, objective, batch)
            values = per_example(self.case, functools.partial(_of, objective, made), batch)
            loss = (values * share.to(values.dtype)).sum()
            _check_reached(loss, f"role {role!r}", len(self.parameters))
            value = self.losses.known[role] = self._finish(role, float(loss.detach().double()))
            parts.append(loss * (weight(value) if callable(weight) else weight))
        torch.stack(parts).sum().backward()
        self.case.meter.differentiated()

    def _backward(self, role: str, weigh: Callable[[float], float]) -> float:
        """Accumulate the gradient of the role's pieces, each weighted; the role's loss on this process."""
        total = 0.0
        for loss in self._pieces(role):
            _check_reached(loss, f"role {role!r}", len(self.parameters))
            value = float(loss.detach().double())
            (loss * weigh(value)).backward()
            self.case.meter.differentiated()
            total += value
        return total

    def _backward_by_loss(
        self, role: str, weigh: Callable[[float], float], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Accumulate the role's gradient times a function of its loss over the whole logical batch."""
        if self.accumulate == 1 and runtime.world() == 1:
            self.losses.known[role] = self._finish(role, self._backward(role, weigh))
            return
        held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        self.losses.known[role] = self._finish(role, self._backward(role, lambda _loss: 1.0))
        scale = weigh(self.losses.known[role])
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
                if name in held:
                    parameter.grad.add_(held[name])
            else:
                parameter.grad = held.get(name)

    def hvp(self, vectors: Mapping[str, Grads]) -> Grads:
        """sum_k H_k vectors[k], by differentiating twice. Needs the math attention kernel, which it selects."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        names, curved = list(self.parameters), False
        if any(runtime.sharded(p) for p in self.parameters.values()):
            raise RunFailed(
                "second derivatives of sharded parameters are not available: run data parallel, or take a difference "
                "of gradients with oracle.at(shift)"
            )
        with self._only(self.parameters), self._shifted(), sdpa_kernel(SDPBackend.MATH):
            for role, vector in vectors.items():
                total = 0.0
                for loss in self._pieces(role):
                    grads = torch.autograd.grad(
                        loss, list(self.parameters.values()), create_graph=True, allow_unused=True
                    )
                    inner = sum(
                        (
                            (g * vector[n]).sum()
                            for n, g in zip(names, grads, strict=True)
                            if g is not None and n in vector
                        ),
                        start=torch.zeros((), device=loss.device),
                    )
                    if inner.requires_grad:  # a loss that is linear in every weight has no curvature
                        inner.backward()
                        curved = True
                    self.case.meter.differentiated(2)
                    total += float(loss.detach().double())
                self.losses.known[role] = self._finish(role, total)
        if not curved:
            return {}
        return self.case.scope.cut(runtime.gradient(self.parameters), self.case.model)

    def _pieces(self, role: str) -> Iterator[Tensor]:
        """This process's pieces of the role's loss, one graph at a time."""
        objective = self.roles[role].objective
        batch = self.draws.batch(role)
        if getattr(objective, "parameters_only", False):
            self.case.meter.forget_graph()
            yield objective(self.case, batch).sum() / runtime.world()
            return
        shares = self._shares(role, objective, batch)
        if self.accumulate == 1 and runtime.world() == 1:
            self.case.meter.forget_graph()
            values = per_example(self.case, objective, batch)
            yield (values * shares.to(values.dtype)).sum()
            return
        order = self._order(batch)
        for index, real in runtime.pieces(rows_of(batch), self.accumulate):
            index, real = order[index].to(shares.device), real.to(shares.device)
            self.case.meter.forget_graph()
            values = per_example(self.case, objective, take(batch, index))
            share = (shares[index] * real).to(values.dtype)
            yield (values * share).sum()

    def _shares(self, role: str, objective: Objective, batch: Batch) -> Tensor:
        """[b] float64: the part that each example has in the role's loss."""
        weight = example_weights(self.case, objective, batch)
        whole = float(weight.sum())
        if whole <= 0:
            raise RunFailed(f"the weights of role {role!r} sum to {whole:g}: expected at least one positive weight")
        return weight / whole

    def _order(self, batch: Batch) -> Tensor:
        """Rows in the order in which they are cut into pieces: by length, so that a short piece is not padded to a long.

        The sum over pieces is the same up to rounding, whatever the order.
        """
        lengths = getattr(self.case.task, "lengths", None)
        if lengths is None:
            return torch.arange(rows_of(batch))
        return torch.argsort(lengths(batch).cpu(), stable=True)

    def _finish(self, role: str, value: float) -> float:
        value = float(runtime.all_sum(torch.tensor([value], dtype=torch.float64))) if runtime.world() > 1 else value
        if not math.isfinite(value):
            raise Diverged(
                f"the loss of role {role!r} is {value} at step {self.step}: expected a finite number; lower "
                f"the learning rate, or use a forgetting loss that is bounded"
            )
        return value

    @contextlib.contextmanager
    def _only(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        others = [p for name, p in self._named.items() if p.requires_grad and name not in parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def _shifted(self) -> Iterator[None]:
        if self.shift is None:
            yield
            return
        named = self._named  # a view's own parameters may be fewer than the shift's
        kept = {name: named[name].detach().clone() for name in self.shift}
        try:
            with torch.no_grad():
                for name, value in self.shift.items():
                    named[name].add_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    named[name].copy_(value)


def _of(objective: Any, made: Any, case: Case, batch: Batch) -> Tensor:
    """The objective's values from a forward pass that others read too."""
    return objective.of(case, batch, made)


def _check_reached(loss: Tensor, of: str, parameters: int) -> None:
    if not loss.requires_grad:
        raise RunFailed(
            f"the loss of {of} depends on none of the {parameters} parameters in scope: widen the scope, or check that "
            f"the model does not detach its output"
        )


def take(batch: Batch, rows: Tensor) -> Batch:
    """These rows of a batch."""
    return map_tensors(lambda t: t[rows.to(t.device)], batch)


def example_weights(case: Case, objective: Objective, batch: Batch) -> Tensor:
    """[b] float64: the batch's ``weight`` column times the objective's own weights, 1 where there is neither."""
    weight = batch["weight"].double() if "weight" in batch else torch.ones(rows_of(batch), dtype=torch.float64)
    weigh = getattr(objective, "weigh", None)
    if weigh is not None:
        own = weigh(case, batch).double()
        weight = weight.to(own.device) * own
    return weight.to(runtime.device_of(case.model))


def per_example(case: Case, objective: Objective, batch: Batch) -> Tensor:
    """The objective's values, held to one number per example."""
    values = objective(case, batch)
    if values.shape != (rows_of(batch),):
        raise Refused(
            f"objective {objective!r} returned shape {tuple(values.shape)} for {rows_of(batch)} examples: "
            f"expected one loss per example, not reduced"
        )
    return values


def prepared(case: Case, data: Data, size: int, key: Key, objective: Objective | None = None) -> Iterator[Batch]:
    """Every example of `data` once, in order, prepared by the task (and drawn by the objective), on the model's device."""
    device = runtime.device_of(case.model)
    for number, batch in enumerate(data.batches(size)):
        batch = case.task.prepare(runtime.to_device(batch, device), key.at("prepare", number))
        draw = getattr(objective, "draw", None)
        yield batch if draw is None else runtime.to_device(draw(case, batch, key.at("draw", number)), device)


def mean_loss(case: Case, data: Data, objective: Objective, size: int, key: Key) -> float:
    """The objective's weighted mean over all of `data`, without a graph, independent of `size`."""
    total = weights = 0.0
    with torch.no_grad():
        for batch in prepared(case, data, size, key, objective):
            weight = example_weights(case, objective, batch)
            total += float((per_example(case, objective, batch).double() * weight).sum())
            weights += float(weight.sum())
    if weights <= 0:
        raise Refused(f"the weights of {len(data)} examples sum to {weights:g}: expected at least one positive weight")
    return total / weights


def sum_gradient(case: Case, objective: Objective, batch: Batch) -> Grads:
    """Gradient of the SUM over the batch of the objective, in scope. The batch must be prepared."""
    parameters = case.scope.parameters(case.model)
    for index, real in runtime.pieces(rows_of(batch), 1):  # one piece: this process's rows
        part = batch if runtime.world() == 1 else take(batch, index)
        case.meter.forget_graph()
        values = per_example(case, objective, part)
        _check_reached(values, repr(objective), len(parameters))
        (values * real.to(values)).sum().backward()
        case.meter.differentiated()
    return case.scope.cut(runtime.gradient(parameters), case.model)


def gradient_graph(loss: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> Grads:
    """Gradient of a scalar loss in `parameters`, with its graph: for an objective that is a function of a gradient.

    Differentiating that objective differentiates twice: `loss` runs with the math attention kernel, which can be. A
    name that the loss does not depend on is absent.

    Args:
        loss: run once here.
        parameters: name -> tensor that requires a gradient.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.grad(loss(), list(parameters.values()), create_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


class _PerExample(nn.Module):
    """The objective as a module, so that ``functional_call`` can swap the model's parameters."""

    def __init__(self, case: Case, objective: Objective):
        super().__init__()
        self.model = case.model
        self._call = lambda batch: objective(case, batch)

    def forward(self, batch: Batch) -> Tensor:
        return self._call(batch)


def example_gradients(case: Case, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """[b, ...] per name: the gradient of each example on its own, all examples in one batched pass.

    A model that cannot be batched this way (data-dependent control flow, say) is differentiated one example at a time,
    which is noted. Memory: b times the parameters in scope.
    """
    parameters = case.scope.parameters(case.model)
    module = _PerExample(case, objective)
    fixed = {name: p.detach() for name, p in case.model.named_parameters() if name not in parameters}
    where = places(case.model)

    def loss(values: dict[str, Tensor], row: Any) -> Tensor:
        single = map_tensors(lambda t: t.unsqueeze(0), row)
        every = {**fixed, **values}
        named = {f"model.{place}": every[name] for place, name in where.items()}
        return torch.func.functional_call(module, named, (single,), tie_weights=False).sum()

    values = {name: p.detach() for name, p in parameters.items()}
    before = case.meter.forward
    try:
        rows_only = {name: part for name, part in batch.items() if isinstance(part, (Tensor, Mapping))}
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")(values, rows_only)
        case.meter.forward = before + rows_of(batch)
        case.meter.backward += rows_of(batch)
    except (RuntimeError, NotImplementedError, KeyError) as error:
        case.meter.forward = before
        case.meter.note(
            f"per-example gradients were taken one at a time: the model cannot be batched over examples "
            f"({str(error).splitlines()[0][:120]})"
        )
        rows = [sum_gradient(case, objective, take(batch, torch.tensor([i]))) for i in range(rows_of(batch))]
        zero = {name: torch.zeros_like(p) for name, p in values.items()}  # an example need not reach every parameter
        return {name: torch.stack([row.get(name, zero[name]) for row in rows]) for name in parameters}
    return {name: _masked(case, name, grad) for name, grad in grads.items()}


class _Called(nn.Module):
    """A call of a model as a module without arguments, so that ``functional_call`` can swap the model's parameters."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module], Any]):
        super().__init__()
        self.model = model
        self._call = call

    def forward(self) -> Any:
        return self._call(self.model)


def along(model: nn.Module, step: Mapping[str, Tensor], call: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """(call(model), its derivative along `step` in the weights): J step, by forward differentiation, in one pass.

    The pass counts its rows once and costs about two; no graph is kept of it but the caller's own.

    Args:
        step: canonical name -> tensor of the parameter's shape and type; other parameters are held fixed.
        call: model -> a tensor, or a nest of floating tensors.

    Raises:
        RunFailed: where some operation of the model has no forward derivative.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named, standing = dict(model.named_parameters()), places(model)
    module = _Called(model, call)

    def at(moving: dict[str, Tensor]) -> Any:
        every = {f"model.{place}": moving.get(name, named[name]) for place, name in standing.items()}
        return torch.func.functional_call(module, every, (), tie_weights=False)

    try:
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.func.jvp(at, ({name: named[name] for name in step},), (dict(step),))
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and "autograd.Function" not in str(error):
            raise
        raise RunFailed(
            f"the model has an operation without a forward derivative, so that its outputs cannot be followed along a "
            f"change of its weights ({str(error).splitlines()[0][:120]}): use another method"
        ) from error
    return found[0], found[1]


def places(model: nn.Module) -> dict[str, str]:
    """Where each parameter stands -> its canonical name; tied ones have several places, a module used twice has one.

    Swapped by torch under both names of such a module, its parameters would not be put back.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owned = ((path, leaf, p) for path, module in model.named_modules() for leaf, p in module._parameters.items())
    return {f"{path}.{leaf}" if path else leaf: names[id(p)] for path, leaf, p in owned if p is not None}


def _masked(case: Case, name: str, grad: Tensor) -> Tensor:
    mask = case.scope.mask(name, grad[0])
    return grad if mask is None else grad * mask


@contextlib.contextmanager
def differentiable(case: Case, *, live: bool = False) -> Iterator[None]:
    """Set ``requires_grad`` to the scope and the mode to eval (or train, for live normalisation); restored after.

    Eval mode means: running statistics used, no dropout, nothing but the scope moves. Gradients that somebody left on
    the model (its training, a step that failed half-way) are dropped, or they would be added to the first one taken.
    """
    flags = [(p, p.requires_grad) for p in case.model.parameters()]
    modes = [(module, module.training) for module in case.model.modules()]
    parameters = {id(p) for p in case.scope.parameters(case.model).values()}
    if not parameters:
        raise Refused("the scope is empty: expected at least one trainable floating parameter; nothing could change")
    case.model.train(live)
    try:
        for parameter, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in parameters)
        yield
    finally:
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def borrowed(case: Case) -> Iterator[None]:
    """``differentiable`` for a model of the caller's: its buffers, and gradients that it came with, are put back too."""
    held = [(p, p.grad) for p in case.model.parameters()]
    try:
        with only_looked_at(case.model), differentiable(case):
            yield
    finally:
        for parameter, grad in held:
            parameter.grad = grad
