"""Compare weights that a source has twice: only one of the two is kept, so both must be equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dgemma.convert.encode import SLICE_VALUES
from dgemma.convert.safetensors import SourceTensor
from dgemma.convert.source import Source
from dgemma.errors import FormatError
from dgemma.native import formats


def compare_copies(
    source: Source, copies: Sequence[tuple[SourceTensor, SourceTensor]], progress: Callable[[int], None]
) -> None:
    """Raise FormatError at the first value in which a pair differs. progress: called with the bytes just read."""
    for one, other in copies:
        for start in range(0, one.count, SLICE_VALUES):
            count = min(SLICE_VALUES, one.count - start)
            progress(_compare(source, one, other, start, count))


def _compare(source: Source, one: SourceTensor, other: SourceTensor, start: int, count: int) -> int:
    """Compare `count` values from index `start` on, and return the number of bytes that were read."""
    kept = [formats.by_name(tensor.dtype) for tensor in (one, other)]
    data = [
        source.read(tensor, start // stored.block * stored.bytes, count // stored.block * stored.bytes)
        for tensor, stored in zip((one, other), kept, strict=True)
    ]
    if one.dtype != other.dtype or data[0] != data[1]:
        values, copied = (stored.decode(each) for stored, each in zip(kept, data, strict=True))
        for i in np.flatnonzero(values != copied)[:1]:
            at = list(map(int, np.unravel_index(start + int(i), one.shape)))
            raise FormatError(
                f"{other.file}: tensor {other.name} must equal {one.name}, to which it is tied: at {at} it is"
                f" {copied[i]:.9g}, there {values[i]:.9g}"
            )
    return sum(map(len, data))
