"""dg-eval: measures the quality of files, and of generation settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from dgemma.cli import Command, version_option
from dgemma.cli.files import InputFile, InputPath, ModelFile, OutputFile
from dgemma.cli.output import say_json, write
from dgemma.cli.running import AUTO, OFF, open_model, ram_option, running_options
from dgemma.errors import UsageError
from dgemma.eval.approximations import comparisons
from dgemma.eval.baseline import BASE, Base
from dgemma.eval.checks import CHECKS
from dgemma.eval.fidelity import compare, make_base
from dgemma.eval.plot import beside, plot
from dgemma.eval.report import Evaluation, Files, about, markdown, told
from dgemma.eval.results import Log, Variant, run, scores
from dgemma.eval.sweep import named, read_axes, settings, sweep
from dgemma.eval.tasks import SHIPPED, Task, load, shipped, suitable
from dgemma.files.identity import identity
from dgemma.files.json_lines import as_bytes
from dgemma.files.output import json_kind, write_whole
from dgemma.hub.models import local_model
from dgemma.model import Model, bundled
from dgemma.ui.charts import CHART, refuse_chart
from dgemma.ui.progress import telling


def listed(lines: Mapping[str, str]) -> str:
    """Return a table of names and descriptions, for --help."""
    width = max(map(len, lines))
    return "\n".join(f"  {name:{width}}  {what}" for name, what in lines.items())


HELP = f"""Measures the quality of model files and settings: how close a file is to another file of the same model, and
how many tasks it solves.

MODELS are GGUF files, or tidy or sudoku, which come with dgemma, or hf:owner/name[:TYPE]; without one, sudoku is
measured. With --against or --base, files are compared with a base. With --task, tasks are done. Without any of these,
all tasks that come with dgemma and that the model's vocabulary can read are done.

\b
  dg-eval model-q4_k_m.gguf --against model-q8_0.gguf --layers
  dg-eval q8.gguf q6.gguf q4.gguf --against bf16.gguf --task json    a line per file
  dg-eval model.gguf --against bf16.gguf --save-base bf16.npz        later: --base bf16.npz
  dg-eval model.gguf --task mine.jsonl --seeds 3 --results mine.results.jsonl
  dg-eval model.gguf --sweep steps=8,16,32,48 --sweep entropy_bound=0.05,0.1 --plot trade.svg

Tasks that come with dgemma, for --task:

\b
{listed({name: each.what for name, each in SHIPPED.items()})}

