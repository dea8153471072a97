"""A new method is one short file. With nothing else edited it is in the command line, the docs and the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import expunge

ROOT = Path(expunge.__file__).parents[2]
NEEDED = (
    "src",
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/fixtures.py",
    "tests/contract/test_methods.py",
    "docs",
    "README.md",
    "pyproject.toml",
    "bench/suites",
)
SHARED = """
    Args:
        lr: learning rate of SGD, > 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: examples per step, >= 1.
    \"\"\"
"""
HEAD = '''"""Weighted descent (a method that exists only in this test)."""
from expunge.combine import Weighted
from expunge.core import Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, Positive, method

ROWS = "steps * (min(batch, n_forget) + min(batch, n_retain))"


'''
GOOD = (
    HEAD
    + '''@method(paper="arXiv:0000.00000", needs={"forget", "retain"}, dose="steps", tasks=("classification",),
        cost={"forward": ROWS, "backward": ROWS})
def brand_new(*, lr: Positive = 0.05, steps: Count = 60, batch: AtLeastOne = 32) -> Stage:
    """Descend on wrong labels and on the retain data. It does not promise that anything is forgotten.
'''
    + SHARED
    + """    return Descend(RandomLabel(), NLL(), combine=Weighted({"retain": 2.0}), optimizer=SGD(lr), steps=steps,
                   batch=batch, guard=Guard())
"""
)
BAD = (
    HEAD
    + '''@method(paper="arXiv:0000.00001", needs={"forget", "retain"}, dose="steps", tasks=("classification",),
        cost={"forward": "0", "backward": "0"}, departures={"contract:seed": "declared, and not so"})
def leaky(*, lr: Positive = 0.05, steps: Count = 60, batch: AtLeastOne = 32, momentum=0.9) -> Stage:
    """Shrink every weight, whatever the scope; a method that keeps to nothing.
'''
    + SHARED
    + """
    def shrink(case):
        for parameter in case.model.parameters():
            parameter.data.mul_(0.5)
        return case
    return shrink
"""
)
MAIN = "import sys; from expunge.cli import main; sys.exit(main(sys.argv[1:]))"


def python(folder: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A fresh process that sees the copy and nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with two more files in ``methods/``."""
    folder = tmp_path_factory.mktemp("project")
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
    (folder / "src/expunge/methods/brand_new.py").write_text(GOOD)
    (folder / "src/expunge/methods/leaky.py").write_text(BAD)
    return folder


def test_it_is_short() -> None:
    assert len(GOOD.splitlines()) <= 25


def test_the_command_line_lists_and_explains_it(copy: Path) -> None:
    listed = python(copy, "-c", MAIN, "list", "methods", "--json")
    assert listed.returncode == 0, listed.stderr
    found = {entry["name"]: entry for entry in json.loads(listed.stdout)}
    assert found["brand_new"]["settings"] == {"lr": 0.05, "steps": 60, "batch": 32}
    assert set(found) > {"finetune", "brand_new"}
    explained = python(copy, "-c", MAIN, "explain", "brand_new")
    assert explained.returncode == 0, explained.stderr
    assert "Descend on wrong labels" in explained.stdout
    assert "learning rate of SGD" in explained.stdout
    near = python(copy, "-c", MAIN, "explain", "brand_nwe")
    assert near.returncode == 2
    assert "brand_new" in near.stdout + near.stderr


def test_the_docs_have_a_page_of_it(copy: Path) -> None:
    if not (copy / "docs/generate.py").exists():
        pytest.skip("this copy of the source carries no docs")
    made = python(copy, "docs/generate.py")
    assert made.returncode == 0, made.stderr
    page = (copy / "docs/methods/brand_new.md").read_text()
    assert "Descend on wrong labels" in page
    assert "batch" in page
    assert python(copy, "docs/generate.py", "--check").returncode == 0
    if "<!-- methods:begin -->" in (copy / "README.md").read_text():
        assert "brand_new" in (copy / "README.md").read_text()


def test_the_package_has_it_as_a_function(copy: Path) -> None:
    program = "import expunge; print(expunge.methods.brand_new(steps=0)); expunge.methods.brand_new(lr=-1.0)"
    done = python(copy, "-c", program)
    assert "brand_new" in done.stdout
    assert "brand_new: lr must lie in (0, inf], found -1.0" in done.stderr


@pytest.mark.slow
def test_the_contract_tests_hold_it(copy: Path) -> None:
    """The good one passes all of them; the bad one is caught."""
    held = python(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "brand_new or leaky",
        "tests/contract/test_methods.py",
        timeout=300,
    )
    lines = held.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert any(" passed" in line for line in lines), held.stdout[-3000:]
    assert not [line for line in failed if "brand_new" in line], held.stdout[-3000:]
    caught = {line.split("::")[1].split("[")[0] for line in failed if "leaky" in line}
    assert caught >= {
        "test_declares_itself",
        "test_bad_values_are_refused",
        "test_nothing_outside_the_scope_moves",
        "test_dose_zero_is_the_identity",
        "test_same_seed_same_bits_and_saved_weights_answer_alike",
    }, "\n".join(failed)
