"""Reads GGUF files of any model: keys with their values, and tensors.

>>> from dgemma.model import bundled
>>> with File(bundled()) as file:
...     print(file.get("general.architecture"), file.tensors[0].name)
diffusion-gemma output_norm.weight
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np

from dgemma._native import ffi, lib
from dgemma.config import Config
from dgemma.errors import Error, UsageError, check, new_error
from dgemma.native import formats
from dgemma.native.formats import Format
from dgemma.native.handle import Handle

# GGUF's types of values: their numbers, and their format characters in the module struct. An array's kind is the kind
# of its elements with an S behind it.
KINDS = {
    "U8": (0, "B"), "I8": (1, "b"), "U16": (2, "H"), "I16": (3, "h"), "U32": (4, "I"), "I32": (5, "i"), "F32": (6, "f"),
    "BOOL": (7, "?"), "STRING": (8, ""), "U64": (10, "Q"), "I64": (11, "q"), "F64": (12, "d"),
}  # fmt: skip
ARRAY = 9
_NAMES = {number: name for name, (number, _) in KINDS.items()} | {ARRAY: "ARRAY"}


@dataclass(frozen=True)
class Value:
    """A key's value. `data` lies in the mapped file, and keeps it mapped."""

    kind: str  # "U32", "STRINGS", ...; arrays of arrays are "ARRAYS"
    count: int  # elements of an array, otherwise 1
    data: Any

    @property
    def is_array(self) -> bool:
        return self.kind.endswith("S")

    @property
    def encoded(self) -> bytes:
        """The bytes of the value as they follow the key in a file: type, length of an array, data."""
        element, data = self.kind.removesuffix("S"), bytes(self.data)
        number = ARRAY if element == "ARRAY" else KINDS[element][0]
        return (struct.pack("<IIQ", ARRAY, number, self.count) if self.is_array else struct.pack("<I", number)) + data

    @cached_property
    def value(self) -> Any:
        """The value as a Python object; None for an array of arrays.

        Bytes of a text that are no UTF-8 are replaced by U+FFFD.
        """
        element = self.kind.removesuffix("S")
        if element == "ARRAY":
            return None
        if element == "STRING":
            strings = list(self._strings())
            return strings if self.is_array else strings[0]
        values = np.frombuffer(self.data, "<" + KINDS[element][1], self.count).tolist()
        return values if self.is_array else values[0]

    def _strings(self) -> Iterator[str]:
        at = 0
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.data, at)
            yield bytes(self.data[at + 8 : at + 8 + length]).decode("utf-8", "replace")
            at += 8 + length


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    `dims`: the dimension that varies fastest is first. `data` lies in the mapped file, and keeps it mapped; it is empty
    where the tensor's format is unknown.
    """

    name: str
    format: Format
    dims: tuple[int, ...]
    data: Any

    @property
    def bytes(self) -> int:
        return len(self.data)


class File:
    """A GGUF file, mapped into memory; a context manager.

    The path of a split file's first part opens all parts. Raises FormatError for a file that is damaged or of another
    kind, SystemFailure for one that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fsencode(path)
        if b"\0" in name:
            raise UsageError(f"a path cannot hold a null character: {path!r}")
        out, error = ffi.new("dg_file **"), new_error()
        check(lib.dg_file_open(name, out, error), error)
        self._path = os.fsdecode(name)
        self._handle: Handle | None = Handle(out[0], lib.dg_file_free)
        self.bytes = int(lib.dg_file_bytes(self._handle.pointer))
        self.parts = int(lib.dg_file_parts(self._handle.pointer))
        self.values: dict[str, Value] = {}
        for key, value in self._values(self._handle):
            self.values.setdefault(key, value)  # the runtime too takes the first of equal keys
        self.tensors: list[Tensor] = list(self._tensors(self._handle))

    def get(self, key: str) -> Any:
        """Return the value of a key as a Python object, or None."""
        return self.values[key].value if key in self.values else None

    def config(self) -> Config:
        """Return the configuration of a model's file, even where the types of its weights are unknown.

        Raises FormatError for a file that is no DiffusionGemma model.
        """
        out, error = ffi.new("dg_config *"), new_error()
        check(lib.dg_file_config(self._open_handle().pointer, out, error), error)
        return Config(out)

    @staticmethod
    def _values(file: Handle) -> Iterator[tuple[str, Value]]:
        found, i = ffi.new("dg_file_value *"), 0
        while lib.dg_file_value_at(file.pointer, i, found):
            kind = f"{_NAMES[found.element]}S" if found.kind == ARRAY else _NAMES[found.kind]
            data = file.buffer(found.data, found.bytes)
            yield _text(found.key, found.key_bytes), Value(kind, int(found.count), data)
            i += 1

    @staticmethod
    def _tensors(file: Handle) -> Iterator[Tensor]:
        found, i = ffi.new("dg_file_tensor *"), 0
        while lib.dg_file_tensor_at(file.pointer, i, found):
            name, dims = _text(found.name, found.name_bytes), tuple(found.dims[0 : found.n_dims])
            yield Tensor(name, formats.type_of(found.type), dims, file.buffer(found.data, found.bytes))
            i += 1

    def check(self) -> None:
        """Raise SystemFailure where the file shrank, or could not be read, since it was opened.

        The data that was read may then be zeros: call this after reading it.
        """
        error = new_error()
        check(lib.dg_file_check(self._open_handle().pointer, error), error)

    def _open_handle(self) -> Handle:
        handle = self._handle
        if handle is None:
            raise Error(f"this file is closed: {self._path}")
        return handle

    def close(self) -> None:
        """Close the file. It stays mapped until nobody holds data of it any more. A second call does nothing."""
        self.values, self.tensors = {}, []
        self._handle = None

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _text(pointer: Any, size: int) -> str:
    return bytes(ffi.buffer(pointer, size)).decode("utf-8", "replace")
