"""Lists of example numbers in files, as other tools leave them: one number per line, JSON, or a numpy array."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from expunge.core import Refused

KINDS = (".txt", ".csv", ".json", ".npy", ".npz")


def read_indices(path: str | Path) -> list[int]:
    """The numbers in a file: ids of examples, or row numbers where the data has no ids of its own.

    Args:
        path: ``.txt`` or ``.csv`` with one whole number per line (a heading is passed over); ``.json`` with a list;
            ``.npy``, or ``.npz`` with one array, of whole numbers or of one truth value per row. No code of it is run.

    Raises:
        Refused: for a file that is missing or of another kind, holds something else, nothing, or a number twice.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise Refused(f"cannot read the index file {path}: expected one of {', '.join(KINDS)}")
    if not path.is_file():
        raise Refused(f"there is no index file {path}")
    try:
        found = _numbers(path)
    except (OSError, ValueError, UnicodeDecodeError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} is not a list of whole numbers ({error}): give one number per line") from error
    if not found:
        raise Refused(f"{path} lists no example: expected at least one number")
    seen: set[int] = set()
    for number in found:
        if number in seen:
            raise Refused(f"{path} lists {number} twice: expected each example once")
        seen.add(number)
    return found


def _numbers(path: Path) -> list[int]:
    kind = path.suffix.lower()
    if kind == ".json":
        return [_whole(value) for value in _flat(json.loads(path.read_text(encoding="utf-8")))]
    if kind in (".npy", ".npz"):
        return _of_array(_array(path))
    lines = [line.strip().rstrip(",") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if lines and not _is_number(lines[0]):
        lines = lines[1:]  # a heading
    return [_whole(line) for line in lines]


def _flat(tree: Any) -> list[Any]:
    if not isinstance(tree, list):
        raise ValueError(f"found a {type(tree).__name__}")
    return tree


def _array(path: Path) -> np.ndarray:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found:
        if len(found.files) != 1:
            raise ValueError(f"found {len(found.files)} arrays")
        return found[found.files[0]]


def _of_array(array: np.ndarray) -> list[int]:
    if array.dtype == bool and array.ndim == 1:
        return np.flatnonzero(array).tolist()
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"found {array.dtype} of shape {array.shape}")
    return array.tolist()


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and _is_number(value))):
        raise ValueError(f"found {value!r}")
    return int(value)
