"""What a step of gradient surgery costs, beside an ordinary joint step and beside TorchJD, on the same work in one run.

Each variant does whole optimizer steps on the same 64 forget and 64 retain examples with the same small residual
network. Variants are interleaved round by round, and CPU time of one thread is measured, so that other load on the
machine falls on all alike; the ratio is the median over rounds. Peak memory is measured in a fresh process each.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.combine import OneSidedProjection, PCGrad, UPGrad, Weighted
from expunge.core import Case, Key, Request
from expunge.implicit import FastImplicitSurgery, ImplicitSurgery
from expunge.objectives import NLL, RandomLabel
from expunge.optim import SGD
from expunge.scope import Scope
from expunge.version import revision

ROWS, STEPS, ROUNDS, SEED = 64, 3, 15, 0
RESULT = Path(__file__).parent / "results" / "surgery_cost.json"


class Block(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(4, outside), nn.GroupNorm(4, outside)])
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.shortcut(x))


def network(width: int = 16) -> nn.Module:
    """A residual network of 78,000 parameters for 32 x 32 inputs."""
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def request() -> Request:
    """Forget and retain examples with random content: only the work matters here."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(2 * ROWS, 3, 32, 32, generator=generator)
    return ex.split((x, torch.randint(0, 10, (2 * ROWS,), generator=generator)), forget=range(ROWS))


def ours(combine: object) -> Callable[[], None]:
    """STEPS steps of our Descend with a combiner."""
    model = network()
    case = Case(model, request(), ex.Classification(10), Scope.all(model), {}, Key(SEED))
    stage = ex.Descend(
        forget=RandomLabel(), retain=NLL(), combine=combine, optimizer=SGD(1e-3, 0.9), steps=STEPS, batch=ROWS
    )
    return lambda: stage(case) and None


def _tensors() -> tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]:
    model, asked = network(), request()
    assert asked.forget is not None
    assert asked.retain is not None
    both = [asked.forget.batch(torch.arange(ROWS)), asked.retain.batch(torch.arange(ROWS))]
    x, y = (torch.cat([batch[name] for batch in both]) for name in ("x", "y"))
    return model, x, y, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def joint() -> Callable[[], None]:
    """The ordinary step: one concatenated batch, one loss, one backward."""
    model, x, y, optimizer = _tensors()

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none")
            (losses[:ROWS].mean() + losses[ROWS:].mean()).backward()
            optimizer.step()

    return run


def torchjd(chunk: int | None, aggregator: str) -> Callable[[], None]:
    """TorchJD's own way: a Jacobian backward of both losses through one forward, then an aggregator."""
    from torchjd import aggregation, autojac

    model, x, y, optimizer = _tensors()
    rule = getattr(aggregation, aggregator)()
    parameters = list(model.parameters())

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none")
            autojac.backward([losses[:ROWS].mean(), losses[ROWS:].mean()], parallel_chunk_size=chunk)
            autojac.jac_to_grad(parameters, rule)
            optimizer.step()

    return run


VARIANTS: dict[str, Callable[[], Callable[[], None]]] = {
    "joint step (plain torch)": joint,
    "expunge weighted sum": lambda: ours(Weighted()),
    "expunge explicit one-sided": lambda: ours(OneSidedProjection()),
    "expunge implicit (EUPMU)": lambda: ours(ImplicitSurgery(start=1.0)),
    "expunge implicit, fast": lambda: ours(FastImplicitSurgery()),
    "expunge PCGrad": lambda: ours(PCGrad()),
    "expunge UPGrad": lambda: ours(UPGrad()),
    "TorchJD PCGrad, sequential": lambda: torchjd(1, "PCGrad"),
    "TorchJD UPGrad, sequential": lambda: torchjd(1, "UPGrad"),
    "TorchJD UPGrad, vmap": lambda: torchjd(None, "UPGrad"),
}
BOUNDS = {"expunge explicit one-sided": 1.15, "expunge implicit (EUPMU)": 1.25, "expunge implicit, fast": 1.05}


def measure() -> dict[str, dict[str, float]]:
    """Median CPU-time ratio to the joint step over interleaved rounds, with its quartiles."""
    runs = {name: make() for name, make in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_number:  # the first round warms up
                seconds[name].append((time.process_time() - start) / STEPS)
    base = seconds["joint step (plain torch)"]
    table = {}
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {"milliseconds": 1000 * statistics.median(values), "ratio": middle, "low": low, "high": high}
    return table


def memory(name: str) -> float:
    """Peak resident MiB of one variant in a fresh process, above what the process holds before its first step."""
    command = [sys.executable, __file__, "--memory", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _own_memory(name: str) -> None:
    importlib.import_module("torch._dynamo")  # the first optimizer step imports it: not memory of the step
    run = VARIANTS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak that importing left behind
    before = _peak_kib()
    run()
    print((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    """Peak resident memory of this process alone; what getrusage says includes the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--memory"]:
        _own_memory(sys.argv[2])
        return
    table = measure()
    for name, row in table.items():
        row["peak_mib"] = memory(name)
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "seed": SEED,
        "revision": revision(),
        "rows": [ROWS, ROWS],
        "rounds": ROUNDS,
        "parameters": sum(p.numel() for p in network().parameters()),
        "machine": {
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
        },
        "bounds": BOUNDS,
        "variants": table,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        "variant", "ms", "ratio", "quartiles", "peak MiB", "bound", title="Cost of a step, ratio to a joint step"
    )
    for name, row in table.items():
        shown.add_row(
            name,
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{BOUNDS[name]:.2f}" if name in BOUNDS else "",
        )
    Console().print(shown)
    over = [name for name, bound in BOUNDS.items() if table[name]["ratio"] > bound]
    if table["expunge explicit one-sided"]["peak_mib"] > table["joint step (plain torch)"]["peak_mib"]:
        over.append("peak memory of explicit surgery, above the joint step's")
    if over:
        sys.exit(f"over their bound: {', '.join(over)}")


if __name__ == "__main__":
    main()
