"""Forget in an adapter of few groups: the stage under GS-LoRA and GS-LoRA++ (arXiv:2403.11530, arXiv:2501.09705)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from expunge.bounded import After, Bounded, Weighing
from expunge.core import Case, Key, Objective
from expunge.descend import Descend
from expunge.group_lasso import GroupLasso, Kind, group_norms
from expunge.guard import Guard
from expunge.likeness import head_name
from expunge.objectives import NLL
from expunge.optim import AdamW, Cosine
from expunge.oracle import On
from expunge.prototypes import Answered, Seen, ToPrototype, prototypes
from expunge.wrap import LoRA, in_adapter

SELECTED = 1e-2
"""A group counts as selected whose norm is at least this share of the largest one."""


@dataclass(frozen=True)
class Prototypes:
    """Settings of the prototype losses: `bound` in nats and weight `away` of the forget data, weight `near` of the rest."""

    bound: float
    away: float
    near: float


@dataclass(frozen=True)
class ForgetInAdapter:
    """Train an adapter to raise the forget loss to a bound, under a group lasso, and merge it. See ``methods.gs_lora``.

    The history ends with the norm of each group and how many were selected. With steps 0 nothing is attached.

    Args:
        adapter: LoRA. by: what makes a group.
        beta: weight of the forget loss. bound: that it is raised to, in multiples of chance.
        sparsity: weight of the group lasso after the share `warmup` of the run.
        prototypes: None for GS-LoRA.
        lr, weight_decay: of AdamW, whose rate falls on a cosine. steps, batch, norm_stats: see ``Descend``.
    """

    adapter: LoRA
    by: Kind
    beta: float
    bound: float
    sparsity: float
    warmup: float
    lr: float
    weight_decay: float
    steps: int
    batch: int
    norm_stats: Any
    prototypes: Prototypes | None = None

    def __call__(self, case: Case) -> Case:
        if self.steps == 0:
            return replace(case, rng=case.rng.take()[1])
        return in_adapter(self.adapter, self._inside)(case)

    def _inside(self, case: Case) -> Case:
        key, rng = case.rng.take()
        done = self._plan(case, key)(replace(case, rng=rng))
        norms = group_norms(done, self.by)
        selected = sum(norm >= SELECTED * max(norms.values()) for norm in norms.values())
        row = {f"group/{name}": norm for name, norm in norms.items()}
        case.meter.history.append({**row, "groups": float(len(norms)), "groups_selected": float(selected)})
        return done

    def _plan(self, case: Case, key: Key) -> Descend:
        data = case.request.data("forget")
        chance = case.task.chance(data.batch(torch.arange(len(data))))
        bounds, weights = {"forget": self.bound * chance}, self._weights()
        forget: Objective = NLL()
        retain: Objective = NLL()
        others: dict[str, On] = {"groups": On(None, GroupLasso(self.by))} if self.sparsity > 0 else {}
        if self.prototypes is not None:
            with case.meter.checking():
                head = head_name(case)
            means = prototypes(case, head, self.batch, key.at("prototypes"))
            retain = ToPrototype(means, head, self.prototypes.near, nll=True)
            if self.prototypes.away > 0:
                forget = Answered(Seen(head))  # of the same pass as the distance
                others["away"] = On("forget", ToPrototype(means, head))
                weights["away"], bounds["away"] = self.prototypes.away, self.prototypes.bound
        return Descend(
            forget=forget,
            retain=retain,
            others=others,
            combine=Bounded(weights, bounds),
            optimizer=AdamW(self.lr, weight_decay=self.weight_decay),
            schedule=Cosine(),
            steps=self.steps,
            batch=self.batch,
            norm_stats=self.norm_stats,
            guard=Guard(),
        )

    def _weights(self) -> dict[str, Weighing]:
        weights: dict[str, Weighing] = {"forget": self.beta}
        return {**weights, "groups": After(self.warmup, self.sparsity)} if self.sparsity > 0 else weights


def patterns(targets: str | None) -> tuple[str, ...]:
    """Names or patterns of layers between commas; none for None."""
    return () if targets is None else tuple(part.strip() for part in targets.split(","))
