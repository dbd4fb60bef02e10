"""Sizes of memory, as people write them."""

from __future__ import annotations

import re

from dgemma.errors import UsageError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
BARE = 1_000_000  # a number without a unit from here on is meant in bytes
MOST = 2**63


def parse_size(value: object) -> int:
    """Return a size in bytes: a whole number of them, or text such as "8G", "8GB", "8GiB", "8192M" or "1.5 g".

    K, M, G and T are powers of 1024, in all spellings. Raises ValueError, with the reason, for anything else, for a
    size below 0 or from 2**63 on, and for a number without a unit between 0 and a million, such as 8: it is rarely
    meant in bytes.
    """
    text = value.strip().upper() if isinstance(value, str) else str(value) if type(value) is int else ""
    found = re.fullmatch(r"([0-9]{1,19})(\.[0-9]+)?\s*(?:([KMGT])(?:I?B)?)?", text, re.ASCII)
    if found is None:
        raise ValueError(f"{value!r} is no size such as 512M or 8G")
    whole, part, unit = found.groups()
    scale = UNITS.get(unit, 1)
    size = int(whole) * scale + int(float(part or 0) * scale)
    if size >= MOST:
        raise ValueError(f"{value!r} is no size such as 512M or 8G")
    if unit is None and 0 < size < BARE:
        likely = "GM" if size < UNITS["K"] else "MK"
        raise ValueError(f"{size} is {size} bytes; write {' or '.join(f'{size}{unit}' for unit in likely)}")
    return size


def size(value: int | str, name: str) -> int:
    """Return a size in bytes, as parse_size() does. Raises UsageError, with the name of what is read."""
    try:
        return parse_size(value)
    except ValueError as reason:
        raise UsageError(f"{name}: {reason}") from None


def size_text(size: float) -> str:
    """Return bytes in powers of 1024, as "15.7 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
