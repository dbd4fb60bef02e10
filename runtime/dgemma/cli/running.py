"""Options of every command that runs a model, and figures of what was read under a memory budget."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dgemma.model import Model, backends
from dgemma.ui.terminal import one_line, tell
from dgemma.units import parse_size, size_text

AUTO, OFF = "auto", "off"


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


class Ram(Size):
    """The type of --ram: a size, or "auto", or "off"."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and (word := value.strip().lower()) in self._words:
            return word
        return super().convert(value, param, ctx)


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
    """Add --ram. Its value is None where it is not given: see open_model()."""
    text = (
        "Use at most this much memory (such as 8G). Experts that do not fit are read from the file at every step. The"
        " tokens stay the same. auto, the default: a file that is larger than the memory that is free gets a budget of"
        " what is free, less a margin. off: the file is mapped, and the system keeps in memory what it can."
    )
    return click.option("--ram", type=Ram(AUTO, OFF), metavar="auto|off|SIZE", help=text)(command)


def open_model(
    path: str | os.PathLike[str] | None,
    *,
    ram: int | str | None,
    quiet: bool = False,
    aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    **options: Any,
) -> Model:
    """Open a model, and tell in one line what --ram auto chose. aside: a block in which a line can be printed."""
    ram = AUTO if ram is None else ram
    model = Model(path, ram=ram, **options)
    line = chosen_line(model) if ram == AUTO and not quiet else None
    if line is not None:
        with aside():
            tell(line)
    return model


def chosen_line(model: Model) -> str | None:
    """Return one line about a file that is larger than memory; None for any other."""
    found = model.memory
    if found.needs <= found.free or found.free == 0:
        return None
    there = f"{one_line(Path(model.path).name)} takes {size_text(found.needs)} and {size_text(found.free)} of memory"
    if found.ram is not None:
        return (
            f"{there} are free: it runs within {size_text(found.ram)}, experts are read again at every step; --ram SIZE"
            " or off says otherwise"
        )
    if found.least <= found.free:
        return None
    return (
        f"{there} are free, less than the least budget of {size_text(found.least)}: the file is mapped, and most of it"
        " is read again at every step"
    )


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
