"""Model files that claim more than they hold: the header of any sizes, and tensors of zeros that take no disk.

python tests/measure claims FILE CONTEXT uses one in a process of its own, and tells what that took: first the bytes
that a session takes by what the library says (0: it was refused), then those that were taken once it had made a step.
"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

from fuzz import odd

import dgemma
from dgemma._native import ffi, lib
from dgemma.native.formats import all_formats
from dgemma.native.metadata import keys

TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "a", "b"]
TYPES = [3, 3, 3, 2, 1, 1, 1]
SMALL: dict[str, Any] = dict(
    n_layer=1, context_length=64, d_model=32, d_ffn=32, n_head=1, n_head_kv=1, rope_base=1e6, rope_base_swa=1e4,
    rms_eps=1e-6, n_expert=2, n_expert_used=1, head_dim=32, softcap=30.0, sliding_window=8, sliding=0, head_dim_swa=32,
    d_expert=32, causal=0, canvas_length=8, steps=2,
)  # fmt: skip
KINDS = {"U32": odd.U32, "I32": odd.I32, "F32": odd.F32, "BOOL": odd.BOOL}
FORMATS = {form.name: form for form in all_formats()}


def header_values(claims: dict[str, Any], tokens: list[str]) -> list[bytes]:
    """The keys of metadata.def, with these values; those that are not given are left out."""
    values = [odd.value("general.architecture", odd.STRING, "diffusion-gemma")]
    for field, value in claims.items():
        key = keys()[field]
        kind = KINDS[key.kind.removesuffix("S")]
        each = [value] * claims["n_layer"]
        values.append(odd.array(key.key, kind, each) if key.per_layer else odd.value(key.key, kind, value))
    return [
        *values,
        odd.value("tokenizer.ggml.model", odd.STRING, "gemma4"),
        odd.array(odd.TOKENS, odd.STRING, tokens),
        odd.array(odd.TYPES, odd.I32, [*TYPES, *[1] * (len(tokens) - len(TYPES))]),
        odd.value(odd.UNKNOWN, odd.U32, 3),
        odd.value("tokenizer.ggml.eos_token_id", odd.U32, 1),
    ]


def write(path: Path, tokens: list[str] = TOKENS, **claimed: Any) -> Path:
    """A model of these sizes (fields of dg_config). Head sizes follow head_dim."""
    claims = SMALL | claimed
    for field in ("value_dim", "rope_dim"):
        claims |= {field: claims["head_dim"], f"{field}_swa": claims["head_dim_swa"]}
    config = ffi.new("dg_config *")
    for field, value in claims.items():
        if keys()[field].per_layer:
            getattr(config, field)[0 : lib.DG_MAX_LAYERS] = [value] * lib.DG_MAX_LAYERS
        else:
            setattr(config, field, value)
    config.n_vocab = len(tokens)
    tensors, end, ones = [], 0, 0
    for layer in range(min(claims["n_layer"], lib.DG_MAX_LAYERS)):
        for entry, dims in entries(config, layer):
            form = FORMATS["Q8_0" if ffi.string(entry.kind) in (b"MATRIX", b"TABLE") else "F32"]
            name = ffi.string(entry.gguf).decode()
            tensors.append(odd.tensor(name % layer if "%" in name else name, dims, form.id, end))
            if name == "rope_freqs.weight":  # which is divided by
                ones = end
            size = math.prod(dims) // form.block * form.bytes
            end += -(-size // 32) * 32
    header = odd.file(header_values(claims, tokens), tensors)
    with path.open("wb") as file:
        file.write(header)
        file.seek(len(header) + ones)
        file.write(struct.pack("<f", 1.0) * (claims["head_dim"] // 2))
        file.truncate(len(header) + end)
    return path


def entries(config: Any, layer: int) -> list[tuple[Any, list[int]]]:
    """The tensors of one layer, and with the first those outside of layers."""
    found, i, dims = [], 0, ffi.new("int64_t[3]")
    while entry := lib.dg_tensor_entry_at(i):
        n = lib.dg_tensor_dims(i, config, layer, dims)
        scope = ffi.string(entry.scope)
        if n and scope != b"SPLIT" and (scope != b"TOP" or layer == 0):
            found.append((entry, list(dims[0:n])))
        i += 1
    return found


def own_memory() -> int:
    """Bytes of this process's own, without mapped files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon:"))


def main(path: str, context: int) -> None:
    before = own_memory()
    try:
        model = dgemma.Model(path, threads=1)
        session = model.session(context or None)
        told = model.session_bytes(session.context)
        session.encode([2, 5])
        steps = session.stream(steps=2)
        next(steps)
        next(steps)
    except dgemma.Error as refused:
        print(0, own_memory() - before, type(refused).__name__, refused, sep="\n")
    else:
        print(told, own_memory() - before, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
