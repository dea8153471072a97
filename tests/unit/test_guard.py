"""The guard's plan: when it looks and at how much; that it is cheap in a short run, and stops one that diverges."""

from __future__ import annotations

import pytest

import expunge as ex
from expunge import guard as guards
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, Ascent
from expunge.optim import SGD
from tests import fixtures


@pytest.mark.parametrize(
    ("guard", "steps", "rows", "looks", "examples"),
    [
        (Guard(), 1000, 128, 10, 128),  # long: the whole probe, as often as asked
        (Guard(), 400, 64, 10, 69),  # 0.03 * 25,600 rows over 11 looks
        (Guard(), 80, 63, 5, 32),  # too few rows for ten looks at 32
        (Guard(patience=1), 80, 63, 3, 37),
        (Guard(checks=4), 80, 63, 4, 32),
        (Guard(share=None), 80, 63, 10, 128),
        (Guard(probe=16), 80, 63, 8, 16),
        (Guard(checks=(7, 9, 11, 13, 15, 17)), 80, 63, 7, 32),  # steps that were named are all looked after
        (Guard(), 3, 4, 3, 32),
        (Guard(checks=0), 80, 63, 1, 75),
    ],
)
def test_plan(guard: Guard, steps: int, rows: int, looks: int, examples: int) -> None:
    at, found = guard.plan(steps, rows)
    assert (len(at), found) == (looks, examples)
    assert max(at) == steps
    assert min(at) > 0


@pytest.mark.parametrize("rows", [8, 64, 512])
@pytest.mark.parametrize("steps", [50, 500, 5000])
def test_the_looks_stay_under_their_share(steps: int, rows: int) -> None:
    """Or at the fewest looks at the fewest examples, which are stated."""
    guard = Guard()
    at, examples = guard.plan(steps, rows)
    assert (len(at) + 1) * examples <= max(0.03 * steps * rows, (guard.patience + 3) * 32)


def test_a_short_run_pays_what_the_plan_says_and_moves_as_without_a_guard() -> None:
    data = fixtures.tiny("classification")
    results = []
    for guard in (None, Guard(), Guard(share=None)):
        stage = Descend(forget=NLL(), optimizer=SGD(1e-4), steps=20, batch=8, guard=guard)
        results.append(ex.unlearn(data.model, data.request, task=data.task, method=stage, seed=3))
    probe = min(128, len(data.request.data("retain")))
    quick = 0 if probe <= 32 else 32
    assert [done.record["cost"]["checks"] for done in results] == [0, probe + (6 * quick or 5 * probe), 11 * probe]
    assert len({done.record["result"] for done in results}) == 1


def test_a_short_run_that_diverges_is_still_stopped() -> None:
    data = fixtures.tiny("classification")
    stage = Descend(forget=Ascent(NLL()), optimizer=SGD(3.0), steps=40, batch=8, guard=Guard())
    done = ex.unlearn(data.model, data.request, task=data.task, method=stage, seed=0)
    assert any("stopped at step" in note for note in done.notes)


def test_the_few_alone_do_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are outside their bound the whole probe is read, and decides."""
    data, real = fixtures.tiny("classification"), guards.Sentry._start
    monkeypatch.setattr(Guard, "plan", lambda *_: ({5, 10}, 2))
    monkeypatch.setattr(
        guards.Sentry, "_start", lambda self, of: (0.0, -1.0) if len(of) == 2 else real(self, of)
    )  # no loss is inside the bound of the two
    plan = Descend(forget=NLL(), optimizer=SGD(1e-4), steps=10, batch=8, guard=Guard(patience=1))
    done = ex.unlearn(data.model, data.request, task=data.task, method=plan, seed=0)
    assert done.notes == []
    assert done.record["cost"]["checks"] == 3 * min(128, len(data.request.data("retain"))) + 4
