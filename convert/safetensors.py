"""Read checkpoints in safetensors files: headers are read and checked when they are opened, values on demand."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.errors import FormatError
from dgemma.files.regular import open_regular, read_regular

# Types of weights that can be converted, with the bytes of one value.
DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
# Types of other tensors in a file; their lengths are checked too.
OTHER_DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
OTHER_DTYPES |= {"I64": 8, "U64": 8, "F64": 8}

MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a source, and where its data is."""

    name: str
    file: Path
    dtype: str  # the name of a format
    shape: tuple[int, ...]  # the dimension that varies slowest is first
    offset: int  # bytes from the beginning of the file
    bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """The tensors of one or several safetensors files, by name; a context manager that keeps the files open."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, SourceTensor] = {}
        self._files: dict[Path, int] = {}
        try:
            for file, promised in _shards(folder).items():
                self._add(file, promised)
        except BaseException:
            self.close()
            raise

    def _add(self, file: Path, promised: set[str]) -> None:
        self._files[file] = open_regular(file)
        found = _read_header(file, self._files[file])
        for name in sorted(promised - found.keys()):
            raise FormatError(f"{file}: the index says that tensor {name} is in this file, but it is not")
        for name, tensor in found.items():
            if name in self.tensors:
                raise FormatError(f"{file}: tensor {name} is already in {self.tensors[name].file.name}")
            self.tensors[name] = tensor

    def read(self, tensor: SourceTensor, start: int, count: int) -> bytearray:
        """Return `count` bytes of a tensor from byte `start` on."""
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            got = os.preadv(self._files[tensor.file], [view[done:]], tensor.offset + start + done)
            if got == 0:
                raise FormatError(f"{tensor.file}: the file ended inside tensor {tensor.name}")
            done += got
        return data

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    if not os.path.lexists(file):
        raise FormatError(f"{file}: no such file")
    data = read_regular(file)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"{file}: not a JSON file ({problem})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Return the files of a checkpoint, each with the tensors that should be in it by the index."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(whole):
        return {whole: set()}
    if os.path.lexists(index):
        return _indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder}: no model.safetensors and no model.safetensors.index.json here")
    for file in files:
        if numbered := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", file.name):
            head, number, of, count, tail = numbered.groups()
            for i in range(1, min(int(count), 100_000) + 1):
                shard = folder / f"{head}{i:0{len(number)}}{of}{count}{tail}"
                if not os.path.lexists(shard):
                    raise FormatError(f"{shard}: this shard of the checkpoint is missing")
    return {file: set() for file in files}


def _indexed(folder: Path, index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: expected an object weight_map of tensor names and files")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise FormatError(f"{index}: tensor {name} is said to be in {shard!r}, which is no file name")
        shards.setdefault(folder / shard, set()).add(name)
    present = {file.name for file in folder.iterdir()}  # the index may have names that no file can have
    for shard, names in shards.items():
        if shard.name not in present:
            raise FormatError(f"{shard}: this shard of the checkpoint is missing (it holds {len(names)} tensors)")
    return dict(sorted(shards.items()))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name appears twice")
    return names


def _read_header(file: Path, descriptor: int) -> dict[str, SourceTensor]:
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
        raise FormatError(f"{file}: not a safetensors file, or cut off: a header of {length} bytes, a file of {size}")
    try:
        text = os.pread(descriptor, length, 8).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"{file}: the safetensors header is damaged ({problem})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{file}: the safetensors header is no JSON object")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset != end:
            raise FormatError(f"{file}: tensor {tensor.name} starts at byte {tensor.offset}, expected {end}")
        end += tensor.bytes
    if end != size:
        raise FormatError(f"{file}: expected {end} bytes from its header, found a file of {size}")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> SourceTensor:
    where = f"{file}: tensor {name}"
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: its header entry is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    width = DTYPES.get(dtype) or OTHER_DTYPES.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise FormatError(f"{where}: unknown type {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"{where}: its shape is {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise FormatError(f"{where}: its data_offsets are {offsets!r}")
    start, end = offsets
    expected = math.prod(shape) * width
    if end - start != expected:
        raise FormatError(f"{where}: {dtype} {shape} takes {expected} bytes, its data_offsets say {end - start}")
    return SourceTensor(name, file, dtype, tuple(shape), data_start + start, expected)
