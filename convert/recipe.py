"""Which format each tensor gets: the recipes of llama-quantize, with its per-layer rules and fall-backs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dgemma import formats
from dgemma.convert.names import Wanted
from dgemma.errors import UsageError

# Rows that do not divide into a format's blocks fall back to this one, and where they do not fit that either, to F16.
FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
LAST_RESORT = "F16"


def more_bits(i: int, n: int) -> bool:
    """Whether number i of n matters more: the first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _same(base: str) -> Callable[[Wanted, int, int], str]:
    return lambda want, i, n: base


def _mixed(base: str) -> Callable[[Wanted, int, int], str]:
    """_M recipes: attn_v and the down projections of the layers that matter more get Q6_K."""

    def rule(want: Wanted, i: int, n: int) -> str:
        special = ".attn_v." in want.gguf or ".ffn_down" in want.gguf
        return "Q6_K" if special and more_bits(i, n) else base

    return rule


@dataclass(frozen=True)
class Recipe:
    """`rule` gives the format of a matrix that is number i of the n of its name."""

    file_type: int  # general.file_type
    table: str  # the format of the embedding, which is also the output head
    rule: Callable[[Wanted, int, int], str]
    help: str


# THE list of types.
RECIPES = {
    "f32": Recipe(0, "F32", _same("F32"), "32-bit floats, for comparisons"),
    "f16": Recipe(1, "F16", _same("F16"), "16-bit floats with a small range"),
    "bf16": Recipe(32, "BF16", _same("BF16"), "the checkpoint's own values, nothing lost"),
    "q8_0": Recipe(7, "Q8_0", _same("Q8_0"), "8.5 bits a weight, hardly to be told from bf16"),
    "q6_k": Recipe(18, "Q6_K", _same("Q6_K"), "6.6 bits a weight"),
    "q5_k_m": Recipe(17, "Q6_K", _mixed("Q5_K"), "5.5 bits, more where it matters"),
    "q4_k_m": Recipe(15, "Q6_K", _mixed("Q4_K"), "4.5 bits, more where it matters: the usual choice"),
    "q4_0": Recipe(2, "Q6_K", _same("Q4_0"), "4.5 bits the plain way, quick to encode"),
}


def find(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"type {name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def assign(needed: Sequence[Wanted], recipe: Recipe, overrides: Sequence[tuple[str, str]]) -> dict[str, formats.Format]:
    """The format of every tensor by its GGUF name. `overrides` are (glob, format name), the last that matches wins."""
    chosen: dict[str, formats.Format] = {}
    seen: dict[str, int] = {}  # existing layers of each name so far: attn_v counts those that have one
    totals: dict[str, int] = {}
    for want in needed:
        totals[_stem(want)] = totals.get(_stem(want), 0) + 1
    for want in needed:
        i = seen.get(_stem(want), 0)
        seen[_stem(want)] = i + 1
        if want.is_float:
            name = "F32"
        elif want.kind == "TABLE":
            name = _fitting(recipe.table, want)
        else:
            name = _fitting(recipe.rule(want, i, totals[_stem(want)]), want)
        chosen[want.gguf] = formats.by_name(name)
    for pattern, name in overrides:
        _override(pattern, name, needed, chosen)
    return chosen


def _stem(want: Wanted) -> str:
    return want.gguf.split(".", 2)[2] if want.layer >= 0 else want.gguf


def _fitting(name: str, want: Wanted) -> str:
    row = want.dims[0]
    if row % formats.by_name(name).block == 0:
        return name
    name = FALLBACK.get(name, LAST_RESORT)
    return name if row % formats.by_name(name).block == 0 else LAST_RESORT


def _override(pattern: str, name: str, needed: Sequence[Wanted], chosen: dict[str, formats.Format]) -> None:
    flag = f"--set '{pattern}={name}'"
    try:
        to = formats.by_name(name)
    except KeyError:
        to = None
    if to is None or not to.encodes:
        writable = ", ".join(f.name.lower() for f in formats.all_formats() if f.encodes)
        raise UsageError(f"{flag}: expected one of {writable}")
    matching = [want for want in needed if fnmatchcase(want.gguf, pattern)]
    if not matching:
        raise UsageError(f"{flag}: no tensor has a name like that")
    free = [want for want in matching if not want.is_float]
    if not free and to.name != "F32":
        raise UsageError(f"{flag}: {matching[0].gguf} is always F32")
    for want in free:
        if want.dims[0] % to.block:
            raise UsageError(f"{flag}: {want.gguf} has rows of {want.dims[0]}, no multiple of {to.block}")
        chosen[want.gguf] = to
