"""Checkpoints of DiffusionGemma in, GGUF files out.

>>> from dgemma.convert import convert
>>> convert("diffusiongemma-26B-A4B-it", "model.gguf", type="q4_k_m")
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dgemma.convert.encode import encoded
from dgemma.convert.plan import Plan, make_plan, open_source
from dgemma.convert.writer import NewFile, refuse_target
from dgemma.errors import SystemFailure, UsageError

__all__ = ["Conversion", "Plan", "convert", "plan"]


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path
    plan: Plan
    seconds: float


def plan(source: str | os.PathLike[str], type: str = "q4_k_m", overrides: Sequence[tuple[str, str]] = ()) -> Plan:
    """What convert() would do, without reading weights or writing anything."""
    folder = Path(source)
    with _system_errors(folder), open_source(folder) as checkpoint:
        return make_plan(checkpoint, folder, type, overrides)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    overrides: Sequence[tuple[str, str]] = (),
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the checkpoint in the folder `source` as the GGUF file `out`, which exists only once it is complete.

    type: a recipe, see dg-convert --help. overrides: (glob over GGUF names, format) pairs on top of it; the last that
    matches wins. threads: None takes one per processor. force: replace an existing file. progress: called with the
    bytes of the source that are done and their total. The file is the same for any number of threads.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads: expected at least 1, found {threads}")
    started, folder = time.monotonic(), Path(source)
    target = Path(os.path.realpath(out))
    refuse_target(target, force, folder)
    with _system_errors(folder), open_source(folder) as checkpoint:
        todo = make_plan(checkpoint, folder, type, overrides)
        done, total = 0, todo.source_bytes
        with NewFile(target, todo.file_bytes) as file:
            file.write(todo.header)
            with closing(encoded(checkpoint, todo, threads or _processors())) as pieces:
                for data, source_bytes in pieces:
                    file.write(data)
                    done += source_bytes
                    if progress:
                        progress(done, total)
            file.commit(force)
    return Conversion(Path(out), todo, time.monotonic() - started)


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Turns what the operating system refuses about the source into an Error that names the file."""
    try:
        yield
    except OSError as problem:
        raise SystemFailure(f"{problem.filename or folder}: {(problem.strerror or str(problem)).lower()}") from None
