"""A file of JSON lines that grows: each is on the disk before the next, and a killed run can go on with it."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dgemma import json_lines
from dgemma.errors import FormatError, UsageError
from dgemma.output import StrPath, named, whole_file

LONGEST = 64 << 20  # bytes of a line: more is no line of ours
HEX = ["[0-9a-f]"] * 16
DIGITS = ["[0-9]+"]


def literal(text: str) -> list[str]:
    """The pieces of a pattern that stand for this text."""
    return [re.escape(letter) for letter in text]


def beginning(pieces: Sequence[str]) -> re.Pattern[bytes]:
    """What fully matches a line that begins with these pieces, and such a line that was cut off anywhere."""
    pattern = "(?s:.*)"
    for piece in reversed(pieces):
        pattern = f"(?:{piece}{pattern})?"
    return re.compile(pattern.encode())


class LineLog:
    """Appends JSON lines to a file, for this process alone. A context manager.

    head: how each line begins (see `beginning`). Raises UsageError where another process is writing the file.
    """

    def __init__(self, path: StrPath, head: re.Pattern[bytes], maker: str) -> None:
        self._name = os.fspath(path)
        self._head = head
        self._maker = maker
        try:
            self._file: BinaryIO = os.fdopen(_open(self._name), "a+b")
        except OSError as failure:
            raise named(failure, self._name) from None
        try:
            _lock(self._file, self._name)
        except BaseException:
            self._file.close()
            raise

    def recover(self, read: Callable[[Any], object]) -> None:
        """Gives every line's value to `read`, which raises ValueError, KeyError or TypeError for a foreign one. A last
        line that was cut off is taken away, if it begins as ours do.

        Raises FormatError for a line, or the beginning of one, that is not ours; then nothing was changed.
        """
        end = number = 0
        self._file.seek(0)
        while line := self._file.readline(LONGEST):
            number += 1
            whole = line.endswith(b"\n")
            try:
                read(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                if whole or not self._head.fullmatch(line):
                    raise FormatError(f"{self._name}, line {number}: not a line of {self._maker}") from None
                self._file.truncate(end)
                return
            end += len(line)
            if not whole:
                self._file.write(b"\n")

    def append(self, value: Any) -> None:
        """Adds a line, on the disk when this returns."""
        try:
            self._file.write(json_lines.as_bytes(value))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as failure:
            raise named(failure, self._name) from None

    def clear(self) -> None:
        """Takes all lines away."""
        self._file.truncate(0)

    def values(self) -> list[Any]:
        """All lines, in their order."""
        self._file.seek(0)
        return [json.loads(line) for line in self._file]

    def replace(self, values: Iterable[Any]) -> None:
        """Puts other lines in place of all, at once. The log is not written to afterwards."""
        with whole_file(Path(self._name)) as file:
            for value in values:
                file.write(json_lines.as_bytes(value))

    def __enter__(self) -> LineLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _open(name: str) -> int:
    """A descriptor of a regular file, which is made if it is not there. What is no file is not waited for."""
    descriptor = os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{name}: not a regular file")
    return descriptor


def _lock(file: BinaryIO, name: str) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # no locks on this system
    except BlockingIOError:
        raise UsageError(f"{name} is being written by another process") from None
    except OSError:
        pass  # a file system without locks
