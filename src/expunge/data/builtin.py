"""Small data sets, each with a task, a network and a way to train it: three real ones of scikit-learn, one synthetic.

They are for the demo, the tests and quick benchmarks: a run takes seconds on a laptop, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from expunge.core import Data, Key
from expunge.data.real import REAL
from expunge.data.real_tables import REAL_TABLES
from expunge.data.real_text import REAL_TEXT
from expunge.data.recipe import Recipe, Suite, fresh, held_out, split_by_hash, train, train_counted, where
from expunge.data.sources import as_data
from expunge.registry import find

__all__ = [
    "SUITES",
    "Recipe",
    "Suite",
    "breast_cancer",
    "diabetes",
    "digits",
    "fresh",
    "held_out",
    "identities",
    "suite",
]
__all__ += ["train", "train_counted"]


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
    train, test = everything.select(where(~unseen)), everything.select(where(unseen))
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
    **REAL,
    **REAL_TABLES,
    **REAL_TEXT,
}
"""Name -> what builds it. Those of ``real``, ``real_tables`` and ``real_text`` look for their files when they are built, not before."""


def suite(name: str) -> Suite:
    """The built-in suite of that name.

    Raises:
        Refused: for an unknown name, with the nearest one.
    """
    return find("suite", name, SUITES)()


def _split(name: str, inputs: np.ndarray, target: np.ndarray) -> tuple[Data, Data]:
    return split_by_hash(name, as_data({"x": inputs.astype(np.float32), "y": target}))


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
