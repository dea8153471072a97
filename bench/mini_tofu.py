"""mini-TOFU: do the field's qualitative findings show on invented authors, on one core? Run by run, each kept in a file.

python bench/mini_tofu.py run       trains the models and makes every run that is missing, then judges and writes
python bench/mini_tofu.py judge     from the runs there are: bench/results/mini_tofu.json
python bench/mini_tofu.py write     from that json: figures and numbers of docs/guides/mini-tofu.md

Settings were chosen on a world of its own (seed 100, which is not reported); the criteria stand in
``mini_tofu_findings.py`` and were written before the reported worlds were run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mini_tofu_findings
import mini_tofu_pages
import numpy as np
import torch
from torch import nn

from expunge import methods
from expunge.attacks.quantise import quantised
from expunge.audit import extraction
from expunge.benchmarks import mini_tofu as worlds
from expunge.benchmarks.mini_tofu_model import Bench, Shape, Training, llama, score
from expunge.benchmarks.tofu_scores import per_item
from expunge.combine import OneSidedProjection
from expunge.core import Case, Key, Stage, chain, eval_mode
from expunge.descend import Descend
from expunge.edits import extrapolate
from expunge.implicit import FastImplicitSurgery
from expunge.journal import write_bytes
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.reference import CacheReference
from expunge.scope import Scope, edit
from expunge.version import __version__, revision
from expunge.weights import load_weights, save_weights

RESULT = Path(__file__).parent / "results" / "mini_tofu.json"
OUT = Path("out/mini_tofu")
SEEDS = (0, 1, 2)
TRAINING, SHAPE = Training(epochs=40, batch=32, lr=2.5e-3), Shape()
MODELS = {"original": (0, True), "retrained": (0, False), "retrained again": (1, False)}
"""Name -> (seed of the weights and the order, whether it sees the forget authors)."""
POINTS = (8, 16, 22, 30, 42, 64)
LATE = (4, 8, 12, 16, 22, 30, 42, 64, 96)
"""Steps after which a run is looked at; ``LATE`` those of the runs that show where a method ends up."""
ALPHAS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
BITS = (8, 4)
STEPS, LONG, BATCH = POINTS[-1], LATE[-1], 20
"""All forget examples come by every third step."""
SLOW, RATE, FAST = 1e-4, 3e-4, 1e-3
"""Rates of Adam: for rounding, for most runs, and for where a run ends up."""
RETAINED = 60
"""Retain items that are scored, evenly spread."""


def free(stage: Any, **changes: Any) -> Stage:
    """A method's own loop without its guard: here the point is to see where it goes."""
    return replace(stage.stage, guard=None, **changes)


def npo(lr: float, steps: int, **changes: Any) -> Stage:
    """NPO with a retain term, as published but for the optimizer, without a second model."""
    stage = free(methods.npo(beta=0.1, retain_weight=1.0, lr=lr, steps=steps, batch=BATCH), **changes)
    return chain(CacheReference(), stage)


RUNS: dict[str, Callable[[], Stage]] = {
    "gradient_ascent": lambda: free(methods.gradient_ascent(lr=FAST, steps=LONG, batch=BATCH)),
    "grad_diff": lambda: free(methods.grad_diff(forget_weight=1.0, lr=FAST, steps=LONG, batch=BATCH)),
    "npo_fast": lambda: npo(FAST, LONG),
    "npo_retain": lambda: npo(RATE, STEPS),
    "npo_slow": lambda: npo(SLOW, LONG),
    "idk_nll": lambda: free(methods.idk_nll(lr=RATE, steps=STEPS, batch=BATCH)),
    "simnpo": lambda: free(methods.simnpo(beta=2.5, retain_weight=1.0, lr=RATE, steps=STEPS, batch=BATCH)),
    "npo_projection": lambda: npo(RATE, STEPS, combine=OneSidedProjection(tolerance=-1.0)),
    "npo_eupmu": lambda: npo(RATE, STEPS, combine=FastImplicitSurgery()),
    "npo_retain_long": lambda: npo(RATE, LONG),
    "npo_eupmu_long": lambda: npo(RATE, LONG, combine=FastImplicitSurgery()),
}
"""Name -> stage. ``npo_retain`` is NPO with a retain term; the others named npo differ in rate or combiner alone."""
LATER = ("gradient_ascent", "grad_diff", "npo_fast", "npo_slow", "npo_retain_long", "npo_eupmu_long")
ROUNDED = ("npo_retain", "npo_slow")
NAMES = (*MODELS, *RUNS, "task_vector")
Point = dict[str, Any]


