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
from tempfile import TemporaryDirectory

from dgemma.convert.encode import encoded
from dgemma.convert.imatrix import Importance, read_imatrix
from dgemma.convert.names import wanted
from dgemma.convert.plan import Plan, make_plan
from dgemma.convert.source import Source, open_source
from dgemma.convert.verify import Deviation, verify
from dgemma.convert.writer import NewFiles, part_paths, refuse_target
from dgemma.errors import FormatError, SystemFailure, UsageError
from dgemma.hub import local_headers, local_source

__all__ = ["Conversion", "Deviation", "Plan", "convert", "plan"]


@dataclass(frozen=True)
class Conversion:
    """What was written. `path` is the first of `paths`; `deviations` is empty unless they were asked for."""

    path: Path
    paths: list[Path]
    plan: Plan
    seconds: float
    deviations: list[Deviation]


def plan(
    source: str | os.PathLike[str],
    type: str = "q4_k_m",
    overrides: Sequence[tuple[str, str]] = (),
    *,
    imatrix: str | os.PathLike[str] | None = None,
    split_max_size: int | None = None,
) -> Plan:
    """What convert() would do, without reading weights or writing anything."""
    with TemporaryDirectory(prefix="dgemma-") as room:
        path = local_headers(source, Path(room))
        with _system_errors(path), open_source(path) as opened:
            return _planned(opened, type, overrides, imatrix, split_max_size)[0]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: str | os.PathLike[str] | None = None,
    split_max_size: int | None = None,
    verify: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the checkpoint in the folder `source`, or the GGUF file `source`, as the GGUF file `out`.

    source may be hf:owner/name[@revision], whose files are fetched first (see dgemma.hub).
    type: a recipe, see dg-convert --help. overrides: (glob over GGUF names, format) pairs on top of it; the last that
    matches wins. imatrix: llama.cpp's file of how much each column is used, by which errors are weighed.
    split_max_size: bytes; what needs more becomes OUT-00001-of-00003.gguf and so on. verify: compare the file with its
    source afterwards, and remove it where it holds anything else. threads: None takes one per processor. force: replace
    existing files. progress: called with the bytes of the source that are done and their total. Files have their names
    only once all are complete, and their bytes are the same for any number of threads.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads: expected at least 1, found {threads}")
    if split_max_size is not None and split_max_size < 1:
        raise UsageError(f"split_max_size: expected at least 1, found {split_max_size}")
    threads = threads or _processors()
    target = Path(os.path.realpath(out))
    if split_max_size is None:
        refuse_target(target, force, Path(source))
    path = local_source(source)
    started = time.monotonic()
    with _system_errors(path), open_source(path) as opened:
        todo, importance = _planned(opened, type, overrides, imatrix, split_max_size)
        paths = part_paths(target, len(todo.parts))
        for part_path in paths:
            refuse_target(part_path, force, path)
        done, total = 0, todo.source_bytes * (1 + verify)

        def advance(source_bytes: int) -> None:
            nonlocal done
            done += source_bytes
            if progress:
                progress(done, total)

        with NewFiles(paths, [part.file_bytes for part in todo.parts]) as new:
            for part, file in zip(todo.parts, new.files, strict=True):
                file.write(part.header)
                with closing(encoded(opened, part.tensors, threads, importance)) as pieces:
                    for data, source_bytes in pieces:
                        file.write(data)
                        advance(source_bytes)
            new.commit(force)
        try:
            deviations = _verify(opened, todo, paths[0], threads, advance) if verify else []
        except FormatError:
            for part_path in paths:
                part_path.unlink(missing_ok=True)
            raise
    shown = part_paths(Path(out), len(paths))
    return Conversion(shown[0], shown, todo, time.monotonic() - started, deviations)


_verify = verify  # convert() has an argument of that name


def _planned(
    source: Source,
    type: str,
    overrides: Sequence[tuple[str, str]],
    imatrix: str | os.PathLike[str] | None,
    split_max_size: int | None,
) -> tuple[Plan, Importance | None]:
    if imatrix is None:
        return make_plan(source, type, overrides, split_max_size), None
    importance = read_imatrix(Path(imatrix), source.config.values["n_expert"])
    more = importance.pairs(importance.bind(wanted(source.config)))
    return make_plan(source, type, overrides, split_max_size, more), importance


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _system_errors(source: Path) -> Iterator[None]:
    """Turns what the operating system refuses about the source into an Error that names the file."""
    try:
        yield
    except OSError as problem:
        raise SystemFailure(f"{problem.filename or source}: {(problem.strerror or str(problem)).lower()}") from None
