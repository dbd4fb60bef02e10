"""Encode weights from the source's types to the file's, slice by slice on several threads, in the file's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dgemma.convert.config import Config
from dgemma.convert.gguf_header import aligned
from dgemma.convert.safetensors import SourceTensor
from dgemma.errors import FormatError
from dgemma.native import formats

if TYPE_CHECKING:
    from dgemma.convert.imatrix import Columns, Importance
    from dgemma.convert.plan import Planned
    from dgemma.convert.source import Source

HELD = 60_000.0  # every format can hold values up to this size, with any others in the same block
SLICE_VALUES = 1 << 20  # about the number of values that one task reads and encodes; always complete rows


def encoded(
    source: Source, tensors: Sequence[Planned], threads: int, importance: Importance | None = None
) -> Generator[tuple[Any, int], None, None]:
    """Yield (bytes, source bytes that were read) in the file's order; tensors are padded to the alignment."""
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
    """Complete rows of a tensor.

    at, count: the index of the first value in the tensor, and the number of values. start: the index of the first value
    in the source tensor; offset, bytes: the same in bytes of the source.
    """

    __slots__ = ("at", "bytes", "count", "offset", "source", "start")

    def __init__(self, source: SourceTensor | None, start: int, at: int, count: int) -> None:
        self.source, self.start, self.at, self.count = source, start, at, count
        self.offset, self.bytes = start, 0
        if source:
            stored = formats.by_name(source.dtype)
            self.offset, self.bytes = (n // stored.block * stored.bytes for n in (start, count))


def slices(tensor: Planned) -> Iterator[tuple[Slice, bool]]:
    """Yield (slice, whether it is the last) for a tensor, in order."""
    row, at = tensor.want.dims[0], 0
    step = row * max(1, SLICE_VALUES // row)
    for source, start, count in tensor.runs():
        for done in range(0, count, step):
            piece = Slice(source, start + done, at, min(step, count - done))
            at += piece.count
            yield piece, at == tensor.want.count


def place(shape: Sequence[int], number: int) -> list[int]:
    """Return the indices of value `number` of a tensor, slowest dimension first."""
    return [int(i) for i in np.unravel_index(number, tuple(shape))]


def source_values(source: Source, tensor: Planned, piece: Slice) -> tuple[Any, NDArray[np.float32]]:
    """Return the bytes of a slice in the source, and its decoded values."""
    if piece.source is None:
        assert tensor.made is not None
        made = tensor.made[piece.offset : piece.offset + piece.count]
        return made.tobytes(), made
    data = source.read(piece.source, piece.offset, piece.bytes)
    values = formats.by_name(piece.source.dtype).decode(data)
    if tensor.want.kind == "MADE" and (off := np.isposinf(values)).any():  # F16 holds STANDS as infinity
        values = np.where(off, np.float32(STANDS), values)
        data = values.tobytes() if tensor.format.name == piece.source.dtype else data
    return data, values


def _encode(source: Source, tensor: Planned, piece: Slice, importance: Importance | None) -> Any:
    data, values = source_values(source, tensor, piece)
    to = tensor.format
    if piece.source is None:
        return data
    largest = max(values.max(initial=0.0), -values.min(initial=0.0))
    if not np.isfinite(largest):
        [i] = np.flatnonzero(~np.isfinite(values))[:1]
        holds = f"holds {values[i]:g} at {place(piece.source.shape, piece.start + int(i))}"
        raise FormatError(f"{piece.source.file}: tensor {piece.source.name} {holds}, which is not finite")
    if to.name == piece.source.dtype:
        return data
    columns = importance.of(tensor.want) if importance and not tensor.want.is_float else None
    blocks = to.encode(values) if columns is None else _weighed(tensor, piece, values, columns)
    lost = None if columns is None and largest < HELD else to.first_not_finite(blocks)
    if lost is not None:
        raise _too_large(piece.source, piece.start, values, lost, to)
    return blocks


def _weighed(tensor: Planned, piece: Slice, values: NDArray[np.float32], columns: Columns) -> NDArray[np.uint8]:
    rows = values.reshape(-1, tensor.want.dims[0])
    first = piece.at // tensor.want.dims[0]
    per_expert = tensor.want.count // tensor.want.dims[0] // len(columns.weights)
    cuts = range(per_expert - first % per_expert, len(rows), per_expert)
    experts = np.split(rows, list(cuts))
    encoded = [columns.encode(tensor.format, some, first // per_expert + i) for i, some in enumerate(experts)]
    return np.concatenate([blocks.reshape(-1) for blocks in encoded])


def _too_large(
    source: SourceTensor, start: int, values: NDArray[np.float32], lost: int, to: formats.Format
) -> FormatError:
    """Return the error for a value that is too large for a format: the largest of the block that is not finite.

    lost: the index of the first value that is not finite after encoding.
    """
    first = lost // to.block * to.block
    at = first + int(np.abs(values[first : first + to.block]).argmax())
    value = float(values[at])
    most = to.most(-1 if value < 0 else 1)
    other = next(f for name in ("BF16", "F32") if (f := formats.by_name(name)).most(1) >= abs(value))
    return FormatError(
        f"{source.file}: tensor {source.name} holds {value:g} at {place(source.shape, start + at)}, which {to.name}"
        f" cannot: it ends near {most:.4g}; {other.name} can"
    )


STANDS = 1e30  # a frequency divided by this is 0 in effect: the pair is not rotated


def rope_freqs(config: Config) -> NDArray[np.float32]:
    """Return the divisors of the frequencies of full layers: 1 for pairs that are rotated, STANDS for the others."""
    head_dim = config.values["head_dim"]
    factors = np.full(head_dim // 2, STANDS, np.float32)
    factors[: int(config.rotary_factor * head_dim // 2)] = 1.0
    return factors
