"""dg-convert: a checkpoint in, a GGUF file out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dgemma.cli import Command
from dgemma.convert import convert, plan
from dgemma.convert.plan import Plan
from dgemma.convert.recipe import RECIPES
from dgemma.convert.writer import size_text

TYPES = "\n".join(f"  {name:<8}{recipe.help}" for name, recipe in RECIPES.items())

HELP = f"""Writes a DiffusionGemma checkpoint as one GGUF file.

SOURCE is a folder as Hugging Face has them: config.json, tokenizer.json (or tokenizer.model), and model.safetensors or
its shards, in bf16, f16 or f32. The vision tower is left out.

\b
  dg-convert diffusiongemma-26B-A4B-it -o dg.gguf               4.5 bits a weight, 15.7 GiB
  dg-convert diffusiongemma-26B-A4B-it -o dg-q8.gguf --type q8_0
  dg-convert checkpoint -o out.gguf --dry-run                   what it would write, and how much
  dg-convert checkpoint -o out.gguf --set 'blk.*.attn_v.weight=q8_0' --set 'token_embd.weight=bf16'

\b
Types, from the largest to the smallest file:
{TYPES}

A type is a recipe: norms, scales and the router are always F32, the embedding and some layers get more bits, and rows
that do not divide into a format's blocks fall back to a format that they fit. --set changes single tensors: PATTERN is
a glob over names as --dry-run prints them, TYPE a format such as q4_k or f16; the last that matches a tensor wins.

The file has its name only when it is complete. The exit status is 0 when it is there, 1 for a failure, 2 for wrong
usage, 130 after Ctrl-C; the last three leave nothing behind.
"""


def pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """PATTERN=TYPE, cut at the last =."""
    for value in values:
        pattern, equals, name = value.rpartition("=")
        if not (pattern and equals and name):
            raise click.BadParameter(f"{value!r} is not PATTERN=TYPE", ctx, param)
    return [(pattern, name) for pattern, _, name in (value.rpartition("=") for value in values)]


def version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        import dgemma

        click.echo(f"dg-convert {dgemma.__version__}")
        ctx.exit()


@click.command(cls=Command, name="dg-convert", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", metavar="FILE", type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option(
    "--type",
    "type_",
    type=click.Choice(list(RECIPES), case_sensitive=False),
    default="q4_k_m",
    show_default=True,
    metavar="TYPE",
    help="The recipe.",
)
@click.option("--set", "overrides", multiple=True, callback=pairs, metavar="PATTERN=TYPE", help="May be repeated.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: one per processor.")
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights, write nothing.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=version, help="Print the version.")
def main(
    source: Path,
    out: Path | None,
    type_: str,
    overrides: list[tuple[str, str]],
    threads: int | None,
    dry_run: bool,
    force: bool,
) -> None:
    if dry_run:
        click.echo(describe(plan(source, type_, overrides)))
        return
    if out is None:
        raise click.UsageError("nowhere to write to: give -o FILE, or --dry-run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with progress_bar() as progress:
        done = convert(source, out, type_, overrides=overrides, threads=threads, force=force, progress=progress)
    click.echo(f"{out}: {summary(done.plan)}, in {done.seconds:.1f} s", err=True)


def describe(todo: Plan) -> str:
    """The plan as text: a line per tensor, then the totals."""
    width = max(len(tensor.want.gguf) for tensor in todo.tensors)
    lines = [f"{'tensor':<{width}}  {'dims':<20}  {'from':<5}  {'to':<5}  {'bytes':>14}"]
    for tensor in todo.tensors:
        dims = " x ".join(map(str, tensor.want.dims))
        source = tensor.source.dtype if tensor.source else "made"
        name = tensor.want.gguf
        lines.append(f"{name:<{width}}  {dims:<20}  {source:<5}  {tensor.format.name:<5}  {tensor.bytes:>14,}")
    lines += ["", f"{'type':<5}  {'tensors':>7}  {'bytes':>14}"]
    lines += [f"{name:<5}  {count:>7}  {size:>14,}" for name, (count, size) in todo.histogram().items()]
    lines += [
        "",
        f"tensors       {len(todo.tensors):>14,}  (and {todo.left_out} of the source left out)",
        f"header bytes  {len(todo.header):>14,}",
        f"data bytes    {todo.data_bytes:>14,}",
        f"file bytes    {todo.file_bytes:>14,}  ({size_text(todo.file_bytes)})",
    ]
    return "\n".join(lines)


def summary(done: Plan) -> str:
    formats = ", ".join(f"{count} {name}" for name, (count, _) in done.histogram().items())
    left_out = f"; {done.left_out} tensors left out (vision tower, tied copies)" if done.left_out else ""
    return f"{done.type}, {size_text(done.file_bytes)}, {len(done.tensors)} tensors ({formats}){left_out}"


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Bytes, speed and time left on standard error, where that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[Any] = [bars.BarColumn(), bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
    columns += [bars.TimeRemainingColumn(), bars.TextColumn("left")]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
