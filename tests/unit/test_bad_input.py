"""Every kind of bad input to the command line: one sentence, exit status 2, at once, nothing lost."""

from __future__ import annotations

import builtins
import collections
import errno
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expunge import journal
from expunge.cli import main

MINE = """
import torch
from torch import nn
from expunge import Classification

def make():
    return nn.Linear(4, 3)

def everything():
    x = torch.linspace(-1, 1, 240).reshape(60, 4)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 12).reshape(3, 4))
        model.bias.zero_()
    return {"model": model, "train": (x, torch.arange(60) % 3), "task": Classification(3), "make": make}

def without_make():
    return {name: part for name, part in everything().items() if name != "make"}

def label_outside():
    found = everything()
    found["train"][1][7] = 3
    return found

def nan_in_data():
    found = everything()
    found["train"][0][11, 2] = float("nan")
    return found

def nan_in_weights():
    found = everything()
    found["model"].weight.data[1, 1] = float("nan")
    return found

def another_shape():
    return {**everything(), "model": nn.Linear(5, 3)}

def other_classes():
    return {**everything(), "model": nn.Linear(4, 7)}

def nothing():
    return {}

def misspelt():
    return {**everything(), "modell": None}

def raises():
    return {}["absent"]

constant = 3
"""
RUN = """
[data]
python = "mine.py:everything"
[request]
forget = [0, 1, 2]
[method]
name = "finetune"
steps = 3
[run]
out = "out"
"""
TABLE = """
[data]
train = "train.csv"
label = "pay"
classes = 3
[model]
weights = "good.safetensors"
python = "mine.py:make"
[request]
forget = [0]
[method]
name = "finetune"
steps = 3
"""


class Payload:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass(frozen=True)
class Bad:
    """One kind of bad input: what is prepared, what is typed, and words that the sentence must have."""

    name: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    prepare: Callable[[Path, pytest.MonkeyPatch], None] = lambda folder, patch: None


def override(*settings: str) -> tuple[str, ...]:
    return ("run", "run.toml", *settings)


