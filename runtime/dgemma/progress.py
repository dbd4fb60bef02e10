"""A bar on standard error for work that is counted in bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(text: str = "") -> Iterator[Callable[[int, int], None] | None]:
    """What to call with the bytes done and their total, None where standard error is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[Any] = [bars.TextColumn("{task.description}")] if text else []
    columns += [bars.BarColumn(), bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
    columns += [bars.TimeRemainingColumn(), bars.TextColumn("left")]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(text, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
