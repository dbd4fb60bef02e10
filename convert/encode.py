"""Weights from the source's type to the file's, slice by slice on all threads, in file order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dgemma import formats
from dgemma.convert.config import Config
from dgemma.convert.safetensors import SourceTensor
from dgemma.convert.writer import aligned
from dgemma.errors import FormatError

if TYPE_CHECKING:
    from dgemma.convert.imatrix import Importance
    from dgemma.convert.plan import Planned
    from dgemma.convert.source import Source

SLICE_VALUES = 1 << 20  # about what one task reads and encodes; whole rows of it
F16_MOST = 65504.0


def encoded(
    source: Source, tensors: Sequence[Planned], threads: int, importance: Importance | None = None
) -> Generator[tuple[Any, int], None, None]:
    """The bytes of the tensors in order, aligned, each piece with the bytes of the source that it stands for."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dg-convert")
    waiting: deque[tuple[Future[Any], int, int]] = deque()  # result, source bytes, padding behind it
    try:
        for tensor in tensors:
            padding = aligned(tensor.bytes) - tensor.bytes
            for piece, last in slices(tensor):
                task = pool.submit(_encode, source, tensor, piece, importance)
                waiting.append((task, piece.bytes, padding if last else 0))
                if len(waiting) > threads + 2:
                    yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(waiting: deque[tuple[Future[Any], int, int]]) -> Iterator[tuple[Any, int]]:
    task, source_bytes, padding = waiting.popleft()
    yield task.result(), source_bytes
    if padding:
        yield bytes(padding), 0


class Slice:
    """Whole rows of a tensor: `count` values from number `at` on, which are those from `start` on of their source."""

    __slots__ = ("at", "bytes", "count", "offset", "source")

    def __init__(self, source: SourceTensor | None, start: int, at: int, count: int) -> None:
        self.source, self.at, self.count = source, at, count
        self.offset, self.bytes = start, 0
        if source:
            stored = formats.by_name(source.dtype)
            self.offset, self.bytes = (n // stored.block * stored.bytes for n in (start, count))


def slices(tensor: Planned) -> Iterator[tuple[Slice, bool]]:
    """A tensor's slices in order, and whether it is the last."""
    row, at = tensor.want.dims[0], 0
    step = row * max(1, SLICE_VALUES // row)
    for source, start, count in tensor.runs():
        for done in range(0, count, step):
            piece = Slice(source, start + done, at, min(step, count - done))
            at += piece.count
            yield piece, at == tensor.want.count


def source_values(source: Source, tensor: Planned, piece: Slice) -> tuple[Any, NDArray[np.float32]]:
    """A slice of the source: its bytes there, and its values."""
    if piece.source is None:
        assert tensor.made is not None
        made = tensor.made[piece.offset : piece.offset + piece.count]
        return made.tobytes(), made
    data = source.read(piece.source, piece.offset, piece.bytes)
    return data, formats.by_name(piece.source.dtype).decode(data)


def _encode(source: Source, tensor: Planned, piece: Slice, importance: Importance | None) -> Any:
    data, values = source_values(source, tensor, piece)
    to = tensor.format
    if piece.source is None:
        return data
    _check(values, piece.source, to.name)
    if to.name == piece.source.dtype:
        return data
    columns = importance.of(tensor.want) if importance and not tensor.want.is_float else None
    if columns is None:
        return to.encode(values)
    rows = values.reshape(-1, tensor.want.dims[0])
    first = piece.at // tensor.want.dims[0]
    per_expert = tensor.want.count // tensor.want.dims[0] // len(columns.weights)
    cuts = range(per_expert - first % per_expert, len(rows), per_expert)
    experts = np.split(rows, list(cuts))
    return b"".join(columns.encode(to, some, first // per_expert + i).data for i, some in enumerate(experts))


def _check(values: NDArray[np.float32], source: SourceTensor, to: str) -> None:
    largest = max(values.max(initial=0.0), -values.min(initial=0.0))
    if not np.isfinite(largest):
        raise FormatError(f"{source.file}: tensor {source.name} holds a value that is not finite")
    if to == "F16" and largest > F16_MOST:
        raise FormatError(f"{source.file}: tensor {source.name} holds {largest:g}, which F16 cannot; BF16 can")


def rope_freqs(config: Config) -> NDArray[np.float32]:
    """What divides each frequency of full layers: 1 for the pairs that turn, so much for the others that they stand."""
    head_dim = config.values["head_dim"]
    factors = np.full(head_dim // 2, 1e30, np.float32)
    factors[: int(config.rotary_factor * head_dim // 2)] = 1.0
    return factors
