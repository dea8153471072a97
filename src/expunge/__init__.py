"""expunge: make a trained model forget, with evidence."""

import importlib
from typing import TYPE_CHECKING, Any

from expunge.version import __version__

if (
    TYPE_CHECKING
):  # at run time a name is imported when it is first asked for, so that `expunge --help` does not wait for torch
    from expunge import methods
    from expunge.combine import OneSidedProjection
    from expunge.core import Case, Data, MissingExtra, Refused, Request, RunFailed, chain
    from expunge.data.sources import as_data
    from expunge.data.split import split
    from expunge.descend import Descend, Guard
    from expunge.run import Outcome, load_weights, save_weights, unlearn
    from expunge.scope import Scope, edit
    from expunge.tasks.classification import Classification

_HOME = {
    "OneSidedProjection": "combine",
    "Case": "core",
    "Data": "core",
    "MissingExtra": "core",
    "Refused": "core",
    "Request": "core",
    "RunFailed": "core",
    "chain": "core",
    "as_data": "data.sources",
    "split": "data.split",
    "Descend": "descend",
    "Guard": "descend",
    "Outcome": "run",
    "load_weights": "run",
    "save_weights": "run",
    "unlearn": "run",
    "Scope": "scope",
    "edit": "scope",
    "Classification": "tasks.classification",
}

__all__ = [
    "Case",
    "Classification",
    "Data",
    "Descend",
    "Guard",
    "MissingExtra",
    "OneSidedProjection",
    "Outcome",
    "Refused",
    "Request",
    "RunFailed",
    "Scope",
    "__version__",
    "as_data",
    "chain",
    "edit",
    "load_weights",
    "methods",
    "save_weights",
    "split",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name == "methods":
        return importlib.import_module("expunge.methods")
    if name in _HOME:
        found = getattr(importlib.import_module(f"expunge.{_HOME[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