A task file has a JSON object per line: id, prompt or messages, and a check
(kinds: {", ".join(CHECKS)});
see the docstrings of dgemma.eval.tasks and dgemma.eval.checks. For --against, the base generates answers to prompts
that come with dgemma. Both models then denoise the same canvases, with the base's predictions of the step before as
their self-conditioning. Only one of the files is loaded at a time. Intervals are of 95 %. Tables go to standard output,
in Markdown; --json prints all figures instead, and -o writes them to a file. --plot needs an extra package: pip install
'dgemma[eval]'. The exit status is 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C.
"""


FIGURES = json_kind("figures of dg-eval", "schema", "files", "sweep", "approximations")


def path_option(
    flag: str, name: str, type_: InputPath | OutputFile, text: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(flag, name, type=type_, metavar="FILE", help=text)


@click.command(cls=Command, name="dg-eval", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, type=ModelFile())
@click.option(
    "--against", type=ModelFile(), metavar="BASE", help="Compare the distributions and answers with this file's."
)
@path_option("--base", "base_file", InputPath(), "Compare with a base that --save-base wrote.")
@path_option("--save-base", "save_base", OutputFile(BASE), "Save the base's results, for later runs with --base.")
@click.option("--layers", is_flag=True, help="Also compare the hidden states after each layer.")
@click.option("--prompts", type=click.IntRange(min=1), metavar="N", help="Prompts to compare on; default: all 16.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=InputFile(),
    metavar="FILE",
    help="A task file, or shipped tasks by name. Repeatable.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="The most tasks of a level."
)
@click.option("--level", "levels", multiple=True, metavar="NAME", help="Only tasks of this level. Repeatable.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Tries at each task, with different seeds.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, metavar="N", help="The first seed."
)
@path_option(
    "--results", "results_file", OutputFile(None), "Save each answer in this file; answers in it are not made again."
)
@click.option("--sweep", "axes", multiple=True, metavar="OPTION=A,B,...", help="Try these values, all combinations.")
@click.option("--approximations", is_flag=True, help="Measure what each approximation for speed costs.")
@running_options
@ram_option
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON instead of tables.")
@click.option("-o", "--output", type=OutputFile(FIGURES), metavar="FILE", help="Write all figures, as JSON.")
@path_option(
    "--plot", "plot_file", OutputFile(CHART, more=beside), "Draw a chart of --sweep; written as .svg and as .png."
)
@version_option("dg-eval")
def main(
    models: tuple[str, ...],
    against: str | None,
    base_file: Path | None,
    save_base: Path | None,
    layers: bool,
    prompts: int | None,
    tasks: tuple[str, ...],
    count: int,
    levels: tuple[str, ...],
    seeds: int,
    seed: int,
    results_file: Path | None,
    axes: tuple[str, ...],
    approximations: bool,
    backend: str,
    threads: int | None,
    vram: int | None,
    exact: bool,
    ram: int | str | None,
    as_json: bool,
    output: Path | None,
    plot_file: Path | None,
) -> None:
    compares = against is not None or base_file is not None
    refuse(
        {
            "--against and --base both name a base; give one": against is not None and base_file is not None,
            "--save-base needs --against": save_base is not None and against is None,
            "--layers needs --against or --base": layers and not compares,
            "--prompts needs --against": prompts is not None and against is None,
            "--level needs tasks: --task": bool(levels) and compares and not tasks,
            "--plot needs --sweep": plot_file is not None and not axes,
            "--sweep takes one model": bool(axes) and len(models) > 1,
            "--approximations takes one model": approximations and len(models) > 1,
            "--approximations tries --exact itself": approximations and exact,
            "--approximations has two models open at once: no --ram": approximations and ram not in (None, OFF),
        }
    )
    chosen = settings(read_axes(axes)) if axes else []
    if plot_file is not None:
        refuse_chart(plot_file, "eval")

    files = [local_model(model) for model in models] or [bundled()]
    arguments: dict[str, Any] = {"backend": backend, "threads": threads}
    arguments |= {name: value for name, value in (("exact", exact), ("vram", vram)) if value}
    arguments["ram"] = (OFF if approximations else AUTO) if ram is None else ram
    does_tasks = bool(tasks) or not compares
    with telling() as say, Log(results_file) as log:
        base = None
        if base_file is not None:
            base = Base.load(base_file)
        elif against is not None:
            base = make_base(local_model(against), count=prompts, seed=seed, layers=layers, model=arguments, say=say)
            if save_base is not None:
                base.save(save_base)
        found = Evaluation({})
        for path in files:
            about_file = identity(path)
            measured = Files({name: about_file[name] for name in ("name", "bytes", "sha256")})
            found.files.append(measured)
            if base is not None:
                measured.fidelity = compare(path, base, layers=layers, model=arguments, say=say)
            with open_model(path, **arguments) as model:
                given = chosen_tasks(model, tasks, count, levels) if does_tasks else []
                names = list(dict.fromkeys(task.name for task in given))
                found.about = found.about or about(
                    model, exact, tasks=names, levels=list(levels), count=count, seeds=seeds, seed=seed
                )
                if chosen:
                    variants = [Variant.of(named(one), model, about_file, arguments, one) for one in chosen]
                    found.points = sweep(variants, given, log, seeds=seeds, seed=seed, say=say)
                elif given and not approximations:
                    variant = Variant.of("", model, about_file, arguments)
                    measured.scores = scores(run([variant], given, log, seeds=seeds, seed=seed, say=say)[""])
            if approximations:
                found.comparisons = comparisons(path, given, log, seeds=seeds, seed=seed, model=arguments, say=say)
    try:
        if output is not None:
            write_whole(output, as_bytes(told(found), indent=1), FIGURES)
        if plot_file is not None:
            plot(found, plot_file)
    finally:
        if as_json:
            say_json(told(found), indent=1)
        else:
            write(markdown(found) + "\n")


def refuse(wrong: dict[str, bool]) -> None:
    for message, is_so in wrong.items():
        if is_so:
            raise click.UsageError(message)


def chosen_tasks(model: Model, given: tuple[str, ...], count: int, levels: tuple[str, ...]) -> list[Task]:
    """Return the first `count` tasks of each level, or of `levels` alone.

    They are taken from what is given, or else from all shipped tasks that suit the model.
    """
    names = given or tuple(suitable(model))
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        raise UsageError("--task: two sets of tasks have the same name")
    if not names:
        raise UsageError(f"{model.path}: its vocabulary reads none of the shipped tasks ({', '.join(SHIPPED)})")
    out: list[Task] = []
    for name in names:
        found = shipped(model, name) if name in SHIPPED and not os.path.exists(name) else load(name)
        seen: dict[str, int] = {}
        for task in found:
            seen[task.level] = seen.get(task.level, 0) + 1
            if seen[task.level] <= count and (not levels or task.level in levels):
                out.append(task)
    if missing := set(levels) - {task.level for task in out}:
        raise UsageError(f"--level {min(missing)!r}: there is none among the tasks")
    return out


if __name__ == "__main__":
    main()
