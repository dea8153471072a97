"""A method's objective by its name, as a run file gives it."""

from __future__ import annotations

import pytest

from expunge import methods
from expunge.core import Refused
from expunge.registry import Bound
from expunge.runner_up import RunnerUp
from expunge.tune_space import space_of


def test_a_name_stands_for_the_objective_with_its_defaults() -> None:
    stage = methods.surgery(forget="RunnerUp")  # type: ignore[arg-type]
    assert isinstance(stage, Bound)
    assert stage == methods.surgery(forget=RunnerUp())
    assert dict(stage.settings)["forget"] == RunnerUp()


@pytest.mark.parametrize(
    ("name", "said"),
    [("RunerUp", "did you mean 'RunnerUp'"), ("EWC", "surgery: forget = 'EWC' cannot be made by its name alone")],
)
def test_a_name_that_is_none_or_not_enough_is_refused(name: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        methods.surgery(forget=name)  # type: ignore[arg-type]


def test_a_search_keeps_an_objective_that_is_fixed() -> None:
    from expunge.registry import methods as registered

    assert "forget" not in space_of(registered()["surgery"], {"forget": "RunnerUp"})
