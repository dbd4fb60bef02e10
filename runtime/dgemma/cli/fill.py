"""dg-run --fill, and --canvas with --pin: the rest of a text whose parts stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from dgemma.cli.display import count
from dgemma.cli.files import InputFile
from dgemma.infill.fill import LENGTHS, Filled, Hole, Pieces
from dgemma.model import Model


def whole_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Reads "3,5,7"."""
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", value):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 3,5,7", ctx, param)
    return tuple(map(int, value.split(",")))


def fill_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of this file."""
    tried = ", ".join(map(str, LENGTHS))
    lengths = "Lengths to try, in tokens, for [[...]] and for the passage of --edit."
    command = click.option("--lengths", callback=whole_numbers, metavar="N,N,...", help=lengths)(command)
    for flags, name, metavar, text in (
        (["--pin"], "pin", "REGEX", "What stays of --canvas: all that this regular expression (Python's) matches."),
        (
            ["--canvas"],
            "canvas",
            "FILE",
            "Write anew what --pin does not match in this text; each part as many tokens long as it is.",
        ),
        (
            ["--fill"],
            "fill",
            "FILE",
            "Fill the holes of this text: [[n]] is one of n tokens, [[...]] of a length to be found: "
            f"{tried} are tried, and the one whose text is the likeliest wins: by next-token logits, plus the entropy "
            "of its tokens when they were accepted, so that long texts, of which there are many, have their chance "
            "(in 480 holes of the bundled tidy 431 times right; the lowest mean entropy per token is 343 times). "
            "The prompt, if one is given by -p or -f, says what it is about. - is standard input.",
        ),
    ):
        type_ = InputFile() if metavar == "FILE" else None
        command = click.option(*flags, name, type=type_, metavar=metavar, help=text)(command)
    return command


def pinned_pieces(model: Model, text: str, pin: str) -> Pieces:
    """A text whose parts that `pin` matches stay; each of the others is a hole of its own length in tokens."""
    try:
        pattern = re.compile(pin)
    except re.error as failure:
        raise click.BadParameter(f"{pin!r} is no regular expression: {failure}", param_hint="'--pin'") from None
    pieces: list[str | Hole] = []
    at = 0

    def hole(part: str) -> None:
        if part:
            pieces.append(Hole(len(model.tokenizer.encode(part, special=False))))

    for found in pattern.finditer(text):
        if found.end() > found.start():
            hole(text[at : found.start()])
            pieces.append(found[0])
            at = found.end()
    hole(text[at:])
    return pieces


def fill_figures(filled: Filled) -> list[str]:
    """What is told at the end."""
    ended = "converged" if filled.converged else "not converged"
    lengths = ", ".join(map(str, filled.best.lengths[:8])) + (", ..." if len(filled.best.lengths) > 8 else "")
    holes = count(len(filled.best.lengths), "hole")
    return [
        f"{holes} of {lengths} tokens, entropy {filled.best.mean_entropy:.4f} per token, {ended};"
        f" {count(len(filled.trials), 'trial')}, {count(filled.steps, 'step')}, {filled.seconds:.2f} s"
    ]
