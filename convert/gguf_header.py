"""Build the part of a GGUF file before its data section with the gguf package: header, keys, tensor information."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

from dgemma.convert.metadata import ENCODED, Pair
from dgemma.errors import Error
from dgemma.native.formats import Format

ALIGNMENT = GGUF_DEFAULT_ALIGNMENT

# The gguf package's type for each kind of value in metadata.def; the kind of an array is its elements' with an S.
VALUE_TYPES = {
    "U8": GGUFValueType.UINT8,
    "I8": GGUFValueType.INT8,
    "U16": GGUFValueType.UINT16,
    "I16": GGUFValueType.INT16,
    "U32": GGUFValueType.UINT32,
    "I32": GGUFValueType.INT32,
    "U64": GGUFValueType.UINT64,
    "I64": GGUFValueType.INT64,
    "F32": GGUFValueType.FLOAT32,
    "F64": GGUFValueType.FLOAT64,
    "BOOL": GGUFValueType.BOOL,
    "STRING": GGUFValueType.STRING,
}


class TensorInfo(NamedTuple):
    """A tensor as the header describes it. Its offset follows from the tensors before it."""

    name: str
    dims: Sequence[int]  # fastest first
    format: Format

    @property
    def bytes(self) -> int:
        """Return the size of its data, without the padding behind it."""
        return int(math.prod(self.dims) // self.format.block * self.format.bytes)


def aligned(size: int) -> int:
    """Return the size rounded up to the alignment of tensors."""
    return int(GGUFWriter.ggml_pad(size, ALIGNMENT))


def header(pairs: Iterable[Pair], tensors: Iterable[TensorInfo]) -> bytes:
    """Return everything before the data section, padded to the alignment."""
    data = _unpadded(pairs, tensors)
    return data.ljust(aligned(len(data)), b"\0")


def header_bytes(pairs: Iterable[Pair], tensors: Iterable[TensorInfo]) -> int:
    """Return the length of the header without its padding."""
    return len(_unpadded(pairs, tensors))


def encode_values(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs with encoded values, so that long arrays are encoded once even for several headers."""
    return [pair if pair.kind == ENCODED else Pair(pair.key, ENCODED, _encoded(pair)) for pair in pairs]


class _Encoded(bytes):
    """An encoded value, as in a file: the number of its type, then its bytes."""


class _HeaderWriter(GGUFWriter):
    """The gguf package's writer, changed to write to memory and to accept encoded values."""

    def __init__(self) -> None:
        super().__init__(None, "")
        self.memory = BytesIO()

    def add_architecture(self) -> None:
        """Add nothing: this key is one of the pairs, or the file has none."""

    def open_output_file(self, path: Path | None = None) -> None:
        """Let the package write to memory."""
        self.fout, self.state = [self.memory], WriterState.EMPTY

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        return val if isinstance(val, _Encoded) else bytes(super()._pack_val(val, vtype, add_vtype, sub_type))


def _unpadded(pairs: Iterable[Pair], tensors: Iterable[TensorInfo]) -> bytes:
    writer = _HeaderWriter()
    for pair in encode_values(pairs):
        value_type = GGUFValueType(int.from_bytes(pair.value[:4], "little"))
        writer.add_key_value(pair.key, _Encoded(pair.value), value_type)
    for tensor in tensors:
        shape, format_id = tuple(reversed(tensor.dims)), GGMLQuantizationType(tensor.format.id)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.bytes, format_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer.memory.getvalue()


def _encoded(pair: Pair) -> bytes:
    """Return the value of a pair, encoded as in a file."""
    is_array = pair.kind not in VALUE_TYPES
    element = VALUE_TYPES[pair.kind.removesuffix("S")] if is_array else None
    value_type = GGUFValueType.ARRAY if is_array else VALUE_TYPES[pair.kind]
    if is_array and not pair.value:  # the package refuses to write empty arrays
        return struct.pack("<IIQ", value_type, element, 0)
    try:
        return bytes(GGUFWriter(None, "")._pack_val(pair.value, value_type, add_vtype=True, sub_type=element))
    except UnicodeEncodeError as problem:
        raise Error(f"{pair.key}: {problem.object!r} is no Unicode text") from None
