"""k-FPF (Zhao et al., ICML 2023) for unlearning: k times, forget and fine-tune only the modules that forgot most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from expunge.core import Case, Objective, Stage
from expunge.descend import Descend
from expunge.objectives import NLL, RandomLabel
from expunge.optim import Adam
from expunge.registry import AtLeastOne, Count, Positive, method
from expunge.scope import Scope

_ROUND = "(steps * {0}min(batch, n_forget) + repair_steps * min(batch, n_retain))"


@method(
    paper="arXiv:2304.04158",
    tasks=("classification", "regression"),
    needs={"forget", "retain"},
    dose="steps",
    reason="published for debiasing a classifier, not for forgetting; its rounds are held to torch's own Adam",
    cost={
        "forward": f"(steps > 0) * k * {_ROUND.format('(1 + relabel) * ')}",
        "backward": f"(steps > 0) * k * {_ROUND.format('')}",
    },
    departures={
        "setting": "the paper is on continual learning and forgets by accident, while it learns a new task; that forgetting "
        "is the task here, and the retain data the buffer, is ours",
        "modules": "those whose weights moved most in this round's steps, mean of |change|, a fixed number of them; the "
        "paper's own measure of the training dynamics, taken over whole tasks, could not be checked",
    },
)
def k_fpf(
    *,
    k: AtLeastOne = 2,
    modules: AtLeastOne = 2,
    forget: Objective = RandomLabel(),
    lr: Positive = 1e-3,
    steps: Count = 20,
    repair_lr: Positive = 1e-3,
    repair_steps: Count = 15,
    batch: AtLeastOne = 64,
    norm_stats: Literal["frozen", "live"] = "frozen",
) -> Stage:
    """Descend on the forget objective alone, then fine-tune on the retain data only the modules that moved most; k times.

    From the paper: that few modules change much between tasks, that fine-tuning only these on kept data repairs what was
    lost, and that doing so k times can take the place of keeping data in every step. Ours: the new task is to forget. It
    does not promise that the modules that moved are those that held the forget data, nor that the repair, which reads
    retain data alone, leaves them forgotten.

    Formula, k times: ``steps`` of Adam on the mean over D_f of `forget`, all of the scope; then ``repair_steps`` of Adam on
    the mean over D_r of NLL, on the `modules` with the largest mean |change of a weight| in the former.

    Args:
        k: rounds, >= 1.
        modules: that are fine-tuned, >= 1; all where there are fewer. A module is what owns weights directly.
        forget: per-example objective on the forget data. The declared cost is that of one that asks no model but this.
        lr: learning rate of Adam when forgetting, > 0.
        steps: dose, of forgetting in each round, >= 0; 0 changes nothing, and leaves nothing to repair.
        repair_lr: learning rate of Adam when fine-tuning, > 0.
        repair_steps: of fine-tuning in each round, >= 0.
        batch: examples per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
    """
    out = Descend(forget=forget, optimizer=Adam(lr), steps=steps, batch=batch, norm_stats=norm_stats)
    repair = Descend(retain=NLL(), optimizer=Adam(repair_lr), steps=repair_steps, batch=batch, norm_stats=norm_stats)

    def rounds(case: Case) -> Case:
        if steps == 0:
            return case
        outer = case.scope
        for _ in range(k):
            before = {name: p.detach().clone() for name, p in outer.parameters(case.model).items()}
            case = out(case)
            case = replace(repair(replace(case, scope=most_moved(case.model, outer, before, modules))), scope=outer)
        return case

    return rounds


def most_moved(model: nn.Module, scope: Scope, before: Mapping[str, Tensor], count: int) -> Scope:
    """The part of the scope in the `count` modules with the largest mean |weight - before| over coordinates in scope.

    Of equal ones the earlier module.
    """
    moved: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for name, parameter in scope.parameters(model).items():
        owner = name.rpartition(".")[0]
        mask = scope.mask(name, parameter)
        change = (parameter.detach() - before[name]).abs().double()
        change = change.flatten() if mask is None else change[mask]
        moved[owner] = moved.get(owner, 0.0) + float(change.sum())
        sizes[owner] = sizes.get(owner, 0) + change.numel()
    ranked = sorted(moved, key=lambda owner: -moved[owner] / max(1, sizes[owner]))
    chosen = set(ranked[:count])
    inside = {name: mask for name, mask in scope.masks.items() if name.rpartition(".")[0] in chosen}
    return Scope(inside, scope.universe)
