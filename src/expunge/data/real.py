"""Suites on real pictures, from files that a user has in the folder that EXPUNGE_DATA names: nothing is downloaded.

A suite reads its files when it is built, not before, and is refused with one sentence where they are absent.
Accuracies and times in the docstrings are approximate: one seed, one thread of a server's processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from expunge.core import Data, Refused
from expunge.data.files import read_images, read_npz
from expunge.data.formats import data_file, data_folder, read_cifar, read_mnist, read_tiles
from expunge.data.networks import ResNet, small_network
from expunge.data.recipe import Recipe, Suite
from expunge.data.sources import as_data, collect
from expunge.tasks.classification import Classification

FIRST_TEST_ID = 1_000_000
"""Ids of test pictures begin here, so that no test id is a training id."""
PART = 10_000
"""Training pictures of a suite that does not take them all: the first ones."""
FASHION_STATISTICS = ((0.2860,), (0.3530,))
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of each channel, of pixels in [0, 1]."""
Statistics = tuple[Sequence[float], Sequence[float]]

FASHION, CIFAR10, CIFAR100, FACES = (
    "the data set Fashion-MNIST (four idx files such as train-images-idx3-ubyte.gz)",
    "the data set CIFAR-10 (binary version: data_batch_1.bin to data_batch_5.bin and test_batch.bin)",
    "the data set CIFAR-100 (binary version: train.bin and test.bin)",
    "the AT&T (ORL) faces (folders s1 to s40, or att_faces_40x10.npz)",
)
FASHION_RECIPE = Recipe(epochs=15, lr=0.1, batch=128)
GROUPS = (0, 1, 0, 1, 0, 2, 0, 2, 3, 2)
"""Fashion-MNIST's ten classes -> upper body, trousers and dresses, shoes, bags."""


def fashion_mnist() -> Suite:
    """The first 10,000 training pictures of Fashion-MNIST, all 10,000 test pictures; a network without BatchNorm.

    Accuracy 89.0 % on the test set and 97.0 % on the training set, in 30 seconds.
    """
    train, test = _fashion(PART)
    return Suite("fashion_mnist", train, test, Classification(10), _fashion_network(10), FASHION_RECIPE)


def fashion_mnist_full() -> Suite:
    """All 60,000 training pictures of Fashion-MNIST, 10,000 test pictures; a network without BatchNorm.

    Accuracy 91.3 % on the test set and 93.9 % on the training set, in 55 seconds.
    """
    train, test = _fashion(None)
    recipe = Recipe(epochs=5, lr=0.1, batch=128)
    return Suite("fashion_mnist_full", train, test, Classification(10), _fashion_network(10), recipe)


def fashion_mnist_coarse() -> Suite:
    """As ``fashion_mnist``, four groups of clothes as labels; column ``fine`` holds the class, so ``fine == 5`` is one.

    Groups: upper body, trousers and dresses, shoes, bags. Accuracy 97.2 % on the test set, in 30 seconds.
    """
    train, test = _fashion(PART, groups=True)
    return Suite("fashion_mnist_coarse", train, test, Classification(4), _fashion_network(4), FASHION_RECIPE)


def _fashion_network(classes: int) -> Callable[[], torch.nn.Module]:
    return partial(small_network, channels=1, side=28, classes=classes, stages=2)


def _fashion(count: int | None, groups: bool = False) -> tuple[Data, Data]:
    folder = data_folder("fashion_mnist", FASHION)
    train, test = (read_mnist(folder, part, "Fashion-MNIST") for part in ("train", "test"))
    for _, labels in (train, test):
        if int(labels.max()) > 9:
            raise Refused(f"{folder} has a label {int(labels.max())}, expected 0 to 9: get {FASHION}")
    return _fashion_data(*train, 0, count, groups), _fashion_data(*test, FIRST_TEST_ID, None, groups)


