"""Running dg-convert in a test, and damaging what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import write_json
from commands import Inside

from dgemma.convert.cli import main

INSIDE = Inside(main, "dg-convert")
run, refused = INSIDE.run, INSIDE.refused


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    write_json(file, value)


def leftovers(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.suffix in (".gguf", ".part") or f.name.startswith("."))
