"""The one gradient loop: Objective x Combiner x Optimizer x Schedule, inside the Case's Scope."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from expunge import guard as guards
from expunge import runtime
from expunge.combine import Weighted
from expunge.compose import clock_of
from expunge.core import Case, Combiner, Key, Objective, Refused, lent_stream, require
from expunge.guard import Guard
from expunge.meter import peak_bytes
from expunge.optim import SGD, Constant, Optimizer, Schedule
from expunge.oracle import Diverged, Draws, On, Oracle, differentiable
from expunge.predict import predict, shown
from expunge.progress import progress, say
from expunge.scope import Guarded


@dataclass(frozen=True)
class Descend:
    """Descend on objectives of forget data, retain data and others, and return the Case with its model changed.

    The update does not depend, to rounding, on how a batch is cut into pieces or spread over processes. Nothing out
    of scope moves, to the bit, whatever the optimizer. Recorded per step: each loss, gradient norms and cosine where
    the combiner has them, every `watch` steps the realised against the predicted change of the retain loss, and what
    ``unlearn(watch=Watch(...))`` asks for.

    It does not promise that anything was forgotten, nor that the retain loss falls: that is for the audit.

    Args:
        forget, retain: the objectives on the request's forget and retain data.
        others: further roles: name -> objective (on the request's data of that name) or ``On(source, objective)``.
        combine: how the roles' gradients make one update.
        optimizer, schedule: settings, from ``optim``.
        steps, epochs: exactly one of them; an epoch is one pass over the data of the first role.
        batch: examples per role and step, or role -> number. A source smaller than that is taken whole.
        accumulate: pieces that each role's batch is cut into, to save memory; of like length, where examples have one.
        order: "shuffled", or "bucketed": batches of examples of like length, in a drawn order, so that less is padding.
            That changes which examples meet in a batch, and so the result: no batch is a random one any more.
        norm_stats: "frozen": eval mode, running statistics used, no dropout, nothing moves but the scope. "live": train
            mode, as many authors do; not with ``accumulate > 1``, since a loss would then depend on the cut.
        guard: stop when the retain loss leaves its bound; None never stops.
        watch: realised change of the retain loss every so many steps (0: never); one retain forward each time.

    Raises:
        Refused: for settings that cannot work, before the first step.
        Diverged: when a loss stops being finite and no guard kept a good state.
    """

    forget: Objective | None = None
    retain: Objective | None = None
    others: Mapping[str, Objective | On] = field(default_factory=dict)
    combine: Combiner = field(default_factory=Weighted)
    optimizer: Optimizer = field(default_factory=SGD)
    schedule: Schedule = field(default_factory=Constant)
    steps: int | None = None
    epochs: float | None = None
    batch: int | Mapping[str, int] = 64
    accumulate: int = 1
    order: Literal["shuffled", "bucketed"] = "shuffled"
    norm_stats: Literal["frozen", "live"] = "frozen"
    guard: Guard | None = None
    watch: int = 0

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        roles = self.roles()
        steps = self.count(case, roles)
        if steps > 0:
            runtime.reshard(case.model)
            with _opened(case, self.norm_stats == "live"):
                _Run(self, case, roles, steps, key).go()
        return replace(case, rng=rng)

    def roles(self) -> dict[str, On]:
        """role -> On(source, objective)."""
        named = {"forget": self.forget, "retain": self.retain}
        roles = {name: On(name, objective) for name, objective in named.items() if objective is not None}
        for name, other in self.others.items():
            if isinstance(other, On):
                roles[name] = other
            else:
                roles[name] = On(None if getattr(other, "parameters_only", False) else name, other)
        return roles

    def count(self, case: Case, roles: Mapping[str, On]) -> int:
        """How many steps there will be; refuses settings that cannot work."""
        if not roles:
            raise Refused("Descend has no objective: give forget=, retain= or others=")
        self._check(roles)
        if (self.steps is None) == (self.epochs is None):
            raise Refused(
                f"Descend needs exactly one of steps and epochs, found steps={self.steps}, epochs={self.epochs}"
            )
        if max(self.accumulate, case.pieces) > 1 and self.norm_stats == "live":
            raise Refused(
                "accumulate > 1 (or a run in pieces) with norm_stats='live' is refused: batch statistics would depend on how "
                "a batch is cut; use norm_stats='frozen' or one piece"
            )
        if runtime.world() > 1 and self.norm_stats == "live":
            raise Refused(
                "norm_stats='live' with several processes is refused: each would see the batch statistics of its own "
                "rows; use norm_stats='frozen'"
            )
        for role, on in roles.items():
            alone = on.source is not None and min(self.size(role), len(case.request.data(on.source))) == 1
            if alone and self.norm_stats == "live" and any(isinstance(m, _BatchNorm) for m in case.model.modules()):
                raise Refused(
                    f"norm_stats='live' with one example per batch (role {role!r}) is refused: BatchNorm has no "
                    f"statistics of one example; use a larger batch or norm_stats='frozen'"
                )
        if self.steps is not None:
            return self.steps
        reading = [(role, on.source) for role, on in roles.items() if on.source is not None]
        if not reading:
            raise Refused("epochs needs a role that reads data; give steps= instead")
        first, source = reading[0]
        size = len(case.request.data(source))
        return math.ceil((self.epochs or 0) * math.ceil(size / min(size, self.size(first))))

    def _check(self, roles: Mapping[str, On]) -> None:
        """Refuse parts that are not what they should be, and numbers out of range."""
        made = {
            **{f"the objective of role {role!r}": on.objective for role, on in roles.items()},
            "combine": self.combine,
        }
        for what, part in made.items():
            if isinstance(part, type) or not (callable(part) or what == "combine"):
                found = (
                    f"the class {part.__name__}, give an instance: {part.__name__}()"
                    if isinstance(part, type)
                    else repr(part)
                )
                raise Refused(
                    f"Descend: {what} is {found}; expected one of expunge.{'combine' if what == 'combine' else 'objectives'}"
                )
        require(self.norm_stats in ("frozen", "live"), self, "norm_stats", "'frozen' or 'live'")
        require(self.order in ("shuffled", "bucketed"), self, "order", "'shuffled' or 'bucketed'")
        named = self.batch if isinstance(self.batch, Mapping) else {}
        for role in named:
            if role not in roles:
                raise Refused(f"Descend: batch names role {role!r}: expected one of {', '.join(roles)}")
        sizes = {f"batch of role {role!r}": self.size(role) for role in roles}
        for what, value, least in (
            *((name, size, 1) for name, size in sizes.items()),
            ("accumulate", self.accumulate, 1),
            ("steps", self.steps or 0, 0),
            ("epochs", self.epochs or 0, 0),
            ("watch", self.watch, 0),
        ):
            if not value >= least:
                raise Refused(f"Descend: {what} must be at least {least}, found {value!r}")

    def size(self, role: str) -> int:
        """Examples per step of a role."""
        return self.batch if isinstance(self.batch, int) else self.batch.get(role, 64)


@contextlib.contextmanager
def _opened(case: Case, live: bool) -> Any:
    """The scope differentiable, everything that may be called watched by the meter."""
    modules = [t for t in case.teachers.values() if isinstance(t, nn.Module)]
    with differentiable(case, live=live), case.meter.watch(case.model, *modules):
        yield


def _lengths(case: Case, roles: Mapping[str, On]) -> dict[str, Tensor]:
    """source -> [n] lengths of its examples."""
    find = getattr(case.task, "lengths", None)
    if find is None:
        raise Refused(f"order='bucketed' needs examples with a length, which task {case.task.name!r} does not have")
    sources = {on.source for on in roles.values() if on.source is not None}
    return {name: torch.cat([find(batch) for batch in case.request.data(name).batches(256)]) for name in sources}


class _Run:
    """One execution of a Descend: what changes from step to step lives here, and in the checkpoint."""

    def __init__(self, plan: Descend, case: Case, roles: Mapping[str, On], steps: int, key: Key):
        self.plan, self.case, self.roles, self.steps, self.key = plan, case, roles, steps, key
        self.scope = Guarded(case.scope, case.model)
        self.named = dict(case.model.named_parameters())
        self.optimizer = plan.optimizer.build(self.scope.parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.state = plan.combine.init()
        self.sizes = {role: plan.size(role) for role in roles}
        self.lengths = _lengths(case, roles) if plan.order == "bucketed" else {}
        self.watched = guards.Sentry(plan.guard, case, key, steps, self._rows()) if plan.guard is not None else None
        self.predicted: dict[str, Any] | None = None
        self.step = 0

    def _rows(self) -> int:
        """Examples that a step differentiates, each role counted once."""
        sources = {role: on.source for role, on in self.roles.items() if on.source is not None}
        return sum(min(self.sizes[role], len(self.case.request.data(name))) for role, name in sources.items())

    @property
    def _live(self) -> bool:
        return self.plan.norm_stats == "live"

    def go(self) -> None:
        checkpoint = self.case.journal.enter(self.plan) if self.case.journal is not None else None
        if checkpoint is not None and self.watched is not None and guards.bytes_of(self._changing()) > guards.SPILL:
            self.watched.kept = guards.Kept(checkpoint.path.with_name(f"kept-{checkpoint.path.name}"))
        if checkpoint is not None and (saved := checkpoint.load()) is not None:
            self._restore(saved)
        else:
            if self.watched is not None:
                self.watched.begin(self._changing())
            self._predict()
        first, begun = self.step, time.perf_counter()
        with progress("unlearning", self.steps) as show:
            while self.step < self.steps:
                if not self._advance():
                    break
                show(self.step)
                if checkpoint is not None and self.step < self.steps:
                    checkpoint.tick(self._checkpoint)
        self._compare(begun, first)
        if not runtime.finite(self.scope.parameters):
            self._fall_back(f"weights stopped being finite by step {self.step}")

    def _predict(self) -> None:
        """Where the run asks for it: what the loop will take, from the gradients of its first step, which are dropped."""
        meter, model = self.case.meter, self.case.model
        if meter.predicted is None:
            return
        teachers = (t for t in self.case.teachers.values() if isinstance(t, nn.Module))
        buffers = {name: b.clone() for name, b in model.named_buffers()} if self._live else {}

        def probe() -> None:
            oracle = self._oracle()
            with self._noise():
                self.plan.combine.combine(oracle, self.plan.combine.init())

        with meter.checking(), contextlib.suppress(Diverged):  # the first step will say so, and a guard may help
            found = predict(self.steps, [model, *teachers], self.scope.parameters, self.plan.optimizer.build, probe)
            self.predicted = found.describe()
            meter.predicted.append(self.predicted)
            say(found.sentence())
        for name, value in buffers.items():
            model.get_buffer(name).copy_(value)

    def _compare(self, begun: float, first: int) -> None:
        """Put what the loop took beside what it was expected to take."""
        if self.predicted is not None and self.step > first:
            seconds, peak = (time.perf_counter() - begun) / (self.step - first), peak_bytes()
            self.predicted["measured"] = {"step_seconds": seconds, "peak_bytes": peak}
            say(f"measured: peak memory {shown(peak)}, {seconds:.3g} s a step, checks included")

    def _advance(self) -> bool:
        """One step; False when the guard stopped the run."""
        try:
            self._step()
        except Diverged as error:
            self._fall_back(str(error))
            return False
        self.step += 1
        if self.watched is not None and self.watched.due(self.step):
            sentence = self.watched.check(self.step, self._changing())
            if sentence is not None:
                self._put_back(self.watched.kept.read())
                self.case.meter.note(sentence)
                return False
        return True

    def _oracle(self) -> Oracle:
        """What the combiner asks at this step, at this step's learning rate."""
        share = self.step / self.steps
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.plan.schedule.factor(share)
        clock = clock_of(self.plan.combine)
        draws = Draws(self.case, self.roles, self.key, self.step, self.sizes, clock, self.lengths)
        return Oracle(
            self.case,
            self.roles,
            draws,
            accumulate=max(self.plan.accumulate, self.case.pieces),
            step=self.step,
            progress=share,
            lr=self.optimizer.param_groups[0]["lr"],
            named=self.named,
        )

    def _step(self) -> None:
        oracle = self._oracle()
        with self._noise():
            grads, self.state = self.plan.combine.combine(oracle, self.state)
        for name, parameter in self.scope.parameters.items():
            parameter.grad = grads.get(name)
        del grads
        self.optimizer.step()
        for parameter in self.scope.parameters.values():
            parameter.grad = None
        self.scope.restore()
        after = oracle.again()
        settle = getattr(self.plan.combine, "settle", None)
        if settle is not None:
            with self._noise():
                self.state = settle(after, self.state)
        self._record(oracle, after)

    def _noise(self) -> contextlib.AbstractContextManager[None]:
        """What the model draws by itself is a function of the step, so that a resumed run draws the same."""
        return lent_stream(self.key.at("noise", self.step))

    def _record(self, oracle: Oracle, after: Oracle) -> None:
        row = {"step": float(self.step), "lr": oracle.lr}
        row.update({f"loss/{role}": value for role, value in oracle.losses.known.items()})
        row.update(oracle.report)
        if "retain" in oracle.losses.known:
            if self.plan.watch and self.step % self.plan.watch == 0 and "retain" not in after.losses.known:
                buffers = {name: b.clone() for name, b in self.case.model.named_buffers()} if self._live else {}
                with self.case.meter.checking(), self._noise():
                    _ = after.losses["retain"]
                for name, b in self.case.model.named_buffers():  # a look at live normalisation must not move it
                    if name in buffers:
                        b.copy_(buffers[name])
            if "retain" in after.losses.known:
                row["retain_realised"] = after.losses.known["retain"] - oracle.losses.known["retain"]
                if "retain_slope" in row:
                    row["retain_predicted"] = -oracle.lr * row["retain_slope"]
        history = self.case.meter.history
        if self.case.watch is not None and self.case.watch.due(len(history) + 1):
            row.update(self.case.watch.look(self.case))
        history.append(row)

    def _fall_back(self, reason: str) -> None:
        if self.watched is None or self.watched.data is None:
            why = "this stage has no guard" if self.watched is None else "there was no data for the guard to watch"
            raise Diverged(f"{reason}; nothing was kept, because {why}")
        self._put_back(self.watched.kept.read())
        self.case.meter.note(
            f"stopped at step {self.step} of {self.steps}: {reason}; the state of step "
            f"{self.watched.kept_step} was kept"
        )

    def _changing(self) -> dict[str, Tensor]:
        """What this stage can change, itself, no copy: parameters in scope, and buffers where normalisation is live."""
        found = {f"p/{name}": p.detach() for name, p in self.scope.parameters.items()}
        if self._live:
            found.update({f"b/{name}": b.detach() for name, b in self.case.model.named_buffers()})
        return found

    def _put_back(self, kept: Mapping[str, Tensor]) -> None:
        buffers = dict(self.case.model.named_buffers())
        with torch.no_grad():
            for name, value in kept.items():
                target = self.scope.parameters[name[2:]] if name[0] == "p" else buffers[name[2:]]
                target.copy_(value)

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weights": self._changing(),
            "optimizer": self.optimizer.state_dict(),
            "combiner": self.state,
            "meter": self.case.meter.state(),
            "guard": None if self.watched is None else self.watched.state(),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.step = saved["step"]
        self._put_back(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["combiner"]
        self.case.meter.load(saved["meter"])
        if self.watched is not None:
            self.watched.load(saved["guard"])