def _fashion_data(images: np.ndarray, labels: np.ndarray, first: int, count: int | None, groups: bool) -> Data:
    x, y = _normal(images[:count, None], FASHION_STATISTICS), labels[:count]
    columns = {"x": x, "y": np.array(GROUPS)[y], "fine": y} if groups else {"x": x, "y": y}
    return as_data(columns, ids=range(first, first + len(y)))


def cifar10() -> Suite:
    """The first 10,000 training pictures of CIFAR-10, all 10,000 test pictures; a small network without BatchNorm.

    Accuracy 61.4 % on the test set and 90.3 % on the training set, in 45 seconds.
    """
    parts = cifar10_data()
    return Suite("cifar10", *parts, Classification(10), small_network, Recipe(epochs=12, lr=0.05))


def cifar10_resnet20() -> Suite:
    """The pictures of ``cifar10`` in ImageNet's normalisation, and ResNet-20 from fresh weights.

    Accuracy 66 % on the test set and 84 % on the training set (two seeds), in six minutes. ``networks.pretrained_resnet20``
    loads the weights that are published for the network, which all 50,000 pictures trained.
    """
    parts = cifar10_data(statistics=IMAGENET_STATISTICS)
    recipe = Recipe(epochs=8, lr=0.1, batch=64)
    return Suite("cifar10_resnet20", *parts, Classification(10), ResNet, recipe)


def cifar10_data(train: int = PART, test: int = PART, statistics: Statistics = CIFAR_STATISTICS) -> tuple[Data, Data]:
    """The first `train` training and `test` test pictures of CIFAR-10, normalised, with labels.

    The folder ``cifar10`` holds the binary version; or lossless tiles, ``labels.npz`` beside
    ``train_00000_09999.webp`` and ``test_00000_09999.webp``; or image folders ``train`` and ``test`` of one subfolder per
    class. The first two give the same pictures, ids and order; image folders order them by class.

    Raises:
        Refused: for files that are absent or damaged, or fewer pictures than asked for.
    """
    folder = data_folder("cifar10", CIFAR10)
    return (
        _cifar10_part(folder, "train", train, 0, statistics),
        _cifar10_part(folder, "test", test, FIRST_TEST_ID, statistics),
    )


