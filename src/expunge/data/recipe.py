"""A suite: data, task, network, and the recipe that the network is trained by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core import Case, Data, Key, Request, Task
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import SGD, AdamW, Cosine, Optimizer
from expunge.scope import Scope


@dataclass(frozen=True)
class Recipe:
    """How a network is trained from the weights that `make` gives it, on the NLL, with a cosine schedule.

    Args:
        epochs: passes over the data, >= 0; 0 leaves the first weights.
        lr, momentum, weight_decay: of SGD; AdamW has no such momentum.
        batch: examples per step, >= 1.
        optimizer: "sgd", or "adamw", which language models are fine-tuned with.
    """

    epochs: float = 20
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"


@dataclass(frozen=True)
class Suite:
    """Data, task, network and recipe: all that a comparison of methods needs.

    Attributes:
        name: registry name.
        train, test: the fixed split; ids are the rows of the original data set.
        task: the modality.
        make: a fresh network. It draws from torch's global random state: call it through ``fit`` or ``fresh``.
        recipe: how that network is trained.
    """

    name: str
    train: Data
    test: Data
    task: Task
    make: Callable[[], nn.Module] = field(repr=False)
    recipe: Recipe

    def fit(self, data: Data | None = None, seed: int = 0) -> nn.Module:
        """A network trained on `data` (default: the training set), from fresh weights."""
        return train_counted(self.make, self.train if data is None else data, self.task, seed, self.recipe)[0]


def _optimizer(recipe: Recipe) -> Optimizer:
    if recipe.optimizer == "adamw":
        return AdamW(recipe.lr, weight_decay=recipe.weight_decay)
    return SGD(recipe.lr, recipe.momentum, recipe.weight_decay)


def fresh(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `make` builds when the global random state is at `seed`; that state is given back as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(Key(seed).at("fresh").seed)
        return make()


def train(
    make: Callable[[], nn.Module],
    data: Data,
    task: Task,
    seed: int = 0,
    *,
    epochs: float = 20,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch: int = 64,
) -> nn.Module:
    """Train a fresh network: ``Descend(retain=NLL())`` on all its parameters, in train mode.

    The same arguments give the same bits on the same machine; the global random state is untouched. It does not promise
    that the recipe suits the network: look at the accuracy.

    Args:
        make: builds the network, drawing from the global random state.
        data: what to learn.
        task: the modality.
        seed: of the weights and of every batch.
        epochs, lr, momentum, weight_decay, batch: see ``Recipe``.
    """
    return train_counted(make, data, task, seed, Recipe(epochs, lr, momentum, weight_decay, batch))[0]


def train_counted(
    make: Callable[[], nn.Module], data: Data, task: Task, seed: int, recipe: Recipe
) -> tuple[nn.Module, dict[str, float]]:
    """As ``train``, and what it cost: ``seconds``, and rows ``forward`` and ``backward``."""
    model = fresh(make, seed)
    case = Case(model, Request(retain=data), task, Scope.all(model), rng=Key(seed).at("train"))
    stage = Descend(
        retain=NLL(),
        optimizer=_optimizer(recipe),
        schedule=Cosine(warmup=0.05),
        epochs=recipe.epochs,
        batch=recipe.batch,
        norm_stats="live",
    )
    with case.meter.timed():
        stage(case)
    return model.eval(), {name: getattr(case.meter, name) for name in ("seconds", "forward", "backward")}


def held_out(name: str, rows: int) -> np.ndarray:
    """[rows] bool, about a fifth True: a row is in the test set by a hash of its number, so it stays there for ever."""
    picked = [hashlib.blake2b(f"{name}:{row}".encode(), digest_size=4).digest()[0] % 5 == 0 for row in range(rows)]
    return np.array(picked)


def where(mask: Tensor) -> Tensor:
    """int64 positions of the True ones of a mask [n]."""
    return torch.nonzero(mask).flatten()


def split_by_hash(name: str, everything: Data) -> tuple[Data, Data]:
    """Train and test: the rows that ``held_out`` says are the test set."""
    test = torch.from_numpy(held_out(name, len(everything)))
    return everything.select(where(~test)), everything.select(where(test))
