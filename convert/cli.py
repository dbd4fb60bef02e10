"""dg-convert: writes a checkpoint as a GGUF file."""

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

SOURCE is a folder in the form of Hugging Face: config.json, tokenizer.json (or tokenizer.model), and model.safetensors
or its shards, in bf16, f16 or f32. The vision tower is left out. SOURCE may also be a GGUF file of any types (of a
split file, the first part); its metadata is kept. If its weights are quantised already, the errors add up: start from
bf16 if you can. Or SOURCE is hf:owner/name[@revision], a repository of the Hugging Face Hub with either of them (pip
install 'dgemma[hub]'). It is downloaded into the Hub's cache, and an interrupted download is resumed;
hf:owner/name:TYPE chooses one of several GGUF files.

\b
  dg-convert diffusiongemma-26B-A4B-it -o dg.gguf               4.5 bits a weight, 15.7 GiB
  dg-convert diffusiongemma-26B-A4B-it -o dg-q8.gguf --type q8_0
  dg-convert dg-bf16.gguf -o dg.gguf --verify                   and compare it with its source
  dg-convert checkpoint -o out.gguf --dry-run                   what it would write, and how much
  dg-convert checkpoint -o out.gguf --set 'blk.*.attn_v.weight=q8_0' --set 'token_embd.weight=bf16'
  dg-convert checkpoint -o out.gguf --split-max-size 4G         out-00001-of-00004.gguf and so on

\b
Types, with the size of diffusiongemma-26B-A4B's file:
{TYPES}

A type is a recipe: norms, scales and the router are always F32, the embedding and some layers get more bits, and a
tensor whose rows do not divide into the format's blocks gets another format that fits. --set changes single tensors:
PATTERN is a glob over names as printed by --dry-run, TYPE a format such as q4_k or f16; the last one that matches wins.

--imatrix FILE reads the importance of the columns of each matrix, as llama.cpp's llama-imatrix measures it on a text
(GGUF, or the older .dat). The file's size stays the same, but errors become smaller in columns that are used more.

--calibrate TEXTS measures importance with the checkpoint itself, which answers prompts by complete denoising
trajectories. TEXTS is a text file with blank lines between prompts, or a .jsonl file with {{"prompt": ...}} or
{{"messages": [...]}} per line. The mean of each input is measured too: with it, errors of a row are made to cancel
out. --save-imatrix saves both. The checkpoint of a folder runs from a temporary file of q8_0 beside FILE, which needs
disk space. The importance of an expert with fewer than {FEW} tokens is averaged with its layer's, and it is listed.

A file gets its name only when it is complete, and parts only when all are. The exit status is 0 when the file is
written, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C; after a failure or Ctrl-C no new file is left.
"""


def pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """Split each PATTERN=TYPE at its last =; a callback of click."""
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
@click.option("--set", "overrides", multiple=True, callback=pairs, metavar="PATTERN=TYPE", help="Repeatable.")
@click.option("--imatrix", type=InputPath(), metavar="FILE", help="Weight errors by importance.")
@click.option("--calibrate", type=InputPath(), metavar="TEXTS", help="Measure importance by running the model.")
@click.option(
    "--calibrate-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"The most tokens that go through the model; default: {TOKENS}.",
)
@click.option(
    "--save-imatrix",
    type=OutputFile(IMATRIX),
    metavar="FILE",
    help="Save what --calibrate measured, for --imatrix.",
)
@click.option(
    "--split-max-size", type=Size(), metavar="SIZE", help="Split into files of at most this size, such as 4G."
)
@click.option("--verify", is_flag=True, help="Compare the file with its source: errors of tensors, and distributions.")
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
