"""A log file of JSON lines. Each line is on the disk before the next is written, so a killed run can be resumed."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dgemma.errors import FormatError, SystemFailure, UsageError
from dgemma.files import json_lines
from dgemma.files.output import StrPath, named, whole_file

LONGEST = 64 << 20  # the most bytes of a line that a log holds
HEX = ["[0-9a-f]"] * 16
DIGITS = ["[0-9]+"]


def literal(text: str) -> list[str]:
    """Return patterns that match this text, one for each letter."""
    return [re.escape(letter) for letter in text]


class Beginning:
    """Recognises the beginning of a log's lines. pieces: patterns in order, each for one letter or for digits."""

    def __init__(self, *pieces: str) -> None:
        cut = "(?s:.*)"
        for piece in reversed(pieces):
            cut = f"(?:{piece}{cut})?"
        self._cut = re.compile(cut.encode())
        self._whole = re.compile("".join(pieces).encode())

    def of_line(self, line: bytes) -> bool:
        """Return whether a complete line begins in this way."""
        return self._whole.match(line) is not None

    def of_part(self, line: bytes) -> bool:
        """Return whether a line may be the first part of such a line, cut off anywhere."""
        return self._cut.fullmatch(line) is not None


class LineLog:
    """Appends JSON lines to a file, for this process alone. A context manager.

    head: how each line begins. maker: the program that writes such files, for errors. Raises UsageError where another
    process is writing the file.
    """

    def __init__(self, path: StrPath, head: Beginning, maker: str) -> None:
        self._name = os.fspath(path)
        self._head = head
        self._maker = maker
        self._end: int | None = None  # where the complete lines end, if mend() has something to repair behind them
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
        """Call `read` with the value of every line; it raises ValueError, KeyError or TypeError for a foreign value.

        A last line that was cut off is skipped, if it begins like the lines of this log; mend() removes it.

        Raises FormatError for a line, complete or cut off, that is not of this log. The file is not changed.
        """
        end = number = 0
        self._file.seek(0)
        while line := self._file.readline(LONGEST):
            number += 1
            whole = line.endswith(b"\n")
            try:
                if not self._head.of_line(line):
                    raise ValueError
                read(json.loads(line))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                if whole or not self._head.of_part(line):
                    raise FormatError(f"{self._name}, line {number}: not a line of {self._maker}") from None
                self._end = end
                return
            end += len(line)
            if not whole:
                self._end = end

    def mend(self) -> None:
        """Remove the cut-off line that recover() skipped, or add the newline that a complete last line lacks."""
        end, self._end = self._end, None
        if end is not None:
            with self._named():
                self._file.seek(0, os.SEEK_END)
                cut = self._file.tell() > end
                self._file.truncate(end)
                self._file.write(b"" if cut or not end else b"\n")
                self._file.flush()

    def append(self, value: Any) -> None:
        """Add a line. It is on the disk when this returns."""
        with self._named():
            self._file.write(json_lines.as_bytes(value))
            self._file.flush()
            os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Remove all lines."""
        self._end = None
        with self._named():
            self._file.truncate(0)

    def values(self) -> list[Any]:
        """Return all values, in the order of their lines."""
        self._file.seek(0)
        return [json.loads(line) for line in self._file]

    def replace(self, values: Iterable[Any]) -> None:
        """Replace all lines by others in one step. Nothing may be written to this log afterwards."""
        with whole_file(Path(self._name)) as file:
            for value in values:
                file.write(json_lines.as_bytes(value))

    def __enter__(self) -> LineLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._named():
                self._file.close()
        except SystemFailure:  # the first error is reported, not this one after it
            if kind is None:
                raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn errors of the system in the block into errors with the file's name."""
        try:
            yield
        except OSError as failure:
            raise named(failure, self._name) from None


def _open(name: str) -> int:
    """Return a descriptor of a regular file, which is made if there is none. Does not wait for a pipe or a device."""
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
