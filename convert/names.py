"""Which tensors a GGUF file holds, in file order, and where each comes from. The list is the library's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dgemma._native import ffi, lib
from dgemma.convert.config import Config
from dgemma.convert.safetensors import DTYPES, SourceTensor
from dgemma.errors import FormatError

# What checkpoints hold and no GGUF file does: the vision tower. Tied copies are found by what they are copies of.
UNNEEDED = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
TIED = {"lm_head.": "model.decoder.embed_tokens.", "model.encoder.language_model.": "model.decoder."}

# The tensors that older files have in place of a fused one, in the order of its rows.
HALVES = {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the file to be: `dims` fastest first, `layer` -1 at top level, `hf` "" when it is made here."""

    gguf: str
    hf: str
    kind: str  # FLOATS, MATRIX, TABLE, MADE
    layer: int
    dims: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.dims)

    @property
    def halves(self) -> tuple[str, ...]:
        """The names of the tensors that older files have in its place; none for most."""
        return next((tuple(self.gguf.replace(f, h) for h in of) for f, of in HALVES.items() if f in self.gguf), ())

    @property
    def is_float(self) -> bool:
        """Always float32, whatever the recipe."""
        return self.kind in ("FLOATS", "MADE")


def wanted(config: Config) -> list[Wanted]:
    """All tensors, in the order of the file: those at top level by name, then each layer's by name."""
    native, dims = config.native(), ffi.new("int64_t[3]")

    def entries() -> Iterator[Wanted]:
        i = 0
        while entry := lib.dg_tensor_entry_at(i):
            scope, kind, gguf, hf = (_text(s) for s in (entry.scope, entry.kind, entry.gguf, entry.hf))
            if scope != "SPLIT":
                for layer in [-1] if scope == "TOP" else range(config.values["n_layer"]):
                    if n := lib.dg_tensor_dims(i, native, max(layer, 0), dims):
                        at, from_ = (name.replace("%d", str(layer)) for name in (gguf, hf))
                        yield Wanted(at, from_, kind, layer, tuple(dims[0:n]))
            i += 1

    return sorted(entries(), key=lambda w: (w.layer, w.gguf))


def match(tensors: dict[str, SourceTensor], needed: list[Wanted], folder: Path) -> tuple[dict[str, SourceTensor], int]:
    """The source of each needed tensor by its GGUF name, and how many others were left out."""
    sources: dict[str, SourceTensor] = {}
    for want in needed:
        if not want.hf:
            continue
        source = tensors.get(want.hf)
        if source is None:
            raise FormatError(f"{folder}: tensor {want.hf} is missing")
        if source.shape != want.dims[::-1]:
            expected, found = list(want.dims[::-1]), list(source.shape)
            raise FormatError(
                f"{source.file}: tensor {want.hf}: expected shape {expected} from config.json, found {found}"
            )
        if source.dtype not in DTYPES:
            raise FormatError(f"{source.file}: tensor {want.hf} is {source.dtype}; expected one of {', '.join(DTYPES)}")
        sources[want.gguf] = source
    known = {want.hf for want in needed}
    for name in tensors.keys() - known:
        if not (name.startswith(UNNEEDED) or any(copy in known for copy in _originals(name))):
            raise FormatError(f"{tensors[name].file}: unknown tensor {name}")
    return sources, len(tensors.keys() - known)


def _originals(name: str) -> Iterator[str]:
    return (original + name[len(copy) :] for copy, original in TIED.items() if name.startswith(copy))


def _text(string: object) -> str:
    return ffi.string(string).decode()
