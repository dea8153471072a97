"""`expunge audit` on what another tool left: two files of weights, three of row numbers, and no record of expunge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.cli import main

SCRIPT = Path(__file__).parents[2] / "examples" / "elsewhere.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    assert "expunge" not in {
        line.split()[1].split(".")[0] for line in SCRIPT.read_text().splitlines() if "import" in line
    }
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def arguments(**changes: str | None) -> list[str]:
    options: dict[str, str | None] = {
        "data": "digits.npz",
        "model": f"{SCRIPT}:build",
        "before": "before.pt",
        "after": "after.pt",
        "forget": "forget.txt",
        "retain": "retain.txt",
        "test": "test.txt",
        **changes,
    }
    return ["audit", *(part for name, value in options.items() if value is not None for part in (f"--{name}", value))]


def test_the_line_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(), "audit.retrained=3", "audit.epochs=15", "--json", "--gate"]) == 3
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["unlearned"]["verdict"] == "not forgotten"
    assert rows["original"]["verdict"] == "not forgotten"
    assert rows["retrain"]["verdict"] == "3 of 3 pass"
    sizes, lines = (
        report["facts"]["examples"],
        {n: len(Path(f"{n}.txt").read_text().split()) for n in ("forget", "retain", "test")},
    )
    assert (sizes["forget"], sizes["retain"]) == (lines["forget"], lines["retain"])
    assert sizes["test"] + sizes["test_forgotten"] == lines["test"]
    assert sizes["test_forgotten"] > 0
    assert (folder / "out/audit/report.html").is_file()
    files = sorted((folder / "out/audit/references").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 3
    assert main([*arguments(), "audit.retrained=3", "audit.epochs=15", "--json"]) == 0
    assert [path.stat().st_mtime_ns for path in files] == times, "references are trained once"


def test_a_model_retrained_elsewhere_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import elsewhere
    finally:
        sys.path.pop(0)
    with np.load("digits.npz") as file:
        x, y = torch.tensor(file["x"]), torch.tensor(file["y"])
    rows = torch.tensor([int(line) for line in Path("retain.txt").read_text().split()])
    for seed in range(6):
        torch.manual_seed(100 + seed)
        model = elsewhere.build()
        elsewhere.fit(model, x[rows], y[rows], epochs=15, lr=0.05)
        torch.save(model.state_dict(), f"retrained{seed}.pt")
    given = [part for seed in range(1, 6) for part in ("--retrained", f"retrained{seed}.pt")]
    assert main([*arguments(after="retrained0.pt"), *given, "--gate"]) == 0
    assert "verdict: forgotten" in capsys.readouterr().out


def test_without_references_it_cannot_tell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments()) == 0
    assert "verdict: cannot tell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "extra", "sentence"),
    [
        ({"before": None}, [], "missing: --before"),
        ({"forget": None, "data": None}, [], "missing: --data, --forget"),
        ({"forget": "gone.txt"}, [], "there is no index file gone.txt"),
        ({"forget": "retain.txt"}, [], "retain overlaps forget"),
        ({"forget": "far.txt"}, [], "99999"),
        ({"test": "forget.txt"}, [], "forget and test files share 146 ids, the first is 7"),
        ({"test": "far.txt"}, [], "99999"),
        ({"after": "digits.npz"}, [], "digits.npz is not a plain file of tensors"),
        ({"after": "cut.pt"}, [], "does not fit the model"),
        ({"model": f"{SCRIPT}:biuld"}, [], "no function 'biuld'"),
        ({}, ["--also", "relern"], "did you mean 'relearn'"),
        ({}, ["--retrained", "gone.pt"], "no weights file gone.pt"),
        ({}, ["--gate"], "--gate needs something to judge by"),
    ],
)
def test_bad_input_is_one_sentence_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], extra: list[str], sentence: str
) -> None:
    Path("far.txt").write_text("99999\n")
    torch.save({"0.weight": torch.zeros(8, 1, 3, 3)}, "cut.pt")
    assert main([*arguments(**changes), *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("expunge: ")
    assert said.count("\n") == 1
    assert sentence in said
    assert not Path("out/audit/report.json").exists()
