"""What models say of examples, kept by content: model id x example id, filled once, read by every measure.

One file holds what one model says of one data set, under the hash of the model and the hash of the data. A file is
written whole under a name that its content decides, so writers need no lock: two that write the same write the same
bytes. Nothing else is kept: the folder is the index.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.core import MissingExtra, Refused
from expunge.journal import write_bytes

FORMAT = "expunge-store-1"


@dataclass(frozen=True)
class Kept:
    """A model by its content address: what it says comes from a store, its weights only where a measure needs them.

    Args:
        name: the content address, the same for the same weights (or for the same recipe, data and seed).
        load: gives the model, in eval mode; called anew each time, so that no more than one has to be in memory.
    """

    name: str
    load: Callable[[], nn.Module] = field(repr=False, compare=False)


class Store:
    """A folder of arrays by (model, data).

    Args:
        folder: made on the first write. Several processes may read and append at once.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, model: str, data: str) -> Path:
        """Where the arrays of this model on this data are, or would be."""
        for part in (model, data):
            if not part or any(letter in part for letter in "/\\.") or part.startswith("-"):
                raise Refused(f"a store keeps arrays under hashes, found the name {part!r}: give letters and digits")
        return self.folder / model / f"{data}.npz"

    def has(self, model: str, data: str) -> bool:
        """Whether there is a file; whether it is whole, ``get`` finds out."""
        return self.path(model, data).is_file()

    def put(self, model: str, data: str, arrays: Mapping[str, np.ndarray]) -> Path:
        """Keep arrays, each with one row per example, ``id`` among them; whole or not at all."""
        if "id" not in arrays or len({len(array) for array in arrays.values()}) != 1:
            found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise Refused(f"a store keeps arrays with one row per example and their id, found {found or 'none'}")
        content = io.BytesIO()
        head = json.dumps({"format": FORMAT, "digest": digest(arrays)}).encode()
        everything: dict[str, Any] = {**arrays, "__head__": np.frombuffer(head, dtype=np.uint8)}
        np.savez(content, **everything)
        path = self.path(model, data)
        write_bytes(path, content.getvalue())
        return path

    def get(self, model: str, data: str) -> dict[str, np.ndarray]:
        """The arrays, checked against their digest. No code of the file is run.

        Raises:
            Refused: for a file that is missing, damaged, or of something else.
        """
        path = self.path(model, data)
        if not path.is_file():
            raise Refused(f"the store {self.folder} has nothing of model {model} on data {data}: fill it first")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(arrays.pop("__head__").tobytes())
            whole = head["format"] == FORMAT and head["digest"] == digest(arrays)
        except Exception as error:  # numpy, zipfile and json raise some ten kinds for damaged bytes
            said = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise Refused(
                f"{path} is not a whole file of the store ({said}): delete it, and it is made again"
            ) from error
        if not whole:
            raise Refused(f"{path} does not hold what was written there: delete it, and it is made again")
        return arrays

    def fill(self, model: str, data: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays; computed and kept on first use."""
        if not self.has(model, data):
            self.put(model, data, compute())
        return self.get(model, data)

    def entries(self) -> Iterator[tuple[str, str]]:
        """(model, data) of everything that is kept, sorted."""
        for path in sorted(self.folder.glob("*/*.npz")):
            if not path.name.startswith("."):
                yield path.parent.name, path.stem

    def to_parquet(self, path: str | Path, what: Sequence[str] | None = None) -> Path:
        """Everything in one long table: model, data, id and the arrays (a column per class for logits)."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtra("Parquet needs pyarrow, which is not installed: pip install 'expunge[files]'") from error
        tables = []
        for model, data in self.entries():
            columns: dict[str, np.ndarray | list[str]] = {}
            for name, array in self.get(model, data).items():
                if what is not None and name not in (*what, "id"):
                    continue
                wide = array.reshape(len(array), -1)
                columns.update(
                    {name: array} if array.ndim == 1 else {f"{name}_{i}": wide[:, i] for i in range(wide.shape[1])}
                )
            size = len(columns["id"])
            tables.append(pa.table({"model": [model] * size, "data": [data] * size, **columns}))
        if not tables:
            raise Refused(f"the store {self.folder} is empty: there is nothing to write")
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables(tables, promote_options="default"), sink)
        write_bytes(Path(path), sink.getvalue())
        return Path(path)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """blake2b of names, types, shapes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name}{array.dtype.str}{array.shape}".encode())
        found.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return found.hexdigest()
