"""Bars on standard error for long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(text: str = "", unit: str = "bytes") -> Iterator[Callable[[int, int], None] | None]:
    """What to call with how much is done and the total, None where standard error is no terminal. The bar is there from
    the first call to the last.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[Any] = [bars.TextColumn("{task.description}")] if text else []
    columns.append(bars.BarColumn())
    if unit == "bytes":
        columns += [bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
    else:
        columns += [bars.MofNCompleteColumn(), bars.TextColumn(unit)]
    columns += [bars.TimeRemainingColumn(), bars.TextColumn("left")]
    shown = bars.Progress(*columns, console=Console(stderr=True), transient=True)
    task = shown.add_task(text, total=None)

    def update(done: int, total: int) -> None:
        shown.start()
        shown.update(task, completed=done, total=total)
        if done >= total:
            shown.stop()

    try:
        yield update
    finally:
        shown.stop()


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """A line on standard error, where that is a terminal, of what is being done. It is there from the first call on."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda line: None
        return
    from rich.console import Console

    status = Console(stderr=True).status("")

    def tell(line: str) -> None:
        status.start()
        status.update(line)

    try:
        yield tell
    finally:
        status.stop()
