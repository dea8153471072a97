"""Small data sets, each with a task, a network and a way to train it: three real ones of scikit-learn, one synthetic.

They are for the demo, the tests and quick benchmarks: a run takes seconds on a laptop, and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core import Case, Data, Key, Request, Task
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import SGD, AdamW, Cosine, Optimizer
from expunge.registry import find
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


def digits() -> Suite:
    """1,797 handwritten digits of 8 x 8 pixels in 10 classes, and a convolutional network without BatchNorm."""
    from sklearn.datasets import load_digits

    from expunge.tasks.classification import Classification

    images, labels = load_digits(return_X_y=True)
    inputs = images.reshape(-1, 1, 8, 8).astype(np.float32) / 16.0
    train, test = _split("digits", inputs, labels.astype(np.int64))
    return Suite("digits", train, test, Classification(10), _convolutional, Recipe(epochs=40))


def breast_cancer() -> Suite:
    """569 tumours, 30 measurements each, benign or malignant; a two-layer network."""
    from sklearn.datasets import load_breast_cancer

    from expunge.tasks.classification import Classification

    inputs, labels = load_breast_cancer(return_X_y=True)
    train, test = _split("breast_cancer", _standard("breast_cancer", inputs), labels.astype(np.int64))
    return Suite("breast_cancer", train, test, Classification(2), lambda: _dense(30, 32, 2), Recipe(lr=0.02))


def diabetes() -> Suite:
    """442 patients, 10 measurements each, the standardised progression of diabetes in a year; a two-layer network."""
    from sklearn.datasets import load_diabetes

    from expunge.tasks.regression import Regression

    inputs, target = load_diabetes(return_X_y=True)
    train, test = _split("diabetes", _standard("diabetes", inputs), _standard("diabetes", target[:, None])[:, 0])
    return Suite("diabetes", train, test, Regression(), lambda: _dense(10, 32, 1), Recipe(lr=0.01))


PEOPLE, UNSEEN_PEOPLE, PICTURES, AGES, SIDE = 60, 40, 12, 4, 12


def identities() -> Suite:
    """Synthetic pictures of 100 people in four age groups, nobody in both train and test; a two-layer network. Not real.

    A picture is a smooth pattern of the person's own, a fainter one of the age group, and noise. The person's age group
    can be learnt by heart, which is what forgetting the person must undo. Column ``identity`` names the person.
    """
    from expunge.tasks.classification import Classification

    rng = np.random.Generator(np.random.PCG64(Key(0).at("identities").seed))
    people = PEOPLE + UNSEEN_PEOPLE
    own, groups = _smooth(rng, people), _smooth(rng, AGES)
    person = np.repeat(np.arange(people), PICTURES)
    age = person % AGES
    noise = rng.normal(0, 0.5, (len(person), SIDE, SIDE))
    pictures = (own[person] + 0.6 * groups[age] + noise)[:, None].astype(np.float32)
    everything = as_data({"x": pictures, "y": age, "identity": person})
    unseen = torch.from_numpy(person >= PEOPLE)
    train, test = everything.select(_where(~unseen)), everything.select(_where(unseen))
    return Suite("identities", train, test, Classification(AGES), _flat, Recipe(epochs=20, lr=0.02))


def _smooth(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, SIDE, SIDE] sums of the lowest cosines, each with mean square 1."""
    waves = np.cos(np.pi * np.arange(4)[:, None] * (np.arange(SIDE) + 0.5) / SIDE)
    fields = np.einsum("nab,ah,bw->nhw", rng.normal(size=(count, 4, 4)), waves, waves)
    return fields / np.sqrt(np.square(fields).mean((1, 2), keepdims=True))


SUITES: dict[str, Callable[[], Suite]] = {
    "breast_cancer": breast_cancer,
    "diabetes": diabetes,
    "digits": digits,
    "identities": identities,
}


def suite(name: str) -> Suite:
    """The built-in suite of that name.

    Raises:
        Refused: for an unknown name, with the nearest one.
    """
    return find("suite", name, SUITES)()


def held_out(name: str, rows: int) -> np.ndarray:
    """[rows] bool, about a fifth True: a row is in the test set by a hash of its number, so it stays there for ever."""
    picked = [hashlib.blake2b(f"{name}:{row}".encode(), digest_size=4).digest()[0] % 5 == 0 for row in range(rows)]
    return np.array(picked)


def _split(name: str, inputs: np.ndarray, target: np.ndarray) -> tuple[Data, Data]:
    everything = as_data({"x": inputs.astype(np.float32), "y": target})
    test = torch.from_numpy(held_out(name, len(everything)))
    return everything.select(_where(~test)), everything.select(_where(test))


def _where(mask: Tensor) -> Tensor:
    return torch.nonzero(mask).flatten()


def _standard(name: str, values: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and variance 1 over the training rows."""
    known = values[~held_out(name, len(values))]
    return (values - known.mean(0)) / known.std(0)


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), *_dense(SIDE * SIDE, 64, AGES))


def _dense(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
