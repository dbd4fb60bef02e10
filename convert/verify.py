"""Measure the errors of a file's values against those of its source."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgemma.convert.encode import Slice, place, slices, source_values
from dgemma.convert.plan import Plan, Planned
from dgemma.convert.source import Source
from dgemma.errors import FormatError
from dgemma.files.gguf_file import File


@dataclass(frozen=True)
class Deviation:
    """The errors of one tensor."""

    name: str
    format: str
    source_format: str
    relative_rmse: float  # root mean square of the errors over that of the values
    max_error: float  # the largest absolute error


class Sums(NamedTuple):
    """Sums over a slice of a tensor, and its largest error."""

    errors: float  # sum of the squared errors
    values: float  # sum of the squared values
    largest: float  # the largest absolute error


def verify(source: Source, plan: Plan, path: Path, threads: int, progress: Callable[[int], None]) -> list[Deviation]:
    """Read the file back, and compare every tensor. progress: called with the bytes of the source that were read.

    Raises FormatError where a tensor has errors although its format can hold the source's values.
    """
    found = []
    with File(path) as file:
        data = {tensor.name: tensor.data for tensor in file.tensors}
        for tensor in plan.tensors:
            sums = [Sums(0.0, 0.0, 0.0)]
            with closing(_compared(path, source, tensor, data[tensor.want.gguf], threads)) as pieces:
                for piece, source_bytes in pieces:
                    sums.append(piece)
                    progress(source_bytes)
            file.check()
            found.append(_deviation(path, tensor, sums))
        data.clear()
    return found


def _compared(
    path: Path, source: Source, tensor: Planned, data: Any, threads: int
) -> Generator[tuple[Sums, int], None, None]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dg-convert")
    waiting: deque[tuple[Future[Sums], int]] = deque()
    try:
        for piece, _ in slices(tensor):
            waiting.append((pool.submit(_compare, path, source, tensor, piece, data), piece.bytes))
            if len(waiting) > threads + 2:
                task, size = waiting.popleft()
                yield task.result(), size
        for task, size in waiting:
            yield task.result(), size
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(path: Path, source: Source, tensor: Planned, piece: Slice, data: Any) -> Sums:
    _, wanted = source_values(source, tensor, piece)
    stored = tensor.format
    start, size = (n // stored.block * stored.bytes for n in (piece.at, piece.count))
    found = stored.decode(memoryview(data)[start : start + size])
    for i in np.flatnonzero(~(np.isfinite(found) & np.isfinite(wanted)))[:1]:
        raise FormatError(
            f"{path}: tensor {tensor.want.gguf} holds {found[i]:g} at"
            f" {place(tensor.want.dims[::-1], piece.at + int(i))}, and its source {wanted[i]:g}"
        )
    errors = found.astype(np.float64) - wanted
    squared, values = float(np.dot(errors, errors)), float(np.dot(wanted, wanted.astype(np.float64)))
    return Sums(squared, values, float(np.abs(errors).max(initial=0.0)))


def _deviation(path: Path, tensor: Planned, sums: list[Sums]) -> Deviation:
    errors, values = math.fsum(s.errors for s in sums), math.fsum(s.values for s in sums)
    largest = max(s.largest for s in sums)
    rmse = math.sqrt(errors / values) if values else math.sqrt(errors)
    name, to = tensor.want.gguf, tensor.format.name
    if largest > 0 and tensor.source_format in ("made", to):
        raise FormatError(f"{path}: tensor {name} is not what was written: {to}, errors of up to {largest:g}")
    return Deviation(name, to, tensor.source_format, rmse, largest)