@dataclass
class Look:
    """Stands where ``Watch`` does: looks at the given steps and keeps every item."""

    bench: Bench
    at: tuple[int, ...]
    rounded: bool
    kept: list[dict[str, Any]]

    def due(self, done: int) -> bool:
        return done in self.at

    def look(self, case: Case) -> dict[str, float]:
        step = len(case.meter.history) + 1
        self.kept.append({"step": step, **items(self.bench, case.model, self.rounded)})
        return {}


def items(bench: Bench, model: nn.Module, also_rounded: bool = True) -> dict[str, Any]:
    """What one model said, in lists that go to JSON, and what its rounded copies remember where that is asked."""
    scored = score(bench, model, retain=RETAINED)
    forget = scored.said["forget"]
    found = {
        "numbers": scored.numbers(),
        "answer": forget.answer,
        "correct": forget.correct,
        "wrong": forget.wrong,
        "rouge": forget.rouge,
        "extraction": scored.extraction,
        "long": scored.long.astype(int),
        "members": {name: pair for name, pair in scored.members.items()},
        "retain": per_item(scored.said["retain"], "retain"),
        "rounded": {str(bits): rounded(bench, model, bits) for bits in BITS if also_rounded},
    }
    return json.loads(json.dumps(found, default=lambda a: np.round(a, 6).tolist()))


def rounded(bench: Bench, model: nn.Module, bits: int) -> dict[str, Any]:
    """Forget losses and extraction strength, and retain losses, of a copy with weights of so many bits."""
    copy = quantised(model, bits)
    forget, retain = bench.data(bench.world.forget), bench.data(bench.world.retain[::6])
    counts = extraction.matches(copy, bench.task, forget, 256, Key(0))
    return {
        "answer": losses(bench, copy, forget),
        "retain": losses(bench, copy, retain),
        "extraction": extraction.strength({**counts, "tokens": np.maximum(counts["tokens"], 1)}),
    }


def losses(bench: Bench, model: nn.Module, data: Any) -> np.ndarray:
    """[n] nats per answer token."""
    with torch.no_grad(), eval_mode(model):
        found = [bench.task.nll(model, batch) / bench.task.units(batch) for batch in data.batches(256)]
    return torch.cat(found).double().numpy()


def trained(folder: Path, bench: Bench, seed: int, name: str) -> nn.Module:
    """One of ``MODELS``, from its file where there is one."""
    path, (which, forget) = folder / f"{name}.safetensors", MODELS[name]
    if path.exists():
        return load_weights(llama(bench.task.vocab, SHAPE), path).eval()
    started = time.process_time()
    model = bench.train(int(Key(seed).at("model", which).seed % 2**31), forget=forget, how=TRAINING, shape=SHAPE)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, path)
    say(f"seed {seed}: {name} trained in {time.process_time() - started:.0f} s")
    return model


def case_of(bench: Bench, original: nn.Module, seed: int, kept: list[Point], name: str) -> Case:
    """A copy of the original to work on."""
    model = llama(bench.task.vocab, SHAPE)
    model.load_state_dict(original.state_dict())
    look: Any = Look(bench, LATE if name in LATER else POINTS, name in ROUNDED, kept)
    return Case(model, bench.request(), bench.task, Scope.all(model), rng=Key(seed).at("unlearn"), watch=look)


def curve(bench: Bench, original: nn.Module, seed: int, start: Point, name: str) -> list[Point]:
    """A run looked at along the way; `start` is what the original said."""
    kept = [{"step": 0, **start}]
    RUNS[name]()(case_of(bench, original, seed, kept, name))
    return kept


