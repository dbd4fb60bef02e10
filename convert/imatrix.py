"""Importance: how much each column of a matrix is used, as llama.cpp's imatrix files have it from running a model."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgemma.convert.metadata import Pair
from dgemma.convert.names import Wanted
from dgemma.errors import FormatError, SystemFailure
from dgemma.file import File

LEAST = 1e-4  # of the mean: no column is worth nothing
MOST = 1e4


class Importance:
    """Mean squared inputs per column, [1 or experts, columns] by the name of a GGUF tensor."""

    def __init__(self, path: Path, vectors: dict[str, NDArray[np.float32]], dataset: str, chunks: int) -> None:
        self.path, self.dataset, self.chunks = path, dataset, chunks
        self._vectors = vectors

    def of(self, want: Wanted) -> NDArray[np.float32] | None:
        """The weights of a tensor's columns, around 1, one row for all or one per expert; None where none are known.

        A fused tensor has the inputs of either of its halves.
        """
        return next((self._vectors[name] for name in (want.gguf, *want.halves) if name in self._vectors), None)

    def bind(self, needed: Sequence[Wanted]) -> int:
        """Checks the vectors of all tensors; returns how many there are."""
        found = 0
        for want in needed:
            vectors = self.of(want)
            if vectors is None or want.is_float:
                continue
            columns, experts = want.dims[0], want.dims[2] if len(want.dims) > 2 else 1
            if vectors.shape not in ((1, columns), (experts, columns)):
                raise FormatError(
                    f"{self.path}: {want.gguf}: expected {experts} x {columns} numbers, found"
                    f" {vectors.shape[0]} x {vectors.shape[1]}"
                )
            found += 1
        if not found:
            raise FormatError(f"{self.path}: it knows no tensor of this model")
        return found

    def pairs(self, found: int) -> list[Pair]:
        """What a quantised file says of it."""
        return [
            Pair("quantize.imatrix.file", "STRING", self.path.name),
            Pair("quantize.imatrix.dataset", "STRING", self.dataset),
            Pair("quantize.imatrix.entries_count", "I32", found),
            Pair("quantize.imatrix.chunks_count", "I32", self.chunks),
        ]


def read_imatrix(path: Path, n_expert: int) -> Importance:
    """Reads a GGUF file, or the .dat of before. n_expert: how the numbers of a .dat divide."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                return _from_dat(path, magic + file.read(), n_expert)
    except OSError as problem:
        raise SystemFailure(f"{path}: {(problem.strerror or str(problem)).lower()}") from None
    with File(path) as file:
        if file.get("general.type") != "imatrix":
            raise FormatError(f"{path}: expected an imatrix, found a GGUF file of type {file.get('general.type')!r}")
        sums = {t.name: (t.dims, t.format.decode(t.data)) for t in file.tensors}
        datasets = file.get("imatrix.datasets") or []
        chunks = file.get("imatrix.chunk_count") or 0
    vectors = {}
    for name in (n.removesuffix(".in_sum2") for n in sums if n.endswith(".in_sum2")):
        dims, squares = sums[f"{name}.in_sum2"]
        counts = sums.get(f"{name}.counts", ((0,), np.zeros(0, np.float32)))[1]
        if counts.size * dims[0] != squares.size:
            expected = squares.size // dims[0]
            raise FormatError(f"{path}: tensor {name}.counts: expected {expected} numbers, found {counts.size}")
        vectors[name] = _weights(path, name, squares.reshape(-1, dims[0]))
    return Importance(path, vectors, ", ".join(map(str, datasets)), int(chunks))


def _from_dat(path: Path, data: bytes, n_expert: int) -> Importance:
    """i32 entries, each i32 length, name, i32 calls, i32 numbers, f32s; behind them i32 chunks, i32 length, dataset."""
    vectors: dict[str, NDArray[np.float32]] = {}
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise FormatError(f"{path}: not an imatrix, or cut off at byte {at} of {len(data)}")
        at += count
        return data[at - count : at]

    def whole() -> int:
        return int(struct.unpack("<i", take(4))[0])

    for _ in range(whole()):
        name = take(whole()).decode("utf-8", "replace")
        whole()
        squares = np.frombuffer(take(4 * whole()), "<f4")
        experts = n_expert if "_exps." in name and squares.size % n_expert == 0 else 1
        vectors[name] = _weights(path, name, squares.reshape(experts, -1))
    chunks, dataset = (whole(), take(whole()).decode("utf-8", "replace")) if at < len(data) else (0, "")
    return Importance(path, vectors, dataset, chunks)


def _weights(path: Path, name: str, squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row around 1, which is what counts; a row of zeros, an expert that was never asked, weighs all alike."""
    if squares.size == 0 or not np.isfinite(squares).all() or (squares < 0).any():
        raise FormatError(f"{path}: {name}: expected finite sums of squares")
    exact = squares.astype(np.float64)
    means = exact.mean(axis=1, keepdims=True)
    scaled = np.divide(exact, means, out=np.ones_like(exact), where=means > 0)
    return np.ascontiguousarray(np.clip(scaled, LEAST, MOST), np.float32)
