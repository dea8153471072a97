"""The report in a real browser: no error, no network, nothing cut off, names stay text, and it prints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge.audit import Section, audit, write_page
from expunge.audit.chat import Exchange
from expunge.audit.subject import Reading
from tests.unit.test_audit_measures import answers, retrained_models, subject
from tests.unit.test_audit_report import HISTORY, HOSTILE, record

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
PLACES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = next((path for name in PLACES if (path := shutil.which(name))), None)
        own = Path(started.chromium.executable_path)
        if not own.exists() and found is None:
            pytest.skip("there is no Chromium: `playwright install chromium`, or install it with the system's packages")
        opened = started.chromium.launch(executable_path=None if own.exists() else found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with a banner, every kind of figure, and hostile names of the model, its classes and its files."""
    made = replace(subject(answers(4, 0.1), answers(2, 1.0), retrained_models(8), draws=50), names=(HOSTILE,) * 4)
    made = replace(made, record=record(file=f"{HOSTILE}.csv", history=HISTORY))
    report = audit(made, name=HOSTILE, title=HOSTILE)
    roc = Reading("roc_test", 0.5, 0.4, 0.6, 9, curves={"roc": ((0.0, 0.1, 1.0), (0.0, 0.4, 1.0))}, axes=(HOSTILE, "b"))
    lines = {"unlearned": ((0.0, 1.0), (0.1, 0.5)), HOSTILE: ((0.0, 1.0), (0.1, 0.5), (0.0, 0.4), (0.2, 0.6))}
    relearn = replace(roc, name="relearn_test", curves=lines)
    rows = tuple(
        replace(row, readings={**row.readings, "roc_test": roc, "relearn_test": relearn}) for row in report.rows
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    told = (
        Exchange("forget", HOSTILE, "word " * 400, {"original": f"{HOSTILE}\n\n{'x' * 900}", HOSTILE: ""}),
        Exchange("retain", "\u202etnereffid", "<end>", {"original": "<|user|></dd></dl>", HOSTILE: "&lt;b&gt;"}),
    )
    write_page(path, HOSTILE, [Section(HOSTILE, replace(report, rows=rows, exchanges=told))])
    return path.as_uri()


def opened(browser: Any, address: str, width: int, scheme: str) -> tuple[Any, list[str], list[str]]:
    """The page, what the console and the page complained of, and every address that was asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (said.append("a dialog opened"), dialog.dismiss()))
    page.goto(address)
    page.wait_for_selector(".plot .main-svg")
    return page, said, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_it_renders_without_error_or_network(browser: Any, address: str, width: int, scheme: str) -> None:
    page, said, asked = opened(browser, address, width, scheme)
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    plots = page.locator(".plot").count()
    assert plots >= 8
    assert page.evaluate("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "nothing is wider than the screen"
    )
    wide = "[...document.querySelectorAll('.plot .main-svg')].every(s => s.getBoundingClientRect().right <= innerWidth + 1)"
    assert page.evaluate(wide)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 127")
    assert light == (scheme == "light")
    page.context.close()


def test_hostile_names_stay_text_in_the_browser(browser: Any, address: str) -> None:
    page, said, _ = opened(browser, address, 1440, "light")
    assert page.locator("img").count() == 0
    assert page.locator("b").count() == 0
    assert page.title() == HOSTILE
    assert HOSTILE in page.locator(".banner").inner_text()
    assert page.locator(".plot image").count() == 0
    assert "49" not in page.locator("h1").inner_text()
    assert said == []
    page.context.close()


def test_what_models_answer_stays_text_and_on_the_screen(browser: Any, address: str) -> None:
    page, said, _ = opened(browser, address, 390, "light")
    cards = page.locator(".chat")
    assert cards.count() == 2
    assert cards.nth(0).locator(".asked").inner_text() == HOSTILE
    assert cards.nth(0).locator("dd").all_inner_texts()[1].startswith(HOSTILE)
    assert cards.nth(0).locator("dd").all_inner_texts()[2] == "(nothing)"
    assert cards.nth(1).locator("dd").all_inner_texts() == ["<end>", "<|user|></dd></dl>", "&lt;b&gt;"]
    assert all(cards.nth(n).bounding_box()["width"] <= 390 for n in range(2))
    assert said == []
    page.context.close()


def test_the_verdict_stands_first_with_its_reasons(browser: Any, address: str) -> None:
    page, _, _ = opened(browser, address, 390, "light")
    banner = page.locator(".banner")
    assert banner.locator(".word").inner_text().split() == ["Verdict:", "over-forgotten"]
    assert "Forget accuracy: over-forgot" in banner.inner_text()
    assert banner.bounding_box()["y"] < page.locator("table").first.bounding_box()["y"]
    page.context.close()


def test_a_row_can_be_hidden(browser: Any, address: str) -> None:
    page, _, _ = opened(browser, address, 1440, "light")
    shown = "document.querySelectorAll('#plot-0-0 .scatterlayer .trace').length"
    before = page.evaluate(shown)
    page.locator(".legend input").first.uncheck()
    page.wait_for_function(f"{shown} === {before - 1}")
    page.context.close()


def test_it_prints_to_pdf_with_everything_open(browser: Any, address: str, tmp_path: Path) -> None:
    page, said, _ = opened(browser, address, 1440, "dark")
    path = tmp_path / "report.pdf"
    page.pdf(path=str(path), format="A4")
    content = path.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") >= 2 or len(content) > 100_000
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert said == []
    page.context.close()
