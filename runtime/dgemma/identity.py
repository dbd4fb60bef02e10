"""What a model file is known by, cheaply: the same for copies of a file, another for any other model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from dgemma.file import File
from dgemma.output import readable

SAMPLE = 4096  # bytes of each tensor that are looked at


def identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model file is known by: name, bytes, and a SHA-256 of its keys, its tensors' names, formats and shapes,
    and the first bytes of each. `vocabulary` is one of the tokens alone.
    """
    whole, tokens = hashlib.sha256(), hashlib.sha256()
    with File(path) as file:
        for key, value in file.values.items():
            whole.update(key.encode() + b"\0" + value.encoded)
            if key == "tokenizer.ggml.tokens":
                tokens.update(value.encoded)
        for tensor in file.tensors:
            whole.update(f"{tensor.name} {tensor.format.name} {tensor.dims}\n".encode() + bytes(tensor.data[:SAMPLE]))
        size = file.bytes
    return {
        "name": readable(Path(path).name),
        "bytes": size,
        "sha256": whole.hexdigest(),
        "vocabulary": tokens.hexdigest(),
    }
