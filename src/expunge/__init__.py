"""expunge: make a trained model forget, with evidence."""

import importlib
from typing import TYPE_CHECKING, Any

from expunge.version import __version__

# At run time a name is imported when it is first asked for, so that `expunge --help` does not wait for torch.
if TYPE_CHECKING:
    from expunge import methods
    from expunge.audit.report import Report, audit
    from expunge.audit.subject import Reading, Subject
    from expunge.combine import OneSidedProjection
    from expunge.core import Case, Data, MissingExtra, Refused, Request, RunFailed, chain
    from expunge.criteria import surgery
    from expunge.data.sources import as_data
    from expunge.data.split import split
    from expunge.descend import Descend, Guard
    from expunge.run import Outcome, unlearn
    from expunge.scope import Scope, edit
    from expunge.tasks.causal_lm import CausalLM
    from expunge.tasks.classification import Classification
    from expunge.tasks.diffusion import Diffusion
    from expunge.tasks.regression import Regression
    from expunge.watch import Watch
    from expunge.weights import load_weights, save_weights

_HOME = {
    "Report": "audit.report",
    "Reading": "audit.subject",
    "Subject": "audit.subject",
    "OneSidedProjection": "combine",
    "Case": "core",
    "Data": "core",
    "MissingExtra": "core",
    "Refused": "core",
    "Request": "core",
    "RunFailed": "core",
    "chain": "core",
    "surgery": "criteria",
    "as_data": "data.sources",
    "split": "data.split",
    "Descend": "descend",
    "Guard": "descend",
    "Outcome": "run",
    "load_weights": "weights",
    "save_weights": "weights",
    "unlearn": "run",
    "Scope": "scope",
    "edit": "scope",
    "CausalLM": "tasks.causal_lm",
    "Classification": "tasks.classification",
    "Diffusion": "tasks.diffusion",
    "Regression": "tasks.regression",
    "Watch": "watch",
}

__all__ = [
    "Case",
    "CausalLM",
    "Classification",
    "Data",
    "Descend",
    "Diffusion",
    "Guard",
    "MissingExtra",
    "OneSidedProjection",
    "Outcome",
    "Reading",
    "Refused",
    "Regression",
    "Report",
    "Request",
    "RunFailed",
    "Scope",
    "Subject",
    "Watch",
    "__version__",
    "as_data",
    "audit",
    "chain",
    "edit",
    "load_weights",
    "methods",
    "save_weights",
    "split",
    "surgery",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name in ("methods", "audit"):  # packages; the second can be called, see expunge/audit/__init__.py
        return importlib.import_module(f"expunge.{name}")
    if name in _HOME:
        found = getattr(importlib.import_module(f"expunge.{_HOME[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
