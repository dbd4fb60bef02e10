"""Computes the identity of a model file: copies of a file have the same identity, other files have another one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from dgemma.files.digest import add_file
from dgemma.files.gguf_file import File
from dgemma.files.output import parts, readable


def identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a file's name, its bytes, and the SHA-256 of the file, or of all parts of a split file in a row.

    `vocabulary` is a digest of the tokens alone. The whole file is read: about a second per GB.
    """
    tokens = hashlib.sha256()
    with File(path) as file:
        size = file.bytes
        if "tokenizer.ggml.tokens" in file.values:
            tokens.update(file.values["tokenizer.ggml.tokens"].encoded)
    return {
        "name": readable(Path(path).name),
        "bytes": size,
        "sha256": _digest(path),
        "vocabulary": tokens.hexdigest(),
    }


def _digest(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    for part in parts(Path(path)):
        add_file(digest, part)
    return digest.hexdigest()
