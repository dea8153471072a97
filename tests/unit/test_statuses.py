"""What is not reproduced says why."""

from __future__ import annotations

from expunge.registry import methods


def test_every_method_of_ours_is_reproduced_or_says_why_not() -> None:
    ours = {name: spec for name, spec in methods().items() if spec.build.__module__.startswith("expunge.methods.")}
    silent = [name for name, spec in ours.items() if spec.status == "implemented" and not spec.reason]
    assert len(ours) > 60
    assert silent == []
