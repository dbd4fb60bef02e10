"""The last lines of a terminal, which can be redrawn in place and cleared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # hide and show the cursor


class Region:
    """Lines at the end of standard error. The terminal's size may change between two drawings."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._widths: list[int] = []  # columns of each line that is drawn

    def draw(self, lines: Sequence[Text]) -> None:
        """Replace the lines that are drawn now. Each is cut to the terminal's width.

        The caller gives at most as many lines as the terminal has.
        """
        console, erase = self.console, self._erasure() or HIDE
        with console.capture() as captured:
            for i, line in enumerate(lines):
                line.truncate(console.width)
                console.print(line, end="\n" if i + 1 < len(lines) else "", soft_wrap=True)
        self._widths = [line.cell_len for line in lines]
        self._write(erase + captured.get())

    def clear(self) -> None:
        """Clear the lines, and leave the cursor where the first one began."""
        erase, self._widths = self._erasure(), []
        if erase:
            self._write(erase + SHOW)

    def _erasure(self) -> str:
        """Return the control sequence that clears the lines that are drawn now.

        If the terminal has become narrower, it has wrapped lines, and a line takes several rows.
        """
        if not self._widths:
            return ""
        width = max(self.console.width, 1)
        rows = sum(max(1, -(-line // width)) for line in self._widths)
        return "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (rows - 1)

    def _write(self, data: str) -> None:
        file = self.console.file
        file.write(data)
        file.flush()
