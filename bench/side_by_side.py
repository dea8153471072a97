"""One method beside its authors' own code: the same network, data, examples to forget and seeds; what each leaves, and its time.

    EXPUNGE_DATA=... python bench/side_by_side.py /elsewhere/ssd.py --seeds 5

The authors' code is not part of this project. The file named on the command line stands beside a copy of it and says how to
call it; docs/reproduction has, for each method, which functions of which revision it called, and how to write that file:

    METHOD = "ssd"                                   # ours
    SETTINGS = {"share": 0.1, "strength": 1.0}       # of ours
    REPOSITORY = "owner/name@revision"
    REQUEST = "y == 3"                               # or a share drawn at random: 0.1
    def theirs(model, problem, seed): ...            # gets a copy of the trained model; returns the model that forgot
    # optional: NAME (of the result), SUITE, EXAMPLES, EPOCHS, make() -> network, ours(model, problem, seed) -> Outcome,
    # train(data, seed) -> model, where a method asks for models trained in its own way,
    # warm(problem): anything that is not to be timed, such as imports

Both get the same trained model, in eval mode, and data as tensors in memory. They run in turn, one thread, and which goes
first changes from seed to seed. Each is timed and its rows are counted on the way in (any forward of the model) and back.
The time is the processor's for this process, which other programs on the machine disturb less; the clock's stands beside it.
Writes ``bench/results/side_by_side/NAME.json``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import expunge as ex
from expunge.audit import intervals
from expunge.bench.cells import Models
from expunge.core import Data, Key, Request
from expunge.data import builtin
from expunge.data.sources import collect, fingerprint
from expunge.journal import write_bytes
from expunge.registry import methods
from expunge.shelf import Shelf
from expunge.trainer import Trainer
from expunge.training_pool import make_all
from expunge.version import revision
from expunge.weights import hash_tensors, tensors_of

RESULTS = Path(__file__).parent / "results" / "side_by_side"
PARTS = ("forget", "retain", "test")


@dataclass(frozen=True)
class Problem:
    """What both sides get.

    Attributes:
        train, test: (x float32 [n, ...], y int64 [n] of classes, or float32 targets).
        forget, retain: int64 rows of `train`.
        request, task: the same for ours.
        make: builds an untrained network. classes: how many; 0 of real targets.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    forget: Tensor
    retain: Tensor
    request: Request
    task: Any
    make: Callable[[], nn.Module]
    classes: int

    def part(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) of some rows of the training data."""
        return self.train[0][rows], self.train[1][rows]


def adapter(path: Path) -> Any:
    """The file that knows the authors' code."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem_of(theirs: Any, suite: builtin.Suite, seed: int) -> Problem:
    """The data and the request of one seed."""
    count = min(getattr(theirs, "EXAMPLES", 5000), len(suite.train))
    train = suite.train.select(torch.arange(count))
    asked = theirs.REQUEST
    if isinstance(asked, float):
        order = torch.randperm(count, generator=Key(seed).at("request").generator())
        request = ex.split(train, train.ids[order[: round(asked * count)]].tolist())
    else:
        request = ex.split(train, asked)
    inside = torch.isin(train.ids, request.data("forget").ids)
    return Problem(
        _arrays(train),
        _arrays(suite.test),
        torch.nonzero(inside).flatten(),
        torch.nonzero(~inside).flatten(),
        request,
        suite.task,
        suite.make,
        getattr(suite.task, "classes", 0),
    )


def _arrays(data: Data) -> tuple[Tensor, Tensor]:
    batch = collect(data)
    return batch["x"], batch["y"]


def now() -> tuple[float, float]:
    """Seconds of this process's processor time, and of the clock."""
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    """What has passed of both."""
    return {name: end - begun for name, begun, end in zip(("seconds", "clock_seconds"), start, now(), strict=True)}


def warm(model: nn.Module, problem: Problem) -> None:
    """What only a first second of work costs (imports, caches, memory from the system) belongs to neither side."""
    stage = methods()["finetune"].build(steps=20, batch=256)
    ex.unlearn(model, problem.request, task=problem.task, method=stage, seed=0)


