"""The search for settings: what it may vary, by what it judges, what it must never look at, and that it can be killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import expunge
from expunge import tune_rules, tune_trial
from expunge.cli import main
from expunge.core import Data, Key, MissingExtra, Refused, Request
from expunge.data.builtin import Recipe, train
from expunge.objectives import NLL
from expunge.registry import methods
from expunge.tune import tune
from expunge.tune_found import Budget, Tuned
from expunge.tune_kinds import alike
from expunge.tune_rules import Judged
from expunge.tune_space import Dimension, defaults, described, space_of
from expunge.tune_trial import Bench, Trial, hopeless
from expunge.watch import Stopped, Watch

pytest.importorskip("optuna")
CLASSES = 4
TASK = expunge.Classification(CLASSES)
RECIPE = Recipe(epochs=12, lr=0.1, batch=32)
FEW = Budget(trials=5)


def points(rows: int, seed: int, spread: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    return centres[labels] + spread * torch.randn(rows, 2, generator=draw), labels


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, CLASSES))


EVERYTHING = expunge.as_data(points(240, 0))
VALID = expunge.as_data(points(80, 1), ids=range(1000, 1080))


def trained(data: Data = EVERYTHING, seed: int = 3) -> nn.Module:
    return train(make, data, TASK, seed, epochs=RECIPE.epochs, lr=RECIPE.lr, batch=RECIPE.batch)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def a_class(valid: Data | None = None) -> Request:
    return expunge.split(EVERYTHING, forget="y == 2", valid=valid)


def records(valid: Data | None = VALID) -> Request:
    return expunge.split(EVERYTHING, forget=list(range(30)), valid=valid)


def search(model: nn.Module | None, request: Request, **more: Any) -> Tuned:
    """A small one, of finetune."""
    return tune(
        model,
        request,
        **{"task": TASK, "method": "random_label", "budget": FEW, "floor": 20.0, "fixed": {"steps": 6}, **more},
    )


def outcome(found: Tuned) -> list[Any]:
    """What two searches have in common, if they are the same: all but the seconds."""
    return [{**trial.to_json(), "seconds": 0.0} for trial in found.trials] + [found.best, found.settings][1:]


def right(model: nn.Module, data: Data) -> float:
    batch = data.batch(torch.arange(len(data)))
    return 100 * float((model(batch["x"]).argmax(1) == batch["y"]).double().mean())


APPROXIMATE = [name for name, method in methods().items() if method.promise != "exact"]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_every_approximate_method_has_a_space_around_its_defaults(name: str) -> None:
    method = methods()[name]
    space = space_of(method, {})
    assert 1 <= len(space) <= 6
    assert "batch" not in space
    assert defaults(method, space, {}) == {setting: method.settings()[setting].default for setting in space}
    for setting, dimension in space.items():
        for end in (dimension.low, dimension.high):
            assert dimension.setting(dimension.drawn(end)) == end
            method.build(**{setting: end})


def test_spaces_by_hand() -> None:
    known = methods()
    assert described(space_of(known["finetune"], {})) == {"lr": [0.001, 0.1], "steps": [25, 200]}
    assert described(space_of(known["surgery"], {"lr": 0.1})) == {"steps": [10, 80], "tolerance": [-10.0, -0.1]}
    assert described(space_of(known["salun"], {}))["keep"] == [0.05, 1.0], "a share keeps inside its range"
    assert described(space_of(known["fisher_forgetting"], {})) == {"alpha": [1e-7, 1e-5]}
    assert Dimension(-10.0, -0.1, log=True).setting(0.123456) == -0.1235, "sizes of negative numbers, to four digits"
    asked = space_of(known["eupmu"], {"steps": 9}, {"steps": [3, 5], "variant": ["fast", "paper"], "start": [0, 2]})
    assert asked["steps"] == Dimension(3, 5, True, True)
    assert asked["variant"].choices == ("fast", "paper")
    assert asked["start"] == Dimension(0.0, 2.0, False, False)
    assert defaults(known["eupmu"], asked, {"steps": 9}) == {"steps": 5, "variant": "fast", "start": 1.0}


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"lrr": [0.1, 1.0]}, "did you mean 'lr'"),
        ({"lr": [-1.0, 1.0]}, "lr must lie in"),
        ({"lr": 0.1}, r"\[low, high\]"),
        ({"lr": [0.2, 0.1]}, "from a low to a higher"),
        ({"lr": [[0.1], 1.0]}, "may hold numbers"),
        ({"steps": [0.5, 3]}, "whole number"),
    ],
)
def test_spaces_that_cannot_be(space: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        space_of(methods()["finetune"], {}, space)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rule": "blnd"}, "did you mean 'blind'"),
        ({"method": "retrain"}, "nothing to tune"),
        ({"method": "finetun"}, "did you mean 'finetune'"),
        ({"fixed": {"lr": 0.1, "steps": 5, "retain_weight": 1.0}}, "nothing to tune: every setting"),
        ({"floor": -1.0}, "floor must be"),
        ({"seeds": 0}, "seeds must be"),
        ({"rule": "proxy"}, "give train="),
        ({"rule": "proxy", "train": RECIPE, "make": make, "count": 0}, "count of the proxies"),
        ({"rule": "proxy", "problems": []}, "at least one"),
        ({"problems": []}, "belongs to the rule 'proxy'"),
    ],
)
def test_what_is_refused(model: nn.Module, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        search(model, a_class(), **change)


def test_requests_that_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="needs retain data"):
        search(model, Request(forget=a_class().forget))
    with pytest.raises(Refused, match="examples that the model never saw"):
        search(model, records(valid=None))
    with pytest.raises(Refused, match="trials must be"):
        Budget(trials=0)
    two = expunge.split(EVERYTHING.select(torch.nonzero(points(240, 0)[1] < 2).flatten()), forget="y == 1")
    with pytest.raises(Refused, match="use --rule blind"):
        search(None, two, rule="proxy", train=RECIPE, make=make)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"expunge\[tune\]"):
        search(model, a_class())


def test_the_blind_rule_for_records_by_hand(model: nn.Module) -> None:
    request, other = records(), trained(seed=9)
    assert request.forget is not None
    assert request.retain is not None
    judged = tune_rules.blind(model, request, TASK, Key(0)).judge(other)
    expected = (
        abs(right(model, EVERYTHING) - right(other, request.retain))
        + abs(right(model, VALID) - right(other, VALID))
        + abs(right(other, request.forget) - right(model, VALID))
    )
    assert judged.score == pytest.approx(expected, abs=1e-9)
    drops = [right(model, data) - right(other, data) for data in (request.retain, VALID)]
    assert judged.drop == pytest.approx(max(drops), abs=1e-9)


def test_the_blind_rule_for_a_class_is_forgetting_first_and_then_utility(model: nn.Module) -> None:
    request = a_class()
    problem = tune_rules.blind(model, request, TASK, Key(0))
    assert problem.request.retain is not None
    assert request.retain is not None
    assert len(problem.request.retain) == 0.8 * len(request.retain), "the rest is held out of the runs"
    nothing = problem.judge(model)
    assert nothing.score == pytest.approx(right(model, request.data("forget")))
    assert nothing.drop == 0
    without = problem.judge(trained(request.retain))
    assert without.readings["forget"] == 0
    assert without.score < 0.1 < nothing.score
    broken = nn.Sequential(nn.Linear(2, CLASSES))
    nn.init.zeros_(broken[0].weight)
    broken[0].bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    worse = problem.judge(broken)
    assert without.score < worse.score < 100 / len(request.data("forget")), "utility never outweighs one example"


def test_a_proxy_is_judged_as_the_audit_judges(model: nn.Module) -> None:
    request = records(valid=None)
    references = [trained(request.retain, seed) for seed in (21, 22)]
    problem = tune_rules.proxy("p", model, request, VALID, references, TASK, Key(0))
    after = trained(request.retain, 5)
    subject = expunge.Subject(model, after, request, TASK, VALID, tuple(references))
    gaps = [expunge.audit(replace(subject, after=one)).rows for one in (after, model)]
    mine, nothing = (next(row for row in rows if row.kind == "method").readings["average_gap"].value for rows in gaps)
    assert problem.judge(after).score == pytest.approx(mine / nothing)
    assert problem.judge(model).score == pytest.approx(1.0)
    with pytest.raises(Refused, match="no retrained models"):
        tune_rules.proxy("p", model, request, VALID, [], TASK, Key(0))
    with pytest.raises(Refused, match="cannot be told from retraining"):
        tune_rules.proxy("p", model, request, VALID, [model], TASK, Key(0))


def test_proxies_are_other_requests_of_the_same_kind_from_the_retain_data(tmp_path: Path) -> None:
    request = a_class(VALID)
    found = tune_rules.proxies(request, TASK, RECIPE, make, tmp_path, count=3, retrained=1, key=Key(0))
    forgotten = set(request.data("forget").ids.tolist())
    classes = []
    for problem in found:
        parts = [problem.request.data(name) for name in ("forget", "retain", "valid")]
        ids = [set(part.ids.tolist()) for part in parts]
        assert not set.union(*ids) & forgotten
        assert sum(map(len, ids)) == len(set.union(*ids)), "apart from each other"
        classes.append(set(parts[0].batch(torch.arange(len(parts[0])))["y"].tolist()))
        assert not classes[-1] & set(parts[1].batch(torch.arange(len(parts[1])))["y"].tolist())
    assert classes == [{label} for label in dict.fromkeys(next(iter(c)) for c in classes)], "each another class"
    drawn = alike(records(), EVERYTHING, TASK, Key(0), 0)
    assert len(drawn) == 30
    assert len(set(EVERYTHING.batch(drawn)["y"].tolist())) == CLASSES
    part = expunge.split(EVERYTHING, forget=[0, 4, 8, 12, 16, 20])  # six of sixty of one class
    drawn = alike(part, part.data("retain").without([]), TASK, Key(0), 1)
    rows = torch.isin(EVERYTHING.ids, drawn).nonzero().flatten()
    assert len(set(EVERYTHING.batch(rows)["y"].tolist())) == 1
    assert len(rows) == 6
    assert not bool((EVERYTHING.batch(rows)["y"] == 0).any()), "of another class"


def test_a_range_of_targets_is_a_kind_of_its_own() -> None:
    values = torch.linspace(-1, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    data, task = expunge.as_data((values[:, None], values)), expunge.Regression()
    top = expunge.split(data, forget="y > 0.8", valid=data)
    pool = top.data("retain")
    kept = values[torch.isin(data.ids, pool.ids)]
    ranges = [values[torch.isin(data.ids, alike(top, pool, task, Key(0), number))] for number in range(3)]
    assert [len(part) for part in ranges] == [18, 18, 18], "a tenth"
    assert ranges[0].min() > 0.55, "the top of what is kept"
    assert ranges[1].max() < -0.75, "and the bottom"
    for part in ranges:
        assert int(((kept >= part.min()) & (kept <= part.max())).sum()) == 18, "and nothing is left inside"
    scattered = expunge.split(data, forget=list(range(20)))
    part = values[torch.isin(data.ids, alike(scattered, scattered.data("retain"), task, Key(0), 0))]
    assert float(part.max() - part.min()) > 1
    with pytest.raises(Refused, match="all targets of a range"):
        tune_rules.blind(nn.Linear(1, 1), top, task, Key(0))


def test_a_search_is_repeatable_and_leaves_the_global_streams_alone(model: nn.Module) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = search(model, a_class())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert outcome(found) == outcome(search(model, a_class()))
    assert [trial.settings for trial in found.trials[1:]] != [
        trial.settings for trial in search(model, a_class(), seed=1).trials[1:]
    ]
    known = {name: parameter.default for name, parameter in methods()["random_label"].settings().items()}
    assert all(known[name] == value for name, value in found.trials[0].settings.items()), "the defaults come first"
    best = min((trial for trial in found.trials if trial.feasible), key=lambda trial: trial.score)
    assert found.best == best


def test_the_winner_is_what_unlearn_gives(model: nn.Module) -> None:
    request = a_class(VALID)
    found = search(model, request, fixed={"steps": 7})
    assert found.best is not None
    assert found.settings["steps"] == 7
    stage = methods()["random_label"].build(**found.settings)
    run = found.best.runs[0]
    assert (
        expunge.unlearn(model, request, task=TASK, method=stage, seed=run["seed"]).record["result"]
        == found.best.weights[0]
    )


@pytest.mark.parametrize("rule", ["blind", "proxy"])
def test_a_killed_search_goes_on_to_the_same_bits(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    more = {"rule": rule, "train": RECIPE, "make": make, "count": 1, "retrained": 1, "budget": Budget(trials=13)}
    whole = search(model, a_class(), **more)
    tried, count = Bench.tried, 0

    def dies(self: Bench, number: int, *rest: Any) -> Trial:
        nonlocal count
        count += 1
        found = tried(self, number, *rest)
        if count in (4, 11):  # in the startup trials of the sampler, and after them
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Bench, "tried", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(model, a_class(), **more, out=tmp_path / "s")
    (tmp_path / "s/trials/.00003.json.1-1.tmp").write_text('{"half')
    again = search(model, a_class(), **more, out=tmp_path / "s")
    assert count == 13 + 2, "finished trials are not run again"
    assert outcome(again) == outcome(whole)
    assert again.to_json()["settings"] == json.loads((tmp_path / "s/tuned.json").read_text())["settings"]
    assert not {path.suffix for path in (tmp_path / "s").rglob("*") if path.is_file()} - {
        ".json",
        ".safetensors",
        ".lock",
    }
    larger = search(model, a_class(), **{**more, "budget": Budget(trials=14)}, out=tmp_path / "s")
    assert outcome(larger)[:13] == outcome(whole)[:13]
    assert count == 16
    with pytest.raises(Refused, match="another search, which differs from this one in floor"):
        search(model, a_class(), **more, floor=19.0, out=tmp_path / "s")


def test_folders_that_are_refused(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(Refused, match=r"holds no search \(found 'mine.txt'\)"):
        search(model, a_class(), out=tmp_path)
    search(model, a_class(), out=tmp_path / "s", budget=Budget(trials=1))
    (tmp_path / "s/trials/00000.json").write_text('{"number": 0')
    with pytest.raises(Refused, match=r"00000.json cannot be read"):
        search(model, a_class(), out=tmp_path / "s", budget=Budget(trials=1))


def test_the_proxy_rule_never_looks_at_the_real_forget_data_nor_at_the_model() -> None:
    """Other inputs, far away, in place of the real forget data: the same trials to the bit."""
    request = a_class()
    x, y = points(240, 0)
    poisoned = torch.where((y == 2)[:, None], torch.full_like(x, 1e6), x)
    other = expunge.split(expunge.as_data((poisoned, y)), forget="y == 2")
    more = {"rule": "proxy", "train": RECIPE, "make": make, "count": 1, "retrained": 1, "budget": Budget(trials=3)}
    found, again = search(None, request, **more), search(nn.Linear(2, CLASSES), other, **more)
    identity = [dict(one.search["problems"]["proxy 1"]) for one in (found, again)]
    assert outcome(found) == outcome(again)
    names = [name for name in identity[0] if name.startswith(("original", "retrained"))]
    assert [identity[0][name] for name in names] == [identity[1][name] for name in names]


def test_the_floor_rules_out_and_ends_trials_early(model: nn.Module, tmp_path: Path) -> None:
    real = tune_rules.blind(model, a_class(), TASK, Key(0))
    lost = replace(real, judge=lambda after: Judged(0.1, 5.0, {"forget": 1.0}))
    found = search(None, a_class(), rule="proxy", problems=[lost], floor=4.5, out=tmp_path / "s")
    assert [trial.violation for trial in found.trials] == [0.5] * 5
    assert found.best is None
    with pytest.raises(Refused, match=r"none of the 5 settings tried kept the utility within 4.5 points"):
        _ = found.settings
    assert json.loads((tmp_path / "s/tuned.json").read_text())["settings"] is None
    mixed = replace(real, judge=lambda after: Judged(0.1, 1.0, {"forget": 1.0}))
    bench = Bench(methods()["finetune"], {}, (mixed, replace(lost, name="second"), mixed), TASK, 2.0, None, 1, Key(0))
    trial = bench.tried(1, {"steps": 2})
    assert (len(trial.runs), trial.drop, trial.feasible) == (2, 5.0, False), "what broke the floor is not run again"
    assert trial.note == "lost 5 points of utility in run 2 of 3"


def test_the_search_leaves_what_breaks_the_floor(model: nn.Module) -> None:
    """Further is better until it breaks: the sampler goes to that edge, neither to the middle nor to the far end."""
    real = tune_rules.blind(model, a_class(), TASK, Key(0))
    start = model.state_dict()

    def judge(after: nn.Module) -> Judged:
        moved = sum(float((after.state_dict()[name] - start[name]).abs().sum()) for name in start)
        return Judged(-moved, 1000 * moved, {})

    problem = replace(real, judge=judge)
    more = {"method": "finetune", "space": {"lr": [1e-4, 1e-1]}, "fixed": {"steps": 2}, "floor": 5.0}
    found = search(None, a_class(), rule="proxy", problems=[problem], budget=Budget(30), **more)
    far = np.abs(np.log([trial.drop / 5.0 for trial in found.trials]))  # from where it breaks
    assert np.median(far[11:]) < np.median(far[1:11]) / 3
    assert found.best is not None
    assert found.best.feasible
    assert found.best.score == min(trial.score for trial in found.trials if trial.feasible)


def test_a_hopeless_run_is_ended_along_the_way(model: nn.Module) -> None:
    problem = tune_rules.blind(model, a_class(), TASK, Key(0))
    stop = hopeless(TASK, problem)
    said = [stop({"watch/retain": value}) for value in (95.0, 40.0, 90.0, 40.0, 40.0, 40.0)]
    assert said[:-1] == [None] * 5, "patience"
    assert said[-1] is not None
    assert "ended early" in said[-1]
    assert all(hopeless(TASK, problem)({"watch/retain": 25.0}) is None for _ in range(5)), "it knew nothing before"
    stage = expunge.Descend(retain=NLL(), steps=50)
    looks = Watch(5, 16, stop=lambda found: "enough")
    with pytest.raises(Stopped, match="enough") as caught:
        expunge.unlearn(model, a_class(), task=TASK, method=stage, watch=looks)
    assert caught.value.cost["backward"] == 0, "the look before the first step"
    seen: list[float] = []
    watch = Watch(5, 16, stop=lambda found: seen.append(found["watch/retain"]))  # type: ignore[func-returns-value]
    one = expunge.unlearn(model, a_class(), task=TASK, method=stage, watch=watch)
    two = expunge.unlearn(model, a_class(), task=TASK, method=stage)
    assert len(seen) == 1 + 10 + 1
    assert one.record["result"] == two.record["result"], "looking changes nothing"


def test_an_ended_run_costs_what_it_cost_and_can_never_win(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_the_second_look(task: Any, problem: Any) -> Any:
        looks = iter((None, "ended"))
        return lambda found: next(looks)

    monkeypatch.setattr(tune_trial, "hopeless", at_the_second_look)
    bench = Bench(
        methods()["finetune"], {}, (tune_rules.blind(model, a_class(), TASK, Key(0)),), TASK, 2.0, None, 1, Key(0)
    )
    trial = bench.tried(1, {"steps": 40})
    assert (trial.note, trial.feasible, trial.score) == ("ended", False, tune_trial.FAILED)
    assert trial.backward == 5 * 64, "a look after an eighth of 40 steps"


def test_budgets_and_target(model: nn.Module) -> None:
    request = a_class()
    whole = search(model, request)
    first = whole.trials[0].backward
    assert first > 0
    by_rows = search(model, request, budget=Budget(trials=5, backward=first + 1))
    assert (len(by_rows.trials), by_rows.ended) == (2, f"the budget of {first + 1:,} backward rows is spent")
    by_time = search(model, request, budget=Budget(trials=5, seconds=1e-9))
    assert len(by_time.trials) == 1
    near = search(model, request, target=1e9)
    assert (len(near.trials), near.ended) == (1, "the target was met")
    dear = search(model, request, budget=Budget(trials=2, per_run=10))
    assert all("more than 10" in trial.note and not trial.feasible for trial in dear.trials)
    assert dear.trials[0].backward == 0, "declared too dear: not run"


def test_choices_that_come_again_are_not_run_again(model: nn.Module) -> None:
    found = search(model, a_class(), space={"norm_stats": ["frozen", "live"]}, fixed={"steps": 3})
    notes = [trial.note for trial in found.trials]
    assert sum("again" in note for note in notes) >= 3
    assert {trial.settings["norm_stats"] for trial in found.trials} == {"frozen", "live"}


MINE = """
import torch
from torch import nn
import expunge
from expunge.data.builtin import train

