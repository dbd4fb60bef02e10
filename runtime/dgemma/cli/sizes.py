"""Sizes on a command line: bytes, or so many K, M or G, powers of 1024."""

from __future__ import annotations

import click

from dgemma.errors import UsageError
from dgemma.sizes import size


class Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in click 8.2 and later
    """An option's value such as 4G or 1.5G, in bytes; at least one."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            amount = size(value, "it") if isinstance(value, (int, str)) else 0
        except UsageError:
            amount = 0
        if amount < 1:
            self.fail(f"{value!r} is no size such as 512M or 4G", param, ctx)
        return amount
