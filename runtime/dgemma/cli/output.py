"""Prints an answer while it becomes final.

The text goes to standard output. A thought is shown dimmed on a terminal; when it ends, one line takes its place.
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
    """Prints deltas between the drawings of a display; a context manager.

    Where the display draws on the same terminal, an incomplete last line is shown by the display and printed once it is
    complete. Otherwise text is printed at once. Control characters are made visible on a terminal only.
    late: print everything at the end, and nothing after an error.
    end_line: whether to end a last line that lacks a newline; None: only on a terminal.
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
            self._print(delta.text)

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """End the answer: print what was held back."""
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
            tell(f"thought of {count(len(thought.split()), 'word')}", dim=True)

    def _print(self, text: str) -> None:
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


def say(text: str, safe: bool = False) -> None:
    """Write a text as write() does; on a terminal with a newline at its end."""
    write(text + "\n" if is_terminal(sys.stdout) and not text.endswith("\n") else text, safe)


def say_json(value: Any, indent: int | None = None) -> None:
    """Write a value to standard output as a line of JSON, or as several."""
    text = as_bytes(value, indent).decode()
    write(shown_json(text) if is_terminal(sys.stdout) else text, safe=True)


def write(text: str, safe: bool = False) -> None:
    """Write a text to standard output; on a terminal control characters are made visible.

    safe: the text is written unchanged, because its only control sequences are styles of ours.
    """
    sys.stdout.flush()
    if is_terminal(sys.stdout):
        data = (text if safe else shown(text)).encode(sys.stdout.encoding, "replace")
    else:
        data = text.encode("utf-8", "replace")
    output: BinaryIO = sys.stdout.buffer
    output.write(data)
    output.flush()
