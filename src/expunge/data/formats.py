"""Image data sets in the formats that they are published in: idx, CIFAR's binary version, tiles in one lossless picture.

None of the readers can run code that stands in a file: the pickled versions of these data sets are refused. Every byte
is counted, so that a download that broke off is never read as a smaller data set.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expunge.core import Refused
from expunge.data.tables import first_line
from expunge.registry import need_extra

ENVIRONMENT = "EXPUNGE_DATA"
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
LARGEST = 2**31
"""Bytes of values that an idx file may hold: more is a damaged header."""
CIFAR_SHAPE = (3, 32, 32)


def data_folder(part: str, what: str) -> Path:
    """The folder `part` of the one that the environment variable EXPUNGE_DATA names.

    Args:
        part: name of the subfolder.
        what: the data set by its public name, and the files that are expected there, for the message.

    Raises:
        Refused: where the variable is not set or the folder is not there.
    """
    given = os.environ.get(ENVIRONMENT)
    if not given:
        raise Refused(f"{ENVIRONMENT} is not set: get {what}, put it in a folder {part}/ and name the folder above it")
    folder = Path(given) / part
    if not folder.is_dir():
        raise Refused(f"there is no folder {folder}: get {what}, and put it there")
    return folder


def data_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of the names that is a file in the folder.

    Raises:
        Refused: where none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise Refused(f"{folder} has no file {' or '.join(names)}: get {what}, and put it there")


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an idx file, plain or gzipped: MNIST's format.

    Two zero bytes, a byte for the type and one for the number of dimensions, each dimension as a big-endian 32-bit
    number, then the values.

    Args:
        path: the file; one that ends in ``.gz`` is unpacked while it is read.

    Raises:
        Refused: for a file that is no idx file, or one that is shorter or longer than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"there is no idx file {path}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_TYPES or not 1 <= start[3] <= 4:
                raise Refused(f"{path} is not an idx file: it begins with {start.hex() or 'nothing'}; get it again")
            dimensions = file.read(4 * start[3])
            if len(dimensions) < 4 * start[3]:
                raise Refused(f"{path} breaks off in its header: get it again")
            shape = struct.unpack(f">{start[3]}I", dimensions)
            kind = np.dtype(IDX_TYPES[start[2]])
            expected = math.prod(shape) * kind.itemsize
            if expected > LARGEST:
                raise Refused(
                    f"{path} says that it holds {expected:,} bytes, expected at most {LARGEST:,}: get it again"
                )
            values = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{path} cannot be unpacked ({first_line(error)}): get it again") from error
    if len(values) != expected:
        found = f"only {len(values):,}" if len(values) < expected else "more"
        raise Refused(f"{path} should hold {expected:,} bytes of values and holds {found}: get it again")
    return np.frombuffer(values, kind).reshape(shape).astype(kind.newbyteorder("="))


def read_mnist(folder: str | Path, part: str, what: str = "MNIST") -> tuple[np.ndarray, np.ndarray]:
    """Images [n, height, width] uint8 and labels [n] int64 of a data set in MNIST's four files.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two that begin with ``t10k``,
            each plain or with ``.gz``; a dot before ``idx`` is taken as well.
        part: "train" or "test".
        what: the data set's public name, for the messages.

    Raises:
        Refused: for files that are absent or damaged, or that differ in length.
    """
    start = "train" if part == "train" else "t10k"
    images, labels = (
        read_idx(data_file(Path(folder), _idx_names(f"{start}-{kind}", ranks), f"the four idx files of {what}"))
        for kind, ranks in (("images", 3), ("labels", 1))
    )
    if images.ndim != 3 or labels.shape != images.shape[:1] or images.dtype != np.uint8 or labels.dtype != np.uint8:
        raise Refused(
            f"{folder}: the {start} images are {images.dtype} of shape {images.shape} and the labels {labels.dtype} of "
            f"shape {labels.shape}: expected the same number of bytes [n, height, width] and [n]; get {what} again"
        )
    return images, labels.astype(np.int64)


def _idx_names(start: str, rank: int) -> list[str]:
    names = [f"{start}{mark}idx{rank}-ubyte" for mark in "-."]
    return [name + ending for name in names for ending in ("", ".gz")]


def read_cifar(path: str | Path, labels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] uint8 and labels [n, labels] int64 of a file of CIFAR's binary version.

    Each record is its label bytes (CIFAR-10 one; CIFAR-100 two, the coarse and the fine one) and 3,072 bytes of pixels.

    Args:
        path: the file, ``data_batch_1.bin`` say.
        labels: label bytes per record, 1 or 2.

    Raises:
        Refused: for a file that is not a whole number of records, or with labels that this data set has not.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"there is no file {path} of CIFAR's binary version")
    size = labels + math.prod(CIFAR_SHAPE)
    values = np.fromfile(path, np.uint8)
    if not len(values) or len(values) % size:
        raise Refused(
            f"{path} has {len(values):,} bytes, expected a whole number of records of {size:,}: get CIFAR's binary version"
        )
    records = values.reshape(-1, size)
    names = records[:, :labels].astype(np.int64)
    for column, classes in enumerate((10,) if labels == 1 else (20, 100)):
        largest = int(names[:, column].max())
        if largest >= classes:
            raise Refused(f"{path} has a label {largest}, expected at most {classes - 1}: get CIFAR's binary version")
    return records[:, labels:].reshape(-1, *CIFAR_SHAPE), names


def read_tiles(path: str | Path, side: int = 32) -> np.ndarray:
    """Images [n, 3, side, side] uint8 that stand as square tiles, row by row, in one lossless picture.

    Args:
        path: a picture that pillow reads. JPEG is refused: it would change the pixels.
        side: pixels of a tile's side, >= 1.

    Raises:
        Refused: for a picture that is absent, damaged or lossy, or whose sides no whole number of tiles fills.
        MissingExtra: without pillow.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"there is no picture {path}")
    pillow = need_extra("PIL.Image", "files", "reading images")
    try:
        with pillow.open(path) as picture:
            kind, pixels = picture.format, np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise Refused(f"{path} cannot be read as a picture ({first_line(error)}): get it again") from error
    height, width = pixels.shape[:2]
    if kind == "JPEG" or height % side or width % side:
        raise Refused(
            f"{path} is a {kind} picture of {width} x {height} pixels, expected a lossless one of whole tiles of {side} x "
            f"{side}"
        )
    tiles = pixels.reshape(height // side, side, width // side, side, 3)
    return np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3)).reshape(-1, 3, side, side)
