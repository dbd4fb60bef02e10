"""Stands in for standard streams that the process was started without, as after `>&-`: Python has None there.

What is printed to None is lost without a word. Here it fails as on a full disk.
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
    """Let a closed standard output fail when it is written to.

    The numbers of closed streams are taken, so that no file gets one of them: what a library writes to number 2 would
    be in it.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_Closed(), encoding="utf-8", write_through=True)


def show_any_text() -> None:
    """Make text that a stream's encoding lacks, such as a file name that is no Unicode text, print as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
