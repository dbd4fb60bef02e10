"""Choose the format of each tensor, by the recipes of llama-quantize with their rules for layers and fall-backs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gguf import LlamaFileType

from dgemma.convert.names import Wanted
from dgemma.errors import UsageError
from dgemma.native import formats

# A tensor whose rows do not divide into a format's blocks gets the fall-back; if that does not fit either, F16.
FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
LAST_RESORT = "F16"

# The numbers of general.file_type, by names such as Q4_K_M; in the gguf package they are MOSTLY_Q4_K_M and so on.
FILE_TYPES = {file_type.name.partition("_")[2]: int(file_type) for file_type in LlamaFileType}


def more_bits(i: int, n: int) -> bool:
    """Return whether layer i of n gets more bits: the first and last eighth of the layers, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


Rule = Callable[[Wanted, int, int], str]


def _same(base: str) -> Rule:
    return lambda want, i, n: base


def _mixed(base: str) -> Rule:
    """Return the rule of _M recipes: in the layers of more_bits, attn_v and the down projections get Q6_K."""

    def rule(want: Wanted, i: int, n: int) -> str:
        return "Q6_K" if (_is_value(want) or _is_down(want)) and more_bits(i, n) else base

    return rule


def _first(base: str, values: int) -> Rule:
    """Return a rule: the first `values` attn_v and the down projections of the first eighth of the layers get Q5_K."""

    def rule(want: Wanted, i: int, n: int) -> str:
        return "Q5_K" if (_is_value(want) and i < values) or (_is_down(want) and i < n // 8) else base

    return rule


def _dense8(experts: str) -> Rule:
    """Return a rule of dgemma's: experts, of which a token uses one in sixteen, get few bits; all others get Q8_0."""
    return lambda want, i, n: experts if "_exps." in want.gguf else "Q8_0"


def _is_value(want: Wanted) -> bool:
    return ".attn_v." in want.gguf


def _is_down(want: Wanted) -> bool:
    return ".ffn_down" in want.gguf


@dataclass(frozen=True)
class Recipe:
    """A choice of formats for all tensors."""

    like: str  # the type for general.file_type; for recipes of dgemma's the most similar one
    table: str  # the format of the embedding, which is also the output head
    rule: Rule  # rule(want, i, n) returns the format of a matrix: the i-th of n with its name
    size: str  # the size of the published checkpoint's file
    help: str

    @property
    def file_type(self) -> int:
        """Return the value of general.file_type."""
        return FILE_TYPES[self.like]


# All types, from the largest file to the smallest.
RECIPES = {
    "f32": Recipe("F32", "F32", _same("F32"), "94.1 GiB", "32-bit floats, for comparisons"),
    "f16": Recipe("F16", "F16", _same("F16"), "47.1 GiB", "16-bit floats with a small range"),
    "bf16": Recipe("BF16", "BF16", _same("BF16"), "47.1 GiB", "the checkpoint's own values, nothing lost"),
    "q8_0": Recipe("Q8_0", "Q8_0", _same("Q8_0"), "25.0 GiB", "8.5 bits a weight, hardly to be told from bf16"),
    "q6_k": Recipe("Q6_K", "Q6_K", _same("Q6_K"), "21.1 GiB", "6.6 bits a weight"),
    "q5_k_m": Recipe("Q5_K_M", "Q6_K", _mixed("Q5_K"), "17.8 GiB", "5.5 bits, more where it matters"),
    "q5_dense8": Recipe(
        "Q5_K_M", "Q8_0", _dense8("Q5_K"), "17.5 GiB", "experts in 5.5 to 6 bits, all else in 8.5 (ours)"
    ),
    "q4_k_m": Recipe("Q4_K_M", "Q6_K", _mixed("Q4_K"), "15.7 GiB", "4.5 bits, more where it matters: the usual choice"),
    "q4_dense8": Recipe(
        "Q4_K_M", "Q8_0", _dense8("Q4_K"), "15.3 GiB", "experts in 4.5 to 5.5 bits, all else in 8.5 (ours)"
    ),
    "q4_k_s": Recipe(
        "Q4_K_S", "Q6_K", _first("Q4_K", values=4), "14.4 GiB", "4.5 bits, more in the first layers alone"
    ),
    "iq4_nl": Recipe(
        "IQ4_NL", "Q6_K", _first("IQ4_NL", values=0), "13.6 GiB", "4.5 bits on uneven levels, slow to encode"
    ),
    "q4_0": Recipe("Q4_0", "Q6_K", _same("Q4_0"), "13.5 GiB", "4.5 bits the plain way, quick to encode"),
}


def find(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"type {name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def assign(needed: Sequence[Wanted], recipe: Recipe, overrides: Sequence[tuple[str, str]]) -> dict[str, formats.Format]:
    """Return the format of each tensor, by GGUF name. overrides: (glob, format name); the last that matches wins."""
    chosen: dict[str, formats.Format] = {}
    seen: dict[str, int] = {}  # the number of tensors with this name so far; not every layer has an attn_v
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
