"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Makes a file, or replaces what one holds, keeping its mode; whoever reads it sees the old or the new, whatever
    happens. A link stays one. Raises OSError with the name that was given."""
    target = Path(os.path.realpath(path))
    beside = target.parent / f".{target.name}.{secrets.token_hex(6)}.part"
    try:
        with open(beside, "xb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(beside, os.stat(target).st_mode & 0o7777)
        os.replace(beside, target)
    except OSError as failure:
        raise type(failure)(failure.errno, failure.strerror, os.fspath(path)) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)
