"""Running dg-convert in a test, and damaging what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.checkpoints import read_safetensors_header, write_json, write_raw_safetensors
from support.commands import Inside

from dgemma.convert.cli import main

INSIDE = Inside(main, "dg-convert")
run, refused = INSIDE.run, INSIDE.refused


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    write_json(file, value)


def add_tensor(file: Path, name: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
    """Puts a tensor at the end of a safetensors file."""
    header, before = read_safetensors_header(file)
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(before), len(before) + len(data)]}
    write_raw_safetensors(file, header, before + data)


def tensor_of(file: Path, name: str) -> tuple[str, list[int], bytes]:
    """The type, shape and bytes of a tensor of a safetensors file."""
    header, data = read_safetensors_header(file)
    start, end = header[name]["data_offsets"]
    return header[name]["dtype"], header[name]["shape"], data[start:end]


def rename_tensor(file: Path, old: str, new: str) -> None:
    header, data = read_safetensors_header(file)
    header[new] = header.pop(old)
    write_raw_safetensors(file, header, data)


def leftovers(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.suffix in (".gguf", ".part") or f.name.startswith("."))
