"""dg-run --edit: one passage of a file, rewritten as it is told to, shown as a diff."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from dgemma.cli.files import InPlace, InputFile
from dgemma.infill.edit import Edited, lines_of
from dgemma.ui.terminal import shown

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def edit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of this file."""
    in_place = "Write the edited text to the file: all of it or, if anything fails, nothing."
    command = click.option("--in-place", cls=InPlace, of="edit", help=in_place)(command)
    for flag, name, metavar, text in (
        ("--instruct", "instruct", "TEXT", "What is to be done with the passage."),
        ("--match", "match", "TEXT", "The passage is this text, which stands in the file once."),
        ("--span", "span", "A:B", "The passage is characters A to B of the file, counted from 0, B not included."),
        ("--edit", "edit", "FILE", "Rewrite a passage of this file, and print the change as a unified diff."),
    ):
        type_ = InputFile() if metavar == "FILE" else None
        command = click.option(flag, name, type=type_, metavar=metavar, help=text)(command)
    return command


def passage(text: str, span: str | None, match: str | None, file: str) -> tuple[int, int]:
    """Where the passage stands."""
    if (span is None) == (match is None):
        raise click.UsageError("--edit needs --span A:B or --match TEXT, one of them")
    if match is not None:
        found = text.count(match) if match else 0
        if found != 1:
            raise click.BadParameter(f"{match!r} stands in {file} {found} times, not once", param_hint="'--match'")
        return text.index(match), text.index(match) + len(match)
    numbers = re.fullmatch(r"(\d+):(\d+)", span or "")
    if not numbers or not int(numbers[1]) <= int(numbers[2]) <= len(text):
        raise click.BadParameter(
            f"{span!r} is no A:B within the {len(text)} characters of {file}", param_hint="'--span'"
        )
    return int(numbers[1]), int(numbers[2])


def diff(edited: Edited, name: str, colour: bool) -> str:
    """The change: coloured for a terminal, what that would obey being shown; or as it is."""
    told = edited.diff(name)
    if not colour:
        return told
    bold = {0: True, 1: True}  # the two names
    return "".join(
        click.style(line, fg=None if at in bold else COLOURS.get(line[0]), bold=at in bold or None)
        for at, line in enumerate(lines_of(shown(told)))
    )
