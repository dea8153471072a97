"""Who may import whom. A module imports only what stands below it; a method never imports another method."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import expunge

ROOT = Path(expunge.__file__).parent
Where = Literal["top", "function", "types"]

# Each line stands on the lines above it. Reasons where the order is not plain:
#   registry is low, because what is registered imports it: it finds methods, tasks and measures at run time;
#   scope is below oracle, which differentiates inside a scope, and gramian and criteria are rules on numbers alone;
#   journal writes Cases and Scopes, and is what reports and run files are written with;
#   tasks and data know the nouns, not the losses; data.recipe is the exception, which trains the networks of the suites;
#   audit judges models from outside: it may see no objective, combiner, method or loop;
#   adapters are settings of carriers and layers for them; adapter_files stands below the loading of language models,
#   which may find an adapter in a folder;
#   benchmarks score what models said with the audit's intervals, and may train models of their own: no method or
#   measure may lean on one.
ORDER: list[set[str]] = [
    {"version", "meter", "progress", "stream"},
    {"core"},
    {"data.json_lines"},
    {
        "runtime",
        "gramian",
        "optim",
        "predict",
        "registry",
        "data",
        "tasks",
        "data.sources",
        "data.indices",
        "data.text",
    },
    {"scope", "criteria", "data.split", "data.tables", "data.joined", "lean"},
    {"oracle", "journal", "tasks.*", "data.files", "adapter_layers"},
    {"weights", "store", "watch", "spectral_adapters", "random_projection", "data.formats"},
    {"adapters"},
    {"adapter_files"},
    {"tasks.language_model", "tasks.alternates"},
    {
        "audit.*",
        "objectives",
        "token_objectives",
        "combine",
        "curvature",
        "edits",
        "overwriting",
        "wrap",
        "checkpointing",
        "reference",
        "steer",
        "value_vectors",
    },
    {
        "saliency",
        "guard",
        "guarded",
        "compose",
        "implicit",
        "constrained",
        "preference",
        "confidence",
        "states",
        "boundary",
        "layers",
        "learnt_inputs",
        "label_smoothing",
        "runner_up",
        "deviation",
        "power_losses",
        "confusion_objectives",
        "perturbed",
        "together",
        "rectify",
        "balance",
        "restriction",
        "attribution",
        "linearised",
        "bounded",
        "group_lasso",
        "fidelity",
        "reuse",
    },
    {"smooth", "salient_rows", "dampening", "prune", "rewind", "zeroth"},
    {"projection", "detector", "gated_layers"},
    {"gate"},
    {"descend", "turns"},
    {"passes", "likeness", "afresh", "anchor", "forget_vectors", "told"},
    {"prototypes"},
    {"sparse_adapter"},
    {"retain_choice", "class_choice", "concept_bank"},
    {"shards", "orders"},
    {"sequences"},
    {"data.recipe", "data.networks"},
    {"data.real", "data.real_tables", "data.real_text"},
    {"methods.*", "data.builtin", "attacks.*", "guarantees.*"},
    {"run", "trainer", "shadow_design"},
    {"shelf", "single"},
    {"training_pool", "reference_plan"},
    {"challenges.*", "references", "benchmarks.*", "tune_space", "tune_kinds"},
    {"tune_rules"},
    {"tune_trial"},
    {"tune_found", "tune_store"},
    {"sections", "tune"},
    {"spec", "demo"},
    {"texts"},
    {"language_run"},
    {"workload"},
    {"perform"},
    {"bench", "bench.*", "recommend", "catalogue", "cli_tune"},
    {"cli"},
    {"__main__"},
]
SIBLINGS = {
    "tasks",
    "audit",
    "attacks",
    "challenges",
    "guarantees",
    "benchmarks",
    "bench",
}  # packages whose modules may import one another
AUDIT_SEES = {
    *("core", "runtime", "oracle", "registry", "journal", "version", "meter", "progress"),
    *("store", "weights", "data.sources"),
}
OPTIONAL = {"transformers", "peft", "diffusers"}
NEAR_MODELS = {"adapters", "adapter_files", "benchmarks.mini_tofu_model", "data.real_text"}
"""Besides tasks/; the last two build models of their own."""


def module_of(path: Path) -> str:
    """src/expunge/data/split.py -> "data.split"; a package's __init__ -> its name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name: path for path in sorted(ROOT.rglob("*.py")) if (name := module_of(path))}


def level(module: str) -> int:
    """The line that a module stands on; its own name before its package's."""
    for wanted in (module, f"{module.rpartition('.')[0]}.*", f"{module}.*"):
        for number, names in enumerate(ORDER):
            if wanted in names:
                return number
    pytest.fail(
        f"{module} has no place in the order of imports: give it one in ORDER, with a reason if it is not plain"
    )


def imports(tree: ast.AST, where: Where = "top") -> Iterator[tuple[str, Where]]:
    """(full module name, where) of every import, names of ``from expunge import x`` resolved to modules."""
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = "function"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            inside = "types"
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if name.removeprefix("expunge.") in MODULES]
            yield from ((name, inside) for name in (inner or [str(node.module)]))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("need_extra", "import_module") and isinstance(node.args[0].value, str):
                yield node.args[0].value, inside
        yield from imports(node, inside)


def inner_imports(module: str) -> list[tuple[str, Where]]:
    """Imports of expunge's own modules, without the prefix."""
    found = imports(ast.parse(MODULES[module].read_text()))
    return [
        (name.removeprefix("expunge.").removeprefix("expunge"), where)
        for name, where in found
        if name.split(".")[0] == "expunge"
    ]


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_only_what_stands_below(module: str) -> None:
    package = module.split(".")[0]
    for other, where in inner_imports(module):
        if where != "top" or not other:
            continue
        if package in SIBLINGS and other.split(".")[0] == package:
            continue
        assert level(other) < level(module), f"{module} imports {other}, which does not stand below it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("methods.")])
def test_a_method_imports_no_other_method(module: str) -> None:
    """Shared mathematics moves down. Not in a function either."""
    assert not [other for other, _ in inner_imports(module) if other.startswith("methods")]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("audit")])
def test_the_audit_sees_the_core_and_the_oracle_only(module: str) -> None:
    seen = {other for other, _ in inner_imports(module) if other and not other.startswith("audit")}
    assert seen <= AUDIT_SEES, f"{module} imports {', '.join(sorted(seen - AUDIT_SEES))}"


@pytest.mark.parametrize("module", list(MODULES))
def test_model_libraries_are_imported_in_functions_near_the_models(module: str) -> None:
    for name, where in imports(ast.parse(MODULES[module].read_text())):
        if name.split(".")[0] in OPTIONAL:
            assert where == "function", f"{module} imports {name} at its head"
            assert module.startswith("tasks.") or module in NEAR_MODELS, f"{module} imports {name}"


def test_only_the_oracle_calls_backward() -> None:
    assert {module for module, path in MODULES.items() if _calls_backward(path)} == {"oracle"}


def _calls_backward(path: Path) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "backward"
        and not node.args
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_importing_everything_imports_no_model_library() -> None:
    """In a fresh process, where nothing else has imported them."""
    names = [f"expunge.{name}" for name in MODULES]
    program = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        f"print(sorted({OPTIONAL!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
