"""What a conversion will do: every tensor's source, format and place in the file, and the header in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgemma.convert import recipe
from dgemma.convert.config import Config, read_config
from dgemma.convert.metadata import metadata
from dgemma.convert.names import Wanted, match, wanted
from dgemma.convert.safetensors import Checkpoint, SourceTensor
from dgemma.convert.tokenizer import read_vocabulary
from dgemma.convert.writer import aligned, header
from dgemma.errors import FormatError, SystemFailure
from dgemma.formats import Format


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the file. `source` is None where the converter makes it; `offset` is within the data section."""

    want: Wanted
    source: SourceTensor | None
    format: Format
    offset: int
    bytes: int

    @property
    def source_bytes(self) -> int:
        return self.source.bytes if self.source else 0


@dataclass(frozen=True)
class Plan:
    folder: Path
    type: str
    config: Config
    header: bytes
    tensors: list[Planned]
    left_out: int  # tensors of the source that no GGUF file holds

    @property
    def data_bytes(self) -> int:
        return aligned(self.tensors[-1].offset + self.tensors[-1].bytes)

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)

    def histogram(self) -> dict[str, tuple[int, int]]:
        """Tensors and bytes per format, the most bytes first."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.format.name] += 1
            sizes[tensor.format.name] += tensor.bytes
        return {name: (counts[name], size) for name, size in sizes.most_common()}


def open_source(folder: Path) -> Checkpoint:
    if not folder.exists():
        raise SystemFailure(f"{folder}: no such folder")
    if not folder.is_dir():
        raise FormatError(f"{folder}: expected the folder of a Hugging Face checkpoint, found a file")
    return Checkpoint(folder)


def make_plan(checkpoint: Checkpoint, folder: Path, type: str, overrides: Sequence[tuple[str, str]] = ()) -> Plan:
    """Reads the small files of the source and decides everything; no weight is read."""
    chosen_recipe = recipe.find(type)
    config = read_config(folder)
    needed = wanted(config)
    sources, left_out = match(checkpoint.tensors, needed, folder)
    formats = recipe.assign(needed, chosen_recipe, overrides)
    vocabulary = read_vocabulary(folder, config.values["n_vocab"], config.special_ids)
    tensors, offset = [], 0
    for want in needed:
        to = formats[want.gguf]
        size = want.count // to.block * to.bytes
        tensors.append(Planned(want, sources.get(want.gguf), to, offset, size))
        offset = aligned(offset + size)
    pairs = metadata(config, vocabulary, needed, chosen_recipe.file_type)
    places = [(t.want.gguf, t.want.dims, t.format.id, t.offset) for t in tensors]
    return Plan(folder, type, config, header(pairs, places), tensors, left_out)
