"""An answer as it becomes final: the text to standard output, the thought dimmed on the screen and folded when done."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import BinaryIO

import click

from dgemma.cli.display import Silent, count
from dgemma.turns import Delta


class Speaker:
    """Prints deltas between the steps that a display shows.

    On a terminal that the display draws on too, the last line is printed once it is complete: until then the display
    holds it. Everywhere else all is written at once, exactly. late: nothing is printed before the end, and nothing at
    all if that does not come. end_line: a last line without an end gets one; None: on a terminal. A context manager.
    """

    def __init__(self, shown: Silent, late: bool = False, end_line: bool | None = None) -> None:
        self._shown = shown
        self._late: list[str] | None = [] if late else None
        self._end_line = sys.stdout is not None and sys.stdout.isatty() if end_line is None else end_line
        self._holding = shown.holds and sys.stdout is not None and sys.stdout.isatty()
        self._held = self._thought = ""
        self._last = "\n"

    def hear(self, delta: Delta) -> None:
        if delta.kind == "thinking":
            self._thought += delta.text
            self._shown.pend(self._thought, thought=True)
        else:
            self._fold()
            self._say(delta.text)

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """The answer is over: nothing is held back."""
        self._fold()
        held, late, self._held, self._late = self._held, self._late, "", None
        if late is not None:
            held = "".join(late) if kind is None else ""
        self._shown.pend("")
        self._write(held + "\n" if self._end_line and (held or self._last)[-1:] != "\n" else held)

    def _fold(self) -> None:
        thought, self._thought = self._thought, ""
        self._shown.pend("")
        if thought.strip() and self._shown.holds:
            self._shown.hide()
            click.echo(click.style(f"thought of {count(len(thought.split()), 'word')}", dim=True), err=True)

    def _say(self, text: str) -> None:
        if self._late is not None:
            self._late.append(text)
            return
        if not self._holding:
            self._write(text)
            return
        done, newline, self._held = (self._held + text).rpartition("\n")
        self._write(done + newline)
        self._shown.pend(self._held)

    def _write(self, text: str) -> None:
        if text:
            self._shown.hide()
            self._last = text
            write(text)


def say(text: str) -> None:
    """Writes to standard output, exactly; on a terminal the last line is ended."""
    write(text + "\n" if sys.stdout is not None and sys.stdout.isatty() and not text.endswith("\n") else text)


def write(text: str) -> None:
    """Writes to standard output, exactly."""
    if sys.stdout is None:
        raise OSError("it is closed")
    output: BinaryIO = sys.stdout.buffer
    output.write(text.encode("utf-8", "replace"))
    output.flush()