def text(name: str, content: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, patch: (folder / name).parent.mkdir(exist_ok=True) or (folder / name).write_text(content)


def weights(name: str, **tensors: torch.Tensor) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, patch: save_file(tensors, folder / name)


def evil(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def write(folder: Path, patch: pytest.MonkeyPatch) -> None:
        (folder / name).write_bytes(pickle.dumps({"weight": Payload(folder / "the payload ran")}))

    return write


def evil_archive(folder: Path, patch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": Payload(folder / "the payload ran")}, folder / "evil.pt")


def full_by_statistics(folder: Path, patch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))


def full_on_write(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The disk's own error: /dev/full takes nothing."""
    real = builtins.open
    patch.setattr(journal, "open", lambda path, mode: real("/dev/full", mode), raising=False)


def without(module: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, patch: patch.setitem(sys.modules, module, None)


def another_run(folder: Path, patch: pytest.MonkeyPatch) -> None:
    assert main(["run", "run.toml", "run.seed=1"]) == 0


def broken_record(folder: Path, patch: pytest.MonkeyPatch) -> None:
    assert main(["run", "run.toml"]) == 0
    record = folder / "out" / "record.json"
    record.write_text(record.read_text()[:100])


def broken_weights(folder: Path, patch: pytest.MonkeyPatch) -> None:
    assert main(["run", "run.toml"]) == 0
    saved = folder / "out" / "weights.safetensors"
    saved.write_bytes(saved.read_bytes()[:-5])


CASES = [
    Bad("unknown command", ("rnu",), ("No such command 'rnu'", "'run'")),
    Bad("unknown option", ("run", "run.toml", "--jsn"), ("No such option", "--jsn")),
    Bad(
        "no argument",
        ("run",),
        ("without a run file a run needs --task", "missing: --task, --model, --forget, --method"),
    ),
    Bad("unknown kind", ("list", "method"), ("'method'", "did you mean 'methods'")),
    Bad("unknown method to explain", ("explain", "fintune"), ("did you mean 'finetune'",)),
    Bad("unknown suite to bench", ("bench", "digitss"), ("unknown bench suite 'digitss'",)),
    Bad("no run file", ("run", "nowhere.toml"), ("nowhere.toml", "No such file")),
    Bad("a folder as run file", ("run", "."), ("cannot read", "directory")),
    Bad("not TOML", ("run", "bad.toml"), ("bad.toml is not TOML", "line 2"), text("bad.toml", "[data]\nsuite = \n")),
    Bad("not text", ("run", "good.safetensors"), ("good.safetensors",)),
    Bad(
        "unknown section",
        ("run", "bad.toml"),
        ("'metod'", "did you mean 'method'"),
        text("bad.toml", RUN + "[metod]\n"),
    ),
    Bad("no section", ("run", "bad.toml"), ("needs a section 'data'",), text("bad.toml", "[method]\nname='finetune'")),
    Bad("unknown key", override("run.sed=1"), ("[run] has no key 'sed'", "did you mean 'seed'")),
    Bad("key without section", override("seed=1"), ("'seed=1'", "did you mean 'run.seed'")),
    Bad("override without value", override("run.seed"), ("expected section.key=value",)),
    Bad("wrong type", override("run.seed=x"), ("run.seed should be", "integer", "'x'")),
    Bad("negative seed", override("run.seed=-1"), ("run.seed should be", "-1")),
    Bad("wrong type of ids", override("request.forget=3.5"), ("request.forget", "3.5")),
    Bad("two sources", override("data.suite=digits"), ("exactly one of suite, python and train",)),
    Bad(
        "unknown suite",
        ("run", "bad.toml"),
        ("did you mean 'digits'",),
        text("bad.toml", RUN.replace('python = "mine.py:everything"', 'suite = "digit"')),
    ),
    Bad("key of another source", override("data.label=y"), ("[data] label belongs to data from files",)),
    Bad("unknown method", override("method.name=fintune"), ("unknown method 'fintune'", "did you mean 'finetune'")),
    Bad("unknown setting", override("method.stepps=3"), ("no setting 'stepps'", "did you mean 'steps'")),
    Bad("setting out of range", override("method.lr=-0.5"), ("finetune: lr must lie in", "-0.5")),
    Bad("setting that is not a number", override("method.lr=nan"), ("finetune: lr must lie in", "nan")),
    Bad("setting of another type", override("method.steps=1.5"), ("steps must be a whole number", "1.5")),
    Bad("unknown part", override("method.name=salun", 'method.forget={name="NPOO"}'), ("did you mean 'NPO'",)),
    Bad(
        "unknown setting of a part",
        override("method.name=salun", 'method.forget={name="NPO", bta=1}'),
        ("no setting 'bta'", "'beta'"),
    ),
    Bad("no Python file", override("data.python=nowhere.py:f"), ("no Python file nowhere.py",)),
    Bad("no function", override("data.python=mine.py:everythin"), ("no function 'everythin'",)),
    Bad("not a function", override("data.python=mine.py:constant"), ("no function 'constant'",)),
    Bad("not FILE:FUNCTION", override("data.python=mine.py"), ("expected FILE.py:FUNCTION",)),
    Bad(
        "a function that fails",
        override("data.python=mine.py:raises"),
        ("mine.py failed at line", "KeyError", "absent"),
    ),
    Bad(
        "a file that does not parse",
        override("data.python=bad.py:f"),
        ("bad.py failed at line 1", "SyntaxError"),
        text("bad.py", "def f(:\n"),
    ),
    Bad("a function that returns nothing", override("data.python=mine.py:nothing"), ("returned no model",)),
    Bad("a function that misspells", override("data.python=mine.py:misspelt"), ("'modell'", "did you mean 'model'")),
    Bad("id that does not exist", override("request.forget=[5, 999]"), ("forget id 999 does not exist", "0 to 59")),
    Bad("id that repeats", override("request.forget=[5, 5]"), ("forget id 5 repeats",)),
    Bad("empty forget", override("request.forget=[]"), ("the forget set is empty",)),
    Bad("forget that matches nothing", override("request.forget=y == 8"), ("the forget set is empty", "y == 8")),
    Bad("unknown column", override("request.forget=age > 8"), ("no column 'age'",)),
    Bad("condition that cannot be read", override("request.forget=y ~ 8"), ("cannot read the condition",)),
    Bad("empty retain", override("request.forget=y >= 0"), ("the retain set is empty",)),
    Bad(
        "retain that overlaps",
        override("request.forget=[1, 2]", "request.retain=[2, 3]"),
        ("retain overlaps forget", "2"),
    ),
    Bad("retain id that does not exist", override("request.retain=[77]"), ("retain id 77 does not exist",)),
    Bad("label outside the classes", override("data.python=mine.py:label_outside"), ("label 3", "id 7", "0 to 2")),
    Bad("NaN in data", override("data.python=mine.py:nan_in_data"), ("NaN", "id 11")),
    Bad("NaN in weights", override("data.python=mine.py:nan_in_weights"), ("'weight'", "not finite")),
    Bad("model of another input", override("data.python=mine.py:another_shape"), ("cannot be called on the data",)),
    Bad("model of other classes", override("data.python=mine.py:other_classes"), ("(2, 7)", "3 classes")),
    Bad("no weights file", override("model.weights=nowhere.safetensors"), ("no weights file nowhere.safetensors",)),
    Bad(
        "weights of another shape",
        override("model.weights=w.safetensors"),
        ("weight has shape (3, 5), expected (3, 4)",),
        weights("w.safetensors", weight=torch.zeros(3, 5), bias=torch.zeros(3)),
    ),
    Bad(
        "weights with other names",
        override("model.weights=w.safetensors"),
        ("missing bias", "unknown wieght"),
        weights("w.safetensors", wieght=torch.zeros(3, 4), weight=torch.zeros(3, 4)),
    ),
    Bad(
        "NaN in a weights file",
        override("model.weights=w.safetensors"),
        ("not finite",),
        weights("w.safetensors", weight=torch.full((3, 4), torch.nan), bias=torch.zeros(3)),
    ),
    Bad("a pickle", override("model.weights=evil.pkl"), ("could run code", "safetensors"), evil("evil.pkl")),
    Bad(
        "a pickle named safetensors",
        override("model.weights=evil.safetensors"),
        ("not a whole safetensors",),
        evil("evil.safetensors"),
    ),
    Bad("a torch archive with a pickle", override("model.weights=evil.pt"), ("could run code",), evil_archive),
    Bad("scope that matches nothing", override('run.scope=["weigth"]'), ("'weigth'", "did you mean 'weight'")),
    Bad("out below a file", override("run.out=mine.py/out"), ("cannot write to mine.py/out",)),
    Bad("out that is a file", override("run.out=mine.py"), ("cannot write to mine.py",)),
    Bad("out where nothing can be made", override("run.out=/proc/expunge"), ("cannot write to /proc/expunge",)),
    Bad(
        "out with somebody's files",
        override("run.out=mine"),
        ("mine is not empty", "'thesis.tex'"),
        text("mine/thesis.tex", "years"),
    ),
    Bad("out with another run", override(), ("out holds another run", "seed"), another_run),
    Bad("out with a broken record", override(), ("out/record.json",), broken_record),
    Bad("out with broken weights", override(), ("out/weights.safetensors",), broken_weights),
    Bad("out with a broken mark", override(), ("out/run.json cannot be read",), text("out/run.json", "{half")),
    Bad("full disk by its statistics", override(), ("disk of out is full",), full_by_statistics),
    Bad("full disk on writing", override(), ("the disk is full",), full_on_write),
    Bad("missing package", ("run", "table.toml"), ("pandas", "expunge[files]"), without("pandas")),
    Bad("no table", ("run", "table.toml", "data.train=nowhere.csv"), ("no table nowhere.csv",)),
    Bad("table without label", ("run", "table.toml", "data.label=wage"), ("no column 'wage'",)),
    Bad(
        "table with a hole",
        ("run", "table.toml", "data.train=hole.csv"),
        ("column 'c'", "line 3"),
        text("hole.csv", "a,b,c,d,pay\n1,2,3,4,0\n1,2,,4,1\n"),
    ),
    Bad(
        "files without weights",
        ("run", "bad.toml"),
        ("[model] weights",),
        text("bad.toml", TABLE.replace("weights", "# ")),
    ),
    Bad(
        "references that cannot be made",
        override("audit.retrained=1", "data.python=mine.py:without_make"),
        ("no make",),
    ),
    Bad(
        "references that are not there", override('audit.weights=["a.safetensors"]'), ("no weights file a.safetensors",)
    ),
    Bad("gate without references", (*override(), "--gate"), ("--gate", "audit.retrained=3")),
    Bad("audit before a run", ("audit", "run.toml"), ("no weights to audit", "out/weights.safetensors")),
    Bad(
        "audit of other weights",
        ("audit", "run.toml", "--after", "w.safetensors"),
        ("missing bias",),
        weights("w.safetensors", weight=torch.zeros(3, 4)),
    ),
    Bad("audit of a pickle", ("audit", "run.toml", "--after", "evil.pkl"), ("could run code",), evil("evil.pkl")),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it, and the current one."""
    for name, content in (
        ("mine.py", MINE),
        ("run.toml", RUN),
        ("table.toml", TABLE),
        ("train.csv", "a,b,c,d,pay\n1,2,3,4,0\n4,3,2,1,1\n"),
    ):
        (tmp_path / name).write_text(content)
    save_file({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, tmp_path / "good.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The two seconds are for refusing, not for importing torch."""
    import pandas  # noqa: F401
    import pyarrow  # noqa: F401

    for kind in ("methods", "measures", "tasks", "suites", "combiners", "objectives"):
        assert main(["list", kind]) == 0


def files(folder: Path) -> dict[str, bytes]:
    """Every file and its content, but for what Python caches."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input_is_refused_in_one_sentence(
    case: Bad, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    case.prepare(folder, monkeypatch)
    before = files(folder)
    capsys.readouterr()
    start = time.monotonic()
    status = main(case.arguments)
    seconds = time.monotonic() - start
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, ""), printed
    sentence = printed.err.removesuffix("\n")
    assert "\n" not in sentence, sentence
    assert len(sentence) < 300, sentence
    assert "Traceback" not in sentence
    for word in case.words:
        assert word in sentence, sentence
    assert seconds < 2
    assert files(folder) == before


def test_the_names_of_the_cases_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_good_run_file_is_good(folder: Path) -> None:
    """Every case above changes one thing about a run that works."""
    assert main(["run", "run.toml"]) == 0
    assert main(["run", "table.toml", "run.out=table"]) == 0
    assert {"record.json", "weights.safetensors"} <= {path.name for path in (folder / "table").iterdir()}


def test_the_payloads_are_real(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded without protection they run, so the cases above would see it."""
    evil("evil.pkl")(folder, monkeypatch)
    pickle.loads((folder / "evil.pkl").read_bytes())
    assert (folder / "the payload ran").exists()
    (folder / "the payload ran").unlink()
    evil_archive(folder, monkeypatch)
    torch.load(folder / "evil.pt", weights_only=False)
    assert (folder / "the payload ran").exists()


def test_a_disk_that_fills_up_at_the_end_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The weights cannot be written; the same command later finishes, as if nothing had happened."""
    real = builtins.open

    def fills(path: Path, mode: str) -> Any:
        if "weights" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "open", fills, raising=False)
        assert main(["run", "run.toml"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    left = files(folder)
    assert not any(name.startswith("out") and ("weights.safetensors" in name or "record" in name) for name in left)
    assert main(["run", "run.toml"]) == 0
    assert main(["run", "run.toml", "run.out=other"]) == 0
    assert (folder / "out/weights.safetensors").read_bytes() == (folder / "other/weights.safetensors").read_bytes()
