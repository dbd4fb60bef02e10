"""Running dg-convert in a test, and damaging what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_json

from dgemma.convert.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """dg-convert in this process: exit status, standard output, standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.main([str(a) for a in arguments], prog_name="dg-convert")
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Runs what must fail, so: this status, nothing on standard output, one line on standard error."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (code, ""), err
    assert err.startswith("dg-convert: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and "internal error" not in err
    return err


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    write_json(file, value)


def leftovers(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.suffix in (".gguf", ".part") or f.name.startswith("."))
