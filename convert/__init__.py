"""Convert a checkpoint of DiffusionGemma to a GGUF file.

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
from typing import Any

from dgemma.convert import fidelity_check
from dgemma.convert.calibrate import (
    WORKING_TYPE,
    Measured,
    check_prompts,
    measure,
    numbered_prompts,
    refuse,
)
from dgemma.convert.encode import encoded
from dgemma.convert.imatrix import Importance, importance_of, read_imatrix, unmeasured, write_imatrix
from dgemma.convert.names import wanted
from dgemma.convert.plan import Plan, make_plan
from dgemma.convert.source import Source, open_source
from dgemma.convert.tied import compare_copies
from dgemma.convert.verify import Deviation, verify
from dgemma.convert.writer import IMATRIX, NewFiles, part_paths, refuse_full_disk, refuse_target, working_file
from dgemma.errors import FormatError, SystemFailure, UsageError
from dgemma.files.output import check_distinct, check_target, readable
from dgemma.hub.download import remember_refusals
from dgemma.hub.models import local_source, source_headers
from dgemma.hub.names import PREFIX
from dgemma.model import Prompt

__all__ = ["Conversion", "Deviation", "Plan", "convert", "plan"]


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    `path` is the first of `paths`. `deviations` is empty without verify=True. `few` has (tensor, expert, tokens) for
    each expert that few tokens were routed to: its importance was averaged with that of its layer.
    """

    path: Path
    paths: list[Path]
    plan: Plan
    seconds: float
    deviations: list[Deviation]
    few: list[tuple[str, int, int]]
    fidelity: Any = None  # a dgemma.eval.fidelity.Fidelity; a text that says why there is none; None without verify


def plan(
    source: str | os.PathLike[str],
    type: str = "q4_k_m",
    overrides: Sequence[tuple[str, str]] = (),
    *,
    imatrix: str | os.PathLike[str] | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    split_max_size: int | None = None,
) -> Plan:
    """Return the plan for convert(). No weight is read, nothing is written, and the model does not run."""
    refuse(imatrix, calibrate, None, None)
    with source_headers(source) as path, _system_errors(path), open_source(path) as opened:
        weights = None if imatrix is None else read_imatrix(Path(imatrix), opened.config.values["n_expert"])
        if calibrate is not None:
            _check_prompts(opened, Path(calibrate))
            weights = unmeasured(Path(calibrate), wanted(opened.config))
        return _planned(opened, type, overrides, weights, split_max_size)


