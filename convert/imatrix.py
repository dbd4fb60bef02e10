"""Read and write importance, that is how much each column of a matrix is used, in llama.cpp's imatrix files."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGUFType, Keys
from numpy.typing import NDArray

from dgemma.convert.gguf_header import TensorInfo, aligned, header
from dgemma.convert.metadata import Pair
from dgemma.convert.names import Wanted
from dgemma.convert.writer import IMATRIX, NewFile
from dgemma.errors import FormatError
from dgemma.files.gguf_file import File
from dgemma.files.output import readable
from dgemma.files.regular import read_regular
from dgemma.native import formats
from dgemma.native.formats import Format

LOSSLESS = ("F32", "F16", "BF16")  # types that sums may have
LEAST, MOST = 1e-4, 1e4  # bounds of a weight, relative to the mean; so no weight is 0
STEADY = 0.1  # this share of the mean variance is added to each: a column that was constant may vary in normal use
FEW = 256  # the mean of an expert with fewer rows is filled up with rows of its layer's mean


class Sums(NamedTuple):
    """Sums over the inputs of a matrix, for each of a layer's experts; experts is 1 for other matrices."""

    squares: NDArray[np.float32]  # [experts, columns] sums of the squared inputs
    counts: NDArray[np.float32]  # [experts] the number of rows that were summed
    inputs: NDArray[np.float32] | None = None  # [experts, columns] sums of the inputs; None where a file has none


class Columns(NamedTuple):
    """The importance of the columns of a matrix, for each of a layer's experts: arrays [experts or 1, columns]."""

    weights: NDArray[np.float32]  # weights of squared errors, around 1
    mean: NDArray[np.float32] | None  # means of the inputs; None where a file does not have them
    pull: NDArray[np.float32] | None  # means over variances of the inputs: see quants/rows.c

    def encode(self, to: Format, rows: NDArray[np.float32], expert: int) -> NDArray[np.uint8]:
        """Encode rows [n, columns] of one expert to blocks. expert: 0 for a matrix without experts."""
        if self.mean is None or self.pull is None or to.block == 1:
            return to.encode(rows, self.weights[expert])
        return to.encode_rows(rows, self.weights[expert], self.mean[expert], self.pull[expert])


class Importance:
    """The importance of the columns of a model's tensors.

    few: (tensor, expert, rows) for each expert with fewer than FEW rows, where the rows are known.
    """

    def __init__(self, path: Path, columns: dict[str, Columns], dataset: str, chunks: int) -> None:
        self.path, self.dataset, self.chunks = path, dataset, chunks
        self.few: list[tuple[str, int, int]] = []
        self._columns = columns

    def of(self, want: Wanted) -> Columns | None:
        """Return the Columns of a tensor, or None where they are not known.

        The two halves of a fused tensor have the same inputs, so either of them will do.
        """
        return next((self._columns[name] for name in (want.gguf, *want.halves) if name in self._columns), None)

    def bind(self, needed: Sequence[Wanted]) -> int:
        """Check the shapes for all tensors, and return the number of tensors with known importance."""
        found = 0
        for want in needed:
            known = self.of(want)
            if known is None or want.is_float:
                continue
            columns, experts = want.dims[0], want.dims[2] if len(want.dims) > 2 else 1
            rows, width = known.weights.shape
            if (rows, width) not in ((1, columns), (experts, columns)):
                raise FormatError(
                    f"{self.path}: {want.gguf}: expected {experts} x {columns} numbers, found {rows} x {width}"
                )
            found += 1
        if not found:
            raise FormatError(f"{self.path}: it knows no tensor of this model")
        return found

    def pairs(self, found: int) -> list[Pair]:
        """Return the metadata about the importance for a quantised file."""
        return [
            Pair("quantize.imatrix.file", "STRING", readable(self.path.name)),
            Pair("quantize.imatrix.dataset", "STRING", self.dataset),
            Pair("quantize.imatrix.entries_count", "I32", found),
            Pair("quantize.imatrix.chunks_count", "I32", self.chunks),
        ]


