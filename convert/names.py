"""Tell which tensors a GGUF file holds, in file order, and where each comes from. The library has the list."""

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

# The tensors of the vision tower, which checkpoints hold and no GGUF file does.
UNNEEDED = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
# Other names of tied weights: a checkpoint has such a weight under one of the names, or under both.
TIED = {"model.decoder.embed_tokens.": "lm_head.", "model.decoder.": "model.encoder.language_model."}
ONE_OF_A_KIND = "model.decoder.self_conditioning."  # not tied: the encoder has none

HEAD = ffi.string(lib.dg_head_name()).decode()  # the output head, in files that have one beside the embedding or alone

# The tensors that older files have in place of a fused one, in the order of their rows in it.
HALVES = {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the new file: `dims` fastest first, `layer` -1 at top level, `hf` "" if the converter makes it."""

    gguf: str
    hf: str
    kind: str  # as tensors.def has it: FLOATS, MATRIX, TABLE or MADE
    layer: int
    dims: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.dims)

    @property
    def halves(self) -> tuple[str, ...]:
        """Return the names of the tensors that older files have in its place; most tensors have none."""
        return next((tuple(self.gguf.replace(f, h) for h in of) for f, of in HALVES.items() if f in self.gguf), ())

    @property
    def is_float(self) -> bool:
        """Return whether the tensor is float32 in every recipe."""
        return self.kind in ("FLOATS", "MADE")


def wanted(config: Config) -> list[Wanted]:
    """Return all tensors in the order of the file: those at top level by name, then each layer's by name."""
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
    """The places of a file's tensors in the source.

    `of` has the places of a tensor by its GGUF name, and none of the tensors that the converter makes. Where there are
    several places, each has a part of every expert's rows, in turn.
    """

    of: dict[str, tuple[SourceTensor, ...]]
    copies: list[tuple[SourceTensor, SourceTensor]]  # pairs that must hold the same values
    left_out: int  # tensors of the source that are in no GGUF file


def match(tensors: dict[str, SourceTensor], needed: Sequence[Wanted], folder: Path) -> Origins:
    """Return where each needed tensor lies. Raises FormatError for a missing or unknown tensor, or another shape."""
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
    """Yield a weight's name and those of its tied copies. own: names of weights that are no copies."""
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
