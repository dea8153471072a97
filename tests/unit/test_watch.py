"""Watching a run changes nothing, survives a kill, costs what it says; and what the audit reads from it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import expunge as ex
from expunge.audit.stability import (
    path,
    proportions_difference,
    stability_gap_retain,
    stability_gap_test,
    thinned,
    worst_retain,
    worst_test,
)
from expunge.audit.subject import Subject
from expunge.core import Case, Key, Refused, Request, chain, fork
from expunge.data.builtin import suite
from expunge.descend import Descend, _Run
from expunge.objectives import NLL, RandomLabel
from expunge.optim import SGD, Adam
from expunge.perform import perform
from expunge.run import Outcome
from expunge.spec import RunSpec
from expunge.watch import Watch
from tests.fixtures import NAMES, odd, retrained, tiny

MEASURES = (worst_retain, worst_test, stability_gap_retain, stability_gap_test)


class Killed(BaseException):
    """The nearest thing to a killed process."""


def two_stages(steps: int = 4) -> Any:
    """Two descents, one with live normalisation, and a function between them that knows nothing of watching."""

    def shake(case: Case) -> Case:
        key, rng = case.rng.take()
        generator = key.generator()
        moved = {
            name: p.detach() + 0.02 * torch.randn(p.shape, generator=generator)
            for name, p in case.scope.parameters(case.model).items()
        }
        return ex.edit(replace(case, rng=rng), moved)

    first = Descend(RandomLabel(), NLL(), optimizer=SGD(0.1, 0.9), steps=steps, batch=10)
    return chain(first, shake, replace(first, optimizer=Adam(0.01), norm_stats="live"))


def run(watch: Watch | None, name: str = "odd", out: Path | None = None, stage: Any = None, **changes: Any) -> Outcome:
    found = odd() if name == "odd" else tiny(name)
    stage = two_stages() if stage is None else stage
    return ex.unlearn(
        found.model, found.request, task=found.task, method=stage, seed=3, out=out, watch=watch, **changes
    )


def bits(done: Outcome) -> dict[str, Tensor]:
    return {**dict(done.model.named_parameters()), **dict(done.model.named_buffers())}


def looks(done: Outcome, name: str = "retain") -> list[float]:
    return [row[f"watch/{name}"] for row in done.record["history"] if f"watch/{name}" in row]


class Counting(nn.Module):
    """A model that counts its calls in a buffer, drops out by itself and normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.leave = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.leave(nn.functional.dropout(self.norm(x), 0.3, training=True))


@pytest.mark.parametrize("name", ["odd", *NAMES])
def test_same_bits_with_and_without(name: str, global_randomness: Any) -> None:
    """Weights, buffers, and everything in the history but the looks."""
    plain, watched = run(None, name), run(Watch(every=1, examples=30), name)
    for parameter, value in bits(plain).items():
        assert torch.equal(value, bits(watched)[parameter]), parameter
    assert plain.record["result"] == watched.record["result"]
    stripped = [{k: v for k, v in row.items() if "watch" not in k} for row in watched.record["history"]]
    assert stripped == plain.record["history"]
    assert len(looks(watched)) == 8
    assert "watched" not in plain.record
    for kind in ("forward", "backward"):
        assert plain.record["cost"][kind] == watched.record["cost"][kind]
    assert global_randomness.unchanged()


