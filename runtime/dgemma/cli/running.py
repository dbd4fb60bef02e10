"""Options of every command that runs a model, and figures of what was read under a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from dgemma.model import Model, backends
from dgemma.units import parse_size, size_text


class Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in click 8.2 and later
    """The type of an option for a size such as 4G or 1.5G; the value is in bytes, at least one."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            amount = parse_size(value)
        except ValueError as reason:
            self.fail(str(reason), param, ctx)
        if amount < 1:
            self.fail(f"{value!r} is no size such as 512M or 8G", param, ctx)
        return amount


_OPTIONS = (
    click.option("--backend", default="auto", metavar="NAME", help=f"auto, or one of: {', '.join(backends())}."),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: one per processor."),
    click.option(
        "--vram",
        type=Size(),
        metavar="SIZE",
        help="With --backend cuda: use at most this much GPU memory (such as 8G). Experts that do not fit are copied to"
        " the GPU at every step, or computed by the CPU. Default: all that is free, less a margin.",
    ),
    click.option(
        "--exact", is_flag=True, help="Compute in float32 throughout, without rounding of activations: slower."
    ),
)


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --backend, --threads, --vram and --exact."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def ram_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ram."""
    text = (
        "Use at most this much memory (such as 8G). Experts that do not fit are read from the file at every step. The"
        " tokens stay the same. Default: the file is mapped, and the system keeps in memory what it can."
    )
    return click.option("--ram", type=Size(), metavar="SIZE", help=text)(command)


def traffic_facts(model: Model) -> dict[str, Any]:
    """Return a model's memory budget, and the bytes that were read under it, for JSON; {} without a budget."""
    traffic = model.traffic
    return {} if traffic is None else {"ram": model.ram, "traffic": asdict(traffic)}


def traffic_line(model: Model) -> str | None:
    """Return one line about what a model under a memory budget has read; None without a budget."""
    traffic = model.traffic
    if traffic is None or model.ram is None:
        return None
    each = size_text(traffic.read / traffic.passes) if traffic.passes else "nothing"
    return (
        f"within {size_text(model.ram)}: {size_text(traffic.resident)} of weights stay in memory, {each} read a pass,"
        f" {traffic.waited:.2f} s waited for the disk"
    )
