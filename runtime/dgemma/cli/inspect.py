"""Reads the contents of a GGUF file into plain Python values, for dg-info's JSON and tables."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgemma.config import shortest
from dgemma.errors import Error, FormatError
from dgemma.files.gguf_file import File, Tensor
from dgemma.model import Model
from dgemma.native.metadata import keys
from dgemma.tokenizer import Tokenizer

LONG = 1000  # elements; of longer arrays only the length is given

# The parts of a model. A tensor belongs to the first part of which its name contains one of the texts.
PARTS = {
    "embedding and output head": ("token_embd",),
    "self-conditioning": ("self_cond",),
    "router": ("ffn_gate_inp", "ffn_down_exps.scale"),
    "experts": ("_exps.",),
    "norms and scales": ("norm", "scale", "rope_freqs"),
    "attention": (".attn_",),
    "dense FFN": (".ffn_",),
}
OTHER = "others"
TOKEN_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "byte"}
CONTROL = 3
MARKS = (CONTROL, 4)  # the TOKEN_KINDS of marks
BOS, TURN_END = "<bos>", "<turn|>"  # Gemma's tokens


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a GGUF file says about its model, even where dgemma cannot run it."""
    with File(path) as file:
        model, refusal = _config(file), _refusal(path)
        found = {
            "path": str(Path(path)),
            "bytes": file.bytes,
            "parts": file.parts,
            "runs": refusal is None,
            "refusal": refusal,
            "config": model,
            "parameters": _parameters(file.tensors, model),
            "formats": _formats(file.tensors),
            "tokenizer": _tokenizer(path, file),
            "chat_template": file.get(keys()["chat_template"].key),
            "metadata": {key: _value(file, key) for key in file.values},
            "tensors": [
                {"name": t.name, "format": t.format.name, "dims": list(t.dims), "bytes": t.bytes} for t in file.tensors
            ],
        }
        file.check()
        return found


def _config(file: File) -> dict[str, Any] | None:
    """Return the model's configuration; None where dgemma does not know this kind of model.

    The types of the tensors are not checked.
    """
    try:
        return dict(file.config())
    except FormatError:
        return None


def _refusal(path: str | os.PathLike[str]) -> str | None:
    """Return the runtime's error for the file, or None where it can run it."""
    try:
        with Model(path, backend="cpu", threads=1):
            return None
    except Error as refusal:
        return str(refusal)


def _value(file: File, key: str) -> dict[str, Any]:
    found = file.values[key]
    entry: dict[str, Any] = {"kind": found.kind}
    if found.is_array:
        entry["count"] = found.count
    if not found.is_array or found.count <= LONG:
        floats, value = found.kind.startswith("F32"), found.value
        entry["value"] = value if not floats else [shortest(v) for v in value] if found.is_array else shortest(value)
    return entry


def part_of(name: str) -> str:
    return next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), OTHER)


def _parameters(tensors: Iterable[Tensor], config: dict[str, Any] | None) -> dict[str, Any]:
    """Return parameters and bytes by part, and the number of active parameters for one token.

    Of the experts only those that a token is routed to are active.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        counts[part_of(tensor.name)] += math.prod(tensor.dims)
        sizes[part_of(tensor.name)] += tensor.bytes
    share = config["n_expert_used"] / config["n_expert"] if config else 1.0
    active = sum(round(count * share) if part == "experts" else count for part, count in counts.items())
    parts = [part for part in (*PARTS, OTHER) if counts[part]]
    return {
        "total": sum(counts.values()),
        "active": active if config else None,
        "parts": {part: {"parameters": counts[part], "bytes": sizes[part]} for part in parts},
    }


def _formats(tensors: Iterable[Tensor]) -> dict[str, dict[str, int]]:
    """Return the number of tensors, parameters and bytes of each format, sorted by bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = found.setdefault(tensor.format.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += math.prod(tensor.dims)
        entry["bytes"] += tensor.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _find(tokenizer: Tokenizer, mark: str) -> int | None:
    """Return the id of a mark, if it is a token."""
    ids = tokenizer.encode(mark)
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids, special=True) == mark else None


def _tokenizer(path: str | os.PathLike[str], file: File) -> dict[str, Any] | None:
    """Return facts about the vocabulary; None where the file has none that the runtime can read."""
    try:
        tokenizer = Tokenizer.from_gguf(path)
    except FormatError:
        return None
    declared = file.get(keys()["token_type"].key) or []
    taken = [i for i, kind in enumerate(tokenizer.kinds) if kind in MARKS and declared[i] not in (kind, CONTROL)]
    kinds = Counter(declared)
    names = ("bos", "eos", "unk", "pad", "mask")
    ids = {name: getattr(tokenizer, f"{name}_id") for name in names}
    merges = file.values.get(keys()["merges"].key)
    return {
        "model": file.get(keys()["tokenizer_model"].key),
        "tokens": tokenizer.n_vocab,
        "merges": merges.count if merges else 0,
        "kinds": {name: kinds[number] for number, name in TOKEN_KINDS.items() if kinds[number]},
        "ids": {name: i for name, i in ids.items() if i is not None},
        "texts": {name: tokenizer.decode([i], special=True) for name, i in ids.items() if i is not None},
        "add_bos": tokenizer.add_bos,
        "bos_by_text": _find(tokenizer, BOS),
        "turn_end": _find(tokenizer, TURN_END),
        "marks": {tokenizer.decode([i], special=True): i for i in taken},
    }
