"""The command dg-convert, which writes a checkpoint as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from dgemma.cli import Command, version_option
from dgemma.cli.files import InputPath, ModelFile, OutputFile
from dgemma.cli.output import say_json, write
from dgemma.cli.running import Size
from dgemma.convert import convert, plan
from dgemma.convert.calibrate import TOKENS
from dgemma.convert.imatrix import FEW
from dgemma.convert.recipe import RECIPES
from dgemma.convert.report import as_json, describe, deviations, few, summary
from dgemma.convert.writer import IMATRIX, MODEL
from dgemma.ui.progress import progress_bar, telling
from dgemma.ui.terminal import tell

TYPES = "\n".join(f"  {name:<11}{recipe.size:<10}{recipe.help}" for name, recipe in RECIPES.items())

HELP = f"""Writes a DiffusionGemma checkpoint as a GGUF file, or a GGUF file in other formats.

SOURCE is a folder as Hugging Face has them: config.json, tokenizer.json (or tokenizer.model), and model.safetensors or
its shards, in bf16, f16 or f32. The vision tower is left out. Or it is a GGUF file of any types, whose metadata is
kept; of a split one, the first part. From one that is quantised already, errors add up: start from bf16 if you can.
Or hf:owner/name[@revision], a repository of the Hugging Face Hub that has either (pip install 'dgemma[hub]'): it is
fetched into the Hub's cache, from where it broke off if it did; of GGUF files hf:owner/name:TYPE says which.

\b
  dg-convert diffusiongemma-26B-A4B-it -o dg.gguf               4.5 bits a weight, 15.7 GiB
  dg-convert diffusiongemma-26B-A4B-it -o dg-q8.gguf --type q8_0
  dg-convert dg-bf16.gguf -o dg.gguf --verify                   and how far it is from its source
  dg-convert checkpoint -o out.gguf --dry-run                   what it would write, and how much
  dg-convert checkpoint -o out.gguf --set 'blk.*.attn_v.weight=q8_0' --set 'token_embd.weight=bf16'
  dg-convert checkpoint -o out.gguf --split-max-size 4G         out-00001-of-00004.gguf and so on

\b
Types, with the size of diffusiongemma-26B-A4B's file:
{TYPES}

A type is a recipe: norms, scales and the router are always F32, the embedding and some layers get more bits, and rows
that do not divide into a format's blocks fall back to a format that they fit. --set changes single tensors: PATTERN is
a glob over names as --dry-run prints them, TYPE a format such as q4_k or f16; the last that matches a tensor wins.

--imatrix FILE takes how much each column of a matrix is used, as llama.cpp's llama-imatrix measures it on a text (GGUF,
or the older .dat), and spends the same bits where they count: sizes stay, errors move to columns that matter less.

--calibrate TEXTS measures that on the checkpoint itself: it is run behind each prompt of a text file, which blank lines
part, or of a .jsonl ({{"prompt": ...}} or {{"messages": [...]}} a line), through whole denoising trajectories. What
inputs are on average is measured too, and kept in --save-imatrix: the errors of a row then cancel out. The checkpoint
of a folder runs from a working file of q8_0 beside FILE, which needs that much room for so long. An expert that saw
fewer than {FEW} tokens is filled up with its layer's mean, and told.

A file has its name only when it is complete, and parts only when all are. The exit status is 0 when it is there, 1 for
a failure, 2 for wrong usage, 130 after Ctrl-C; the last three leave nothing behind.
"""


def pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return PATTERN=TYPE as pairs, cut at the last =."""
    for value in values:
        pattern, equals, name = value.rpartition("=")
        if not (pattern and equals and name):
            raise click.BadParameter(f"{value!r} is not PATTERN=TYPE", ctx, param)
    return [(pattern, name) for pattern, _, name in (value.rpartition("=") for value in values)]


@click.command(cls=Command, name="dg-convert", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=ModelFile(folder=True))
@click.option("-o", "--out", "--output", "out", metavar="FILE", type=OutputFile(MODEL), help="The GGUF file to write.")
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
@click.option("--imatrix", type=InputPath(), metavar="FILE", help="Weigh errors by importance.")
@click.option("--calibrate", type=InputPath(), metavar="TEXTS", help="Measure importance: run the model.")
@click.option(
    "--calibrate-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Let at most so many go through the model; default: {TOKENS}.",
)
@click.option(
    "--save-imatrix",
    type=OutputFile(IMATRIX),
    metavar="FILE",
    help="Keep what --calibrate measured, for --imatrix.",
)
@click.option("--split-max-size", type=Size(), metavar="SIZE", help="Files of at most so much, as 500M or 4G.")
@click.option(
    "--verify", is_flag=True, help="Compare the file with its source: the tensors that lost most, and what it says."
)
@click.option("--json", "as_json_", is_flag=True, help="Print all figures of --verify as JSON.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: one per processor.")
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights, write nothing.")
@click.option("--force", is_flag=True, help="Replace FILE if it is a GGUF file of the same kind.")
@version_option("dg-convert")
def main(
    source: str,
    out: Path | None,
    type_: str,
    overrides: list[tuple[str, str]],
    imatrix: Path | None,
    calibrate: Path | None,
    calibrate_tokens: int | None,
    save_imatrix: Path | None,
    split_max_size: int | None,
    verify: bool,
    as_json_: bool,
    threads: int | None,
    dry_run: bool,
    force: bool,
) -> None:
    if as_json_ and not verify:
        raise click.UsageError("--json prints the figures of --verify: give both")
    if imatrix and calibrate:
        raise click.UsageError("--imatrix and --calibrate both say how much columns are used: give one")
    for flag, given in (("--calibrate-tokens", calibrate_tokens), ("--save-imatrix", save_imatrix)):
        if given is not None and calibrate is None:
            raise click.UsageError(f"{flag} needs --calibrate")
    if dry_run:
        todo = plan(source, type_, overrides, imatrix=imatrix, calibrate=calibrate, split_max_size=split_max_size)
        write(describe(todo) + "\n")
        return
    if out is None:
        raise click.UsageError("nowhere to write to: give -o FILE, or --dry-run")
    with progress_bar() as progress, progress_bar("calibrating", "tokens") as calibrating, telling() as say:
        done = convert(
            source,
            out,
            type_,
            overrides=overrides,
            imatrix=imatrix,
            calibrate=calibrate,
            calibrate_tokens=calibrate_tokens,
            save_imatrix=save_imatrix,
            split_max_size=split_max_size,
            verify=verify,
            threads=threads,
            force=force,
            progress=progress,
            calibrating=calibrating,
            say=say,
        )
    if verify:
        if as_json_:
            say_json(as_json(done), indent=1)
        else:
            write(deviations(done) + "\n")
    for note in done.plan.notes:
        tell(f"dg-convert: note: {note}")
    if done.few:
        tell(few(done))
    tell(f"{done.path}: {summary(done.plan)}, in {done.seconds:.1f} s")


if __name__ == "__main__":
    main()
