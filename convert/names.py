"""List the tensors of a GGUF file in file order, and find each in the source. The list itself is the library's."""

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

# Names of tensors of the vision tower: checkpoints have them, GGUF files do not.
UNNEEDED = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
# Prefixes of tied weights: a checkpoint has such a weight under one of the two names, or under both.
TIED = {"model.decoder.embed_tokens.": "lm_head.", "model.decoder.": "model.encoder.language_model."}
ONE_OF_A_KIND = "model.decoder.self_conditioning."  # not tied: the encoder has no self-conditioning

HEAD = ffi.string(
    lib.dg_head_name()
).decode()  # the output head, in files that have it besides or instead of token_embd

# Tensors of older files that are halves of a fused one, in the order of their rows in it.
HALVES = {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the new file."""

    gguf: str  # its name in GGUF files
    hf: str  # its name in checkpoints; "" if the converter makes it
    kind: str  # its kind in tensors.def: FLOATS, MATRIX, TABLE or MADE
    layer: int  # -1 for tensors outside of layers
    dims: tuple[int, ...]  # the dimension that varies fastest is first

    @property
    def count(self) -> int:
        return math.prod(self.dims)

    @property
    def halves(self) -> tuple[str, ...]:
        """Return the names of the two tensors that older files have in its place; () for most tensors."""
        return next((tuple(self.gguf.replace(f, h) for h in of) for f, of in HALVES.items() if f in self.gguf), ())

    @property
    def is_float(self) -> bool:
        """Return whether the tensor is float32 in every recipe."""
        return self.kind in ("FLOATS", "MADE")


def wanted(config: Config) -> list[Wanted]:
    """Return all tensors in the file's order: those outside of layers by name, then those of each layer by name."""
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
    """The source tensors for the tensors of the new file."""

    # By GGUF name, without tensors that the converter makes. If there are several, each has a part of every expert's
    # rows, in this order.
    of: dict[str, tuple[SourceTensor, ...]]
    copies: list[tuple[SourceTensor, SourceTensor]]  # pairs that must hold the same values
    left_out: int  # the number of source tensors that GGUF files do not have


def match(tensors: dict[str, SourceTensor], needed: Sequence[Wanted], folder: Path) -> Origins:
    """Return the Origins of the needed tensors. Raises FormatError for a missing or unknown tensor or a wrong shape."""
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
    """Yield the name of a weight and the names of its tied copies. own: names of weights that are no copies."""
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
