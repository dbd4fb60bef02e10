"""Weights from the source's type to the file's, slice by slice on all threads, in file order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma.convert.config import Config
from dgemma.convert.plan import Plan, Planned
from dgemma.convert.safetensors import DTYPES, Checkpoint, SourceTensor
from dgemma.convert.writer import aligned
from dgemma.errors import FormatError

SLICE_VALUES = 1 << 20  # about what one task reads and encodes; whole rows of it
F16_MOST = 65504.0


def encoded(checkpoint: Checkpoint, plan: Plan, threads: int) -> Generator[tuple[Any, int], None, None]:
    """The bytes of the data section in order, each piece with the bytes of the source that it stands for."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dg-convert")
    waiting: deque[tuple[Future[Any], int, int]] = deque()  # result, source bytes, padding behind it
    try:
        for tensor, start, count, padding in _slices(plan):
            source_bytes = count * DTYPES[tensor.source.dtype] if tensor.source else 0
            task = pool.submit(_slice, checkpoint, plan.config, tensor, start, count)
            waiting.append((task, source_bytes, padding))
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


def _slices(plan: Plan) -> Iterator[tuple[Planned, int, int, int]]:
    """(tensor, first value, values, bytes of padding behind)"""
    for tensor in plan.tensors:
        row, total = tensor.want.dims[0], tensor.want.count
        step = row * max(1, SLICE_VALUES // row)
        for start in range(0, total, step):
            count = min(step, total - start)
            last = start + count == total
            yield tensor, start, count, aligned(tensor.bytes) - tensor.bytes if last else 0


def _slice(checkpoint: Checkpoint, config: Config, tensor: Planned, start: int, count: int) -> Any:
    source, to = tensor.source, tensor.format
    if source is None:
        return rope_freqs(config)[start : start + count].tobytes()
    width = DTYPES[source.dtype]
    data = checkpoint.read(source, start * width, count * width)
    values = as_float32(data, source.dtype)
    _check(values, source, to.name)
    if to.name == source.dtype:
        return data
    return to.encode(values)


def as_float32(data: bytearray, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(np.float32, copy=False)


def _check(values: NDArray[np.float32], source: SourceTensor, to: str) -> None:
    largest = np.abs(values).max(initial=0.0)
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
