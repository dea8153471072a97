"""The demo's own parts: its requests, its summary, and that its settings are the tuned ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expunge import demo
from expunge.core import Key
from expunge.data import builtin
from expunge.registry import methods

TUNED = Path(__file__).parents[2] / "bench" / "results" / "demo_settings.json"


@pytest.fixture
def quick() -> builtin.Suite:
    """The digits, learnt for two epochs."""
    digits = builtin.suite("digits")
    return replace(digits, recipe=replace(digits.recipe, epochs=2))


def test_settings_are_the_tuned_ones_of_other_requests() -> None:
    found = json.loads(TUNED.read_text())
    assert demo.DIGIT not in found["digits"].values()
    for kind, settings in demo.SETTINGS.items():
        for method, chosen in settings.items():
            assert chosen == found["methods"][method][kind][0]["settings"], f"{method} {kind}"


def test_memorised_records_have_the_largest_loss_under_models_without_them(quick: builtin.Suite) -> None:
    request = demo.most_memorised(quick, quick.train, seed=5)
    assert request.forget is not None
    assert request.retain is not None
    assert len(request.forget) == round(0.1 * len(quick.train))
    order = demo.positions(Key(5).at("folds"), len(quick.train), len(quick.train), 0)
    inside = order[0 :: demo.FOLDS]  # the first fold, done again by hand
    outside = torch.ones(len(quick.train), dtype=torch.bool)
    outside[inside] = False
    model = quick.fit(quick.train.select(torch.nonzero(outside).flatten()), Key(5).at("fold", 0).seed)
    with torch.no_grad():
        batch = quick.train.select(inside).batch(torch.arange(len(inside)))
        loss = torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    forgotten = torch.isin(batch["id"], request.forget.ids)
    assert 0 < int(forgotten.sum()) < len(inside)
    assert float(loss[forgotten].min()) >= float(loss[~forgotten].max())


def test_summary_has_a_row_for_every_method_and_both_controls(
    quick: builtin.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: methods()[name] for name in ("finetune", "ssd")}
    monkeypatch.setattr(demo, "suite", lambda name: quick)
    monkeypatch.setattr(demo, "methods", lambda: chosen)
    monkeypatch.setattr(demo, "REFERENCES", 3)
    demo.run(tmp_path, seed=1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["requests"]) == set(summary["floor"]) == {"digit", "memorised"}
    for rows in summary["requests"].values():
        assert [row["method"] for row in rows] == ["original", "finetune", "ssd", "retrain"]
        for row in rows:
            for score in demo.SCORES:
                assert row[score]["low"] <= row[score]["value"] <= row[score]["high"]
    retrain = summary["requests"]["digit"][-1]
    rows_per_epoch = quick.recipe.batch * -(-int((quick.train.source.columns["y"][quick.train.rows] != 3).sum()) // 64)
    assert retrain["backward_examples"] == 2 * rows_per_epoch
    assert summary["floor"]["digit"] == retrain["average_gap"]["value"]
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page
    assert "https://" not in page.split("plotly", 1)[0]


def test_the_suite_of_digits_has_the_settings_of_the_same_search() -> None:
    tuned = json.loads(TUNED.read_text())
    found = json.loads((TUNED.parents[1] / "suites/found/digits.json").read_text())
    assert found["revision"] == tuned["revision"]
    for name, kinds in tuned["methods"].items():
        assert found["methods"][name]["class_3"]["settings"] == kinds["digit"][0]["settings"]
        assert found["methods"][name]["memorised"]["settings"] == kinds["memorised"][0]["settings"]
