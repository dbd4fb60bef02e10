"""Reads the header of a GGUF file that lies elsewhere: all that stands before its weights, in pieces.

A header has no length in it. It is walked through as far as it came, and more is asked for where it goes on: of the 26B
model these are some 16 MB of 16 GB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

from dgemma._native import ffi, lib
from dgemma.errors import FormatError, check, new_error
from dgemma.files.gguf_file import ARRAY, KINDS
from dgemma.units import size_text

FIRST, LARGEST_PIECE = 1 << 18, 1 << 22  # bytes of the first piece, and of a later one at most: each is twice the last
LONGEST = 64 << 20  # bytes of a header at most
STRING = KINDS["STRING"][0]
SIZES = {number: struct.calcsize("<" + code) for number, code in KINDS.values() if code}  # bytes, by kind
MOST_DIMS = 4

Read = Callable[[int, int], bytes]  # first byte, bytes -> what is there


def gguf_header(read: Read, size: int) -> bytes:
    """Return the beginning of a file of `size` bytes that has its whole header.

    Of a damaged file, or of another kind, it is the beginning up to where that shows: who opens it is told so. Raises
    FormatError for a header of more than LONGEST bytes.
    """
    pieces = _Pieces(read, size)
    with suppress(EOFError):
        _walk(pieces)
    return bytes(pieces.data)


class _Pieces:
    """The beginning of a file, as far as it was asked for, and a place in it."""

    def __init__(self, read: Read, size: int) -> None:
        self.data = bytearray()
        self.at = 0
        self.size, self._read, self._next = size, read, FIRST

    def need(self, end: int) -> None:
        """Have all bytes before `end`. Raises EOFError where the file is shorter."""
        if end > self.size:
            raise EOFError
        if end > LONGEST:
            raise FormatError(f"its header is longer than {size_text(LONGEST)}")
        while len(self.data) < end:
            count = min(self._next, self.size - len(self.data))
            self.data += self._read(len(self.data), count)
            self._next = min(2 * self._next, LARGEST_PIECE)

    def skip(self, count: int) -> None:
        self.need(self.at + count)
        self.at += count

    def number(self, form: struct.Struct) -> int:
        start = self.at
        self.skip(form.size)
        return int(form.unpack_from(self.data, start)[0])

    def skip_texts(self, count: int) -> None:
        at, data, length_at = self.at, self.data, U64.unpack_from
        for _ in range(count):
            if at + 8 > len(data):
                self.need(at + 8)
            at += 8 + length_at(data, at)[0]
        self.at = at
        self.need(at)


U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def _walk(pieces: _Pieces) -> None:
    """Go to the end of a header, or to where it is none."""
    pieces.need(min(4, pieces.size))
    pieces.skip(4)
    if pieces.data[:4] != b"GGUF" or pieces.number(U32) not in (2, 3):
        return
    tensors, values = pieces.number(U64), pieces.number(U64)
    for _ in range(values):
        pieces.skip_texts(1)
        kind, count = pieces.number(U32), 1
        if kind == ARRAY:
            kind, count = pieces.number(U32), pieces.number(U64)
        if kind == STRING:
            pieces.skip_texts(count)
        elif kind in SIZES:
            pieces.skip(count * SIZES[kind])
        else:
            return
    for _ in range(tensors):
        pieces.skip_texts(1)
        dims = pieces.number(U32)
        if not 1 <= dims <= MOST_DIMS:
            return
        pieces.skip(8 * dims + 4 + 8)  # the sizes, the type, the place


def check_model(path: str) -> None:
    """Raise the Error that a model of this file, or header, would raise when it is opened to run on the CPU."""
    options, out, error = ffi.new("dg_model_options *"), ffi.new("dg_model **"), new_error()
    backend = ffi.new("char[]", b"cpu")
    options.backend, options.threads = backend, 1
    check(lib.dg_model_open(path.encode("utf-8", "surrogateescape"), options, out, error), error)
    lib.dg_model_free(out[0])
