"""One file per published method, named as the method. ``expunge.methods.salun`` is the function of that file."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Methods(ModuleType):
    """Importing a file binds its module to the file's name in this package; what people want there is its function."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Methods


def __getattr__(name: str) -> Any:
    """A registered method by its name, found by looking in this folder."""
    from expunge.registry import did_you_mean, methods

    found = methods()
    if name in found:
        return found[name].build
    raise AttributeError(f"expunge has no method {name!r}{did_you_mean(name, found)}")


def __dir__() -> list[str]:
    from expunge.registry import methods

    return list(methods())
