"""Progress on anything over two seconds, on a terminal only; nothing on a log file or in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

enabled: ContextVar[bool] = ContextVar("progress_enabled", default=True)
PATIENCE = 2.0


def say(sentence: str) -> None:
    """A line for whoever sits at the terminal; nothing on a log file or in a pipe."""
    if enabled.get() and sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, highlight=False).print(sentence)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of things done; shows a bar with an estimate once two seconds have gone."""
    start = time.monotonic()
    bar = None

    def update(done: int) -> None:
        nonlocal bar
        if bar is None:
            late = time.monotonic() - start > PATIENCE
            if not (late and enabled.get() and sys.stderr.isatty()):
                return
            bar = _start(label, total)
        bar.update(bar.task_ids[0], completed=done)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _start(label: str, total: int):  # type: ignore[no-untyped-def]  # rich is imported only when a bar is shown
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(label, total=total)
    bar.start()
    return bar