def read_imatrix(path: Path, n_expert: int) -> Importance:
    """Read a GGUF file, or the older .dat. n_expert: the number of experts, which a .dat does not have."""
    if read_regular(path, 4) != b"GGUF":
        return _from_dat(path, read_regular(path), n_expert)
    with File(path) as file:
        if file.get(Keys.General.TYPE) != GGUFType.IMATRIX:
            raise FormatError(f"{path}: expected an imatrix, found a GGUF file of type {file.get(Keys.General.TYPE)!r}")
        for t in file.tensors:
            if t.format.name not in LOSSLESS:
                raise FormatError(f"{path}: tensor {t.name} is {t.format.name}; sums are F32")
        sums = {t.name: (t.dims, t.format.decode(t.data)) for t in file.tensors}
        datasets, chunks = file.get(Keys.IMatrix.DATASETS) or [], file.get(Keys.IMatrix.CHUNK_COUNT) or 0
    if not isinstance(datasets, list) or not all(isinstance(each, str) for each in datasets):
        raise FormatError(f"{path}: {Keys.IMatrix.DATASETS}: expected a list of texts")
    if not isinstance(chunks, int) or not 0 <= chunks < 1 << 31:
        raise FormatError(f"{path}: {Keys.IMatrix.CHUNK_COUNT}: expected a number from 0 to 2147483647")
    found = {}
    for name in (n.removesuffix(".in_sum2") for n in sums if n.endswith(".in_sum2")):
        dims, squares = sums[f"{name}.in_sum2"]
        counts = sums.get(f"{name}.counts", ((0,), np.zeros(0, np.float32)))[1]
        if counts.size * dims[0] != squares.size:
            expected = squares.size // dims[0]
            raise FormatError(f"{path}: tensor {name}.counts: expected {expected} numbers, found {counts.size}")
        inputs = sums.get(f"{name}.in_sum", ((0,), None))[1]
        if inputs is not None and inputs.size != squares.size:
            raise FormatError(f"{path}: tensor {name}.in_sum: expected {squares.size} numbers, found {inputs.size}")
        shaped = None if inputs is None else inputs.reshape(-1, dims[0])
        found[name] = Sums(squares.reshape(-1, dims[0]), counts.reshape(-1), shaped)
    return importance_of(path, found, ", ".join(datasets), chunks)


def importance_of(path: Path, found: Mapping[str, Sums], dataset: str, chunks: int) -> Importance:
    """Return the importance that follows from sums. path: the file for error messages."""
    importance = Importance(path, {}, dataset, chunks)
    for name, sums in found.items():
        importance._columns[name] = _columns(path, name, sums)
        if len(sums.counts) > 1:
            few = np.flatnonzero(sums.counts < FEW)
            importance.few += [(name, int(expert), int(sums.counts[expert])) for expert in few]
    return importance


def unmeasured(path: Path, needed: Sequence[Wanted]) -> Importance:
    """Return an Importance of ones in place of a measured one, for a plan."""
    sizes = {want.gguf: want.dims[0] for want in needed if not want.is_float}
    return Importance(
        path, {n: Columns(np.ones((1, size), np.float32), None, None) for n, size in sizes.items()}, path.name, 0
    )


def _columns(path: Path, name: str, sums: Sums) -> Columns:
    squares, counts = (of.astype(np.float64) for of in (sums.squares, sums.counts))
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise FormatError(f"{path}: {name}: expected finite counts")
    weights = _weights(path, name, _filled_up(squares, counts))
    if sums.inputs is None or not counts.any():
        return Columns(weights, None, None)
    if not np.isfinite(sums.inputs).all():
        raise FormatError(f"{path}: {name}: expected finite sums")
    mean, square = (_filled_up(of, counts) for of in (sums.inputs.astype(np.float64), squares))
    variance = np.maximum(square - mean**2, 0.0)
    steadied = variance + STEADY * variance.mean(axis=1, keepdims=True)
    pull = np.divide(mean, steadied, out=np.zeros_like(mean), where=steadied > 0)
    with np.errstate(over="ignore"):
        kept = [np.ascontiguousarray(of, np.float32) for of in (mean, pull)]
    if not all(np.isfinite(of).all() for of in kept):
        raise FormatError(f"{path}: {name}: sums that do not go with their squares")
    return Columns(weights, *kept)