def points(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + 0.5 * torch.randn(rows, 2, generator=draw), labels

def make():
    return nn.Linear(2, 3)

def everything():
    x, y = TEST
    task = expunge.Classification(3)
    model = train(make, expunge.as_data(points(150, 0)), task, seed=5)
    return {"model": model, "train": points(150, 0), "test": (x, y), "task": task, "make": make}
"""
RUN = """
[data]
python = "mine.py:everything"
[request]
forget = "y == 2"
[method]
name = "random_label"
batch = 16
[run]
out = "out/r"
seed = 7
[audit]
retrained = 2
epochs = 5
[tune]
floor = 20
proxies = 1
space = {lr = [1e-3, 1e-1], steps = [3, 12]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE.replace("TEST", "points(90, 1)"))
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["tune", "run.toml", "--trials", "4", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("rule", ["blind", "proxy"])
def test_the_command_line_never_reads_tests_nor_references(
    folder: Path, capsys: pytest.CaptureFixture, rule: str
) -> None:
    """Poison both: garbage where the run's retrained models are, noise for test data. The trials are the same bits."""
    clean = printed(capsys, "--rule", rule, "--out", "clean")
    models = folder / "out/r/references/models"
    models.mkdir(parents=True)
    (models / "poison.safetensors").write_bytes(b"poison")
    (folder / "mine.py").write_text(MINE.replace("TEST", "100 * torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)"))
    again = printed(capsys, "--rule", rule, "--out", "again")
    for tree in (clean, again):
        for trial in tree["trials"]:
            trial["seconds"] = 0.0
    assert clean["trials"] == again["trials"]
    assert clean["settings"] == again["settings"]
    assert sorted(path.name for path in models.iterdir()) == ["poison.safetensors"], "and nothing was trained there"


def test_the_command_line_gives_a_section_that_runs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "run.toml", "--trials", "4"]) == 0
    out = capsys.readouterr().out
    assert all(
        part in out for part in ("0 (defaults)", "[method]", "expunge run run.toml method.lr=", "written to out/r-tune")
    )
    tuned = json.loads((folder / "out/r-tune/tuned.json").read_text())
    assert tuned["settings"]["batch"] == 16, "what the file sets stays"
    assert {"revision", "space", "seed", "problems"} <= set(tuned["search"])
    section = (folder / "out/r-tune/method.toml").read_text()
    head, _, tail = RUN.partition("[method]")
    (folder / "run2.toml").write_text(head + section + tail[tail.index("[run]") :].replace("retrained = 2", ""))
    assert main(["run", "run2.toml", "audit.epochs=5", "run.out=done"]) == 0
    settings = json.loads((folder / "done/record.json").read_text())["settings"]
    assert {name: settings[name] for name in tuned["settings"]} == tuned["settings"]
    found = printed(capsys, "--out", "third")
    library = tune_by_hand(folder, found)
    assert [trial["weights"] for trial in found["trials"]] == [list(trial.weights) for trial in library.trials]