def task_vector(bench: Bench, original: nn.Module, seed: int, start: Point) -> list[Point]:
    """The original less alpha times what fine-tuning on the forget data changes, without a guard, for every alpha."""
    case = replace(case_of(bench, original, seed, [], "task_vector"), watch=None)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    Descend(forget=NLL(), optimizer=Adam(1e-3), steps=40, batch=BATCH)(case)
    after = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    kept = [{"step": 0, "alpha": 0.0, **start}]
    for alpha in ALPHAS:
        edit(case, extrapolate(before, after, -alpha))
        kept.append({"step": 40, "alpha": alpha, **items(bench, case.model, False)})
    return kept


def one(name: str, seed: int) -> None:
    """One run of one world, and the models that it needs; what has a file is left alone."""
    folder = OUT / f"seed{seed}"
    path = folder / f"{name}.json"
    if path.exists():
        return
    bench, started = Bench.of(worlds.generate(seed)), time.process_time()
    if name in MODELS:
        kept = [{"step": 0, **items(bench, trained(folder, bench, seed, name))}]
    else:
        one("original", seed)
        original = trained(folder, bench, seed, "original")
        start = json.loads((folder / "original.json").read_text())["points"][0]
        started = time.process_time()
        if name == "task_vector":
            kept = task_vector(bench, original, seed, start)
        else:
            kept = curve(bench, original, seed, start, name)
    seconds = time.process_time() - started
    write_bytes(path, json.dumps({"seconds": seconds, "points": kept}).encode())
    say(f"seed {seed}: {name} in {seconds:.0f} s")


def say(text: str) -> None:
    """A line for the log, at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def read(seeds: tuple[int, ...]) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """seed -> run -> points, of the files there are."""
    return {
        seed: {p.stem: json.loads(p.read_text())["points"] for p in sorted((OUT / f"seed{seed}").glob("*.json"))}
        for seed in seeds
    }


def rows_of(worlds_read: Mapping[int, mini_tofu_findings.Runs]) -> list[dict[str, Any]]:
    """A row per world, run and point: the numbers that the figures and tables are made of."""
    found = []
    for seed, runs in worlds_read.items():
        for run, points in runs.items():
            for point in points:
                log10, distance = mini_tofu_findings.quality(point, runs)
                row = {
                    "seed": seed,
                    "run": run,
                    "step": point["step"],
                    "alpha": point.get("alpha"),
                    "log10_quality": log10,
                    "distance": distance,
                    **point["numbers"],
                }
                for bits, part in point["rounded"].items():
                    row[f"forget_probability_int{bits}"] = float(np.exp(-np.array(part["answer"])).mean())
                    row[f"retain_probability_int{bits}"] = float(np.exp(-np.array(part["retain"])).mean())
                    row[f"extraction_strength_int{bits}"] = float(np.mean(part["extraction"]))
                found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return found


def judge(seeds: tuple[int, ...]) -> dict[str, Any]:
    """Everything that goes to the committed file."""
    runs = read(seeds)
    runs = {seed: {name: found[name] for name in NAMES if name in found} for seed, found in runs.items()}
    spent = [json.loads(p.read_text())["seconds"] for seed in seeds for p in (OUT / f"seed{seed}").glob("*.json")]
    settings = {name: repr(make()) for name, make in RUNS.items()}
    return {
        "expunge": __version__,
        "revision": revision(),
        "seeds": list(seeds),
        "data": {str(seed): worlds.generate(seed).digest() for seed in seeds},
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "minutes": round(sum(spent) / 60, 1),
        "model": asdict(SHAPE),
        "training": asdict(TRAINING),
        "settings": settings,
        "drawn": {"collapse": ["gradient_ascent", "grad_diff", "npo_fast"]},
        "findings": mini_tofu_findings.judge(runs),
        "rows": rows_of(runs),
    }


def packed(found: Mapping[str, Any]) -> str:
    """JSON with a row to a line."""
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return json.dumps({**found, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "judge", "write"))
    parser.add_argument("only", nargs="*", help="runs to make; all by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "run":
        for name in given.only or NAMES:
            for seed in SEEDS:
                one(name, seed)
    whole = given.what == "run" and not given.only
    if whole or given.what == "judge":
        found = judge(SEEDS)
        write_bytes(RESULT, packed(found).encode())
        for name, finding in found["findings"].items():
            say(f"{name}: {finding['verdict']}")
    if whole or given.what == "write":
        mini_tofu_pages.write(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
