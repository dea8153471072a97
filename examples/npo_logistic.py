"""Gradient ascent collapses, NPO slows down by itself: the logistic study of the NPO paper (arXiv:2404.05868).

Two classes and two sources in 16 dimensions: retain points around -gap, forget points around +gap, whose labels follow the
opposite rule. Logistic regression on 128 fixed random features is trained on both, unlearned by full-batch gradient descent
in four ways, and compared with the same regression trained on the retain points alone, at points that no model has seen.
With a gap the two sources are easy to tell apart; at gap 0 they lie on top of each other and differ by their labels only.

Run: ``python examples/npo_logistic.py`` (``--all`` for gap 0 too, ``--seeds N`` for the median of N data sets)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from expunge import Request, chain, unlearn
from expunge.core import Batch, Case, Data, Key, Stage
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.objectives import NLL, NPO, Ascent
from expunge.optim import SGD
from expunge.tasks.classification import Classification

DIMENSION, FEATURES = 16, 128
FORGET, RETAIN, FRESH = 200, 1000, 1000
SETTINGS = {1.0: (5e-4, 5e-3, 1.0), 0.0: (1e-4, 5e-2, 10.0)}  # gap -> rate of ascent, rate of NPO, its beta


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[b, 2]; only the first class has weights, as in the paper: the logit of the second is 0."""
    first = model(batch["x"])
    return torch.cat([first, torch.zeros_like(first)], 1)


TASK = Classification(2, call=logits)


@dataclass(frozen=True)
class Study:
    """A model trained on everything, one retrained on the rest, what to forget, and fresh points of both sources."""

    trained: nn.Linear
    retrained: nn.Linear
    request: Request
    forget: Batch
    retain: Batch

    def distances(self, model: nn.Module) -> tuple[float, float]:
        """Mean KL(retrained || model) on fresh forget points and on fresh retain points, nats."""
        with torch.no_grad():
            forget, retain = (
                float(TASK.divergence(model, batch, TASK.outputs(self.retrained, batch)).mean())
                for batch in (self.forget, self.retain)
            )
        return forget, retain


@dataclass
class Look:
    """A stage that changes nothing: it writes the distances down."""

    study: Study
    path: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, case: Case) -> Case:
        self.path.append(self.study.distances(case.model))
        return case


def sample(side: float, gap: float, count: int, key: Key) -> tuple[Tensor, Tensor]:
    """Points [count, 16] around side * gap, and labels: at side -1 mostly 0, at side 1 mostly 1, by a logistic rule."""
    generator = key.generator()
    noise = torch.randn(count, DIMENSION, generator=generator, dtype=torch.float64)
    usual = torch.sigmoid(1.0 + noise.sum(1) / DIMENSION**0.5)  # of the label that is usual on this side
    chosen = torch.rand(count, generator=generator, dtype=torch.float64) < usual
    return noise + side * gap, (chosen if side > 0 else ~chosen).long()


def fit(inputs: Tensor, labels: Tensor, steps: int, rate: float = 0.05) -> nn.Linear:
    """Full-batch gradient descent on the mean logistic loss from zero, with its gradient written out."""
    weights, zero_class = inputs.new_zeros(FEATURES), (labels == 0).to(inputs)
    for _ in range(steps):
        error = torch.sigmoid(inputs @ weights).sub_(zero_class)
        weights.addmv_(inputs.T, error, alpha=-rate / len(inputs))
    model = nn.Linear(FEATURES, 1, bias=False, dtype=inputs.dtype)
    model.load_state_dict({"weight": weights[None]})
    return model


def prepare(gap: float, seed: int, steps: int = 20_000) -> Study:
    """Draw the points and their random features, and train the two models."""
    key = Key(seed)
    shape = DIMENSION, FEATURES
    directions = torch.randn(shape, generator=key.at("features").generator(), dtype=torch.float64) / DIMENSION**0.5

    def draw(name: str, side: float, count: int) -> tuple[Tensor, Tensor]:
        points, labels = sample(side, gap, count, key.at(name))
        return (points @ directions).relu(), labels

    forget, retain = draw("forget", 1.0, FORGET), draw("retain", -1.0, RETAIN)
    everything = as_data((torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]])))
    rows = torch.arange(len(everything))
    return Study(
        trained=fit(torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]]), steps),
        retrained=fit(*retain, steps),
        request=Request(forget=everything.select(rows[:FORGET]), retain=everything.select(rows[FORGET:])),
        forget=_whole(as_data(draw("fresh forget", 1.0, FRESH))),
        retain=_whole(as_data(draw("fresh retain", -1.0, FRESH))),
    )


def _whole(data: Data) -> Batch:
    return next(data.batches(len(data)))


def methods(gap: float, steps: int) -> dict[str, Callable[[], Descend]]:
    """Name -> what makes its descent of `steps` full-batch steps."""
    ascent_rate, npo_rate, beta = SETTINGS[gap]

    def descent(forget: Ascent | NPO, rate: float, with_retain: bool) -> Descend:
        retain = NLL() if with_retain else None
        return Descend(forget=forget, retain=retain, optimizer=SGD(rate, momentum=0.0), steps=steps, batch=RETAIN)

    return {
        "GA": lambda: descent(Ascent(), ascent_rate, False),
        "GA+RT": lambda: descent(Ascent(), ascent_rate, True),
        "NPO": lambda: descent(NPO(beta), npo_rate, False),
        "NPO+RT": lambda: descent(NPO(beta), npo_rate, True),
    }


def follow(study: Study, make: Callable[[], Descend], looks: int) -> list[tuple[float, float]]:
    """Forget and retain distance at the start and after each of `looks` descents in a row, from the one original model."""
    look = Look(study)
    stages: list[Stage] = [look]
    for _ in range(looks):
        stages += [make(), look]
    unlearn(study.trained, study.request, task=TASK, method=chain(*stages))
    return look.path


def main(
    gaps: tuple[float, ...] = (1.0,), seeds: int = 1, steps: int = 2000, looks: int = 20
) -> dict[tuple[float, str], list[list[tuple[float, float]]]]:
    """Follow every method at every gap and print the medians over the seeds; returns the paths, one for each seed."""
    paths: dict[tuple[float, str], list[list[tuple[float, float]]]] = {}
    for gap in gaps:
        for seed in range(seeds):
            study = prepare(gap, seed)
            for name, make in methods(gap, steps // looks).items():
                paths.setdefault((gap, name), []).append(follow(study, make, looks))
    table = Table(title=f"KL(retrained || model), median of {seeds} data set{'s' * (seeds > 1)}, {steps} steps")
    for column in ("gap", "method", "forget: start", "lowest", "end", "retain: start", "at lowest", "end"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for (gap, name), found in paths.items():
        table.add_row(f"{gap:g}", name, *(f"{median(column):.4f}" for column in zip(*map(_row, found), strict=True)))
    Console().print(table)
    return paths


def _row(path: list[tuple[float, float]]) -> list[float]:
    lowest = min(path)
    return [path[0][0], lowest[0], path[-1][0], path[0][1], lowest[1], path[-1][1]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="gap 0 too")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    main(gaps=tuple(SETTINGS) if asked.all else (1.0,), seeds=asked.seeds)