@remember_refusals()  # the Hub is asked twice: for the plan, and for the weights
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: str | os.PathLike[str] | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    calibrate_tokens: int | None = None,
    save_imatrix: str | os.PathLike[str] | None = None,
    split_max_size: int | None = None,
    verify: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    calibrating: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Write the checkpoint in the folder `source`, or the GGUF file `source`, as the GGUF file `out`.

    source: may also be hf:owner/name[@revision], whose files are downloaded first (see dgemma.hub.download).
    type: a recipe, see dg-convert --help. overrides: pairs (glob over GGUF names, format) that change the recipe; the
    last one that matches wins.
    imatrix: llama.cpp's file of importance (how much each column of a matrix is used); errors are weighted by it.
    calibrate: a file of prompts. The checkpoint answers them, and importance is measured, until calibrate_tokens tokens
    have gone through the model (see dgemma.convert.calibrate). save_imatrix: a file for the measured importance, in
    llama.cpp's format.
    split_max_size: bytes; a larger file is split into OUT-00001-of-00003.gguf and so on.
    verify: compare the written file with its source, and remove it where values differ that should be equal. Where
    dg-eval is installed, also compare both models' distributions on fixed prompts; a folder's checkpoint needs a
    temporary file of bf16 for that.
    threads: None is one per processor. force: replace existing files.
    progress: called with the bytes of the source that are done, and their total; calibrating: with the tokens that have
    gone through the model, and their limit; say: with a line about the current comparison.
    Files get their names only when all are complete. Their bytes are the same for any number of threads.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads: expected at least 1, found {threads}")
    if split_max_size is not None and split_max_size < 1:
        raise UsageError(f"split_max_size: expected at least 1, found {split_max_size}")
    refuse(imatrix, calibrate, calibrate_tokens, save_imatrix)
    threads = threads or _processors()
    target = Path(os.path.realpath(out))
    read = {"source": source, "imatrix": imatrix, "calibrate": calibrate}
    inputs = [(name, given) for name, given in read.items() if given is not None]
    saved = [] if save_imatrix is None else [("save_imatrix", os.path.realpath(save_imatrix))]
    check_distinct([("out", target), *saved], inputs)
    if split_max_size is None:
        refuse_target(target, force, Path(source))
    else:
        check_target(target)
    if save_imatrix is not None:
        refuse_target(Path(os.path.realpath(save_imatrix)), force, Path(source), IMATRIX)
    if calibrate is not None:
        numbered_prompts(Path(calibrate))
    if os.fspath(source).startswith(PREFIX):  # finds errors before the weights are downloaded
        plan(source, type, overrides, imatrix=imatrix, calibrate=calibrate, split_max_size=split_max_size)
    path = local_source(source)
    started = time.monotonic()
    with _system_errors(path), open_source(path) as opened:
        weights = None if imatrix is None else read_imatrix(Path(imatrix), opened.config.values["n_expert"])
        if calibrate is not None:
            first = make_plan(
                opened, type, overrides, split_max_size
            )  # raises for wrong arguments before the long work
            for part_path in part_paths(target, len(first.parts)):
                refuse_target(part_path, force, path)
            refuse_full_disk(target, sum(part.file_bytes for part in first.parts))
            prompts = _check_prompts(opened, Path(calibrate))
            measured = _measured(opened, target, prompts, calibrate_tokens, threads, progress, calibrating)
            of = Path(calibrate)
            weights = importance_of(of, measured.sums, readable(of.name), measured.passes)
            if save_imatrix is not None:
                place, size = Path(os.path.realpath(save_imatrix)), measured.canvas_length
                write_imatrix(place, measured.sums, readable(of.name), measured.passes, size, force)
        todo = _planned(opened, type, overrides, weights, split_max_size)
        paths = part_paths(target, len(todo.parts))
        check_distinct([*(("out", part_path) for part_path in paths), *saved], [*inputs, ("source", path)])
        for part_path in paths:
            refuse_target(part_path, force, path)
        done, total = 0, todo.compared_bytes + todo.source_bytes * (1 + verify)

        def advance(source_bytes: int) -> None:
            nonlocal done
            done += source_bytes
            if progress:
                progress(done, total)

        compare_copies(opened, todo.copies, advance)
        real = [Path(os.path.realpath(part_path)) for part_path in paths]  # a link stays a link
        with NewFiles(real, [part.file_bytes for part in todo.parts]) as new:
            for part, file in zip(todo.parts, new.files, strict=True):
                file.write(part.header)
                with closing(encoded(opened, part.tensors, threads, weights)) as pieces:
                    for data, source_bytes in pieces:
                        file.write(data)
                        advance(source_bytes)
            new.commit(force)
        try:
            deviations = _verify(opened, todo, paths[0], threads, advance) if verify else []
        except FormatError:
            new.withdraw()
            raise
    shown = part_paths(Path(out), len(paths))
    seconds, few = time.monotonic() - started, weights.few if weights else []
    fidelity = None
    if verify and fidelity_check.present():

        def make_base(base: Path) -> object:
            return convert(path, base, fidelity_check.BASE_TYPE, threads=threads, force=True)

        runs = not path.is_dir() and not todo.copies
        fidelity = fidelity_check.check_fidelity(path, paths[0], target, threads, None if runs else make_base, say)
    return Conversion(shown[0], shown, todo, seconds, deviations, few, fidelity)


def _check_prompts(source: Source, path: Path) -> list[Prompt]:
    """Return the prompts for calibration. Raises FormatError for a prompt that does not fit the model."""
    found = numbered_prompts(path)
    check_prompts(path, found, source.tokenizer(), source.config.values["context_length"])
    return [prompt for _, prompt in found]


_verify = verify  # convert() has an argument of that name


def _planned(
    source: Source,
    type: str,
    overrides: Sequence[tuple[str, str]],
    weights: Importance | None,
    split_max_size: int | None,
) -> Plan:
    more = weights.pairs(weights.bind(wanted(source.config))) if weights else ()
    return make_plan(source, type, overrides, split_max_size, more)


def _measured(
    source: Source,
    target: Path,
    prompts: Sequence[Prompt],
    tokens: int | None,
    threads: int,
    progress: Callable[[int, int], None] | None,
    calibrating: Callable[[int, int], None] | None,
) -> Measured:
    """Run the source on the prompts, and return the sums. A folder is converted to a temporary file for that."""
    needed = wanted(source.config)
    if not source.path.is_dir():
        return measure(source.path, prompts, needed, tokens, threads, calibrating)
    with working_file(target) as path:
        convert(source.path, path, WORKING_TYPE, threads=threads, force=True, progress=progress)
        return measure(path, prompts, needed, tokens, threads, calibrating)


def _processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _system_errors(source: Path) -> Iterator[None]:
    """Turn errors of the operating system in the block into SystemFailure, with the name of the file."""
    try:
        yield
    except OSError as problem:
        raise SystemFailure(f"{problem.filename or source}: {(problem.strerror or str(problem)).lower()}") from None
