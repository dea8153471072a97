"""``expunge bench``: every cell is there, is what the library gives, is made once, and comes through a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import expunge
from expunge.bench import BenchSpec, bench, pages, requests, turns, words
from expunge.bench.requests import Material
from expunge.bench.table import table
from expunge.cli import main
from expunge.core import Refused
from expunge.data import builtin
from expunge.data.builtin import suite
from expunge.methods.finetune import finetune
from expunge.shelf import Made

SMALL = """suite = "breast_cancer"
seeds = {train = [0, 1], unlearn = [0, 1]}
retrained = 2
[requests]
ten = {random = 10}
malignant = "y == 0"
[methods.finetune]
steps = 2
on.malignant = {steps = 3}
[methods.longer]
method = "finetune"
steps = 4
requests = ["ten"]
[methods.unsir]
"""


def written(folder: Path, text: str, name: str = "small") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    made = bench(written(folder, SMALL), folder / "results", folder / "cells")
    assert made == json.loads((folder / "results/small.json").read_text())
    assert pages.write(made, folder).read_text() == pages.page(made, "page.svg")
    assert (folder / "page.svg").read_text().startswith("<svg")
    return {**made, "_folder": folder}


def test_every_method_request_and_seed_is_there(found: dict[str, Any]) -> None:
    runs = {(run["request"], run["train"], run["unlearn"]): run["rows"] for run in found["runs"]}
    assert len(runs) == len(found["runs"]) == 2 * 2 * 2
    for (request, _, _), rows in runs.items():
        assert set(rows) == {"original", "retrain", "finetune"} | (
            {"longer"} if request == "ten" else {"unsir"} if request == "malignant" else set()
        )
    assert "whole classes" in found["failed"]["ten"]["unsir"]
    assert found["spec"]["methods"]["longer"]["steps"] == 4
    assert found["revision"]
    assert set(found["data"]) == {"train", "test"}
    line = found["table"]["ten"][0]
    values = [run["rows"]["original"]["average_gap"][0] for run in found["runs"] if run["request"] == "ten"]
    assert line["row"] == "original"
    assert line["scores"]["average_gap"]["value"] == pytest.approx(sum(values) / 4)
    assert line["left"] == 1.0


def test_a_row_is_what_the_library_gives(found: dict[str, Any]) -> None:
    data = suite("breast_cancer")
    ids = requests.in_turn(
        data.train, data.train.ids[torch.randperm(456, generator=requests.KEY.at("request").generator())[:10]], 1
    )
    original = data.fit(seed=1)
    outcome = expunge.unlearn(original, ids[0], task=data.task, method=finetune(steps=4), seed=1)
    records = [json.loads(path.read_text()) for path in (found["_folder"] / "cells/cells").glob("*.json")]
    assert outcome.record["result"] in {record["record"].get("result") for record in records}


def test_a_finished_cell_is_not_made_again(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = found["_folder"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("expunge.trainer.train_counted", never)
    again = bench(folder / "small.toml", folder / "again", folder / "cells")
    assert again == {name: value for name, value in found.items() if name != "_folder"}


def test_two_killed_workers_end_in_the_same_table(tmp_path: Path, found: dict[str, Any]) -> None:
    """Kill the run and its workers at random times; give the same command again until it is through."""
    path, luck, kills = written(tmp_path, SMALL), random.Random(0), 0
    command = [sys.executable, "-m", "expunge", "bench", str(path), "--out", str(tmp_path / "results")]
    command += ["--cells", str(tmp_path / "cells"), "--workers", "2", "--json"]
    while True:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        started = time.monotonic()
        patience = luck.uniform(3.0, 6.0) if kills < 3 else 300.0
        while run.poll() is None and time.monotonic() - started < patience:
            time.sleep(0.05)
        if run.poll() is None and kills < 3:
            kills += 1
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            continue
        if run.returncode == 0:
            break
        assert run.stderr is not None
        raise AssertionError(run.stderr.read().decode())
    assert kills
    after = json.loads((tmp_path / "results/small.json").read_text())
    for part in ("table", "runs", "failed", "requests"):
        assert after[part] == found[part], part


def test_turns_end_where_one_request_for_all_does(tmp_path: Path) -> None:
    """The same ten records, at once and in five turns: the same references, and each turn keeps what later ones forget."""
    text = SMALL.replace('malignant = "y == 0"', "in_turn = {random = 10, turns = 5}").replace(
        "on.malignant = {steps = 3}\n", ""
    )
    found = bench(
        written(tmp_path, text.replace("train = [0, 1], unlearn = [0, 1]", "train = [0]")), tmp_path, tmp_path / "cells"
    )
    assert found["requests"]["ten"]["hash"] == found["requests"]["in_turn"]["hash"]
    assert found["requests"]["in_turn"]["forget"] == [2] * 5
    rows = {request: {line["row"]: line for line in lines} for request, lines in found["table"].items()}
    assert rows["in_turn"]["finetune"]["cost"] == pytest.approx(5 * rows["ten"]["finetune"]["cost"])
    assert rows["in_turn"]["retrain"]["scores"] == rows["ten"]["retrain"]["scores"]
    train = suite("breast_cancer").train
    turns = requests.in_turn(train, train.ids[:7], 3)
    assert [turn.data("forget").ids.tolist() for turn in turns] == [
        sorted(train.ids[:7][n::3].tolist(), key=train.ids.tolist().index) for n in range(3)
    ]
    assert [len(turn.data("retain")) for turn in turns] == [len(train) - 3, len(train) - 5, len(train) - 7]
    whole = requests.union(turns, train)
    assert torch.equal(whole.data("forget").ids, train.ids[:7])
    assert torch.equal(whole.data("retain").ids, turns[-1].data("retain").ids)


def test_memorised_records_are_those_a_model_without_them_predicts_worst() -> None:
    data = suite("breast_cancer")
    inside = requests.folds(data.train)
    assert torch.cat(inside).sort().values.tolist() == list(range(len(data.train)))
    models = [data.fit(seed=0)] * requests.FOLDS
    chosen = requests.most_memorised(data.train, data.task, models, 20)
    loss = torch.cat([data.task.nll(models[0], batch) for batch in data.train.batches(1024)]).detach()
    worst = loss[torch.isin(data.train.ids, chosen)]
    rest = loss[~torch.isin(data.train.ids, chosen)]
    assert len(worst) == 20
    assert worst.min() >= rest.max()


def test_bad_examples_are_in_the_training_data_and_not_in_the_references(tmp_path: Path) -> None:
    text = (
        'suite = "digits"\nseeds = {train = [0]}\n[manipulate]\npoison = {target = 0, count = 30}\n[requests]\n'
        "half = {identified = 0.5}\n[methods.finetune]\n"
    )
    spec = BenchSpec.read(written(tmp_path, text))
    plain, material = suite("digits"), Material.of(suite("digits"), spec)
    (request,) = requests.drawn(material, spec.requests["half"], lambda rule, count: torch.empty(0))
    assert len(request.data("forget")) == 15
    assert len(material.clean(request)) == len(plain.train) - 30
    assert material.bad is not None
    assert not torch.isin(material.clean(request).ids, material.bad.ids).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[methods.finetune]", "[methods.finetunne]"), "did you mean 'finetune'"),
        (("random = 10", "rendom = 10"), "rendom"),
        (("random = 10", "random = 10, memorised = 3"), "needs one of random, memorised, worst_case, identified"),
        (("random = 10", "random = 900"), "leaves none to keep"),
        (("random = 10", "identified = 0.5"), "[manipulate]"),
        (('requests = ["ten"]', 'requests = ["tenn"]'), "did you mean 'ten'"),
        (("[methods.longer]", "[methods.retrain]"), "name of a control"),
        (("steps = 4", "stepz = 4"), "did you mean 'steps'"),
        (('suite = "breast_cancer"', 'suite = "breast"'), "did you mean 'breast_cancer'"),
        (("unlearn = [0, 1]", "unlearn = []"), "unlearn"),
    ],
)
def test_a_bad_suite_file_is_refused_before_any_training(
    tmp_path: Path,
    change: tuple[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expunge.trainer.train_counted", lambda *_, **__: pytest.fail("trained"))
    path = written(tmp_path, SMALL.replace(*change))
    assert main(["bench", str(path), "--out", str(tmp_path / "out"), "--cells", str(tmp_path / "cells")]) == 2
    assert says in capsys.readouterr().err


def test_settings_that_a_search_found_stand_below_the_files_own(tmp_path: Path) -> None:
    text = SMALL.replace("retrained = 2", 'retrained = 2\nsettings = "found.json"')
    tried = {"finetune": {"ten": {"settings": {"lr": 0.5}}, "malignant": {"settings": {"steps": 9, "lr": 0.25}}}}
    (tmp_path / "found.json").write_text(json.dumps({"methods": tried}))
    spec = BenchSpec.read(written(tmp_path, text))
    assert spec.methods["finetune"]["on"] == {"ten": {"lr": 0.5}, "malignant": {"steps": 3, "lr": 0.25}}
    settings = dict(spec.stages()["malignant", "finetune"].settings)
    assert (settings["steps"], settings["lr"]) == (3, 0.25)
    assert "on" not in spec.methods["unsir"]
    (tmp_path / "found.json").unlink()
    with pytest.raises(Refused, match="search"):
        BenchSpec.read(written(tmp_path, text))


def test_a_request_may_have_the_settings_of_another(tmp_path: Path) -> None:
    text = SMALL.replace("ten = {random = 10}", 'ten = {random = 10, like = "malignant"}')
    stages = BenchSpec.read(written(tmp_path, text)).stages()
    assert dict(stages["ten", "finetune"].settings)["steps"] == 3
    assert dict(stages["ten", "longer"].settings)["steps"] == 4
    with pytest.raises(Refused, match="did you mean 'malignant'"):
        BenchSpec.read(written(tmp_path, text.replace('"malignant"', '"malignent"', 1)))


def test_a_table_by_hand() -> None:
    """Two seeds: means, Student's interval, shares and costs as they are written down here."""

    def row(name: str, gap: float) -> dict[str, Any]:
        return {
            "row": name,
            "verdict": "v",
            "readings": {"average_gap": {"value": gap, "low": gap - 1, "high": gap + 1}},
        }

    def audit(train: int, gaps: tuple[float, float, float]) -> dict[str, Any]:
        names = ("original", "retrain", "a")
        return {
            "request": "q",
            "train": train,
            "unlearn": 0,
            "audit": 0,
            "rows": [row(name, gap) for name, gap in zip(names, gaps, strict=True)],
        }

    def made(seconds: float, backward: int) -> Made:
        return Made("k", "w", {"cost": {"seconds": seconds, "backward": backward}})

    cells = {("q", "a", 0, 0): made(1.0, 10), ("q", "a", 1, 0): made(3.0, 30)}
    found = table([audit(0, (10.0, 1.0, 2.0)), audit(1, (20.0, 1.0, 6.0))], {"q": [made(8.0, 200)]}, cells)
    line = {line["row"]: line for line in found["table"]["q"]}["a"]
    assert line["scores"]["average_gap"]["value"] == 4.0
    half = 12.706204736432095 * (8**0.5) / 2**0.5  # t of one degree of freedom; sd of 2 and 6 is sqrt(8)
    assert line["scores"]["average_gap"]["high"] == pytest.approx(4 + half)
    assert line["scores"]["average_gap"]["low"] == 0.0
    assert line["left"] == pytest.approx((0.2 + 0.3) / 2)
    assert line["above_floor"] == pytest.approx((1 + 5) / 2)
    assert line["cost"] == pytest.approx(20 / 200)
    assert found["time"]["q"] == {"retrain": [8.0, 1.0], "a": [2.0, 0.25]}


