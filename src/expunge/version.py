"""The version of expunge, and the source revision where it runs from a checkout."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def revision() -> str:
    """The git revision of the checkout that this runs from, with ``+`` where it has changes; else the version."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
