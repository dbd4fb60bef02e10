"""Options of every command that runs a model, and what a memory budget made the model read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from dgemma.errors import UsageError
from dgemma.model import Model, backends
from dgemma.units import size, size_text


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


_OPTIONS = (
    click.option("--backend", default="auto", metavar="NAME", help=f"auto, or one of: {', '.join(backends())}."),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: one per processor."),
    click.option(
        "--vram",
        type=Size(),
        metavar="SIZE",
        help="With --backend cuda: hold at most this much of the GPU's memory (as 8G), experts that do not fit being"
        " copied there at every step or computed by the CPU meanwhile. Default: what is free, less a margin.",
    ),
    click.option(
        "--exact", is_flag=True, help="Float32 throughout: slower; activations are never rounded to fewer bits."
    ),
)


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --backend, --threads, --vram and --exact."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def ram_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ram, of the commands that run a model."""
    text = (
        "Hold at most this much memory (as 8G), experts that do not fit being read again at every step. Same tokens."
        " Default: the file is mapped, and the system keeps what it can."
    )
    return click.option("--ram", type=Size(), metavar="SIZE", help=text)(command)


def traffic_facts(model: Model) -> dict[str, Any]:
    """Return a budget, and what was moved under it, for JSON; nothing without one."""
    traffic = model.traffic
    return {} if traffic is None else {"ram": model.ram, "traffic": asdict(traffic)}


def traffic_line(model: Model) -> str | None:
    """Return what a model under a budget has read, for people."""
    traffic = model.traffic
    if traffic is None or model.ram is None:
        return None
    each = size_text(traffic.read / traffic.passes) if traffic.passes else "nothing"
    return (
        f"within {size_text(model.ram)}: {size_text(traffic.resident)} of weights stay in memory, {each} read a pass,"
        f" {traffic.waited:.2f} s waited for the disk"
    )
