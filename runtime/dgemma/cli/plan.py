"""dg-info --plan: makes a plan, and lays it out in tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from dgemma.bench.plan import STEPS, Machine, Plan, find_machine, machines, plan, rates, this_machine
from dgemma.bench.synthetic import SHAPE_NAMES, SHAPES, TYPE, Synthetic, make_header
from dgemma.cli.files import InputFile
from dgemma.cli.running import AUTO, Ram, Size
from dgemma.convert.recipe import RECIPES
from dgemma.hub.models import Header, model_header
from dgemma.model import Model
from dgemma.ui.progress import telling
from dgemma.units import size_text

Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, columns (those of numbers begin with >), rows

MACHINES = "\n".join(f"  {machine.name:<16}{machine.about}" for machine in machines().values())
FIELDS = "\n".join(f"  {rate.field:<9}{rate.unit:<7}{rate.help}" for rate in rates().values())

HELP = f"""--plan shows where the weights would be kept under memory budgets, and predicts the time of a step from a
machine's bandwidths. It needs no weights: only the header of a file on the Hub is read, and --shape needs no file
(shapes: {SHAPE_NAMES}). Known machines:

\b
{MACHINES}

Another machine is described by a JSON file with the fields below. Without --machine the plan is for this machine: its
memory, its disk, and the speed of the model's first layer and head are measured for some seconds.

\b
{FIELDS}
"""


def plan_options(command: Any) -> Any:
    """Add --plan, and the flags that only it takes."""
    for option in (
        click.option(
            "--layers", type=click.IntRange(1, 256), metavar="N", help="For --shape: layers of the shape; default: all."
        ),
        click.option(
            "--type",
            "type_",
            type=click.Choice(list(RECIPES), case_sensitive=False),
            metavar="TYPE",
            help=f"For --shape: type of the weights, as in dg-convert; default: {TYPE}.",
        ),
        click.option(
            "--shape", type=click.Choice(list(SHAPES)), metavar="NAME", help="For --plan: a shape instead of a file."
        ),
        click.option(
            "--context", type=click.IntRange(1, 2**31 - 1), metavar="N", help="For --plan: tokens of context to hold."
        ),
        click.option(
            "--machine", type=InputFile(), metavar="FILE|NAME", help="For --plan: the machine; default: this one."
        ),
        click.option("--vram", type=Size(), metavar="SIZE", help="For --plan: the most GPU memory to use."),
        click.option(
            "--ram",
            type=Ram(AUTO),
            metavar="auto|SIZE",
            help="For --plan: the most memory; auto, the default: all, less a margin.",
        ),
        click.option(
            "--plan", "as_plan", is_flag=True, help="Show where weights would be kept, and predict the speed."
        ),
    ):
        command = option(command)
    return command


def make_plan(
    path: Path, has_weights: bool, ram: int | str | None, vram: int | None, machine: str | None, context: int | None
) -> Plan:
    """Make a plan from the file's header alone. has_weights: otherwise the file is no more than that."""
    with Model(os.fspath(path), backend="cpu") as model:  # with as many threads as dg-run would have
        where = machine_of(path, has_weights, machine)
        return plan(model, where, ram if isinstance(ram, int) else None, vram, context)


def machine_of(path: Path, has_weights: bool, machine: str | None) -> Machine:
    """Return the machine of a name or a file; of neither, this one, which is measured."""
    if machine is not None:
        return find_machine(machine)
    with telling() as say:
        say("measuring this machine, some seconds")
        return this_machine(path, has_weights)


@contextmanager
def planned_file(model: str | None, shape: str | None, type: str | None, layers: int | None) -> Iterator[Header]:
    """Yield the file of a MODEL, or of a shape: at least its header, which is gone when the block ends."""
    if shape is None:
        for flag, given in (("--type", type), ("--layers", layers)):
            if given is not None:
                raise click.UsageError(f"{flag} needs --shape")
        if model is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        with model_header(model) as header:
            yield header
        return
    if model is not None:
        raise click.UsageError("a MODEL and --shape both say what to plan for; give one")
    wanted = Synthetic(shape, layers, (type or TYPE).lower())
    with TemporaryDirectory(prefix="dgemma-") as room:
        path = make_header(Path(room), wanted)
        size = size_text(path.stat().st_size)
        yield Header(path, f"{shape}, {wanted.n_layer} layers, {wanted.type}: {size}", False)


def refuse_alone(as_plan: bool, **flags: object) -> None:
    """Refuse the options of --plan where --plan is not given."""
    for flag, given in flags.items():
        if given is not None and not as_plan:
            raise click.UsageError(f"--{flag} needs --plan")


def title(name: str, plan: Plan) -> str:
    about = f" ({plan.machine.about})" if plan.machine.about else ""
    return f"{name} on {plan.machine.name}{about}"


def summary(plan: Plan) -> str:
    return (
        f"Predicted: {plan.seconds:.3g} s a step, {figure(plan.tokens_per_second)} tokens/s at {STEPS} steps of"
        f" {plan.tokens} tokens, encoding not counted; bound by {' and '.join(plan.bound)}"
    )


def sections(plan: Plan) -> Iterator[Section]:
    count = sum(sum(way.blocks) for way in plan.ways)
    rows: list[tuple[str, ...]] = [
        (
            way.lives,
            way.computed,
            way.how,
            f"{sum(way.blocks):,}",
            size_text(way.bytes),
            f"{sum(way.blocks) / count:.0%}",
        )
        for way in plan.ways
        if sum(way.blocks)
    ]
    yield "Experts", ("live in", "computed by", "", ">blocks", ">size", ">share"), rows
    whole = [("RAM", plan.ram, plan.ram_budget), ("VRAM", plan.vram, plan.vram_budget)]
    rows = []
    for name, sizes, budget in whole:
        rows += [(name, what, size_text(size)) for what, size in sizes.items()]
        if sizes:
            rows.append((name, f"all, of a budget of {size_text(budget)}", size_text(sum(sizes.values()))))
    yield f"Memory, with keys and values of {plan.context:,} tokens", ("", "", ">size"), rows
    rows = [
        (
            queue.name,
            queue.covers,
            amount(queue.name, queue.amount),
            f"{queue.seconds:.3g} s",
            f"{queue.seconds / plan.seconds:.0%}",
        )
        for queue in plan.queues
        if queue.amount
    ]
    where = "GPU" if plan.gpu else "CPU"
    rows.append(
        (
            "",
            f"not experts: on the {where}, before any expert of a layer",
            "",
            f"{plan.serial:.3g} s",
            f"{plan.serial / plan.seconds:.0%}",
        )
    )
    yield "A step: what works at the same time", ("", "", ">amount", ">busy", ">of the step"), rows
    rows = [
        (rate.field, rate.help, f"{value / rate.scale:,.{0 if value >= 10 * rate.scale else 1}f} {rate.unit}")
        for rate in rates().values()
        if (value := plan.machine.rates[rate.field])
    ]
    yield f"Machine: {plan.machine.source}", ("", "", ">"), rows


def notes(plan: Plan) -> Iterator[str]:
    if plan.machine.rates["vram"] and not plan.gpu:
        if plan.vram_budget < plan.gpu_least:
            yield f"The GPU is not used: it would take {size_text(plan.gpu_least)} of VRAM for what is not experts."
        else:
            yield "The GPU is not used: the CPU alone is faster."


def amount(queue: str, value: float) -> str:
    return f"{figure(value / 1e9)} Gop" if queue in ("CPU", "GPU") else size_text(value)


def figure(value: float) -> str:
    """Return a number with three digits, or with all digits before the point if there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
