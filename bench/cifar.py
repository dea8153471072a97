"""CIFAR-10 from lossless tiles, for benchmarks: the folder that EXPUNGE_DATA names holds cifar10/."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torch import nn

import expunge as ex

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def folder() -> Path | None:
    """Where the data is; None where it is not."""
    given = os.environ.get("EXPUNGE_DATA")
    found = None if given is None else Path(given) / "cifar10"
    return found if found is not None and (found / "labels.npz").is_file() else None


def load(train: int = 10_000, test: int = 10_000) -> tuple[ex.Data, ex.Data]:
    """The first `train` training and `test` test images, normalised, with labels; at most 10,000 of each."""
    where = folder()
    if where is None:
        raise SystemExit("EXPUNGE_DATA does not name a folder that holds cifar10/: this benchmark cannot run")
    with np.load(where / "labels.npz", allow_pickle=False) as file:
        labels = {name: file[name] for name in file.files}
    kinds = {kind: next(v for k, v in labels.items() if kind in k) for kind in ("train", "test")}
    return (
        _data(where / "train_00000_09999.webp", kinds["train"], train, 0),
        _data(where / "test_00000_09999.webp", kinds["test"], test, 1_000_000),
    )


def _data(path: Path, labels: np.ndarray, count: int, first: int) -> ex.Data:
    from PIL import Image

    tiles = np.asarray(Image.open(path).convert("RGB")).reshape(100, 32, 100, 32, 3)
    images = tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)[:count].astype(np.float32) / 255
    x = (images - np.array(MEAN, np.float32)[:, None, None]) / np.array(DEVIATION, np.float32)[:, None, None]
    return ex.as_data((x, labels[:count].astype(np.int64)), ids=range(first, first + count))


def network(width: int = 16) -> nn.Module:
    """A small convolutional network without BatchNorm: 64,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * width, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