def tune_by_hand(folder: Path, found: dict[str, Any]) -> Tuned:
    """The same search by the library's call."""
    import runpy

    parts = runpy.run_path(str(folder / "mine.py"))["everything"]()
    request = expunge.split(parts["train"], forget="y == 2")
    space = {"lr": [1e-3, 1e-1], "steps": [3, 12]}
    more = {"space": space, "fixed": {"batch": 16}, "floor": 20.0, "seed": 7, "budget": Budget(4)}
    return tune(parts["model"], request, task=parts["task"], method="random_label", **more)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--rule", "blnd"], 2, "did you mean 'blind'"),
        (["--trials", "0"], 2, "trials must be"),
        (["method.name=retrain", "method.batch=64"], 2, "nothing to tune"),
        (["tune.space={lrr = [1, 2]}"], 2, "did you mean 'lr'"),
        (["tune.flor=1"], 2, "did you mean 'floor'"),
        (["request.forget=[0, 1, 5, 7]"], 2, "--rule proxy"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], status: int, sentence: str
) -> None:
    assert main(["tune", "run.toml", *arguments]) == status
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_a_search_that_finds_nothing_has_status_1(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_rules, "_drop", lambda *rest: 30.0)
    assert main(["tune", "run.toml", "--trials", "2"]) == 1
    shown = capsys.readouterr()
    assert "lost 30 points of utility" in shown.out
    assert "none of the 2 settings" in shown.err
    assert not (folder / "out/r-tune/method.toml").exists()
