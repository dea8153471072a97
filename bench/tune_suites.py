"""Find the settings of a benchmark's rows on other requests than those that it reports, and write ``bench/suites/found``.

    python bench/tune_suites.py fashion_mnist --trials 16

    python bench/tune_suites.py fashion_mnist --requests memorised --pool fashion_mnist_full

For each request of the suite file, two proxies are drawn from what that request KEEPS: another class for a class, other
records for records, and for the most memorised records those of the retain data that are. Their originals and references
are trained on retain data alone; the request's own references and the suite's test data have no part in it. Every row gets
the same number of trials, each of which may differentiate `share` of retraining's rows at most (see ``expunge.tune``). A
search that was stopped goes on. With `--pool` the proxy is the same kind of request on as many other records: those of a
larger suite's training data that this suite has not, so that the hardest records are drawn from as hard ones. A request that is ``like`` another has the settings of that one.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from expunge.bench.requests import Material, most_memorised
from expunge.bench.runner import Run
from expunge.bench.suite_file import BenchSpec, Drawn, suite_file
from expunge.core import Data, Key, Refused, Request, RunFailed
from expunge.data import builtin
from expunge.journal import write_bytes
from expunge.registry import methods
from expunge.tune import Budget, tune
from expunge.tune_rules import Problem, proxies, proxy
from expunge.version import revision

KEY = Key(0).at("bench tuning")


class _Search:
    """One suite: its requests, and the proxies for them."""

    def __init__(self, path: Path, trials: int, share: float, workers: int, pool: str | None = None):
        document = path.read_text(encoding="utf-8")
        self.path, self.trials, self.share, self.workers = path, trials, share, workers
        plain = Path("out/bench") / path.stem / "search.toml"
        plain.parent.mkdir(parents=True, exist_ok=True)
        plain.write_text("".join(line for line in document.splitlines(True) if not line.startswith("settings =")))
        self.spec = BenchSpec.read(plain)
        self.run = Run(path.stem, self.spec, plain.parent.absolute(), workers, None)
        self.folder = plain.parent / ("search" if pool is None else f"search_{pool}")
        self.pool = None if pool is None else self.elsewhere(pool)

    def requests(self) -> dict[str, Request]:
        """The requests that settings are searched for: those in one turn."""
        jobs = [self.run.models.training("original", "train", self.spec.seeds.train[0])]
        (original,) = self.run.made(self.run.models, jobs, "training the original")
        found = self.run.requests(original)
        return {name: turns[0] for name, turns in found.items() if self.spec.like(name) == name}

    def elsewhere(self, name: str) -> Run:
        """The same suite on other records of a larger one: as many to train on, half as many to test on."""
        own, larger = self.run.material.suite, builtin.suite(name)
        others = larger.train.without(own.train.ids)
        count = len(own.train)
        if len(others) < count + count // 2:
            raise Refused(f"the suite {name!r} has {len(others)} other records: expected {count + count // 2} or more")
        parts = (others.select(torch.arange(count)), others.select(torch.arange(count, count + count // 2)))
        run = Run(self.path.stem, self.spec, self.folder.absolute(), self.workers, None)
        run.material = Material(replace(own, train=parts[0], test=parts[1]))
        run.models = replace(run.models, data={"train": parts[0]})
        return run

    def other(self, name: str) -> list[Problem]:
        """The request of that name, drawn from other records."""
        run, seed = self.pool, self.spec.seeds.train[0]
        assert run is not None
        (original,) = run.made(run.models, [run.models.training("original", "train", seed)], "training the original")
        (request,) = run.requests(original)[name]
        run.models = replace(run.models, data={**run.models.data, "retain": request.data("retain")})
        jobs = [run.models.training("retrained", "retain", 1 + number) for number in range(2)]
        models = [run.models.read(run.shelf.check(one)) for one in run.made(run.models, jobs, "retraining")]
        first, suite = run.models.read(run.shelf.check(original)), run.material.suite
        return [proxy("other records", first, request, suite.test, models, suite.task, KEY.at(name))]

    def problems(self, name: str, request: Request) -> list[Problem]:
        """Two proxies of a request, or one on other records."""
        if self.pool is not None:
            return self.other(name)
        asked = self.spec.requests[name]
        rule = asked.rule[0] if isinstance(asked, Drawn) else ""
        suite = self.run.material.suite
        return proxies(
            request,
            suite.task,
            suite.recipe,
            suite.make,
            self.folder / "proxies" / name,
            count=2,
            retrained=2,
            key=KEY.at(name),
            draw=self.memorised(len(request.data("forget"))) if rule == "memorised" else None,
            workers=self.workers,
        )

    def memorised(self, count: int) -> Any:
        """(data, seed) -> ids of the data's most memorised records, by the models that the suite's own draw is by."""
        made = self.run.made(self.run.models, self.run.fold_jobs(), "training folds")
        models = [self.run.models.read(self.run.shelf.check(one)) for one in made]
        train, task = self.run.train, self.run.models.trainer.task
        ranked = most_memorised(train, task, models, len(train), ranked=True)

        def draw(data: Data, seed: int) -> Any:
            return [number for number in ranked.tolist() if number in set(data.ids.tolist())][:count]

        return draw

    def budget(self, request: Request) -> Budget:
        """Of one search: a run may cost a share of retraining at most."""
        rows = math.ceil(self.share * self.run.material.suite.recipe.epochs * len(request.data("retain")))
        return Budget(trials=self.trials, per_run=rows)


def searched(search: _Search, rows: list[str], requests: list[str], floor: float) -> dict[str, Any]:
    """row -> request -> what was found, or why nothing was."""
    found: dict[str, Any] = {}
    for name, request in search.requests().items():
        if requests and name not in requests:
            continue
        problems = search.problems(name, request)
        for row, settings in search.spec.methods.items():
            own = {key: value for key, value in settings.items() if key not in ("method", "on", "requests", "space")}
            method = settings.get("method", row)
            if (rows and row not in rows) or name not in settings.get("requests", [name]):
                continue
            if methods()[method].promise == "exact":
                continue
            try:
                best = tune(
                    None,
                    request,
                    task=search.run.models.trainer.task,
                    method=method,
                    rule="proxy",
                    problems=problems,
                    budget=search.budget(request),
                    floor=floor,
                    space=settings.get("space"),
                    fixed=own,
                    out=search.folder / name / row,
                )
                found.setdefault(row, {})[name] = summary(best)
            except (Refused, RunFailed) as error:
                print(f"{name:12s} {row:16s} {error}", flush=True)
                continue
            print(f"{name:12s} {row:16s} {found[row][name]}", flush=True)
    return found


def summary(best: Any) -> dict[str, Any]:
    """The best trial of a search."""
    return {
        "settings": dict(best.settings),
        "score": best.best.score,
        "drop": best.best.drop,
        "trials": len(best.trials),
    }


def main() -> None:
    """Search, and write what was found; rows named on the command line are searched alone, the others kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.045, help="of retraining's rows, that a run may differentiate")
    parser.add_argument("--pool", help="a larger suite, whose other records the proxy is drawn from")
    parser.add_argument("--floor", type=float, default=5.0, help="points of utility that a setting may lose")
    parser.add_argument("--requests", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = suite_file(given.suite)
    result = path.parent / "found" / f"{path.stem}.json"
    found = searched(
        _Search(path, given.trials, given.share, given.workers, given.pool), given.rows, given.requests, given.floor
    )
    before = json.loads(result.read_text())["methods"] if result.exists() else {}
    for row, new in found.items():
        before[row] = {**before.get(row, {}), **new}
    document = {
        "rule": "the audit's average gap as a share of do-nothing's, on two proxies drawn from the retain data",
        "trials": given.trials,
        "share": given.share,
        "revision": revision(),
        "methods": before,
    }
    write_bytes(result, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
