"""Data from files: a folder of images, a CSV or Parquet table, arrays in npz or safetensors. Never a pickle.

Every reader gives its examples the same ids and the same order wherever and whenever it runs, and refuses a bad file
with one sentence that names the line, the column or the image.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from expunge.core import Batch, Data, Refused
from expunge.data.sources import as_data
from expunge.data.tables import TABLES, Categories, Loaded, Target, few, first_line, read_table
from expunge.registry import did_you_mean, need_extra

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFiles:
    """Images read and decoded when they are asked for: float32 in [0, 1], channels first.

    Args:
        paths: one file per row.
        labels: int64 [n].
        shape: (channels, height, width) that every image must have; channels is 1 or 3.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, shape: tuple[int, int, int]):
        self.paths, self.labels, self.shape = tuple(paths), labels, shape

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, rows: Tensor) -> Batch:
        """The rows as a batch: ``x`` float32 [b, channels, height, width], ``y`` int64 [b]."""
        return {"x": torch.stack([self._image(self.paths[int(row)]) for row in rows]), "y": self.labels[rows]}

    def _image(self, path: Path) -> Tensor:
        channels, height, width = self.shape
        with _opened(path) as image:
            try:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255.0
            except (OSError, ValueError, SyntaxError) as error:
                raise Refused(
                    f"{path} is not a whole image ({error}): replace it or take it out of the folder"
                ) from error
        if pixels.shape[:2] != (height, width):
            raise Refused(
                f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels and the first image is {width} x {height}: "
                f"bring all images to one size"
            )
        return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).contiguous()


def read_images(folder: str | Path, *, classes: Sequence[str] | None = None) -> Loaded:
    """A folder with one subfolder of images per class. Images are decoded when they are used.

    Ids number the images in the order of (class, file name), so adding an image shifts the ids after it.

    Args:
        folder: holds the subfolders; hidden files are passed over.
        classes: names of the classes in order, as ``Loaded.classes`` of the training data; sorted names by default.

    Raises:
        Refused: for no subfolder, an empty one, a file that is no image, or an image of another size.
        MissingExtra: without pillow.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused(f"there is no image folder {folder}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise Refused(f"{folder} has no subfolders: expected one folder of images per class")
    known = tuple(classes or names)
    paths: list[Path] = []
    labels: list[int] = []
    for name in names:
        found = _images_of(folder / name)
        if name not in known:
            raise Refused(f"{folder / name} is a class that the training data does not have{did_you_mean(name, known)}")
        paths += found
        labels += [known.index(name)] * len(found)
    shape = common_shape(paths)
    rows = torch.arange(len(paths))
    return Loaded(Data(ImageFiles(paths, torch.tensor(labels), shape), rows, rows), known)


def _images_of(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not found:
        raise Refused(f"{folder} has no images: add some or remove the folder")
    for path in found:
        if path.suffix.lower() not in IMAGES:
            raise Refused(f"{path} is not an image: expected one of {', '.join(IMAGES)}; take it out of the folder")
    return found


def _opened(path: Path) -> Any:
    pillow = need_extra("PIL.Image", "files", "reading images")
    try:
        return pillow.open(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise Refused(f"{path} cannot be read as an image: replace it or take it out of the folder") from error


def common_shape(paths: Sequence[Path]) -> tuple[int, int, int]:
    """Channels, height and width; sizes stand in the headers, so that no pixel is decoded here."""
    sizes: dict[tuple[int, int], Path] = {}
    modes: set[str] = set()
    for path in paths:
        with _opened(path) as image:
            sizes.setdefault(image.size, path)
            modes.add(image.mode)
    if len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        raise Refused(
            f"images differ in size: {one} is {first[0]} x {first[1]} pixels and {other} is {second[0]} x "
            f"{second[1]}; bring all to one size"
        )
    width, height = next(iter(sizes))
    return (1 if modes <= {"1", "L", "I;16"} else 3), height, width


def read_arrays(path: str | Path, *, inputs: str = "x", label: str = "y") -> Loaded:
    """Arrays in a ``.npz`` or ``.safetensors`` file, one row per example; pickled objects are refused, never loaded.

    Args:
        path: the file. An array ``id`` of whole numbers, where there is one, names the examples.
        inputs: name of the array of inputs, [n, ...]; numbers keep their type (float64 becomes float32).
        label: name of the array of labels, [n].

    Raises:
        Refused: for a damaged file, a missing array, one that holds objects, or arrays of different length.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"there is no data file {path}")
    arrays = read_npz(path) if path.suffix.lower() == ".npz" else _safetensors(path)
    for name in (inputs, label):
        if name not in arrays:
            raise Refused(f"{path} has no array {name!r}{did_you_mean(name, arrays)}: it has {few(arrays)}")
    y = arrays[label]
    if y.ndim != 1:
        raise Refused(f"{path}: array {label!r} has shape {tuple(y.shape)}, expected one label per example")
    return Loaded(as_data({"x": arrays[inputs], "y": y}, ids=arrays.get("id")))


def read_npz(path: Path) -> dict[str, Any]:
    """Every array of a ``.npz`` file by its name; pickled objects are refused, never loaded."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        pickled = "pickle" in str(error)
        reason = "it holds pickled objects, which could run code" if pickled else "it is damaged or of another kind"
        raise Refused(f"{path} is not a plain npz file: {reason}; save arrays of numbers with numpy.savez") from error


def _safetensors(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".safetensors":
        raise Refused(f"cannot read {path}: expected a folder of images, {', '.join(TABLES)}, .npz or .safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} is not a whole safetensors file ({first_line(error)})") from error


def read(
    path: str | Path,
    *,
    label: str | None = None,
    target: Target = "class",
    categories: Categories = "onehot",
    ids: str | None = None,
    drop: Sequence[str] = (),
    like: Loaded | None = None,
) -> Loaded:
    """Whatever the path is: a folder of images, a table, or arrays.

    Args:
        path: the folder or file; its ending says which reader is used.
        label: the label's column (required for a table) or array (``y`` by default).
        target, categories, ids, drop: of ``read_table``.
        like: what was read of the training data, for a test or validation set.
    """
    path = Path(path)
    if path.is_dir():
        return read_images(path, classes=None if like is None else like.classes)
    if path.suffix.lower() in TABLES:
        if label is None:
            raise Refused(f'{path} is a table: say which column is the label, with label = "NAME"')
        return read_table(path, label=label, target=target, categories=categories, ids=ids, drop=drop, like=like)
    return read_arrays(path, label=label or "y")


def class_count(*parts: Data) -> int:
    """Classes 0 .. C-1 of labels that were read from files: the largest one, plus 1."""
    largest = max(int(batch["y"].max()) for data in parts for batch in data.batches(4096))
    return max(2, math.floor(largest) + 1)
