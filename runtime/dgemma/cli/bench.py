"""dg-bench: measures where the time of a step goes, and how near that is to the machine's limits."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from dgemma.bench.batched import together
from dgemma.bench.decoding import decoding
from dgemma.bench.device import time_behind
from dgemma.bench.llama import Theirs, compare, refuse_llama
from dgemma.bench.machine import apart
from dgemma.bench.measure import FLAT, bench
from dgemma.bench.plan import placed, this_machine, with_device
from dgemma.bench.plot import plot, plot_writing, writing_path
from dgemma.bench.report import markdown
from dgemma.bench.synthetic import SHAPE_NAMES, SHAPES, TYPE, Synthetic, cache_folder, make
from dgemma.cli import Command, version_option
from dgemma.cli.files import ModelFile, OutputFile
from dgemma.cli.output import say_json, write
from dgemma.cli.running import OFF, open_model, ram_option, running_options
from dgemma.convert.recipe import RECIPES
from dgemma.files.json_lines import as_bytes
from dgemma.files.output import json_kind, readable, write_whole
from dgemma.hub.models import local_model
from dgemma.model import bundled, has_vram
from dgemma.ui.charts import CHART, refuse_chart
from dgemma.ui.progress import progress_bar, telling

FIGURES = json_kind("figures of dg-bench", "schema", "machine", "peaks", "step")
SHARP = 0.05  # at this temperature random logits leave as few likely words as those of a trained model

HELP = f"""Times the parts of a denoising step and the encoding of a prompt, and shows the machine's limits beside them.

MODEL is a GGUF file, or tidy or sudoku, which come with dgemma, or hf:owner/name[:TYPE]; without one, and without
--shape, sudoku is measured. --shape makes a model file with random weights in the shapes and formats of a real model,
and keeps it for later runs.

\b
  dg-bench model.gguf
  dg-bench --shape 26b-a4b --layers 6                  3.5 GiB, a fifth of the real model
  dg-bench --shape 26b-a4b --layers 6 --against llama-cpp
  dg-bench model.gguf -o figures.json --plot step.svg

\b
Shapes: {SHAPE_NAMES}

