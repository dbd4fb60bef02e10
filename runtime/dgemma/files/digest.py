"""Computes digests of files, which are read in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

CHUNK = 1 << 20  # bytes per read


def add_file(digest: _Hash, path: Path) -> None:
    """Add the bytes of a file to a digest of hashlib."""
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