class Counted:
    """Seconds, and rows through a model and back, of whoever runs inside."""

    def __init__(self, model: nn.Module):
        self.rows = {"forward": 0, "backward": 0}
        self.handle = model.register_forward_hook(self._seen)
        self.since = now()

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        """Itself: the rows of a copy of the model count too."""
        return self

    def _seen(self, module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        self.rows["forward"] += len(first)
        if first.requires_grad:
            first.register_hook(
                lambda gradient: self.rows.__setitem__("backward", self.rows["backward"] + len(gradient))
            )

    def done(self) -> dict[str, float]:
        """What it took."""
        taken = since(self.since)
        self.handle.remove()
        return {**taken, **self.rows}


def measure(problem: Problem) -> str:
    """What the task is judged by: classes by "accuracy", real targets by their "error"."""
    return "accuracy" if problem.classes else "error"


def judged(problem: Problem, said: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[n] whose mean is the score, in %, and [n] losses. Of classes: whether the first is right, and the NLL. Of real targets:
    the absolute error in units of the task's ``scale`` (the suites' targets have standard deviation 1) is both.
    """
    if problem.classes:
        return 100 * (said.argmax(1) == y).double(), nn.functional.cross_entropy(said, y, reduction="none").double()
    error = ((said.reshape(y.shape) - y) / problem.task.scale).abs().double().reshape(len(y), -1).mean(1)
    return 100 * error, error


def scores(model: nn.Module, problem: Problem) -> dict[str, Any]:
    """Accuracy, or mean absolute error and its spread, and how well losses tell forget from test examples: all in %.

    The last is the AUC: 50 where they cannot.
    """
    found: dict[str, Any] = {}
    losses, spread = {}, {}
    model.eval()
    parts = {"forget": problem.part(problem.forget), "retain": problem.part(problem.retain), "test": problem.test}
    with torch.no_grad():
        for name, (x, y) in parts.items():
            said = torch.cat([_logits(model(piece)) for piece in x.split(512)]).float()
            values, loss = judged(problem, said, y)
            score = f"{name}_{measure(problem)}"
            found[score], spread[score], losses[name] = float(values.mean()), float(values.std()), loss.numpy()
    found["membership"] = 100 * float(intervals.auc(-losses["forget"], -losses["test"]))
    return found if problem.classes else {**found, "spread": spread}


def scores_kept(model: nn.Module, problem: Problem, folder: Path) -> dict[str, Any]:
    """``scores`` of a model that many runs share, reckoned once: kept beside the trained models."""
    data = [fingerprint(problem.request.data(part)) for part in ("forget", "retain")]
    path = folder / f"scores-{'-'.join(part[:12] for part in (hash_tensors(tensors_of(model)), *data))}.json"
    if not path.exists():
        write_bytes(path, json.dumps(scores(model, problem)).encode())
    return json.loads(path.read_text())


def _logits(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def ours(theirs: Any, model: nn.Module, problem: Problem, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Our method, as a user calls it, with all its checks; and what it took."""
    start = now()
    if hasattr(theirs, "ours"):
        outcome = theirs.ours(model, problem, seed)
    else:
        stage = methods()[theirs.METHOD].build(**theirs.SETTINGS)
        outcome = ex.unlearn(model, problem.request, task=problem.task, method=stage, seed=seed)
    taken = since(start)
    return outcome.model, {
        **taken,
        **{part: outcome.record["cost"][part] for part in ("forward", "backward")},
        "notes": outcome.notes,
    }


def their(theirs: Any, model: nn.Module, problem: Problem, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """The authors' method; a forward of the model that it was given, or of copies of it, is counted."""
    counted = Counted(model)
    made = theirs.theirs(model, problem, seed)
    return made, counted.done()


def trained(theirs: Any, suite: builtin.Suite, problem: Problem, seed: int, folder: Path) -> list[nn.Module]:
    """The original, and one trained without the forget data; made once for all methods that share them."""
    train = suite.train.select(torch.arange(len(problem.train[0])))
    how = getattr(theirs, "train", suite.recipe)
    models = Models(Trainer(how, suite.make, suite.task), {"train": train, "retain": problem.request.data("retain")})
    jobs = [models.training("original", "train", seed), models.training("retrained", "retain", 1000 + seed)]
    shelf = Shelf(folder)
    made, _ = make_all(shelf, models, jobs, 1, None, "training")
    return [models.read(shelf.check(made[job.key])) for job in jobs]


def one_seed(theirs: Any, suite: builtin.Suite, seed: int, folder: Path) -> dict[str, Any]:
    """Both sides on one trained model."""
    problem = problem_of(theirs, suite, seed)
    original, retrained = trained(theirs, suite, problem, seed, folder)
    found: dict[str, Any] = {
        "seed": seed,
        "original": scores_kept(original, problem, folder),
        "retrained": scores_kept(retrained, problem, folder),
    }
    sides = {"ours": ours, "theirs": their}
    warm(original, problem)
    for side in sorted(sides, reverse=bool(seed % 2)):
        model = copy.deepcopy(original)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # the authors' code draws from it
        made, cost = sides[side](theirs, model, problem, seed)
        found[side] = {**scores(made, problem), "cost": cost}
    return found


def joint(rows: list[dict[str, Any]], score: str, examples: int) -> dict[str, Any]:
    """The difference of the two means with its 95 % interval: over seeds, paired, and over the examples scored.

    Both sides are scored on the same examples of the same trained models, so the part over seeds is Student's interval of
    the differences; the part over examples is that of the standard error of each side's mean: the binomial one of shares,
    from the spread of the errors of real targets. The halves add in squares.
    """
    one, two = (np.array([row[side][score] for row in rows]) for side in ("ours", "theirs"))
    low, high = intervals.t_interval((one - two).tolist())
    noise = 1.96 * np.sqrt(sum(variance(rows, side, score) for side in ("ours", "theirs")) / examples)
    half = float(np.hypot((high - low) / 2, noise))
    difference = float((one - two).mean())
    return {
        "ours": float(one.mean()),
        "theirs": float(two.mean()),
        "difference": difference,
        "half_width": half,
        "half_width_over_seeds": float((high - low) / 2),
        "within": abs(difference) <= half,
    }


def variance(rows: list[dict[str, Any]], side: str, score: str) -> float:
    """Of one example, in squares of %."""
    if score in rows[0][side].get("spread", {}):
        return float(np.mean([row[side]["spread"][score] ** 2 for row in rows]))
    share = np.clip(np.mean([row[side][score] for row in rows]) / 100, 0, 1)
    return float(100**2 * share * (1 - share))


def ratio(rows: list[dict[str, Any]], seconds: str) -> dict[str, float]:
    """Theirs to ours, the geometric mean over seeds and its 95 % interval. Of the processor's seconds, one thread each, where
    other work runs on the machine: it shares the clock's."""
    logs = np.log([row["theirs"]["cost"][seconds] / row["ours"]["cost"][seconds] for row in rows])
    low, high = intervals.t_interval(logs.tolist()) if len(rows) > 1 else (logs[0], logs[0])
    return {"value": float(np.exp(logs.mean())), "low": float(np.exp(low)), "high": float(np.exp(high))}


def summary(theirs: Any, name: str, suite: builtin.Suite, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written."""
    problem = problem_of(theirs, suite, rows[0]["seed"])
    sizes = {"forget": len(problem.forget), "retain": len(problem.retain), "test": len(problem.test[0])}
    sizes_of = {f"{part}_{measure(problem)}": sizes[part] for part in PARTS} | {"membership": sizes["forget"]}
    return {
        "name": name,
        "method": theirs.METHOD,
        "settings": theirs.SETTINGS,
        "repository": theirs.REPOSITORY,
        "request": theirs.REQUEST,
        "suite": suite.name,
        "sizes": sizes,
        "data": fingerprint(problem.request.data("forget")),
        "scores": {score: joint(rows, score, size) for score, size in sizes_of.items()},
        "time_ratio": ratio(rows, "seconds"),
        "clock_ratio": ratio(rows, "clock_seconds"),
        "revision": revision(),
        "machine": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "seeds": rows,
    }


def main() -> None:
    """Run both sides for every seed and write what they left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, default=Path("out/side_by_side"), help="where trained models are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    theirs = adapter(given.theirs)
    suite = builtin.suite(getattr(theirs, "SUITE", "fashion_mnist"))
    if hasattr(theirs, "make"):
        suite = replace(suite, make=theirs.make)
    if hasattr(theirs, "EPOCHS"):
        suite = replace(suite, recipe=replace(suite.recipe, epochs=theirs.EPOCHS))
    if hasattr(theirs, "warm"):
        theirs.warm(problem_of(theirs, suite, 0))
    rows = [one_seed(theirs, suite, seed, given.models) for seed in range(given.seeds)]
    name = getattr(theirs, "NAME", theirs.METHOD)
    found = summary(theirs, name, suite, rows)
    write_bytes(given.out / f"{name}.json", (json.dumps(found, indent=1, default=repr) + "\n").encode())
    for score, line in found["scores"].items():
        print(
            f"{score:16s} ours {line['ours']:7.2f} theirs {line['theirs']:7.2f} difference {line['difference']:+.2f} "
            f"+- {line['half_width']:.2f} {'within' if line['within'] else 'OUTSIDE'}"
        )
    print("theirs / ours, seconds:", {part: round(value, 2) for part, value in found["time_ratio"].items()})


if __name__ == "__main__":
    main()
