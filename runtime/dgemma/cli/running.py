"""How a model is run: the options of every command that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dgemma.cli.sizes import Size
from dgemma.model import backends

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
    """--backend, --threads, --vram and --exact."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
