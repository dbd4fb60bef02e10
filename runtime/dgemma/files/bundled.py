"""The models that come with dgemma, and what a path stands for that is given as a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dgemma.errors import FormatError, UsageError
from dgemma.ui.terminal import one_line, tell

BUNDLED = ("sudoku", "tidy")
LISTED = 8  # GGUF files of a folder that are named


def bundled(name: str = "sudoku") -> str:
    """Return the path of a model that comes with dgemma: "sudoku", or "tidy", which chats and does small text tasks.

    Raises UsageError for another name.
    """
    from importlib.resources import files

    if name not in BUNDLED:
        raise UsageError(f"no model {name!r} comes with dgemma; it has {' and '.join(BUNDLED)}")
    return os.fspath(files("dgemma").joinpath("models", f"{name}-q8_0.gguf"))  # type: ignore[call-overload, no-any-return]


def named(path: str | os.PathLike[str]) -> str:
    """Return the path that a name stands for: of a bundled model's, its file; of any other, itself.

    A text that is just such a name is always the bundled model; a file of that name is ./tidy, or a Path. Where there
    is one, a line on standard error says which is taken.
    """
    if not isinstance(path, str) or path not in BUNDLED:
        return os.fspath(path)
    if os.path.lexists(path):
        tell(one_line(f"{path}: the model that comes with dgemma is taken; the file here is ./{path}"))
    return bundled(path)


def refuse_folder(path: str) -> None:
    """Raise FormatError for a folder, with what to give instead."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if _is_checkpoint(folder):
        raise FormatError(f"{path}: the folder of a checkpoint; dg-convert {path} -o FILE.gguf makes a model of it")
    found = sorted(file.name for file in folder.glob("*.gguf"))
    listed = ", ".join(found[:LISTED]) + (", ..." if len(found) > LISTED else "")
    raise FormatError(f"{path}: a folder, not a GGUF file" + (f"; in it there are {listed}" if found else ""))


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has config.json, of a model, and weights."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and any(folder.glob("*.safetensors"))
