"""``expunge recommend``: what fits, why the rest does not, in the order of what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge as ex
from expunge.cli import main
from expunge.core import Data, Refused
from expunge.data.sources import as_data, collect
from expunge.recommend import Has, collected, kind_of, recommend, released
from expunge.registry import methods
from tests.fixtures import tiny

LINE = {"suite": "s", "task": "classification", "request": "q", "kind": "class", "above_floor": 0.0}


def line(method: str, left: float, cost: float, forgotten: int = 0, **more: Any) -> dict[str, Any]:
    return {
        **LINE,
        "method": method,
        "left": left,
        "cost": cost,
        "verdicts": {"forgotten": forgotten, "not forgotten": 1},
        **more,
    }


def test_the_best_measured_comes_first_and_the_unmeasured_last() -> None:
    measured = [
        line("finetune", 0.5, 0.1),
        line("salun", 0.2, 0.05, 3),
        line("salun", 0.4, 0.07, 1, suite="t"),
        line("npo", 0.1, 0.05, kind="random"),
    ]
    fit, rest = recommend(Has(request="class"), measured)
    assert [advice.method for advice in fit[:2]] == ["salun", "finetune"]
    assert fit[0].left == pytest.approx(0.3)
    assert fit[0].cost == pytest.approx(0.06)
    assert (fit[0].forgotten, fit[0].runs) == (4, 6)
    assert fit[0].suites == ("s", "t")
    npo = next(advice for advice in fit if advice.method == "npo")
    assert npo.left is None
    assert "measured on other requests only" in npo.why
    assert not rest


def test_what_one_lacks_takes_methods_out_with_a_reason() -> None:
    everything = {name for name, method in methods().items() if "classification" in method.tasks}
    fit, rest = recommend(Has(retain=False), [])
    assert {advice.method for advice in fit} | set(rest) == everything
    assert all("retain" not in methods()[advice.method].needs for advice in fit)
    assert rest["finetune"] == "it needs examples to keep"
    fit, rest = recommend(Has(labels=False), [])
    assert {advice.method for advice in fit} == {name for name in everything if not methods()[name].labels}
    assert rest["ssd"] == "it reads labels"
    fit, rest = recommend(Has(original=False), [])
    assert "scrub" in rest
    assert "npo" in {advice.method for advice in fit}, "a cached column takes the teacher's place"
    fit, rest = recommend(Has(guarantee="exact"), [])
    assert {advice.method for advice in fit} == {name for name in everything if methods()[name].promise == "exact"}
    fit, rest = recommend(Has(request="class", time=0.05), [line("finetune", 0.5, 0.1), line("salun", 0.5, 0.04)])
    assert "10 % of retraining" in rest["finetune"]
    assert "salun" in {advice.method for advice in fit}
    assert rest["retrain"] == "it is retraining itself"


@pytest.mark.parametrize(
    "name", [name for name, m in methods().items() if "classification" in m.tasks and not m.labels]
)
def test_a_method_that_says_so_reads_no_label(name: str) -> None:
    """With every label wrong, the same bits. (Guards read labels: here neither run is stopped by one.)"""
    it = tiny("classification")

    def wrong(data: Data) -> Data:
        batch = {key: value for key, value in collect(data).items() if key != "id"}
        shift = 1 + torch.arange(len(data)) % 3
        return as_data({**batch, "y": (batch["y"] + shift) % it.task.classes}, ids=data.ids)

    request = replace(it.request, forget=wrong(it.request.data("forget")), retain=wrong(it.request.data("retain")))
    results = [
        ex.unlearn(it.model, asked, task=it.task, method=name).record["result"] for asked in (it.request, request)
    ]
    assert results[0] == results[1]


def test_lines_come_from_results_files() -> None:
    found = {
        "name": "s",
        "task": "classification",
        "spec": {
            "methods": {"a": {"method": "salun"}, "b": {"method": "salun"}},
            "requests": {"q": "y == 3", "r": {"random": 3, "turns": 1}},
        },
        "table": {
            "q": [
                {"row": "original", "left": 1.0, "above_floor": 1.0, "cost": None, "verdicts": {}},
                {"row": "a", "left": 0.5, "above_floor": 1.0, "cost": 0.1, "verdicts": {"forgotten": 1}},
                {"row": "b", "left": 0.4, "above_floor": 0.5, "cost": 0.2, "verdicts": {}},
            ]
        },
    }
    (only,) = collected([found])
    assert (only["method"], only["left"], only["kind"]) == ("salun", 0.4, "class")


@pytest.mark.parametrize(
    ("asked", "task", "kind"),
    [
        ("y == 3", "classification", "class"),
        ("fine == 5", "classification", "subclass"),
        ("years <= 30", "regression", "range"),
        ({"random": 0.1, "turns": 1}, "classification", "random"),
        ({"random": 100, "turns": 10}, "classification", "turns"),
        ({"worst_case": 10, "turns": 1}, "classification", "worst"),
        ({"memorised": 10, "turns": 1}, "classification", "memorised"),
        ({"identified": 0.5, "turns": 1}, "classification", "corrective"),
        ([1, 2], "classification", "random"),
    ],
)
def test_kinds_of_requests(asked: Any, task: str, kind: str) -> None:
    assert kind_of(asked, {"task": task}) == kind


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--no-retain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fit", "unfit"} == set(found)
    assert main(["recommend", "--request", "clas"]) == 2
    assert "did you mean 'class'" in capsys.readouterr().err
    assert main(["recommend", "--time", "0"]) == 2
    assert main(["recommend", "--task", "regresion"]) == 2
    with pytest.raises(Refused, match="guarantee"):
        Has(guarantee="certain")
    assert {entry["method"] for entry in released()} <= set(methods())