def test_same_bits_for_a_model_that_counts_its_calls_and_drops_out() -> None:
    generator = torch.Generator().manual_seed(2)
    data = (torch.randn(40, 4, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    request = ex.split(data, forget=list(range(12)))
    torch.manual_seed(0)
    model = Counting()
    done = [
        ex.unlearn(copy.deepcopy(model), request, task=ex.Classification(3), method=two_stages(), watch=watch)
        for watch in (None, Watch())
    ]
    assert all(torch.equal(value, bits(done[1])[name]) for name, value in bits(done[0]).items())


def test_looks_are_the_accuracy_at_that_step() -> None:
    """The last look is what the model that comes back scores, the first what went in; steps go on over stages."""
    found = odd()
    done = run(Watch(every=3, examples=10_000, data={"test": found.test}))
    rows = [number for number, row in enumerate(done.record["history"]) if "watch/retain" in row]
    assert rows == [2, 5], "after steps 3 and 6 of 8"

    def accuracy(model: nn.Module, data: ex.Data) -> float:
        with torch.no_grad():
            batch = data.batch(torch.arange(len(data)))
            return 100 * float((found.task.logits(model.eval(), batch).argmax(1) == batch["y"]).double().mean())

    kept = found.test.select(torch.nonzero(found.test.batch(torch.arange(len(found.test)))["y"] != 3).flatten())
    assert found.request.retain is not None
    assert found.request.forget is not None
    for name, data in (("retain", found.request.retain), ("forget", found.request.forget), ("test", kept)):
        assert done.record["watched"]["start"][f"watch/{name}"] == pytest.approx(accuracy(found.model, data))
        assert done.record["watched"]["end"][f"watch/{name}"] == pytest.approx(accuracy(done.model, data))
    assert done.record["watch"]["probes"]["test"]["examples"] == len(kept), "classes forgotten whole are left out"
    assert done.record["watch"]["unit"] == "%"


@pytest.mark.parametrize("name", ["regression", "causal_lm", "diffusion"])
def test_loss_per_unit_where_there_are_no_labels(name: str) -> None:
    found = tiny(name)
    done = run(Watch(examples=10_000), name)
    assert found.request.retain is not None
    batch = found.task.prepare(found.request.retain.batch(torch.arange(80)), Key(3).at("watch").at("prepare", 0))
    with torch.no_grad():
        losses, units = found.task.nll(found.model.eval(), batch).double(), found.task.units(batch).double()
    start = done.record["watched"]["start"]
    assert start["watch/retain"] == pytest.approx(float(losses.sum() / units.sum()), rel=1e-5)
    draws = torch.randint(80, (4000, 80), generator=torch.Generator().manual_seed(0))
    spread = float((losses[draws].sum(1) / units[draws].sum(1)).std())
    assert start["watch_error/retain"] == pytest.approx(spread, rel=0.1)
    assert done.record["watch"]["unit"] == found.task.unit


def test_what_watching_costs() -> None:
    """Start, end and each look, in rows; as checks, not as work."""
    done = run(Watch(every=2, examples=7))
    sizes = [part["examples"] for part in done.record["watch"]["probes"].values()]
    assert done.record["watch"]["probes"].keys() == {"retain", "forget", "valid"}
    assert sizes == [7, 7, 7]
    assert done.record["cost"]["checks"] - run(None).record["cost"]["checks"] == sum(sizes) * (4 + 2)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_killed_run_goes_on_with_the_same_history(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(every=2, examples=20)
    whole = run(watch, out=tmp_path / "whole", every=0)
    step, count = _Run._step, 0

    def dying(self: _Run) -> None:
        nonlocal count
        if count == at:
            raise Killed
        count += 1
        step(self)

    monkeypatch.setattr(_Run, "_step", dying)
    with pytest.raises(Killed):
        run(watch, out=tmp_path / "killed", every=0)
    monkeypatch.setattr(_Run, "_step", step)
    again = run(watch, out=tmp_path / "killed", every=0)
    assert again.record["history"] == whole.record["history"]
    assert again.record["watched"] == whole.record["watched"]
    assert again.record["cost"]["checks"] == whole.record["cost"]["checks"]
    assert all(torch.equal(value, bits(again)[name]) for name, value in bits(whole).items())
    assert run(watch, out=tmp_path / "killed").record == again.record
    with pytest.raises(Refused, match="watch"):
        run(Watch(every=1, examples=20), out=tmp_path / "killed")


def test_a_run_on_the_side_is_not_watched() -> None:
    seen: list[Case] = []

    def stage(case: Case) -> Case:
        seen.append(case)
        return case

    run(Watch(), stage=stage)
    assert seen[0].watch is not None
    assert fork(seen[0]).watch is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"every": 0}, "every must be a whole number"),
        ({"every": 2.5}, "every must be a whole number"),
        ({"examples": -1}, "examples must be a whole number"),
        ({"examples": True}, "examples must be a whole number"),
        ({"data": {"a/b": None}}, "without a slash"),
        ({"data": {"test": [1, 2]}}, "as_data"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        Watch(**bad)


def test_bad_data_is_refused_before_any_work() -> None:
    found = tiny("classification")
    wrong = ex.as_data((torch.zeros(3, 1, 8, 8), torch.tensor([0, 9, 1])))
    with pytest.raises(Refused, match="test"):
        run(Watch(data={"test": wrong}), "classification")
    with pytest.raises(Refused, match="expected expunge"):
        run(5, "classification")  # type: ignore[arg-type]
    assert found.request.forget is not None
    with pytest.raises(Refused, match="nothing to watch"):
        Watch().probes(Request(), found.task, 0)


def test_a_run_file_can_ask_for_it(tmp_path: Path) -> None:
    document = tmp_path / "run.toml"
    ids = suite("breast_cancer").train.ids[:4].tolist()
    document.write_text(
        f'[data]\nsuite = "breast_cancer"\n[request]\nforget = {ids}\n[method]\nname = "gradient_ascent"\n'
        "steps = 3\n[run]\nwatch = 1\nwatch_examples = 50\n"
    )
    record = perform(RunSpec.read(document)).outcome.record
    assert record["watch"]["every"] == 1
    assert record["watch"]["probes"]["test"]["examples"] == 50
    assert [row for row in record["history"] if "watch/test" in row]
    assert perform(RunSpec.read(document, ["run.watch=0"])).outcome.record["watch"] is None
    with pytest.raises(Refused, match="watch"):
        RunSpec.read(document, ["run.watch=-1"])


# ---- what the audit reads from it --------------------------------------------------------------------------------


def record(values: dict[str, list[float]], unit: str = "%", every: int = 1, end: bool = True) -> dict[str, Any]:
    """A record as ``unlearn`` writes it: start, looks and end of each data set, 200 examples each."""
    count = len(next(iter(values.values()))) - 2

    def row(place: int) -> dict[str, float]:
        found = {f"watch/{name}": line[place] for name, line in values.items()}
        return found if unit == "%" else {**found, **{f"watch_error/{name}": 0.01 for name in values}}

    history: list[dict[str, float]] = []
    for number in range(count * every):
        looked = row(1 + number // every) if (number + 1) % every == 0 else {}
        history.append({"step": float(number), **looked})
    probes = {name: {"examples": 200, "data": ""} for name in values}
    return {
        "watch": {"every": every, "unit": unit, "probes": probes},
        "watched": {"start": row(0), "end": row(-1)},
        "history": history,
    }


def subject(made: dict[str, Any] | None, name: str = "classification", references: int = 0) -> Subject:
    found = tiny(name)
    models = tuple(retrained(name, seed=seed) for seed in range(references))
    return Subject(found.model, found.model, found.request, found.task, found.test, models, record=made)


def test_no_reading_without_watching() -> None:
    for made in (None, {}, run(None, "classification").record):
        assert [measure(subject(made)) for measure in MEASURES] == [None] * 4
    only_retain = subject(record({"retain": [99.0, 50.0, 98.0]}))
    assert worst_test(only_retain) is None
    assert worst_retain(only_retain) is not None


def test_a_known_history() -> None:
    """Down to 60 of 100 at step 2, up to 95 at the end: a gap of 35 points."""
    values = {"retain": [99.0, 80.0, 60.0, 90.0, 95.0], "valid": [70.0, 71.0, 69.0, 70.0, 72.0], "forget": [99.0] * 5}
    made = subject(record(values))
    worst, gap = worst_retain(made), stability_gap_retain(made)
    assert worst is not None
    assert gap is not None
    assert (worst.value, worst.n, worst.unit, worst.better) == (60.0, 200, "%", "higher")
    wilson = binomtest(120, 200).proportion_ci(method="wilson")
    assert (worst.low, worst.high) == (pytest.approx(100 * wilson.low), pytest.approx(100 * wilson.high))
    assert dict(worst.detail) == {"start": 99.0, "end": 95.0, "worst_step": 2.0, "start_to_worst": 39.0}
    assert worst.curves["retain"] == ((0.0, 1.0, 2.0, 3.0, 4.0), (99.0, 80.0, 60.0, 90.0, 95.0))
    assert worst.curves.keys() == {"retain", "forget", "test"}
    assert worst.axes == ("step", "accuracy, %")
    assert (gap.value, gap.unit, gap.better) == (35.0, "points", "lower")
    assert gap.low < 35 < gap.high
    other = stability_gap_test(made)
    assert other is not None
    assert other.value == pytest.approx(3.0)
    assert other.low == 0.0, "an interval of a gap never goes below none"


def test_losses_are_worse_upwards() -> None:
    made = subject(
        record({"retain": [0.5, 2.0, 0.7, 0.6], "valid": [1.0, 0.9, 0.8, 0.8]}, "nats per target"), "regression"
    )
    worst, gap = worst_retain(made), stability_gap_retain(made)
    assert worst is not None
    assert gap is not None
    assert (worst.value, worst.better) == (2.0, "lower")
    assert worst.high - worst.value == pytest.approx(0.0196, rel=1e-3)
    assert gap.value == pytest.approx(1.4)
    assert gap.high - gap.value == pytest.approx(1.96 * math.sqrt(2) * 0.01, rel=1e-3)
    assert gap.detail["start_to_worst"] == pytest.approx(1.5)


def test_the_start_is_no_part_of_the_worst_and_nan_is() -> None:
    rising = path(record({"retain": [10.0, 50.0, 90.0]}), "retain")
    assert rising is not None
    assert (rising.values[rising.worst], rising.gap) == (50.0, 40.0)
    steady = path(record({"retain": [10.0, 90.0, 90.0]}), "retain")
    assert steady is not None
    assert steady.gap == 0
    broken = path(record({"retain": [1.0, math.nan, 2.0]}, "nats"), "retain")
    assert broken is not None
    assert math.isinf(broken.gap)


def test_the_place_of_the_end() -> None:
    """An edit after the last step is one more point; a run that is looked at every other step has its last one."""
    same = path(record({"retain": [99.0, 80.0, 90.0, 90.0]}), "retain")
    assert same is not None
    assert same.steps.tolist() == [0, 1, 2]
    other = path(record({"retain": [99.0, 80.0, 90.0, 85.0]}), "retain")
    assert other is not None
    assert other.steps.tolist() == [0, 1, 2, 3]
    skipped = record({"retain": [99.0, 80.0, 90.0]}, every=3)
    skipped["history"].append({"step": 3.0})
    found = path(skipped, "retain")
    assert found is not None
    assert found.steps.tolist() == [0, 3, 4]


def test_difference_of_proportions() -> None:
    """Against the interval with its score equations solved by bisection; and 0 to 0 of 10 gives no certainty."""

    def ends(share: float, n: int) -> tuple[float, float]:
        grid = np.linspace(0, 1, 2_000_001)
        inside = grid[np.abs(share - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / n) + 1e-12]
        return float(inside[0]), float(inside[-1])

    low, high = proportions_difference(0.6, 0.8, 70)
    (l1, u1), (l2, u2) = ends(0.6, 70), ends(0.8, 70)
    assert low == pytest.approx(0.2 - math.hypot(0.8 - l2, u1 - 0.6), abs=1e-5)
    assert high == pytest.approx(0.2 + math.hypot(u2 - 0.8, 0.6 - l1), abs=1e-5)
    low, high = proportions_difference(0.0, 0.0, 10)
    assert -low == pytest.approx(1.959964**2 / (10 + 1.959964**2))  # Wilson's upper end of none of 10, in closed form
    assert high == -low


def test_a_long_path_keeps_its_worst_point() -> None:
    rng = np.random.default_rng(0)
    values = (90 + rng.normal(size=5000)).tolist()
    values[3210] = 20.0
    found = path(record({"retain": values}), "retain")
    assert found is not None
    x, y = thinned(found)
    assert len(x) <= 242
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, values[0], float(found.steps[-1]), values[-1])
    assert (min(y), x[y.index(min(y))]) == (20.0, 3210.0)


def test_beside_retrained_models_and_on_a_real_run() -> None:
    """Nothing lost along the way is within what retrained models have; a detour through chance is not."""
    good = worst_retain(subject(record({"retain": [100.0, 100.0, 100.0]}), references=3))
    bad = worst_retain(subject(record({"retain": [100.0, 25.0, 100.0]}), references=3))
    assert good is not None
    assert bad is not None
    assert (good.verdict, bad.verdict) == ("within", "outside")
    assert good.reference is not None
    assert good.reference[1] == 100.0
    bumpy = Descend(forget=NLL(), optimizer=SGD(0.3), steps=3)  # training on the forget examples alone, far too fast
    gentle = Descend(retain=NLL(), optimizer=Adam(0.003), steps=40)
    watched = [run(Watch(), "classification", stage=stage).record for stage in (chain(bumpy, gentle), gentle)]
    gaps = [stability_gap_retain(subject(json.loads(json.dumps(one)))) for one in watched]
    assert gaps[0] is not None
    assert gaps[1] is not None
    assert gaps[0].low > gaps[1].value
    row = ex.audit(subject(watched[0], references=2)).row("unlearned")
    assert row.readings["stability_gap_retain"].value == gaps[0].value