def _filled_up(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means of the columns.

    For an expert e with n_e < FEW rows the means are (S_e + (FEW - n_e) m) / FEW, where S_e are its sums and m is the
    mean of all rows of its layer. So each of its rows counts, and an expert without rows has the layer's mean.
    """
    n = counts[:, None]
    if not n.any():
        return sums
    if len(sums) == 1:
        return sums / n
    filled: NDArray[np.float64] = (sums + np.maximum(FEW - n, 0.0) * (sums.sum(axis=0) / n.sum())) / np.maximum(n, FEW)
    return filled


def write_imatrix(
    path: Path, found: Mapping[str, Sums], dataset: str, chunks: int, chunk_size: int, force: bool
) -> None:
    """Write the sums as a GGUF file of llama.cpp's form. chunk_size: the rows of a chunk."""
    pairs = [
        Pair(Keys.General.TYPE, "STRING", GGUFType.IMATRIX),
        Pair(Keys.IMatrix.DATASETS, "STRINGS", [dataset]),
        Pair(Keys.IMatrix.CHUNK_COUNT, "U32", chunks),
        Pair(Keys.IMatrix.CHUNK_SIZE, "U32", chunk_size),
    ]
    infos, data = list[TensorInfo](), list[bytes]()
    for name, sums in found.items():
        kept = {".in_sum2": sums.squares, ".counts": sums.counts[:, None], ".in_sum": sums.inputs}
        for suffix, array in kept.items():
            if array is None:
                continue
            values = np.ascontiguousarray(array, np.float32).tobytes()
            infos.append(TensorInfo(name + suffix, array.shape[::-1], formats.by_name("F32")))
            data.append(values.ljust(aligned(len(values)), b"\0"))
    head = header(pairs, infos)
    with NewFile(path, len(head) + sum(map(len, data)), IMATRIX) as file:
        for piece in (head, *data):
            file.write(piece)
        file.commit(force)


def _from_dat(path: Path, data: bytes, n_expert: int) -> Importance:
    """Return the importance of an older file, all of whose numbers are little-endian.

    It has i32 entries; each entry is i32 length, name, i32 calls, i32 numbers, f32 numbers; then come i32 chunks,
    i32 length and the dataset's name.
    """
    columns: dict[str, Columns] = {}
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
        weights = _weights(path, name, squares.reshape(experts, -1).astype(np.float64))
        columns[name] = Columns(weights, None, None)
    chunks, dataset = (whole(), take(whole()).decode("utf-8", "replace")) if at < len(data) else (0, "")
    return Importance(path, columns, dataset, chunks)


def _weights(path: Path, name: str, squares: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the weights of columns, around 1 in each row; all 1 in a row of zeros (an expert that was never used).

    The weight of a column is the root of its mean square. The mean square itself would minimise the error of outputs if
    inputs were independent. They are not, and half of their mean square comes from their means. In a test with the
    bundled model and six orders of its hidden dimensions, the root gave the lower divergence at four bits
    (tests/measure/weight_types.py).
    """
    if squares.size == 0 or not np.isfinite(squares).all() or (squares < 0).any():
        raise FormatError(f"{path}: {name}: expected finite sums of squares")
    sizes = np.sqrt(squares)
    means = sizes.mean(axis=1, keepdims=True)
    scaled = np.divide(sizes, means, out=np.ones_like(sizes), where=means > 0)
    return np.ascontiguousarray(np.clip(scaled, LEAST, MOST), np.float32)
