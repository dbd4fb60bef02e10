"""The library's table of weight formats; a Format encodes and decodes NumPy arrays.

>>> q4 = by_name("q4_k")
>>> values = np.zeros((2, 2 * q4.block), np.float32)  # [..., n], n a multiple of q4.block
>>> q4.decode(q4.encode(values)).shape
(2, 512)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma._native import ffi, lib
from dgemma.errors import FormatError


class Format:
    """One line of the table: `name`, GGUF `id`, values per `block`, `bytes` per block; whether it encodes, decodes."""

    __slots__ = ("_native", "block", "bytes", "decodes", "encodes", "id", "name")

    def __init__(self, native: Any) -> None:
        """Read the `const dg_format *` native."""
        self._native = native
        self.name: str = ffi.string(native.name).decode()
        self.id: int = native.id
        self.block: int = native.block
        self.bytes: int = native.bytes
        self.decodes: bool = native.decode != ffi.NULL
        self.encodes: bool = native.encode != ffi.NULL

    def __repr__(self) -> str:
        return f"<Format {self.name}: {self.block} values in {self.bytes} bytes>"

    def encode(self, values: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """Encode values [..., n] to blocks [..., n / block * bytes]. The GIL is released.

        importance: positive weights of the squared errors, around 1; of the shape of values, or [n] for all rows alike.
        """
        if not self.encodes:
            raise ValueError(f"{self.name} can be read but not written")
        values = np.ascontiguousarray(values, dtype=np.float32)
        blocks = np.empty(self._shape(values, self.block, self.bytes, "values"), dtype=np.uint8)
        if importance is None:
            self._encode(values, blocks, ffi.NULL)
            return blocks
        if importance.shape not in (values.shape, values.shape[-1:]):
            raise ValueError(f"{self.name}: importance of shape {importance.shape} for values of shape {values.shape}")
        weights = np.ascontiguousarray(np.broadcast_to(importance, values.shape), dtype=np.float32)
        self._encode(values, blocks, ffi.from_buffer("float[]", weights))
        return blocks

    def encode_rows(
        self,
        values: NDArray[np.float32],
        importance: NDArray[np.float32],
        mean: NDArray[np.float32],
        pull: NDArray[np.float32],
    ) -> NDArray[np.uint8]:
        """Encode values [rows, n] to blocks as encode() with importance [n] does, and let errors of a row cancel out.

        Values are rounded so that the sum of a row's errors, each times its column's mean input (mean [n]), is near
        zero. pull [n]: the mean over the variance of each column's inputs. The GIL is released.
        """
        if not self.encodes:
            raise ValueError(f"{self.name} can be read but not written")
        values = np.ascontiguousarray(values, dtype=np.float32)
        blocks = np.empty(self._shape(values, self.block, self.bytes, "values"), dtype=np.uint8)
        arrays = [np.ascontiguousarray(array, dtype=np.float32) for array in (importance, mean, pull)]
        if any(array.shape != values.shape[-1:] for array in arrays):
            found = " and ".join(str(array.shape) for array in arrays)
            raise ValueError(f"{self.name}: columns of shape {found} for values of shape {values.shape}")
        pointers = [ffi.from_buffer("float[]", array) for array in arrays]
        columns = ffi.new("dg_columns *", pointers)
        rows, n = values.size // values.shape[-1], values.shape[-1]
        lib.dg_encode_rows(self._native, ffi.from_buffer("float[]", values), ffi.from_buffer(blocks), rows, n, columns)
        return blocks

    def first_not_finite(self, blocks: NDArray[np.uint8]) -> int | None:
        """Return the index of the first value in the blocks that is infinite or NaN, or None.

        A value too large for the format is encoded as such a value. The GIL is released.
        """
        flat = np.ascontiguousarray(blocks).view(np.uint8)
        found = lib.dg_first_not_finite(self._native, ffi.from_buffer(flat), flat.size // self.bytes)
        return None if found < 0 else int(found)

    @cache  # noqa: B019, for there is one of each format
    def most(self, sign: int) -> float:
        """Return the largest value of this sign, 1 or -1, that can be encoded in a block of otherwise zeros.

        It is found by bisection.
        """
        low, high = 0, 0x7F7FFFFF  # bits of floats; positive floats have the same order as their bits
        while low < high:
            bits = (low + high + 1) // 2
            block = np.zeros(self.block, np.float32)
            block[0] = sign * np.uint32(bits).view(np.float32)
            low, high = (bits, high) if self.first_not_finite(self.encode(block)) is None else (low, bits - 1)
        return float(sign * np.uint32(low).view(np.float32))

    def _encode(self, values: NDArray[np.float32], blocks: NDArray[np.uint8], weights: Any) -> None:
        count = values.size // self.block
        self._native.encode(ffi.from_buffer("float[]", values), ffi.from_buffer(blocks), count, weights)

    def decode(self, blocks: Any) -> NDArray[np.float32]:
        """Decode blocks [..., n / block * bytes], an array or any buffer of bytes, to values [..., n].

        The GIL is released.
        """
        if not self.decodes:
            raise FormatError(f"values of type {self.name} are not read by this build")
        if not isinstance(blocks, np.ndarray):
            blocks = np.frombuffer(blocks, dtype=np.uint8)
        blocks = np.ascontiguousarray(blocks).view(np.uint8)
        values = np.empty(self._shape(blocks, self.bytes, self.block, "bytes"), dtype=np.float32)
        self._native.decode(ffi.from_buffer(blocks), ffi.from_buffer("float[]", values), blocks.size // self.bytes)
        return values

    def _shape(self, array: NDArray[Any], of: int, to: int, unit: str) -> tuple[int, ...]:
        if array.ndim == 0 or array.shape[-1] % of:
            raise ValueError(f"{self.name}: rows of shape {array.shape} are not whole blocks of {of} {unit}")
        return (*array.shape[:-1], array.shape[-1] // of * to)


@cache
def all_formats() -> tuple[Format, ...]:
    """Return every format, in the order of the table."""
    return tuple(Format(lib.dg_format_at(i)) for i in range(lib.dg_format_count()))


def by_name(name: str) -> Format:
    """Return the format of this name, in capitals or not; KeyError when there is none."""
    return _named()[name.upper()]


def by_id(number: int) -> Format:
    """Return the format with this number in GGUF files; KeyError when there is none."""
    return _numbered()[number]


class Unknown(Format):
    """A type that is not in the table: only its number is known."""

    __slots__ = ()

    def __init__(self, number: int) -> None:
        self.name, self.id, self.block, self.bytes = f"type {number}", number, 1, 0
        self.decodes = self.encodes = False


def type_of(number: int) -> Format:
    """Return the format of any type number of a file; a type that is not in the table cannot be decoded."""
    native = lib.dg_type_find(number)
    return _numbered().get(number) or (Format(native) if native else Unknown(number))


@cache
def _named() -> dict[str, Format]:
    return {f.name: f for f in all_formats()}


@cache
def _numbered() -> dict[int, Format]:
    return {f.id: f for f in all_formats()}
