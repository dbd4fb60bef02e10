"""Plan a conversion: the source, format and offset of each tensor, and the headers of the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gguf import Keys
from numpy.typing import NDArray

from dgemma.convert import recipe
from dgemma.convert.config import Config
from dgemma.convert.encode import rope_freqs
from dgemma.convert.gguf_header import ALIGNMENT, TensorInfo, aligned, header, header_bytes
from dgemma.convert.metadata import Pair
from dgemma.convert.names import Wanted, wanted
from dgemma.convert.safetensors import SourceTensor
from dgemma.convert.source import Source
from dgemma.errors import UsageError
from dgemma.native.formats import Format
from dgemma.units import size_text


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the new file, with its values' source."""

    want: Wanted
    sources: tuple[SourceTensor, ...]  # () for a tensor that the converter makes
    made: NDArray[Any] | None  # the values of a tensor that the converter makes
    format: Format
    offset: int  # bytes from the beginning of the data section
    bytes: int

    @property
    def source_bytes(self) -> int:
        return sum(source.bytes for source in self.sources)

    @property
    def source_format(self) -> str:
        return "+".join(dict.fromkeys(source.dtype for source in self.sources)) or "made"

    def runs(self) -> Iterator[tuple[SourceTensor | None, int, int]]:
        """Yield (source, index of its first value, count of values) in the tensor's order: the parts of each expert."""
        if len(self.sources) <= 1:
            yield self.sources[0] if self.sources else None, 0, self.want.count
            return
        for expert in range(self.want.dims[-1]):
            for source in self.sources:
                count = source.count // self.want.dims[-1]
                yield source, expert * count, count


@dataclass(frozen=True)
class Part:
    """A file to write: the only one, or a part of a split file."""

    header: bytes
    tensors: list[Planned]

    @property
    def data_bytes(self) -> int:
        return aligned(self.tensors[-1].offset + self.tensors[-1].bytes)

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Plan:
    """A complete description of a conversion."""

    source: Path
    type: str
    config: Config
    parts: list[Part]
    copies: list[tuple[SourceTensor, SourceTensor]]  # pairs of the source that must be equal; the first is used
    left_out: int  # the number of source tensors that GGUF files do not have, without copies
    notes: list[str]  # notes on the source for the user

    @property
    def tensors(self) -> list[Planned]:
        return list(chain.from_iterable(part.tensors for part in self.parts))

    @property
    def header_bytes(self) -> int:
        return sum(len(part.header) for part in self.parts)

    @property
    def data_bytes(self) -> int:
        return sum(part.data_bytes for part in self.parts)

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + self.data_bytes

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def compared_bytes(self) -> int:
        return sum(one.bytes + other.bytes for one, other in self.copies)

    def histogram(self) -> dict[str, tuple[int, int]]:
        """Return the number of tensors and their bytes in each format, sorted by bytes."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.format.name] += 1
            sizes[tensor.format.name] += tensor.bytes
        return {name: (counts[name], size) for name, size in sizes.most_common()}


def make_plan(
    source: Source,
    type: str,
    overrides: Sequence[tuple[str, str]] = (),
    split_max_size: int | None = None,
    more: Sequence[Pair] = (),
) -> Plan:
    """Return the plan. Only the small files of the source are read, no weights. more: further metadata."""
    chosen = recipe.find(type)
    needed = wanted(source.config)
    origins = source.origins(needed)
    formats = recipe.assign(needed, chosen, overrides)
    tensors = []
    for want in needed:
        sources, to = origins.of.get(want.gguf, ()), formats[want.gguf]
        made = None if sources else rope_freqs(source.config)
        tensors.append(Planned(want, sources, made, to, 0, want.count // to.block * to.bytes))
    pairs = [*source.pairs(needed, chosen.file_type), *more]
    parts = _parts(pairs, tensors, split_max_size)
    return Plan(source.path, type, source.config, parts, origins.copies, origins.left_out, source.notes)


def _parts(pairs: list[Pair], tensors: list[Planned], most: int | None) -> list[Part]:
    """Return one part, or several of at most `most` bytes.

    The first part has the metadata; each of several has its number and their count.
    """
    if most is None or len(grouped := _grouped(pairs, tensors, most)) == 1:
        return [_part(pairs, tensors)]
    parts = []
    for i, group in enumerate(grouped):
        parts.append(_part((pairs if i == 0 else []) + _split_pairs(i, len(grouped), len(tensors)), group))
    return parts


def _split_pairs(i: int, n: int, n_tensors: int) -> list[Pair]:
    return [
        Pair(Keys.Split.LLM_KV_SPLIT_NO, "U16", i),
        Pair(Keys.Split.LLM_KV_SPLIT_COUNT, "U16", n),
        Pair(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, "I32", n_tensors),
    ]


def _grouped(pairs: list[Pair], tensors: list[Planned], most: int) -> list[list[Planned]]:
    """Return the tensors in order, in groups for files of at most `most` bytes."""
    groups: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        entry = header_bytes([], [_info(tensor)]) - header_bytes([], [])
        needs = entry + aligned(tensor.bytes)
        if not groups or needs > room:
            keys = (pairs if not groups else []) + _split_pairs(0, 0, 0)
            room = most - header_bytes(keys, []) - (ALIGNMENT - 1)  # the header is padded by at most ALIGNMENT - 1
            groups.append([])
        if needs > room:
            raise UsageError(
                f"--split-max-size {size_text(most)}: {tensor.want.gguf} and the header of its part need"
                f" {size_text(most - room + needs)}"
            )
        groups[-1].append(tensor)
        room -= needs
    return groups


def _part(pairs: Sequence[Pair], tensors: Sequence[Planned]) -> Part:
    placed, offset = [], 0
    for t in tensors:
        placed.append(Planned(t.want, t.sources, t.made, t.format, offset, t.bytes))
        offset = aligned(offset + t.bytes)
    return Part(header(pairs, [_info(t) for t in placed]), placed)


def _info(tensor: Planned) -> TensorInfo:
    return TensorInfo(tensor.want.gguf, tensor.want.dims, tensor.format)