def _cifar10_part(folder: Path, part: str, count: int, first: int, statistics: Statistics) -> Data:
    if (folder / "labels.npz").is_file():
        images, labels = _tiles(folder, part)
    elif (folder / part).is_dir():
        images, labels = _folder(folder / part)
    else:
        names = [f"data_batch_{number}.bin" for number in range(1, 6)] if part == "train" else ["test_batch.bin"]
        images, labels = _binary(folder, "cifar-10-batches-bin", names[: max(1, -(-count // 10_000))], 1, CIFAR10)
        labels = labels[:, 0]
    if len(images) < count:
        raise Refused(f"{folder} has {len(images):,} {part} pictures, expected at least {count:,}: get {CIFAR10}")
    x = _normal(images[:count], statistics)
    return as_data({"x": x, "y": labels[:count]}, ids=range(first, first + count))


def _tiles(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_npz(folder / "labels.npz")
    if f"y_{part}" not in arrays:
        raise Refused(f"{folder / 'labels.npz'} has no array y_{part}: it has {', '.join(arrays)}")
    labels = np.asarray(arrays[f"y_{part}"]).astype(np.int64)
    images = read_tiles(data_file(folder, [f"{part}_00000_09999.{kind}" for kind in ("webp", "png")], CIFAR10))
    if labels.ndim != 1 or len(labels) < len(images):
        raise Refused(f"{folder} has {len(images)} {part} tiles and labels of shape {labels.shape}: expected one each")
    return images, labels[: len(images)]


def _folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    batch = collect(read_images(folder).data)
    return (batch["x"] * 255).round().to(torch.uint8).numpy(), batch["y"].numpy()


def _binary(folder: Path, inner: str, names: list[str], labels: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    where = folder / inner if (folder / inner).is_dir() else folder
    if not (where / names[0]).is_file() and list(folder.glob("**/*batch*")) + list(folder.glob("**/meta")):
        raise Refused(f"{folder} holds the pickled version, which could run code: get {what}")
    parts = [read_cifar(data_file(where, [name], what), labels) for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([found for _, found in parts])


def cifar100() -> Suite:
    """The first 10,000 training pictures of CIFAR-100, all test pictures; ``coarse`` holds the superclass of each.

    The recipe is that of ``cifar10``, with more epochs; its accuracy was not measured here.
    """
    folder = data_folder("cifar100", CIFAR100)
    train, test = (_cifar100_part(folder, part, first) for part, first in (("train", 0), ("test", FIRST_TEST_ID)))
    return Suite(
        "cifar100", train, test, Classification(100), partial(small_network, classes=100), Recipe(epochs=15, lr=0.05)
    )


def _cifar100_part(folder: Path, part: str, first: int) -> Data:
    images, names = _binary(folder, "cifar-100-binary", [f"{part}.bin"], 2, CIFAR100)
    x, coarse, fine = _normal(images[:PART], CIFAR100_STATISTICS), *names[:PART].T
    return as_data({"x": x, "y": fine.copy(), "coarse": coarse.copy()}, ids=range(first, first + len(x)))


def faces() -> Suite:
    """400 pictures of 40 people (AT&T), 28 x 23 pixels, 8 for training and 2 for testing of each; the label is who it is.

    Accuracy 96 % on the 80 test pictures, in 3 seconds. Column ``identity`` is the label as well. The npz file and the
    folders may not order a person's pictures alike, so that other ones may be held out.
    """
    images, person = _faces(data_folder("faces", FACES))
    small = images.reshape(len(images), 28, 4, 23, 4).mean((2, 4), dtype=np.float32)[:, None]
    order = np.array([int((person[:row] == person[row]).sum()) for row in range(len(person))])
    everything = as_data({"x": small / np.float32(64) - 2, "y": person, "identity": person})
    train, test = (everything.select(torch.from_numpy(np.flatnonzero(keep))) for keep in (order < 8, order >= 8))
    return Suite("faces", train, test, Classification(40), _faces_network, Recipe(epochs=40, lr=0.02, batch=32))


def _faces_network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(28 * 23, 64), torch.nn.ReLU(), torch.nn.Linear(64, 40)
    )


def _faces(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [400, 112, 92] and people [400] int64, 0 to 39."""
    if (folder / "att_faces_40x10.npz").is_file() or not any(path.is_dir() for path in folder.iterdir()):
        arrays = read_npz(data_file(folder, ["att_faces_40x10.npz"], FACES))
        images, person = np.asarray(arrays.get("x", ())), np.asarray(arrays.get("y", ()))
    else:
        images, person = _folder(folder)
        images = images[:, 0]
    if images.shape != (400, 112, 92) or np.unique(person, return_counts=True)[1].tolist() != [10] * 40:
        raise Refused(f"{folder} has pictures of shape {images.shape}, expected 10 of 40 people, 112 x 92: get {FACES}")
    return images, np.unique(person, return_inverse=True)[1].astype(np.int64)


def _normal(images: np.ndarray, statistics: Statistics) -> np.ndarray:
    """float32 [n, channels, h, w] of bytes: mean 0 and deviation 1 of each channel, by the statistics."""
    mean, deviation = (np.array(values, np.float32)[:, None, None] for values in statistics)
    return (images.astype(np.float32) / 255 - mean) / deviation


REAL: dict[str, Callable[[], Suite]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar10_resnet20": cifar10_resnet20,
    "faces": faces,
    "fashion_mnist": fashion_mnist,
    "fashion_mnist_coarse": fashion_mnist_coarse,
    "fashion_mnist_full": fashion_mnist_full,
}
