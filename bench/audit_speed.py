"""What an audit costs beside the forward passes that fill its store: 32 models, 10,000 examples, every measure.

A small convolutional net is perturbed into 32 models (16 retrained, 16 unlearned), whose outputs on 10,000 random images
fill a store; the forward passes are timed. Then a fresh subject knows the models by name only: a measure that ran one
would fail. Every measure of an ordinary audit is timed on the subject, and on each held-out retrained model, as the
report does. Reading the store is timed too. CPU time of one thread, so that other load on the machine counts for little.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import expunge as ex
from expunge.audit.subject import Subject
from expunge.core import Key, own_streams
from expunge.data.sources import as_data
from expunge.registry import asked_for
from expunge.store import Kept, Store
from expunge.version import revision

MODELS, SEED, CLASSES = 16, 0, 10
SIZES = {"forget": 1000, "retain": 6000, "test": 3000}
RESULT = Path(__file__).parent / "results" / "audit_speed.json"
T = TypeVar("T")


def network(seed: int, width: int = 16) -> nn.Module:
    """A convolutional net of 15,000 parameters for 32 x 32 inputs, its weights from a stream of their own."""
    with own_streams(Key(SEED).at("network").seed):
        net = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(2 * width, CLASSES)),
        )
    generator = Key(SEED).at("perturbed", seed).generator()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def parts() -> dict[str, ex.Data]:
    """Random images with random labels: only the work matters here."""
    total = sum(SIZES.values())
    generator = Key(SEED).at("images").generator()
    images = torch.randn(total, 3, 32, 32, generator=generator)
    data = as_data((images, torch.randint(0, CLASSES, (total,), generator=generator)))
    found, start = {}, 0
    for name, size in SIZES.items():
        found[name] = data.select(torch.arange(start, start + size))
        start += size
    return found


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the CPU seconds that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def subject(models: list[Any], folder: Path) -> Subject:
    """Half of the models retrained, half unlearned, the first of each the model after and before."""
    data = parts()
    half = len(models) // 2
    return Subject(
        models[0],
        models[half],
        ex.Request(data["forget"], data["retain"]),
        ex.Classification(CLASSES),
        data["test"],
        tuple(models[:half]),
        unlearned=tuple(models[half:]),
        store=Store(folder),
    )


def fill(folder: Path) -> tuple[list[str], dict[str, float]]:
    """Names of the models, and what filling cost: the forward passes alone, and all of it."""
    made = subject([network(number) for number in range(2 * MODELS)], folder)
    models = (*made.retrained, *made.unlearned)
    with torch.no_grad():
        batches = [batch["x"] for data in parts().values() for batch in data.batches(made.batch)]
        _, passes = timed(lambda: [model(batch) for model in models for batch in batches])
    _, whole = timed(lambda: [made.outputs(name, model) for model in models for name in SIZES])
    return [made.address(model) for model in models], {"forward_passes": passes, "filling": whole}


def no_weights() -> nn.Module:
    """A measure that opens a model would run it: then the comparison would be of nothing."""
    raise RuntimeError("an ordinary measure asked for the weights of a model: the store should have sufficed")


def measures(names: list[str], folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, str], float]:
    """Seconds per measure (of the subject, and of all held-out retrained models), which failed, reading the store."""
    made = subject([Kept(name, no_weights) for name in names], folder)
    models = (*made.retrained, *made.unlearned)
    _, reading = timed(lambda: [made.outputs(name, model) for model in models for name in SIZES])
    held = [made.held_out(number) for number in range(MODELS)]
    table: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for name, measure in asked_for(()).items():
        try:
            found, alone = timed(lambda measure=measure: measure(made))
            _, others = timed(lambda measure=measure: [measure(one) for one in held])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        table[name] = {"applies": float(found is not None), "subject": alone, "held_out": others}
    return table, failed, reading


def main() -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        names, filled = fill(Path(folder))
        table, failed, reading = measures(names, Path(folder))
    total = reading + sum(row["subject"] + row["held_out"] for row in table.values())
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "seed": SEED,
        "revision": revision(),
        "models": 2 * MODELS,
        "examples": SIZES,
        "parameters": sum(parameter.numel() for parameter in network(0).parameters()),
        "machine": {
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "seconds": {**filled, "reading_the_store": reading, "audit": total},
        "ratio": total / filled["forward_passes"],
        "measures": table,
        "failed": failed,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in sorted(table.items(), key=lambda item: -item[1]["subject"] - item[1]["held_out"]):
        print(
            f"{name:28} {row['subject']:7.2f} s, held out {row['held_out']:7.2f} s{'' if row['applies'] else '  (does not apply)'}"
        )
    print(f"forward passes {filled['forward_passes']:.1f} s, audit {total:.1f} s of which reading {reading:.1f} s")
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if failed or total > filled["forward_passes"]:
        sys.exit("an audit takes longer than the forward passes that filled its store, or a measure failed")


if __name__ == "__main__":
    main()
