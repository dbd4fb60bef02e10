"""Replaces standard streams that were closed when the process started (as by `>&-`), for which Python has None.

print() to None writes nothing and reports no error. With this module, writing to a closed stdout is an error, as on a
full disk.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class _Closed(io.RawIOBase):
    """A stream that cannot be written to."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.EBADF, "it is closed")


def fail_on_closed_stdout() -> None:
    """Make writing to a closed standard output an error.

    The descriptors 0 to 2 of closed streams are opened as /dev/null. Otherwise a file that is opened later could get
    the number 2, and a library's error messages would be written into it.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_Closed(), encoding="utf-8", write_through=True)


def show_any_text() -> None:
    """Print characters that a stream's encoding lacks as escapes, such as bytes of a file name that is no Unicode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
