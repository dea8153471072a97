"""Reports: controls in every table, honest notes, hostile names, whole files, a page that needs no network."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from expunge.audit import Report, Row, Section, audit, compare, words, write_page
from expunge.audit.curves import thin
from expunge.audit.judge import Equivalence
from expunge.audit.page import render
from expunge.audit.subject import Reading
from expunge.core import Refused
from expunge.registry import measures
from tests.unit.test_audit_measures import answers, retrained_models, subject

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}<b>&amp;%{x}"
HISTORY = [
    {
        "step": float(i),
        "loss/forget": -0.1 * i,
        "loss/retain": 0.2,
        "cosine": -0.3,
        "multiplier": 1.0,
        "retain_realised": 0.01,
        "retain_predicted": -0.01,
    }
    for i in range(600)
]


def record(**more: object) -> dict[str, object]:
    return {
        "seed": 3,
        "revision": "abc",
        "cost": {"seconds": 1.0, "forward": 10, "backward": 20},
        "history": HISTORY,
        "notes": ["a note <i>"],
        "data": {"forget": "0123"},
        **more,
    }


@pytest.fixture(scope="module")
def report() -> Report:
    base = subject(answers(2, 1.0))
    methods = {HOSTILE: (answers(3, 0.62), record(method=HOSTILE)), "ascent": (answers(4, 0.1), None)}
    references = retrained_models(8)
    return compare(
        base.before,
        methods,
        base.request,
        base.task,
        base.test,
        references,
        [{"seconds": 10.0, "forward": 100, "backward": 100}] * 8,
        title=HOSTILE,
        names=[HOSTILE] * 4,
        draws=100,
    )


class Page(HTMLParser):
    """What a browser would build: elements with their attributes, text outside of scripts, the scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.styles = "", [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts.append(data)
            self.lasttag = ""
        elif self.lasttag == "style":
            self.styles += data
            self.lasttag = ""
        else:
            self.text += data


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render("A title", [Section(HOSTILE, report), Section("second", report, "own words")], "intro"))


def test_every_table_has_its_controls(report: Report) -> None:
    assert [row.name for row in report.rows] == ["original", HOSTILE, "ascent", "retrain"]
    for row in report.rows:
        for name in (
            "average_gap",
            "forget_accuracy",
            "retain_accuracy",
            "test_accuracy",
            "membership_auc",
            "forget_output_distance",
        ):
            reading = row.readings[name]
            assert reading.low <= reading.value <= reading.high
            assert math.isfinite(reading.low)
            assert math.isfinite(reading.high)
    assert report.row("retrain").readings["average_gap"].value == pytest.approx(
        report.row("ascent").readings["average_gap"].detail["floor"]
    )
    assert report.row("original").verdict == "not forgotten"
    assert report.row(HOSTILE).verdict == report.verdict == "forgotten"
    assert report.row("ascent").verdict == "over-forgotten"
    assert report.row("retrain").verdict == "8 of 8 pass"


def test_audit_of_one_model_has_the_same_rows(report: Report) -> None:
    references = retrained_models(8)
    extra = Row("elsewhere", "method", {})
    made = audit(subject(answers(4, 0.1), answers(2, 1.0), references, draws=100), extra_rows=[extra])
    assert [row.name for row in made.rows] == ["original", "unlearned", "elsewhere", "retrain"]
    assert (
        made.row("unlearned").readings["average_gap"].to_json()
        == report.row("ascent").readings["average_gap"].to_json()
    )


def test_it_says_when_the_request_cannot_show_anything() -> None:
    made = audit(subject(answers(1, 0.6), answers(2, 0.6), retrained_models(8)))
    assert any("Doing nothing cannot be told" in note for note in made.notes)
    made = audit(subject(answers(1, 0.6), answers(2, 1.0), retrained_models(8)))
    assert not any("Doing nothing cannot be told" in note for note in made.notes)


def test_it_says_when_references_or_test_data_are_few() -> None:
    for count, sentence in (
        (0, "No retrained model"),
        (1, "Only 1 retrained model was"),
        (2, "Only 2 retrained models were"),
    ):
        made = audit(subject(answers(1, 0.6), answers(2, 1.0), retrained_models(count)))
        assert any(sentence in note for note in made.notes)
    assert not any(
        "retrained model" in note
        for note in audit(subject(answers(1, 0.6), None, retrained_models(3))).notes
        if note.startswith(("No", "Only"))
    )
    made = audit(subject(answers(1, 0.6), None, (), test=None))
    assert any("No test data" in note for note in made.notes)
    assert "membership_auc" not in made.row("unlearned").readings
    assert made.verdict == "cannot tell"


def test_a_method_may_not_take_the_name_of_a_control() -> None:
    base = subject(answers(2, 1.0))
    with pytest.raises(Refused, match="control"):
        compare(base.before, {"retrain": (base.after, None)}, base.request, base.task)


def test_a_broken_model_is_a_row_and_not_the_end() -> None:
    base, broken = subject(answers(2, 1.0)), answers(3, 0.5)
    broken.logits.data[0] = math.nan
    made = compare(
        base.before, {"broken": (broken, None)}, base.request, base.task, base.test, retrained_models(3), draws=50
    )
    assert made.row("broken").verdict == "not judged"
    assert "not finite" in made.row("broken").notes[0]
    assert "broken could not be judged." in made.summary


