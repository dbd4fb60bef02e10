"""Opens regular files only: a pipe, a device or a folder is refused, without waiting for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dgemma.errors import SystemFailure

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def opener(path: str | os.PathLike[str], flags: int) -> int:
    """Open a regular file: an `opener` for the function open().

    Raises SystemFailure, which names the path, for anything else.
    """
    check_regular(path, os.stat(path).st_mode)  # a socket cannot be opened, so it is checked before
    # The path may have become another file since: with O_NONBLOCK, opening a pipe does not wait for its other end.
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | os.PathLike[str]) -> int:
    """Return a descriptor of a regular file to read. Raises SystemFailure, which names the path."""
    try:
        return opener(path, os.O_RDONLY)
    except OSError as problem:
        raise SystemFailure(f"{os.fsdecode(path)}: {(problem.strerror or str(problem)).lower()}") from None


def check_regular(path: str | os.PathLike[str], mode: int) -> None:
    """Raise SystemFailure where a path is no regular file. mode: its st_mode."""
    if not stat.S_ISREG(mode):
        raise SystemFailure(f"{os.fsdecode(path)}: expected a file, found {KINDS.get(stat.S_IFMT(mode), 'no file')}")


def read_regular(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """Return the bytes of a file, at most the first `most`; -1: all."""
    with open(open_regular(path), "rb") as file:
        try:
            return file.read(most)
        except OSError as problem:
            raise SystemFailure(f"{Path(path)}: {(problem.strerror or str(problem)).lower()}") from None
