"""Any data that a user has -> Data: tensors, arrays, mappings, map-style datasets, loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from expunge.core import Batch, Data, Key, Refused, map_tensors, own_streams
from expunge.meter import first_tensor


class Tensors:
    """Examples in memory: a nest of name -> Tensor [n, ...]."""

    in_memory = True

    def __init__(self, columns: Batch):
        self.columns = columns
        lengths = {name: len(t) for name, t in _leaves(columns)}
        if len(set(lengths.values())) != 1:
            raise Refused(
                f"columns differ in length: {', '.join(f'{n} has {k}' for n, k in lengths.items())}; give one "
                f"row per example in each"
            )
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def fetch(self, rows: Tensor) -> Batch:
        """The rows as a batch."""
        return map_tensors(lambda t: t[rows], self.columns)


class MapStyle:
    """A map-style dataset, read example by example and collated.

    One that draws at random (augmentation) finds the global random streams at a start that the rows asked for decide:
    the same request gives the same batch, whoever asks and however often, and the caller's streams are left alone.

    Args:
        dataset: ``__len__`` and ``__getitem__``.
        names: names of the parts of a tuple example.
        collate: examples -> batch; torch's default by default.
    """

    def __init__(self, dataset: Any, names: Sequence[str], collate: Callable[[list[Any]], Any] = default_collate):
        self.dataset, self.names, self.collate = dataset, tuple(names), collate

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, rows: Tensor) -> Batch:
        """The rows as a batch."""
        numbers = rows.tolist()
        with own_streams(Key(0).at("rows", *numbers).seed):
            return named(self.collate([self.dataset[row] for row in numbers]), self.names)


def named(batch: Any, names: Sequence[str]) -> Batch:
    """A collated batch as a mapping of names to tensors; columns without any (file names, remarks) are left out."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items() if first_tensor(value) is not None}
    if isinstance(batch, (list, tuple)):
        if len(batch) != len(names):
            raise Refused(
                f"examples have {len(batch)} parts, expected {len(names)} ({', '.join(names)}): name them with "
                f"names=(...), or yield mappings"
            )
        return dict(zip(names, batch, strict=True))
    return {names[0]: batch}


def _leaves(tree: Batch, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, (Mapping, list, tuple)):
            inner = value if isinstance(value, Mapping) else {str(place): part for place, part in enumerate(value)}
            found += _leaves(dict(inner), f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _tensor(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _tensor(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "USO":
        raise Refused(f"column {name!r} holds {array.dtype} values: expected numbers; encode text or categories first")
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def as_data(value: Any, *, names: Sequence[str] = ("x", "y"), ids: Sequence[int] | Tensor | None = None) -> Data:
    """Make Data of what the user has.

    Args:
        value: Data (returned as it is); a tuple of tensors or arrays; a mapping name -> tensor, array or such a
            mapping; a ``TensorDataset``; a map-style dataset yielding tuples or mappings; a ``DataLoader`` over one
            (its order, sampler and batch size are not used, its ``collate_fn`` is). Columns that hold no numbers (text) are
            left out.
        names: names of the parts of tuple examples.
        ids: int64 [n], unique; 0 .. n-1 by default.

    Raises:
        Refused: for a stream without length, no examples, columns of different length, or repeated ids.
    """
    if isinstance(value, Data):
        return value
    source = _source(value, names)
    size = len(source)
    if size == 0:
        raise Refused("the data has no examples: expected at least one")
    numbers = torch.arange(size) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if len(numbers) != size:
        raise Refused(f"{len(numbers)} ids were given for {size} examples; give one per example")
    if len(torch.unique(numbers)) != size:
        raise Refused("ids repeat: expected a different id for each example")
    return Data(source, torch.arange(size), numbers)


def _source(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, DataLoader):
        return MapStyle(_no_stream(value.dataset), names, value.collate_fn)
    if isinstance(value, TensorDataset):
        return Tensors(named(value.tensors, names))
    if isinstance(value, Tensor | np.ndarray):
        return Tensors({names[0]: _tensor(value, names[0])})
    if isinstance(value, Mapping):
        return Tensors({str(name): _tensor(part, str(name)) for name, part in value.items()})
    if isinstance(value, tuple) and value and all(isinstance(part, (Tensor, np.ndarray)) for part in value):
        return Tensors({name: _tensor(part, name) for name, part in named(value, names).items()})
    _no_stream(value)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return MapStyle(value, names)
    raise Refused(
        f"cannot read examples from a {type(value).__name__}: expected tensors, arrays, a mapping of them, a "
        f"map-style dataset or a DataLoader"
    )


def _no_stream(value: Any) -> Any:
    if isinstance(value, IterableDataset):
        raise Refused(
            "an iterable dataset has no stable order or ids: expected a map-style dataset, whose examples can be "
            "named; materialise it first"
        )
    return value


def collect(data: Data, size: int = 1024) -> Batch:
    """All examples of `data` in one batch on the CPU."""
    parts = list(data.batches(size))
    return _concatenate(parts)


def _concatenate(parts: list[Batch]) -> Batch:
    return {
        name: _concatenate([p[name] for p in parts])
        if isinstance(parts[0][name], Mapping)
        else torch.cat([p[name] for p in parts])
        for name in parts[0]
        if first_tensor(parts[0][name]) is not None
    }


def fingerprint(data: Data) -> str:
    """blake2b of the ids and contents; of ids and up to 64 examples where they are not all in memory."""
    digest = hashlib.blake2b(data.ids.numpy().tobytes(), digest_size=16)
    whole = getattr(data.source, "in_memory", False)
    part = data if whole else data.select(torch.linspace(0, len(data) - 1, min(64, len(data))).round().long())
    for batch in part.batches(1024):
        for name, tensor in _leaves(batch):
            digest.update(name.encode())
            if isinstance(tensor, Tensor):
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:  # a file name, a text: no tensor, but part of the example
                digest.update(repr(tensor).encode())
    return digest.hexdigest() + ("" if whole else "-sampled")
