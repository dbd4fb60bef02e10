"""What Python parses of strangers' bytes: targets for atheris, which `make fuzz-python MINUTES=1` installs and runs.

    python tests/fuzz/parsers.py TARGET [libFuzzer's flags] [CORPUS ...]

tests/test_parsers.py runs the same targets on the corpus and on what hypothesis makes.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SMALL = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}
_folder: tempfile.TemporaryDirectory[str] | None = None


def _file(name: str, data: bytes) -> Path:
    """A file of this name with these bytes, in a folder of its own."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    path = Path(_folder.name) / name
    path.write_bytes(data)
    return path


def safetensors(data: bytes) -> None:
    """A file is refused, or every tensor of it can be read. With a header that is JSON, its length is set right."""
    from dgemma.convert.safetensors import Checkpoint
    from dgemma.errors import FormatError

    if data[:1] == b"{":  # the header alone, so that a fuzzer need not guess lengths
        end = data.rfind(b"}") + 1
        data = struct.pack("<Q", end) + data
    path = _file("model.safetensors", data)
    try:
        with Checkpoint(path.parent) as checkpoint:
            for tensor in checkpoint.tensors.values():
                assert 0 <= tensor.offset <= tensor.offset + tensor.bytes <= len(data)
                assert len(checkpoint.read(tensor, 0, min(tensor.bytes, 64))) == min(tensor.bytes, 64)
    except FormatError as failure:
        assert str(failure).startswith(str(path)) and "\n" not in str(failure)


def calls(data: bytes) -> None:
    """Whatever a model writes is read without an error, in any pieces; arguments are what JSON can hold."""
    from dgemma.turns import Reader, read_text

    text = data.decode("utf-8", "surrogateescape")
    answer = read_text(text)
    for call in answer.calls:
        json.dumps(call.arguments, allow_nan=False)
        assert call.name and call.text in text
    reader = Reader()
    for i in range(0, len(text), 7):
        reader.feed_text(text[i : i + 7])
    reader.finish()
    assert reader.answer == answer


TARGETS: dict[str, Callable[[bytes], Any]] = {"safetensors": safetensors, "calls": calls}


def seeds() -> dict[str, dict[str, bytes]]:
    """What the corpora begin with, by target."""
    body = json.dumps(SMALL).encode()
    call = "<|channel>thought\nhm<channel|>It is "
    call += '<|tool_call>call:f{a:<|"|>x<|"|>,b:[1,-2.5e3,{c:true}],d:null}<tool_call|>.'
    return {
        "safetensors": {
            "seed-whole": struct.pack("<Q", len(body)) + body + bytes(8),
            "seed-header": body + bytes(8),
            "seed-empty": b"{}",
        },
        "calls": {"seed-call": call.encode(), "seed-open": b"<|tool_call>call:f{a:", "seed-text": b"plain\xff text"},
    }


def main() -> None:
    import atheris

    name, *flags = sys.argv[1:]
    with atheris.instrument_imports(include=["dgemma"]):
        import dgemma.convert.safetensors
        import dgemma.turns  # noqa: F401
    atheris.Setup([sys.argv[0], *flags], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
