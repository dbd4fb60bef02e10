"""Sizes of memory, as people write them."""

from __future__ import annotations

import re

from dgemma.errors import UsageError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def size(value: int | str, name: str) -> int:
    """Return a size in bytes: a whole number of them, or text such as "4G" or "1.5m"; K, M and G are powers of 1024.

    Raises UsageError, with the name of what is read, for anything else and for sizes below 0 or from 2**63 on.
    """
    amount: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        amount = value
    elif isinstance(value, str) and (found := re.fullmatch(r"([0-9]{1,19})(\.[0-9]+)?([KMG]?)", value.strip().upper())):
        whole, part, unit = found.groups()
        amount = int(whole) * UNITS[unit] + int(float(part or 0) * UNITS[unit])
    if amount is None or not 0 <= amount < 2**63:
        raise UsageError(f"{name} must be a size in bytes such as 4000000000 or '4G', not {value!r}")
    return amount


def size_text(size: float) -> str:
    """Return bytes in powers of 1024, as "15.7 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
