"""How many deletions sharded models bear before all must be trained anew, by the structures themselves; no training.

    python bench/deletion_capacity.py --theirs /elsewhere/deletion.py

The published setting of S3T (arXiv:2406.16257): 5 shards, 6 slices, budgets of 1 to 6 orders, each request for a slice drawn
uniformly with repetition, until no shard can answer; and SISA without training again, where any request ends its shard.

- whole: the registered ``s3t``, trained for 0 epochs on a small network, and ``unlearn`` of one example per request until it
  refuses. For each run the counter of ``structure`` is given the same requests: both must end at the same one. For
  SISA the registered ``sisa``: a shard has ended when its last stage is not what was trained first, by the model's ledger.
- structure: ``orders.deletion_capacity``, many runs of what the method goes by.
- theirs: the authors' functions, where their file is named; docs/reproduction/s3t.md says which.

Writes ``results/deletion_capacity.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import expunge as ex
from expunge.core import Data, Key, Refused
from expunge.data.sources import as_data
from expunge.journal import write_bytes
from expunge.orders import Sequences, deletion_capacity
from expunge.registry import methods
from expunge.shards import place, train_shards
from expunge.version import revision

OUT = Path(__file__).parent / "results" / "deletion_capacity.json"
SHARDS, SLICES, BUDGETS, EXAMPLES = 5, 6, range(1, 7), 900
S3T = {1: 68.50, 2: 87.87, 3: 99.55, 4: 107.93, 5: 114.48, 6: 119.85}
EXPECTED = {**{("s3t", budget): count for budget, count in S3T.items()}, ("sisa", 1): 11.417}
"""Shards x slices x H(shards x budget), H the harmonic number: every order must lose its first slice."""


def examples() -> Data:
    """Enough for every request to find one in its slice."""
    generator = Key(0).at("examples").generator()
    return as_data({"x": torch.randn(EXAMPLES, 2, generator=generator), "y": torch.arange(EXAMPLES) % 2})


def asked(data: Data, key: Key) -> Any:
    """(shard, slice, id) of one request after the other."""
    places = place(data.ids, SHARDS, SLICES)
    left = {
        (s, k): data.ids[(places == torch.tensor([s, k])).all(1)].tolist() for s in range(SHARDS) for k in range(SLICES)
    }
    generator = key.generator()
    while True:
        shard, number = divmod(int(torch.randint(SHARDS * SLICES, (), generator=generator)), SLICES)
        yield shard, number, left[shard, number].pop()


def by_method(name: str, first: nn.Module, data: Data, stage: Any, key: Key) -> int:
    """Requests that the registered method bears; for S3T checked against the counter on the same requests."""
    task, gone = ex.Classification(2), list[int]()
    model: Any = first
    start = model.ledger.clone()
    sequences = Sequences.whole(SHARDS, SLICES, dict(stage.settings)["budget"]) if name == "s3t" else None
    for count, (shard, number, one) in enumerate(asked(data, key), 1):
        if sequences is not None:
            sequences.delete(shard, number)
        request = ex.split(data.without(gone), [one])
        gone.append(one)
        try:
            model = ex.unlearn(model, request, task=task, method=stage).model
            ended = name == "sisa" and bool((model.ledger[:, -1] != start[:, -1]).any(-1).all())
        except Refused:
            ended = True
        if sequences is not None and ended is sequences.in_service:
            raise SystemExit(f"request {count}: the method and its counter do not agree")
        if ended:
            return count
    raise SystemExit("out of requests")


def line(counts: list[int]) -> dict[str, float]:
    """Mean, standard error and number."""
    return {
        "mean": statistics.fmean(counts),
        "error": statistics.stdev(counts) / len(counts) ** 0.5,
        "runs": len(counts),
    }


def measured(name: str, budget: int, runs: int, data: Data) -> dict[str, float]:
    """Of the registered method."""
    given = {"budget": budget} if name == "s3t" else {}
    stage = methods()[name].build(shards=SHARDS, slices=SLICES, epochs=0.0, **given)
    first = train_shards(nn.Sequential(nn.Linear(2, 2)), data, ex.Classification(2), stage)
    return line([by_method(name, first, data, stage, Key(run).at(name, budget)) for run in range(runs)])


def theirs(path: Path, runs: int) -> dict[str, dict[str, float]]:
    """The authors' counters. Their file prints a table when it is read and lacks a function of the file beside it."""
    module, random_state = ModuleType("deletion"), random.getstate()
    source = path.read_text()
    beside = (path.parent / "sequence_selection.py").read_text()
    rotations = beside[beside.index("def rotate_right") : beside.index("def get_cyclic")]
    exec(compile(rotations, "sequence_selection.py", "exec"), module.__dict__)
    exec(compile(source, str(path), "exec"), module.__dict__)
    random.seed(0)
    found = {f"s3t {b}": line([module.budgeted_s3t(SHARDS, SLICES, b) for _ in range(runs)]) for b in BUDGETS}
    found["sisa 1"] = line([module.get_sisa_count(SHARDS, SLICES) for _ in range(runs)])
    random.setstate(random_state)
    return found


def main() -> None:
    """Count, and write the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", type=Path)
    parser.add_argument("--runs", type=int, default=4000, help="of the counters")
    parser.add_argument("--method-runs", type=int, default=3, help="of the methods themselves")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data, key = examples(), Key(0)
    authors = theirs(given.theirs, given.runs) if given.theirs else {}
    rows = []
    for name, slices, budget in (*(("s3t", SLICES, budget) for budget in BUDGETS), ("sisa", 1, 1)):
        counts = [deletion_capacity(SHARDS, slices, budget, key.at(name, run, budget)) for run in range(given.runs)]
        rows.append(
            {
                "method": name,
                "budget": budget,
                "expected": EXPECTED[name, budget],
                "structure": line(counts),
                "whole": measured(name, budget, given.method_runs * (20 if name == "sisa" else 1), data),
                "theirs": authors.get(f"{name} {budget}"),
            }
        )
        print(rows[-1])
    found = {"name": "deletion_capacity", "shards": SHARDS, "slices": SLICES, "rows": rows, "revision": revision()}
    write_bytes(OUT, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
