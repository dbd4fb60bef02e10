"""Lists the models that a repository of the Hub has, where a name gives no type."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dgemma.files.bundled import named
from dgemma.hub.download import Repository, free_disk, from_hub
from dgemma.hub.names import PREFIX, Name, likely_models, name_of, parse, type_in
from dgemma.native.formats import type_of

KINDS = 64  # numbers of formats that are asked for


@dataclass(frozen=True)
class Choice:
    """A GGUF file of a repository."""

    name: str  # hf:owner/name:TYPE, which finds it
    file: str  # its path there, of parts the first one's
    type: str | None  # by its name
    bytes: int | None  # of all parts; None where the Hub does not tell
    to_come: int  # bytes of it that are not in the cache yet
    unread: bool  # its type is one that this build does not read, by its name


@dataclass(frozen=True)
class Choices:
    """The files that a name without a type may stand for, the largest first."""

    name: str
    files: list[Choice]
    free: tuple[Path, int] | None  # the folder of the cache, and the bytes that are free there


def choices(model: str | os.PathLike[str], least: int = 2) -> Choices | None:
    """Return what a MODEL may stand for; None where it is no hf:owner/name without a type, or has too few files."""
    text = named(model)
    if not text.startswith(PREFIX) or (name := parse(text)).type is not None:
        return None
    found = from_hub(name, lambda repository: _choices(name, repository))
    return Choices(str(name), found, free_disk(name)) if len(found) >= least else None


def _choices(name: Name, repository: Repository) -> list[Choice]:
    files = repository.files
    found = []
    for parts in likely_models(files):
        sizes = [repository.size(part) for part in parts]
        whole = None if None in sizes else sum(size or 0 for size in sizes)
        kind, to_come = type_in(parts[0]), sum(map(repository.to_come, parts))
        found.append(Choice(str(name_of(name, parts, files)), parts[0], kind, whole, to_come, is_unread(kind)))
    return sorted(found, key=lambda choice: -(choice.bytes or 0))


def is_unread(type: str | None) -> bool:
    """Return whether this build reads no weights of a type, by its name.

    That is so for a format that it does not read, and for a mixture, as IQ3_M, where it reads none of that beginning.
    """
    if type is None:
        return False
    format_name = type.rpartition("-")[2]
    reads, first = _reads(), format_name.partition("_")[0]
    if format_name in reads:
        return not reads[format_name]
    alike = [read for each, read in reads.items() if each.partition("_")[0] == first]
    return bool(alike) and not any(alike)


@cache
def _reads() -> dict[str, bool]:
    """Return the formats that GGUF files may have, by name, and whether this build reads them."""
    found = [type_of(number) for number in range(KINDS)]
    return {each.name: each.decodes for each in found if each.bytes}