def test_the_page_has_every_line_and_the_drawing_every_row(found: dict[str, Any]) -> None:
    text, svg = pages.page(found, "x.svg"), pages.drawing(found)
    for request, lines in found["table"].items():
        assert f"## {request}" in text
        for line in lines:
            name = words.CONTROL.get(line["row"], line["row"])
            assert f"| {name} |" in text
            assert f">{name}</text>" in svg
    assert "unsir on ten: " in text


def test_a_request_leaves_something_to_keep() -> None:
    with pytest.raises(Refused, match="leaves none"):
        requests.number(1000, 100)
    with pytest.raises(Refused, match="turns"):
        requests.in_turn(builtin.breast_cancer().train, torch.arange(3), 4)


def test_a_sequence_stands_beside_its_union_with_the_verdicts_of_each_run() -> None:
    def run(request: str, train: int, verdict: str, gap: float) -> dict[str, Any]:
        row = {"verdict": verdict, "average_gap": [gap, gap, gap]}
        return {"request": request, "train": train, "unlearn": 0, "audit": 0, "rows": {"finetune": row}}

    runs = [run("whole", 0, "forgotten", 2.0), run("whole", 1, "not forgotten", 3.0)]
    runs += [run("parts", 0, "forgotten", 1.0), run("parts", 1, "forgotten", 1.0)]
    asked = {
        "whole": {"turns": 1, "hash": "a"},
        "parts": {"turns": 10, "hash": "a"},
        "other": {"turns": 5, "hash": "b"},
    }
    found = {"requests": asked, "runs": runs, "table": {"whole": [{"row": "original"}, {"row": "finetune"}]}}
    assert turns.pairs(found) == [("whole", "parts")]
    said = ["finetune", "1 x forgotten, 1 x not forgotten", "2 x forgotten", "1 of 2"]
    (line,) = turns.beside(found, "whole", "parts")
    assert line[:4] == said
    assert line[4].startswith("-1.50 (")
