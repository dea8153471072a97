"""What the model said before unlearning, kept as columns of the data, so that no second model is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge import runtime
from expunge.core import Batch, Case, Data, Key, Refused, described, eval_mode
from expunge.data.sources import fingerprint
from expunge.journal import load_tree, save_tree
from expunge.oracle import prepared
from expunge.weights import hash_tensors, tensors_of

FORMAT = 1
"""Of the file of references; it belongs to what names a file."""


@dataclass(frozen=True)
class CacheReference:
    """Ask the model as it stands about each forget example, once, and keep what it says as columns of the data.

    Put it first in a chain: ``chain(CacheReference(), npo())`` then needs no teacher and no second model, and spends
    one forward pass over the forget data instead of one per step. The columns travel with the examples through
    shuffles, selections and shards. It changes no weight.

    Where the run has a folder (``out=``), or `folder` is given, the columns are written to one safetensors file there,
    whole or not at all, named by a hash of the weights, the data, the task and what is asked: a run that finds it asks
    the model nothing. Data that are not all in memory, and a task that calls the model by a function of the caller's,
    have no such name, and are asked about anew.

    It does not promise the very bits of a teacher asked anew in a batch of another shape: they differ by rounding.

    Args:
        batch: examples per pass; for memory only.
        tokens: also ``reference_tokens`` [n, U], the NLL of each token in the order of ``task.labels``, 0 behind the
            answer, for TNPO.
        preferred: also the summed NLL of the answers to give instead, for DPO: ``win_reference`` [n] of the data's column
            ``win``; else ``refusal_references`` [n, r] of each of the task's r refusals, of which one is drawn per step.
        folder: where the file is kept, for several runs to share; by default in the run's own folder, if it has one.

    ``reference`` [n], the summed NLL of each example, for NPO and DPO, is always there.

    Raises:
        Refused: for a task whose batches are drawn with noise, since a loss would belong to one draw; and for
            `preferred` where there is neither a column ``win`` nor a fixed list of refusals.
    """

    batch: int = 32
    tokens: bool = False
    preferred: bool = False
    folder: str | None = None

    @property
    def provides(self) -> tuple[str, ...]:
        """Needs of methods that the columns meet."""
        tokens = ("column:reference_tokens",) if self.tokens else ()
        preferred = ("column:win_reference", "column:refusal_references") if self.preferred else ()
        return ("column:reference", *tokens, *preferred)

    def __call__(self, case: Case) -> Case:
        if case.task.stochastic:
            raise Refused(
                f"CacheReference cannot be used with task {case.task.name!r}: its batches are drawn with "
                f"noise, so a reference belongs to one draw; use the original model as a teacher instead"
            )
        key, rng = case.rng.take()
        data = case.request.data("forget")
        if self.preferred and preferable(case.task, data) is None:
            raise Refused(
                f"CacheReference(preferred=True) finds no answers to ask about: the forget data have no column 'win', and "
                f"task {case.task.name!r} has no fixed list of refusals; give one of them, or keep the original model as a "
                f"teacher"
            )
        for name, values in self._columns(case, data, key).items():
            data = data.annotate(name, values)
        return replace(case, request=replace(case.request, forget=data), rng=rng)

    def _columns(self, case: Case, data: Data, key: Key) -> dict[str, Tensor]:
        """Column -> [n, ...], read where an earlier run of the same left them."""
        path = self._file(case, data)
        if path is not None and path.exists():
            return load_tree(path)
        found = self._asked(case, data, key)
        if path is not None:
            save_tree(path, found)
        return found

    def _asked(self, case: Case, data: Data, key: Key) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {}
        order = _by_length(case, data)
        with torch.no_grad(), eval_mode(case.model), case.meter.watch(case.model):
            for batch in prepared(case, data.select(order), self.batch, key):
                said = {name: ask(case, batch).cpu() for name, ask in self._questions(case, data).items()}
                if self.tokens:
                    said["reference"] = said["reference_tokens"].sum(1)
                for name, values in said.items():
                    rows.setdefault(name, []).append(values)
        back = torch.argsort(order)
        return {name: _stacked(parts)[back] for name, parts in rows.items()}

    def _questions(self, case: Case, data: Data) -> dict[str, Callable[[Case, Batch], Tensor]]:
        """Column -> what is asked about a batch. The sum over tokens needs no question of its own."""
        asked: dict[str, Callable[[Case, Batch], Tensor]] = (
            {"reference_tokens": _per_token} if self.tokens else {"reference": _summed}
        )
        if self.preferred:
            column = preferable(case.task, data)
            asked[str(column)] = _of_win if column == "win_reference" else _of_refusals
        return asked

    def _file(self, case: Case, data: Data) -> Path | None:
        """The file of exactly these questions to exactly this model; None where nothing can be kept."""
        own = None if case.journal is None else case.journal.folder.parent
        folder = own if self.folder is None else Path(self.folder)
        digest = fingerprint(data)
        if folder is None or digest.endswith("-sampled") or " at 0x" in repr(case.task) or runtime.world() > 1:
            return None
        name = {
            "format": FORMAT,
            "weights": hash_tensors(tensors_of(case.model)),
            "data": digest,
            "task": described(case.task),
            "columns": list(self._questions(case, data)),
            "machine": [torch.__version__, str(runtime.device_of(case.model).type)],
        }
        return folder / f"reference-{hashlib.blake2b(json.dumps(name).encode(), digest_size=8).hexdigest()}.safetensors"


def preferable(task: Any, data: Data) -> str | None:
    """The column that can hold references of the answers to give instead; None where these are drawn without a list."""
    first = data.batch(torch.arange(1))
    if "win" in first:
        return "win_reference"
    listed = hasattr(task, "refusals_of") and task.refusals_of(first) is not None
    return "refusal_references" if listed else None


def _summed(case: Case, batch: Batch) -> Tensor:
    return case.task.nll(case.model, batch)


def _per_token(case: Case, batch: Batch) -> Tensor:
    """[b, U] nats, at least float32; a task of one label per example has one column."""
    ask = getattr(case.task, "token_nll", None)
    losses = case.task.nll(case.model, batch)[:, None] if ask is None else ask(case.model, batch)
    return losses if losses.dtype == torch.float64 else losses.float()


def _of_win(case: Case, batch: Batch) -> Tensor:
    plain = {name: column for name, column in batch.items() if name != "win"}
    return case.task.nll(case.model, {**plain, **batch["win"]})


def _of_refusals(case: Case, batch: Batch) -> Tensor:
    """[b, r], of every refusal of the list; an empty one costs nothing and is never drawn."""
    task: Any = case.task
    rows, number = task.refusals_of(batch).shape[:2]
    each = (task.refuse(batch, torch.full((rows,), one)) for one in range(number))
    return torch.stack([task.nll(case.model, refused) for refused in each], 1)


def _by_length(case: Case, data: Data) -> Tensor:
    """Positions sorted by length, where examples have one: a batch is then hardly padded."""
    lengths: Callable[[Batch], Tensor] | None = getattr(case.task, "lengths", None)
    if lengths is None:
        return torch.arange(len(data))
    return torch.argsort(torch.cat([lengths(batch).cpu() for batch in data.batches(256)]), stable=True)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Rows under each other, filled up with 0 to the widest."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
