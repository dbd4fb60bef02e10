"""The library's tables of metadata keys (metadata.def), and of limits of their values (limits.def)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dgemma._native import ffi, lib


@dataclass(frozen=True, slots=True)
class Key:
    """One line of metadata.def."""

    field: str  # the name in a model's Config and in the converter's dict of metadata
    key: str  # the name in a GGUF file
    kind: str  # U32 I32 F32 BOOL STRING, or one of them with an S for an array
    in_config: bool
    per_layer: bool
    required: bool
    absent: float  # the value where a file lacks a key that is not required


@dataclass(frozen=True, slots=True)
class Limit:
    """One line of limits.def: the smallest and the largest value of a size that is accepted from a file."""

    field: str  # the name in a model's Config
    key: Key  # the key that holds the size
    least: int
    most: int


@cache
def limits() -> dict[str, Limit]:
    """Return all limits by field."""
    table: dict[str, Limit] = {}
    while entry := lib.dg_limit_at(len(table)):
        field, named = (ffi.string(text).decode() for text in (entry.field, entry.named))
        table[field] = Limit(field, keys()[named], int(entry.least), int(entry.most))
    return table


@cache
def keys() -> dict[str, Key]:
    """Return all keys by field, in the order of a file."""
    table: dict[str, Key] = {}
    while entry := lib.dg_key_at(len(table)):
        field, key, kind = (ffi.string(text).decode() for text in (entry.field, entry.key, entry.kind))
        table[field] = Key(field, key, kind, entry.in_config, entry.per_layer, entry.required, entry.absent)
    return table
