"""Prints an answer as it becomes final.

The text goes to standard output; a thought is dimmed on the screen and folded when it is over.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, BinaryIO

from dgemma.chat.answer_parser import Delta
from dgemma.cli.display import Silent, count
from dgemma.files.json_lines import as_bytes
from dgemma.ui.terminal import is_terminal, shown, shown_json, tell


class Speaker:
    """Prints deltas between the steps that a display shows.

    On a terminal that the display draws on too, the last line is printed once it is complete: until then the display
    holds it. Everywhere else all is written at once. What a terminal would obey is shown there; where there is none
    all is exact. late: nothing is printed before the end, and nothing at
    all if that does not come. end_line: a last line without an end gets one; None: on a terminal. A context manager.
    """

    def __init__(self, shown: Silent, late: bool = False, end_line: bool | None = None) -> None:
        self._shown = shown
        self._late: list[str] | None = [] if late else None
        self._end_line = is_terminal(sys.stdout) if end_line is None else end_line
        self._holding = shown.holds and is_terminal(sys.stdout)
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
        """End the answer: nothing is held back."""
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
            with self._shown.aside():
                tell(f"thought of {count(len(thought.split()), 'word')}", dim=True)

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
            self._last = text
            with self._shown.aside():
                write(text)


def say(text: str, safe: bool = False) -> None:
    """Write a text as write() does; on a terminal the last line is ended."""
    write(text + "\n" if is_terminal(sys.stdout) and not text.endswith("\n") else text, safe)


def say_json(value: Any, indent: int | None = None) -> None:
    """Write a value to standard output as a line of JSON, or as several."""
    text = as_bytes(value, indent).decode()
    write(shown_json(text) if is_terminal(sys.stdout) else text, safe=True)


def write(text: str, safe: bool = False) -> None:
    """Write to standard output.

    The text is written exactly, except that what a terminal would obey is made visible on one. safe: the text holds our
    own styles and nothing else that a terminal obeys.
    """
    sys.stdout.flush()
    if is_terminal(sys.stdout):
        data = (text if safe else shown(text)).encode(sys.stdout.encoding, "replace")
    else:
        data = text.encode("utf-8", "replace")
    output: BinaryIO = sys.stdout.buffer
    output.write(data)
    output.flush()
