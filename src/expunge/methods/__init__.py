"""One file per published method, named as the method. ``expunge.methods.salun`` is the function of that file."""

from __future__ import annotations

from typing import Any


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
