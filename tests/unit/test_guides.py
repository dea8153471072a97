"""The Python of each guide runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

GUIDES = sorted((Path(__file__).parents[2] / "docs/guides").glob("*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_guide_runs(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL):
        if "expunge.wrap" in block:
            pytest.importorskip("peft")
        exec(compile(block, guide.name, "exec"), names)
    torch.set_rng_state(state)
    if guide.stem == "your-own-model":
        report = names["report"]
        assert (tmp_path / "audit/report.html").exists()
        assert report.row("unlearned").verdict  # type: ignore[attr-defined]
        assert len(names["by_predicate"].forget) > 0  # type: ignore[attr-defined]
        assert names["by_number"].forget.ids.tolist() == [7]  # type: ignore[attr-defined]
