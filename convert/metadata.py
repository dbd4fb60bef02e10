"""Gather the metadata of a new file. The library lists the keys, their kinds and order; this module has the values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFType, Keys

from dgemma.convert.config import MODEL_TYPE, Config
from dgemma.convert.names import Wanted
from dgemma.convert.vocabulary import SCORE, SPECIAL, Vocabulary
from dgemma.files.gguf_file import File
from dgemma.native.metadata import keys

TOKENIZER_MODEL = "gemma4"
ENCODED = "ENCODED"

# Keys, or beginnings of keys, that describe a file and not its model.
OF_A_FILE = (Keys.General.ALIGNMENT, "split.", "quantize.")


@dataclass(frozen=True, slots=True)
class Pair:
    """A key of a GGUF file with its value.

    kind: one of gguf_file.KINDS; one of them with an S, for an array; or ENCODED, for an encoded value: the number of
    its type, then its bytes.
    """

    key: str
    kind: str
    value: Any


def metadata(config: Config, vocabulary: Vocabulary, needed: Sequence[Wanted], file_type: int) -> list[Pair]:
    """Return all pairs in file order, without keys that have no value, such as a missing chat template."""
    values: dict[str, Any] = dict(config.values)
    values["architecture"] = MODEL_TYPE.replace("_", "-")
    values["type"] = GGUFType.MODEL
    values["name"] = config.name
    values["size_label"] = size_label(needed, config.values["n_expert"])
    values["tokenizer_model"] = TOKENIZER_MODEL
    values["tokens"] = vocabulary.tokens
    values["scores"] = [SCORE] * len(vocabulary.tokens)
    values["token_type"] = vocabulary.types
    values["merges"] = vocabulary.merges
    values |= {f"{name}_id": vocabulary.ids.get(name) for name in SPECIAL}
    end_ids = config.end_ids or [i for i in [vocabulary.ids.get("eos")] if i is not None]
    values["end_token_ids"] = end_ids or None
    if values["eos_id"] is None and end_ids:
        values["eos_id"] = end_ids[0]
    values["chat_template"] = vocabulary.chat_template
    values["add_space_prefix"] = False
    values["add_bos"] = vocabulary.add_bos
    values["quantization_version"] = GGML_QUANT_VERSION
    values["file_type"] = file_type

    return [Pair(k.key, k.kind, values[k.field]) for k in keys().values() if values[k.field] is not None]


def carried(file: File, file_type: int) -> list[Pair]:
    """Return the metadata of a GGUF file for a new file in other formats."""
    fresh = {keys()["quantization_version"].key: GGML_QUANT_VERSION, keys()["file_type"].key: file_type}
    pairs = [
        Pair(key, "U32", fresh.pop(key)) if key in fresh else Pair(key, ENCODED, value.encoded)
        for key, value in file.values.items()
        if not key.startswith(OF_A_FILE)
    ]
    return pairs + [Pair(key, "U32", value) for key, value in fresh.items()]


def size_label(needed: Sequence[Wanted], n_expert: int) -> str:
    """Return a label such as 128x2.6B: the count of experts, and the parameters of a model with one of them."""
    shared = sum(want.count for want in needed if "_exps.weight" not in want.gguf)
    expert = sum(want.count // n_expert for want in needed if "_exps.weight" in want.gguf)
    return f"{n_expert}x{_rounded(shared + expert)}"


def _rounded(count: int) -> str:
    """Return a count with at least two digits, rounded as by the gguf package."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count > scale or letter == "K":
            break
    digits = 1 + int(math.log10(max(round(count / scale), 1))) if round(count / scale) else 0
    return f"{count / scale:.{max(2 - digits, 0)}f}{letter}"