Operations are calculated from the model's sizes, two for each multiply-add. The machine's limits are measured in the
same run. Tables go to standard output, in Markdown; --json prints all figures instead, and -o writes them to a file.
--plot and --against need extra packages: pip install 'dgemma[bench]'. The exit status is 0, 1 for a failure, 2 for
wrong usage, 130 after Ctrl-C.
"""


@click.command(cls=Command, name="dg-bench", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False, type=ModelFile())
@click.option("--shape", type=click.Choice(list(SHAPES)), metavar="NAME", help="Measure random weights of this shape.")
@click.option("--layers", type=click.IntRange(1, 256), metavar="N", help="Layers of the shape; default: all.")
@click.option(
    "--type",
    "type_",
    type=click.Choice(list(RECIPES), case_sensitive=False),
    metavar="TYPE",
    help="Type of the shape's weights, as in dg-convert; default: q4_k_m.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the shape's file; default: dgemma in the user's cache.",
)
@click.option(
    "--against", type=click.Choice(["llama-cpp"]), metavar="ENGINE", help="Compare the shape's layers with llama-cpp."
)
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N", help="Runs, after a warm-up."
)
@click.option(
    "--prompt",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens of the prompt before the canvas.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 1000),
    metavar="F",
    help=f"Temperature of the steps; default: {SHARP} for a shape, otherwise the middle of the file's range.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N", help="Random seed."
)
@click.option(
    "--canvases",
    type=click.IntRange(2, 64),
    metavar="N",
    help="Also time a step of N canvases together, compared with N steps of one canvas.",
)
@click.option(
    "--long",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also time steps after a prompt of N tokens, compared with --prompt.",
)
@running_options
@ram_option
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON instead of tables.")
@click.option("-o", "--output", type=OutputFile(FIGURES), metavar="FILE", help="Write all figures, as JSON.")
@click.option(
    "--plot",
    "plot_file",
    type=OutputFile(CHART, more=lambda path: [writing_path(path)]),
    metavar="FILE",
    help="Draw a chart of the parts, as .svg or .png. With --against also a chart of tokens by batch size, in a second"
    " file with -writing in its name.",
)
@version_option("dg-bench")
def main(
    model: str | None,
    shape: str | None,
    layers: int | None,
    type_: str | None,
    cache: Path | None,
    against: str | None,
    runs: int,
    prompt: int,
    temperature: float | None,
    seed: int,
    backend: str,
    threads: int | None,
    canvases: int | None,
    long: int | None,
    vram: int | None,
    exact: bool,
    ram: int | str | None,
    as_json: bool,
    output: Path | None,
    plot_file: Path | None,
) -> None:
    if model is not None and shape is not None:
        raise click.UsageError("a MODEL and --shape both say what to measure; give one")
    if shape is None:
        needs = {"--layers": layers, "--type": type_, "--cache": cache, "--against": against}
        for flag, given in needs.items():
            if given is not None:
                raise click.UsageError(f"{flag} needs --shape")
    if ram not in (None, OFF) and against is not None:
        raise click.UsageError("--ram and --against do not go together: the other engine would take what it likes")
    if plot_file is not None:
        refuse_chart(plot_file, "bench")
    if against is not None:
        refuse_llama()

    shape_model = None
    if shape is not None:
        shape_model = Synthetic(shape, layers, (type_ or TYPE).lower(), seed)
        model = os.fspath(synthetic(shape_model, cache))
    options: dict[str, Any] = {"backend": backend, "threads": threads, "exact": exact}
    with ExitStack() as stack:
        say = stack.enter_context(telling())
        if vram is not None and has_vram(backend):  # before the model takes GPU memory
            say("this machine and its GPU, for a prediction")
            there = local_model(model) if model is not None else bundled()
            machine = apart(with_device, there, vram, **options)
        opened = stack.enter_context(open_model(model, ram=ram, vram=vram, **options))
        if opened.ram is not None and against is not None:
            raise click.UsageError("--against compares what is in memory: give fewer --layers, or --ram off")
        if opened.ram is not None:
            say("this machine, for a prediction")
            machine = apart(this_machine, opened.path, **options)
        about: dict[str, Any] = {"path": opened.path, "name": readable(Path(opened.path).name)}
        about |= {"shape": shape, "layers": opened.config.n_layer, "type": shape_model.type if shape_model else None}
        if shape_model:
            about["name"] = f"{shape}, {opened.config.n_layer} layers, {shape_model.type}, random weights"
        if temperature is None:
            temperature = SHARP if shape_model else (opened.config.t_min + opened.config.t_max) / 2
        settings = {"exact": exact, "processors": os.cpu_count(), "temperature": temperature}
        report = bench(
            opened,
            runs=runs,
            prompt=prompt,
            temperature=temperature,
            flat=shape_model is not None and temperature < FLAT,
            seed=seed,
            about=about,
            settings=settings,
            say=say,
        )
        if canvases is not None:
            report.together = together(
                opened, canvases, runs=runs, prompt=prompt, temperature=temperature, seed=seed, say=say
            )
        if long is not None:
            report.behind = time_behind(opened, (prompt, long), temperature=temperature, runs=runs, seed=seed, say=say)
        if report.device is not None and vram is not None:
            report.device |= {"predicted": placed(opened, machine, prompt).seconds, "machine": machine.rates}
        if report.budget is not None:
            report.budget |= {"predicted": placed(opened, machine, prompt).seconds, "machine": machine.rates}
        if shape_model and against:
            path = synthetic(
                Synthetic(shape_model.shape, shape_model.layers, shape_model.type, shape_model.seed, "gemma4"), cache
            )
            with Theirs(path, opened.threads) as theirs:
                report.comparison = compare(opened, theirs, runs, seed, say)
                report.comparison["writing"] = decoding(
                    opened, theirs, runs=runs, temperature=temperature, seed=seed, say=say
                )
    try:
        if output is not None:
            write_whole(output, as_bytes(report.told(), indent=1), FIGURES)
        if plot_file is not None:
            plot(report, plot_file)
            if report.comparison is not None:
                plot_writing(report, writing_path(plot_file))
    finally:
        if as_json:
            say_json(report.told(), indent=1)
        else:
            write(markdown(report) + "\n")


def synthetic(wanted: Synthetic, cache: Path | None) -> Path:
    """Return the path of the shape's file; it is made if it does not exist."""
    with progress_bar() as progress:
        return make(cache or cache_folder(), wanted, progress)


if __name__ == "__main__":
    main()