def test_json_round_trip(report: Report) -> None:
    text = json.dumps(report.to_json(), allow_nan=False)
    again = Report.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.row(HOSTILE).readings["average_gap"] == report.row(HOSTILE).readings["average_gap"]
    reading = Reading("x", math.nan, -math.inf, 1.0, 3)
    assert reading.to_json()["value"] is None
    assert math.isnan(Reading.from_json(json.loads(json.dumps(reading.to_json()))).low)
    with pytest.raises(Refused, match="format"):
        Report.from_json({"format": "other"})


def test_saved_whole_or_not_at_all(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    assert Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text())).rows[0].name == "original"
    before = (tmp_path / "out" / "report.html").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_page(tmp_path / "out" / "report.html", "other", [Section("s", report)])
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_hostile_names_stay_text(report: Report, page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "b", "i", "iframe", "object", "embed", "form", "base"}
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 4
    assert "49" not in page.text.split("A title")[1][:200]
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    plots = json.loads(next(script for script in page.scripts if script.startswith('{"plot-0-0"')))
    names = json.dumps(plots)
    assert "<img" not in names
    assert "&lt;img" in names
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(report.table())
    assert "onerror=alert(1)" in console.export_text()


def test_the_page_asks_the_network_for_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag != "link"
        for name in ("src", "srcset", "data", "poster", "action", "background"):
            assert name not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "http" not in page.scripts[-1]  # our own script; plotly.js holds namespaces and links in its text


def test_the_page_has_every_figure_and_word(page: Page) -> None:
    plots = json.loads(next(script for script in page.scripts if script.startswith('{"plot-0-0"')))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert plots.keys() <= ids
    for wanted in (
        "Gap to retraining",
        "Forget accuracy and retain accuracy",
        "Cost",
        "Conflict: cosine",
        "Change of the retain",
        "What this page does not promise",
        "own words",
        "intro",
        "0123",
        "over-forgot",
        "expected of one more",
    ):
        assert wanted in page.text
    lines = [trace for plot in plots.values() for trace in plot["data"] if trace.get("mode") == "lines"]
    assert lines
    assert max(len(trace["x"]) for trace in lines) <= 240


def test_long_histories_are_averaged_not_cut() -> None:
    at, values = thin(HISTORY, "loss/forget")
    assert at[0] == 0.0
    assert len(at) == 200
    assert values[0] == pytest.approx(-0.1)  # the mean of steps 0, 1, 2
    assert sum(values) * 3 == pytest.approx(sum(step["loss/forget"] for step in HISTORY), rel=1e-4)
    assert thin([*HISTORY[:3], *HISTORY[:3]], "cosine")[0] == [0, 1, 2, 3, 4, 5]


def test_measures_are_registered_with_a_first_line() -> None:
    for name in (
        "average_gap",
        "forget_accuracy",
        "membership_auc",
        "attack_entropy",
        "seconds",
        "test_output_distance",
    ):
        assert (measures()[name].__doc__ or "").splitlines()[0].endswith((".", ";"))


def test_a_table_of_120_columns_loses_no_word(report: Report) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table())
    shown = console.export_text()
    assert "…" not in shown.replace(HOSTILE, "")
    assert all(word in shown for word in ("retraining", "Membership", "accuracy", "over-forgotten"))
    assert max(map(len, shown.splitlines())) <= 120


def test_numbers_that_are_none_survive_files_and_pages(tmp_path: Path) -> None:
    """A run that a guard stopped leaves NaN in its history and its record; a measure may leave it in a curve."""
    odd = {
        "notes": ["stopped"],
        "history": [{"step": 0.0, "loss/forget": None}, {"step": 1.0, "loss/forget": math.nan}],
    }
    base = subject(answers(2, 1.0))
    told = {**odd, "cost": {"seconds": 1.0, "last": math.inf}, "path": tmp_path}
    made = compare(
        base.before, {"a": (answers(3, 0.6), told)}, base.request, base.task, base.test, retrained_models(4), draws=50
    )
    row = made.row("a")
    curve = Reading("lira", 0.5, 0.4, 0.6, 9, curves={"roc": ((0.0, math.nan, 1.0), (0.0, 0.5, 1.0))})
    test = Equivalence("forget_loss", math.nan, math.nan, math.nan, 1.0, "unclear")
    changed = replace(row, readings={**row.readings, "lira": curve}, tests=(*row.tests, test))
    made = replace(made, rows=tuple(changed if one is row else one for one in made.rows))
    made.save(tmp_path / "out")
    again = Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert math.isnan(again.row("a").tests[-1].difference)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "report.json").read_text() == (tmp_path / "out" / "report.json").read_text()


def test_a_model_may_not_be_called_as_a_control() -> None:
    with pytest.raises(Refused, match="name of a control"):
        audit(subject(answers(3, 0.6), answers(2, 1.0), retrained_models(3), draws=50), name="original")


def test_classes_that_are_forgotten_whole_are_not_said_to_be_all() -> None:
    facts = {"examples": {"forget": 15, "retain": 9}, "forgotten_classes": ["cat"]}
    assert words.summary([], facts) == (
        "15 training examples, among them every one of class “cat”, were to be forgotten; 9 were to be kept."
    )


def test_a_report_that_knows_nothing_of_utility_says_so() -> None:
    made = subject(answers(3, 0.6, 0.2, 0.2), answers(2, 1.0), retrained_models(8), draws=50, test=None)
    made = replace(made, request=replace(made.request, retain=None))
    assert any("of no use otherwise" in note for note in audit(made).notes)
