"""What there is, for people to read: the lists and pages of the command line and of the documentation."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expunge.registry import Method, Range, find, is_asked, measures, methods, parts, tasks

_ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def catalogue(kind: str) -> list[dict[str, Any]]:
    """Every method, objective, combiner, measure, task or suite, as JSON-able mappings with name and summary.

    Raises:
        Refused: for an unknown kind, with the nearest one.
    """
    return find("kind", kind, KINDS)()


def _parts(kind: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "summary": summary(part), **_extra(kind, part)} for name, part in found.items()]


def _extra(kind: str, part: Any) -> dict[str, Any]:
    if kind == "measures":
        return {"runs": "when asked" if is_asked(getattr(part, "name", part.__name__)) else "always"}
    fields = getattr(part, "__dataclass_fields__", {})
    unit = fields["unit"].default if kind == "tasks" and "unit" in fields else None
    settings = {name: _default(value) for name, value in _defaults(part).items()}
    return {"settings": settings, **({"unit": unit} if unit else {})}


def _defaults(part: Any) -> dict[str, Any]:
    found = inspect.signature(part).parameters
    return {name: value.default for name, value in found.items() if "factory" not in repr(value.default)}


def _suites() -> list[dict[str, Any]]:
    from expunge.bench import SUITES as folder
    from expunge.data.builtin import SUITES

    built_in = [{"name": name, "summary": f"data: {summary(build)}"} for name, build in SUITES.items()]
    return built_in + [{"name": path.stem, "summary": f"benchmark: {path}"} for path in sorted(folder.glob("*.toml"))]


KINDS: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "methods": lambda: [method.describe() for method in methods().values()],
    "objectives": lambda: _parts("objectives", parts("objectives")),
    "combiners": lambda: _parts("combiners", parts("combiners")),
    "measures": lambda: _parts("measures", measures()),
    "tasks": lambda: _parts("tasks", tasks()),
    "suites": _suites,
}


def summary(part: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(part) or "").partition("\n")[0]


def described(name: str) -> dict[str, Any]:
    """All that a method declares, and its settings with range and meaning.

    Raises:
        Refused: for an unknown name, with the nearest one.
    """
    method = find("method", name, methods())
    return {**method.describe(), "doc": inspect.getdoc(method.build) or "", "settings": settings(method)}


def settings(method: Method) -> list[dict[str, str]]:
    """name, default, kind, range and meaning of each setting."""
    hints = typing.get_type_hints(method.build, include_extras=True)
    meanings = arguments(inspect.getdoc(method.build) or "")
    return [
        {
            "name": name,
            "default": _default(parameter.default),
            "kind": _kind(hints.get(name)),
            "range": _range(hints.get(name)),
            "meaning": meanings.get(name, ""),
        }
        for name, parameter in method.settings().items()
    ]


def arguments(doc: str) -> dict[str, str]:
    """The "Args:" section of a docstring: name -> meaning. Names that share a line share its meaning."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in _section(doc, "Args:"):
        match = _ARGUMENT.match(line.strip()) if len(line) - len(line.lstrip()) <= 4 else None
        if match is not None:
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2]))
        elif line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _section(doc: str, title: str) -> list[str]:
    lines = doc.splitlines()
    if title not in lines:
        return []
    start = lines.index(title) + 1
    end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    return lines[start:end]


def body(doc: str) -> str:
    """A docstring without its first line and without the sections that stand in tables."""
    dropped = set(_section(doc, "Args:")) | {"Args:"}
    lines = doc.splitlines()[1:]
    return "\n".join(line for line in lines if line not in dropped or not line).strip()


def _default(value: Any) -> str:
    return "required" if value is inspect.Parameter.empty else repr(value)


def _kind(hint: Any) -> str:
    base = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if typing.get_origin(base) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(base))
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "NoneType": "none"}
    kinds = [getattr(kind, "__name__", str(kind)) for kind in (typing.get_args(base) or (base,))]
    return " or ".join(names.get(kind, kind) for kind in kinds)


def _range(hint: Any) -> str:
    return ", ".join(_bound(bound) for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, Range))


def _bound(bound: Range) -> str:
    if math.isinf(bound.high):
        return f"{'>' if bound.open_low else '>='} {bound.low:g}"
    return str(bound)


def page(name: str) -> str:
    """A method's page in Markdown.

    Raises:
        Refused: for an unknown name, with the nearest one.
    """
    found = described(name)
    facts = [
        f"paper: {link(found['paper'])}",
        f"status: {found['status']}" + (f": {found['reason']}" if found["reason"] else ""),
        f"promise: {found['promise']}",
        f"needs: {', '.join(found['needs']) or 'nothing'}",
        f"tasks: {', '.join(found['tasks'])}",
        f"dose: `{found['dose']}`" if found["dose"] else "dose: none",
    ]
    rows = [[f"`{s['name']}`", f"`{s['default']}`", s["kind"], s["range"], s["meaning"]] for s in found["settings"]]
    cost = [f"- {kind}: `{text}` rows" for kind, text in found["cost"].items()]
    departures = [f"- {key}: {reason}" for key, reason in found["departures"].items()]
    text = [
        "# " + found["name"],
        found["summary"],
        "\n".join(f"- {fact}" for fact in facts),
        body(found["doc"]),
        "## Settings",
        table(("setting", "default", "kind", "range", "meaning"), rows) if rows else "None.",
        "## Cost",
        "\n".join(cost) or "Not declared.",
        "## Departures",
        "\n".join(departures) or "None.",
    ]
    return "\n\n".join(part for part in text if part) + "\n"


def link(paper: str) -> str:
    """A Markdown link for an arXiv identifier or a DOI; other sources as they are."""
    if paper.startswith("arXiv:"):
        return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return f"[{paper}](https://doi.org/{paper.removeprefix('doi:')})" if paper.startswith("doi:") else paper


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
