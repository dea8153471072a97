"""The command line: what it does is what the library does, and each exit status means what it says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import expunge
from expunge import catalogue, cli, perform, registry
from expunge.audit.report import Report, Row
from expunge.cli import main
from expunge.core import RunFailed
from expunge.data import builtin
from expunge.methods.finetune import finetune

ROOT = Path(__file__).resolve().parents[2]
MINE = """
import torch
from torch import nn
from expunge import Classification
from expunge.data.builtin import train

def points(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + 0.5 * torch.randn(rows, 2, generator=draw), labels

def make():
    return nn.Linear(2, 3)

def everything():
    import expunge
    model = train(make, expunge.as_data(points(150, 0)), Classification(3), seed=5)
    return {"model": model, "train": points(150, 0), "test": points(90, 1), "task": Classification(3), "make": make}
"""
RUN = """
[data]
python = "mine.py:everything"
[request]
forget = "y == 2"
[method]
name = "finetune"
lr = 0.02
steps = 5
[run]
out = "out"
seed = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mine(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mine_for_tests", folder / "mine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed_json(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from expunge.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(
        command in found.stdout
        for command in ("demo", "run", "audit", "reference", "tune", "bench", "recommend", "list", "explain")
    )


def test_a_run_gives_the_bits_that_the_library_gives(folder: Path, capsys: pytest.CaptureFixture) -> None:
    shown = printed_json(capsys, "run", "run.toml")
    parts = mine(folder).everything()
    request = expunge.split(parts["train"], forget="y == 2")
    outcome = expunge.unlearn(parts["model"], request, task=parts["task"], method=finetune(lr=0.02, steps=5), seed=7)
    saved = load_file(folder / "out/weights.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in outcome.model.state_dict().items())
    assert shown["record"]["result"] == outcome.record["result"]
    assert shown["record"]["settings"]["steps"] == 5
    written = json.loads((folder / "out/record.json").read_text())
    written.pop("history")
    assert shown["record"] == written


def test_overrides_win_over_the_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    shown = printed_json(capsys, "run", "run.toml", "method.steps=2", "run.seed=8", "run.out=elsewhere/deep")
    assert (shown["record"]["settings"]["steps"], shown["record"]["seed"]) == (2, 8)
    assert shown["record"]["settings"]["lr"] == 0.02
    assert (folder / "elsewhere/deep/weights.safetensors").exists()
    assert not (folder / "out").exists()


def test_paths_of_a_run_file_are_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "deep").mkdir()
    monkeypatch.chdir(folder / "deep")
    assert main(["run", "../run.toml"]) == 0
    assert (folder / "deep/out/record.json").exists()


def test_a_table_with_text_labels_and_a_condition_on_a_column(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pandas")
    rows = [(20 + row, "ab"[row % 2], ("no", "yes", "maybe")[row % 3]) for row in range(30)]
    (folder / "t.csv").write_text("age,kind,said\n" + "".join(f"{a},{k},{s}\n" for a, k, s in rows))
    (folder / "net.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(3, 3)\n")
    net = torch.nn.Linear(3, 3)
    expunge.save_weights(net, folder / "net.safetensors")
    (folder / "t.toml").write_text(
        '[data]\ntrain="t.csv"\nlabel="said"\n[model]\nweights="net.safetensors"\npython="net.py:build"\n'
        '[request]\nforget="age > 45"\n[method]\nname="finetune"\nsteps=1\n'
    )
    shown = printed_json(capsys, "run", "t.toml")
    assert shown["record"]["examples"] == {"forget": sum(age > 45 for age, _, _ in rows), "retain": 26}
    shown = printed_json(capsys, "run", "t.toml", "request.forget=said == maybe")
    assert shown["record"]["examples"]["forget"] == 10
    expected = expunge.split(
        (torch.zeros(30, 1), torch.arange(30)), forget=[n for n, row in enumerate(rows) if row[2] == "maybe"]
    )
    assert expected.forget is not None
    assert main(["run", "t.toml", "request.forget=said == perhaps"]) == 2
    assert main(["run", "t.toml", "request.forget=label == mayb"]) == 2
    assert "did you mean 'maybe'" in capsys.readouterr().err


def test_an_image_folder_end_to_end(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for number in range(12):
        path = folder / "images" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(np.full((4, 4), 20 * number, dtype=np.uint8)).save(path)
    (folder / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))\n"
    )
    expunge.save_weights(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), folder / "net.safetensors")
    (folder / "i.toml").write_text(
        '[data]\ntrain="images"\n[model]\nweights="net.safetensors"\npython="net.py:build"\n'
        '[request]\nforget=[0, 7]\n[method]\nname="finetune"\nsteps=1\n'
    )
    shown = printed_json(capsys, "run", "i.toml")
    assert shown["record"]["examples"] == {"forget": 2, "retain": 10}


def test_the_gate_opens_for_a_retrained_model_and_closes_for_one_that_forgot_nothing(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    code = mine(folder)
    retain = expunge.split(code.points(150, 0), forget="y == 2").retain
    assert retain is not None
    expunge.save_weights(
        builtin.train(code.make, retain, expunge.Classification(3), seed=99), folder / "retrained.safetensors"
    )
    expunge.save_weights(code.everything()["model"], folder / "before.safetensors")
    arguments = ["audit", "run.toml", "audit.retrained=6", "--gate", "--json"]
    assert main([*arguments, "--after", "retrained.safetensors", "--out", "good"]) == 0
    assert main([*arguments, "--after", "before.safetensors", "--out", "bad"]) == 3
    assert "not forgotten" in capsys.readouterr().err
    assert {"report.json", "report.html"} <= {path.name for path in (folder / "bad").iterdir()}
    abouts = [json.loads(path.read_text()) for path in (folder / "out/references/models").glob("*.json")]
    assert sorted(about["identity"]["seed"] for about in abouts) == [8, 9, 10, 11, 12, 13]


def test_a_run_with_references_writes_a_report_and_the_gate_reads_it(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", "run.toml", "audit.retrained=2", "method.steps=1", "--gate"]) == 3
    report = json.loads((folder / "out/report.json").read_text())
    row = next(row for row in report["rows"] if row["kind"] == "method")
    assert row["readings"]["forget_accuracy"]["value"] > 90
    models = folder / "out/references/models"
    first = {path.name: path.stat().st_mtime_ns for path in models.glob("*.safetensors")}
    assert len(first) == 2
    assert main(["run", "run.toml", "audit.retrained=2", "method.steps=1"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in models.glob("*.safetensors")} == first, "they are read back"
    assert main(["run", "run.toml", "audit.retrained=2", "method.steps=1", "audit.epochs=1"]) == 0
    assert len(list(models.glob("*.safetensors"))) == 4, "another recipe, other models"


@pytest.mark.parametrize(("error", "status"), [(RunFailed("it stopped"), 1), (KeyboardInterrupt(), 130)])
def test_exit_statuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: BaseException, status: int
) -> None:
    def fails(spec: object) -> None:
        raise error

    monkeypatch.setattr(perform, "perform", fails)
    assert main(["run", "run.toml"]) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_hands_its_options_over_and_prints_the_summary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from expunge import demo

    asked = {}
    monkeypatch.setattr(
        demo, "run", lambda **options: asked.update(options) or {"floor": {"digit": 1.5}, "_reports": {}}
    )
    assert printed_json(capsys, "demo", "--out", "there", "--seed", "4") == {"floor": {"digit": 1.5}}
    assert asked == {"out": Path("there"), "seed": 4}
    assert main(["demo", "--seed", "-1"]) == 2


def test_a_fault_of_expunge_itself_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(perform, "perform", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", "run.toml"])


@pytest.mark.parametrize("kind", list(catalogue.KINDS))
def test_list_names_everything_there_is(
    kind: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    entries = printed_json(capsys, "list", kind)
    names = {"methods": registry.methods, "measures": registry.measures, "tasks": registry.tasks}
    names |= {"objectives": lambda: registry.parts("objectives"), "combiners": lambda: registry.parts("combiners")}
    found = [entry["name"] for entry in entries]  # type: ignore[index]
    assert set(found) >= set(names.get(kind, lambda: builtin.SUITES)())
    assert all(entry["summary"] for entry in entries)  # type: ignore[index]
    assert main(["list", kind]) == 0
    assert all(name in capsys.readouterr().out for name in found[:1])


def test_explain_says_what_the_docstring_says(capsys: pytest.CaptureFixture) -> None:
    shown = printed_json(capsys, "explain", "finetune")
    rate = next(setting for setting in shown["settings"] if setting["name"] == "lr")
    assert rate == {
        "name": "lr",
        "default": "0.01",
        "kind": "number",
        "range": "> 0",
        "meaning": "learning rate of SGD, > 0.",
    }
    assert main(["explain", "finetune"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("arXiv:1911.04933", "momentum", "weight_decay", "Cost", "Departures"))


@pytest.mark.parametrize("name", list(registry.methods()))
def test_every_method_has_a_page_with_every_setting(name: str) -> None:
    page = catalogue.page(name)
    for setting in registry.methods()[name].settings():
        assert f"| `{setting}` |" in page
    assert "Args:" not in page


def test_arguments_of_a_docstring() -> None:
    doc = "One.\n\nText.\n\nArgs:\n    lr: rate,\n        in (0, 1].\n    a, b: both.\n\nRaises:\n    Refused: always."
    assert catalogue.arguments(doc) == {"lr": "rate, in (0, 1].", "a": "both.", "b": "both."}
    assert catalogue.body(doc) == "Text.\n\n\nRaises:\n    Refused: always."


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/generate.py on a repository of its own."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, place in (
        ("ROOT", ""),
        ("METHODS", "docs/methods"),
        ("REFERENCE", "docs/reference"),
        ("README", "README.md"),
    ):
        monkeypatch.setattr(module, name, tmp_path / place)
    return module


def test_generated_pages_and_their_check(generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "README.md").write_text("top\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nbottom\n")
    assert generate.main(check=True) == 1
    assert generate.main(check=False) == 0
    assert generate.main(check=True) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("top\n<!-- methods:begin -->\n| method |")
    assert readme.endswith("<!-- methods:end -->\nbottom\n")
    assert "[finetune](docs/methods/finetune.md)" in readme
    assert {path.stem for path in (tmp_path / "docs/methods").iterdir()} == set(registry.methods())
    (tmp_path / "docs/methods/finetune.md").write_text("edited by hand")
    (tmp_path / "docs/methods/gone.md").write_text("of a method that is no more")
    capsys.readouterr()
    assert generate.main(check=True) == 1
    stale = capsys.readouterr().err
    assert "finetune.md is stale" in stale
    assert "gone.md is stale" in stale
    assert generate.main(check=False) == 0
    assert generate.main(check=True) == 0


def test_without_a_command_it_says_what_there_is_in_one_sentence(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(
        "expunge: say what to do: demo, run, audit, reference, tune, bench, recommend, list or explain"
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"expunge {expunge.__version__}\n"


def test_a_run_without_an_audit_does_not_claim_that_it_forgot(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "run.toml"]) == 0
    said = capsys.readouterr().out
    assert "forgot 50" not in said
    assert "whether it forgot is not known" in said


@pytest.mark.parametrize("given", [None, "2"])
def test_built_in_suites_run_on_one_thread_unless_told_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    (folder / "suite.toml").write_text(RUN.replace('python = "mine.py:everything"', 'suite = "breast_cancer"'))
    assert main(["run", "suite.toml", "request.forget=[999999]"]) == 2
    assert asked == ([1] if given is None else [])
    assert main(["run", "run.toml"]) == 0  # somebody's own model: torch's own choice
    assert len(asked) == (given is None)


def test_a_setting_that_methods_and_audit_share_is_looked_for_in_the_method(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", "run.toml", "lr=1"]) == 2
    assert "did you mean 'method.lr'" in capsys.readouterr().err
    assert main(["run", "run.toml", "method.learnrate=1"]) == 2
    assert "it has lr, momentum" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["not forgotten", "over-forgotten", "cannot tell", "audit broken", "not judged"])
def test_the_gate_opens_for_one_verdict_only(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    def judged(verdict: str) -> Report:
        return Report("Audit", (Row("unlearned", "method", {}, verdict, reasons=("because of this",)),))

    assert cli._gated(judged("forgotten")) == 0
    assert cli._gated(judged(word)) == 3
    assert capsys.readouterr().err.strip() == f"expunge: the gate is closed, the verdict is {word!r}: because of this"
    assert cli._gated(Report("Audit", ())) == 3
