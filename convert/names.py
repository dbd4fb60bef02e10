"""Which tensors a GGUF file holds, in file order, and where each comes from. The list is the library's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dgemma._native import ffi, lib
from dgemma.convert.config import Config
from dgemma.convert.safetensors import DTYPES, SourceTensor
from dgemma.errors import FormatError

# What checkpoints hold and no GGUF file does: the vision tower.
UNNEEDED = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
# Other names of the same weights: a checkpoint has a tied weight under either name, or under both.
TIED = {"model.decoder.embed_tokens.": "lm_head.", "model.decoder.": "model.encoder.language_model."}
ONE_OF_A_KIND = "model.decoder.self_conditioning."  # which the encoder does not have

HEAD = ffi.string(lib.dg_head_name()).decode()  # of a GGUF file that has the embedding's copy as a head, or it alone

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


class Origins(NamedTuple):
    """Where a file's tensors are, by GGUF name. Those that the converter makes are missing. Of several places, each has
    a part of every expert's rows, in turn.
    """

    of: dict[str, tuple[SourceTensor, ...]]
    copies: list[tuple[SourceTensor, SourceTensor]]  # (a tensor, another that must hold the same values)
    left_out: int  # tensors of the source that are in no GGUF file


def match(tensors: dict[str, SourceTensor], needed: Sequence[Wanted], folder: Path) -> Origins:
    """The source of each needed tensor. Raises FormatError for one that is missing, is none or has another shape."""
    origins = Origins({}, [], 0)
    own = {want.hf for want in needed}
    seen: set[str] = set()
    for want in needed:
        if not want.hf:
            continue
        found = [tensors[name] for name in _names(want.hf, own) if name in tensors]
        if not found:
            raise FormatError(f"{folder}: tensor {want.hf} is missing")
        for tensor in found:
            _check(tensor, want)
        origins.of[want.gguf] = (found[0],)
        origins.copies.extend((found[0], copy) for copy in found[1:])
        seen.update(tensor.name for tensor in found)
    others = tensors.keys() - seen
    for name in sorted(others):
        if not name.startswith(UNNEEDED):
            raise FormatError(f"{tensors[name].file}: unknown tensor {name}")
    return origins._replace(left_out=len(others))


def _names(name: str, own: set[str]) -> Iterator[str]:
    """A weight's name, and those of its tied copies. own: names of weights that are copies of none."""
    yield name
    for original, copy in TIED.items():
        other = copy + name.removeprefix(original)
        if name.startswith(original) and not name.startswith(ONE_OF_A_KIND) and other not in own:
            yield other


def _check(tensor: SourceTensor, want: Wanted) -> None:
    if tensor.shape != want.dims[::-1]:
        expected, found = list(want.dims[::-1]), list(tensor.shape)
        raise FormatError(
            f"{tensor.file}: tensor {tensor.name}: expected shape {expected} from config.json, found {found}"
        )
    if tensor.dtype not in DTYPES:
        raise FormatError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")


def _text(string: object) -> str:
    return ffi.string(string).decode()
