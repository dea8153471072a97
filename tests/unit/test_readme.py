"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_example_forgets_and_reports() -> None:
    state = torch.get_rng_state()
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    torch.set_rng_state(state)
    report = names["report"]
    after = report.row("unlearned").readings["forget_accuracy"].value  # type: ignore[attr-defined]
    before = report.row("original").readings["forget_accuracy"].value  # type: ignore[attr-defined]
    assert before > 90
    assert after < 10
    assert len(report.row("retrain").readings) > 4  # type: ignore[attr-defined]


def test_readme_compositions_are_stages() -> None:
    pytest.importorskip("peft")
    names: dict[str, object] = {}
    exec(compile("import expunge as ex\n" + BLOCKS[1], "README.md", "exec"), names)
    assert callable(names["in_adapter"])
