"""Progress bars and status lines on standard error, for long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dgemma.ui.terminal import is_terminal, shown


@contextmanager
def progress_bar(text: str = "", unit: str = "bytes") -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function update(done, total), which shows a progress bar; None where standard error is no terminal.

    The bar appears with the first call, and disappears when done reaches total.
    """
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[Any] = [bars.TextColumn("{task.description}", markup=False)] if text else []
    columns.append(bars.BarColumn())
    if unit == "bytes":
        columns += [bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
    else:
        columns += [bars.MofNCompleteColumn(), bars.TextColumn(unit)]
    columns += [bars.TimeRemainingColumn(), bars.TextColumn("left")]
    bar = bars.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(shown(text), total=None)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a status line on standard error; where that is no terminal, it does nothing.

    The line stays until the next call or the end of the block.
    """
    if not is_terminal(sys.stderr):
        yield lambda line: None
        return
    from rich.console import Console
    from rich.text import Text

    status = Console(stderr=True).status("")

    def tell(line: str) -> None:
        status.start()
        status.update(Text(shown(line)))

    try:
        yield tell
    finally:
        status.stop()
