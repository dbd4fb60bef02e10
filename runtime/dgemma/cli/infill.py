"""dg-run --fill, --canvas with --pin, and --edit: their flags, their work, and their output."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

from dgemma.cli.display import count
from dgemma.cli.files import InPlace, InputFile, read_file
from dgemma.cli.output import say
from dgemma.errors import Error
from dgemma.files.output import check_target, write_whole
from dgemma.files.regular import read_regular
from dgemma.infill.edit import Edited, lines_of
from dgemma.infill.fill import LENGTHS, Filled, Hole, Pieces, pieces_of
from dgemma.model import Model
from dgemma.session import Prompt
from dgemma.ui.terminal import is_terminal, shown

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


# ---- --fill, and --canvas with --pin ----


def whole_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse the value of an option, a list such as "3,5,7"."""
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", value):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 3,5,7", ctx, param)
    return tuple(map(int, value.split(",")))


def fill_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --fill, --canvas, --pin and --lengths."""
    tried = ", ".join(map(str, LENGTHS))
    lengths = "Lengths to try, in tokens, for [[...]] and for the passage of --edit."
    command = click.option("--lengths", callback=whole_numbers, metavar="N,N,...", help=lengths)(command)
    for flags, name, metavar, text in (
        (
            ["--pin"],
            "pin",
            "REGEX",
            "The parts of --canvas that stay: all matches of this regular expression (Python).",
        ),
        (
            ["--canvas"],
            "canvas",
            "FILE",
            "Rewrite the parts of this text that --pin does not match; each keeps its length in tokens.",
        ),
        (
            ["--fill"],
            "fill",
            "FILE",
            "Fill the holes of this text: [[n]] is a hole of n tokens, [[...]] a hole of unknown length. For "
            f"[[...]] the lengths {tried} are tried, and the text with the best score is taken. The score is the log "
            "probability of the text, by next-token logits, plus the entropy of its tokens when they were accepted; "
            "without the entropy, short texts would always win (in a test with the bundled tidy, the score chose the "
            "right text for 431 of 480 holes; the lowest mean entropy per token for 343). A prompt may be given by -p "
            "or -f. - is standard input.",
        ),
    ):
        type_ = InputFile() if metavar == "FILE" else None
        command = click.option(*flags, name, type=type_, metavar=metavar, help=text)(command)
    return command


def pinned_pieces(model: Model, text: str, pin: str) -> Pieces:
    """Split a text at the matches of `pin`: these stay, and each other part is a hole of the same length in tokens."""
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
    """Return the line of figures that is printed at the end."""
    ended = "converged" if filled.converged else "not converged"
    lengths = ", ".join(map(str, filled.best.lengths[:8])) + (", ..." if len(filled.best.lengths) > 8 else "")
    holes = count(len(filled.best.lengths), "hole")
    return [
        f"{holes} of {lengths} tokens, entropy {filled.best.mean_entropy:.4f} per token, {ended};"
        f" {count(len(filled.trials), 'trial')}, {count(filled.steps, 'step')}, {filled.seconds:.2f} s"
    ]


# ---- --edit ----


def edit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --edit, --span, --match, --instruct and --in-place."""
    in_place = "Write the edited text to the file. If anything fails, the file is unchanged."
    command = click.option("--in-place", cls=InPlace, of="edit", help=in_place)(command)
    for flag, name, metavar, text in (
        ("--instruct", "instruct", "TEXT", "What is to be done with the passage."),
        ("--match", "match", "TEXT", "The passage is this text, which must be in the file exactly once."),
        ("--span", "span", "A:B", "The passage is characters A to B of the file, counted from 0, B not included."),
        ("--edit", "edit", "FILE", "Rewrite a passage of this file, and print the change as a unified diff."),
    ):
        type_ = InputFile() if metavar == "FILE" else None
        command = click.option(flag, name, type=type_, metavar=metavar, help=text)(command)
    return command


def passage(text: str, span: str | None, match: str | None, file: str) -> tuple[int, int]:
    """Return where the passage begins and ends in the text."""
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
    """Return the change as a diff. colour: with colours, and with control characters made visible."""
    result = edited.diff(name)
    if not colour:
        return result
    bold = {0: True, 1: True}  # the two lines with the file's names
    return "".join(
        click.style(line, fg=None if at in bold else COLOURS.get(line[0]), bold=at in bold or None)
        for at, line in enumerate(lines_of(shown(result)))
    )


# ---- The task, and its result ----


@dataclass(frozen=True, slots=True)
class Task:
    """A text to fill or to edit: the values of the flags for it."""

    fill: str | None
    canvas: str | None
    pin: str | None
    edit: str | None
    span: str | None
    match: str | None
    instruct: str | None
    in_place: bool
    lengths: tuple[int, ...] | None

    @classmethod
    def take(cls, settings: dict[str, Any]) -> Task | None:
        """Take the flags of a task out of `settings`; None without any. Raises UsageError where a flag is missing."""
        task = cls(**{item.name: settings.pop(item.name) for item in fields(cls)})
        given = {name for name in ("fill", "canvas", "edit") if getattr(task, name) is not None}
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join('--' + name for name in sorted(given))} do not go together")
        needs = {"pin": "canvas", "span": "edit", "match": "edit", "instruct": "edit", "in_place": "edit"}
        for name, other in needs.items():
            if getattr(task, name) not in (None, False) and other not in given:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --{other} FILE")
        if task.lengths is not None and not given & {"fill", "edit"}:
            raise click.UsageError("--lengths needs --fill FILE or --edit FILE")
        for name, other in (("canvas", "pin"), ("edit", "instruct")):
            if name in given and getattr(task, other) is None:
                raise click.UsageError(f"--{name} needs --{other}")
        return task if given else None

    @property
    def file(self) -> str:
        return str(self.fill or self.canvas or self.edit)

    def check(self, prompted: bool, stdin: bool, templated: bool) -> None:
        """Raise UsageError where other flags do not fit the task.

        prompted: -p or -f is given. stdin: the prompt is standard input. templated: --system or --think is given.
        """
        if self.edit is not None and prompted:
            raise click.UsageError("--edit is told what to do by --instruct, not by -p or -f")
        if self.file == "-" and (stdin or self.edit is not None):
            raise click.UsageError(
                "standard input cannot be edited" if self.edit else "the prompt and the text are both -"
            )
        if templated and not prompted:
            raise click.UsageError("--system and --think need a prompt: -p or -f")

    def run(
        self, model: Model, prompt: Prompt | None, settings: dict[str, Any], **callbacks: Callable[..., Any]
    ) -> Done:
        if self.edit is not None and self.in_place:
            check_target(self.edit)
        text = self._read()
        if self.lengths is not None:
            settings = {**settings, "lengths": self.lengths}
        if self.edit is not None:
            span = passage(text, self.span, self.match, self.edit)
            edited = model.edit(text, span, str(self.instruct), **callbacks, **settings)
            return Done(edited.filled, edited, self.edit, text if self.in_place else None)
        pieces = pieces_of(text) if self.canvas is None else pinned_pieces(model, text, str(self.pin))
        if not any(isinstance(piece, Hole) for piece in pieces):
            missing = "[[...]] or [[n]]" if self.canvas is None else "all of it matches --pin"
            raise click.UsageError(f"{self.file} has no hole to fill: {missing}")
        return Done(model.fill(pieces, prompt, **callbacks, **settings), None, self.file, None)

    def _read(self) -> str:
        data = read_file(self.file) if self.edit is None else read_regular(self.edit)
        try:
            return data.decode()
        except UnicodeDecodeError as failure:
            raise click.UsageError(f"{self.file} is not UTF-8 text: byte {failure.start}") from None


@dataclass(frozen=True, slots=True)
class Done:
    """A filled or edited text. replaces: the old content of the file, where the edited text is written to it."""

    filled: Filled
    edited: Edited | None
    file: str
    replaces: str | None

    def output(self) -> str:
        """Return the text, or the diff of an edit."""
        return diff(self.edited, self.file, colour=False) if self.edited else self.filled.text

    def say(self) -> None:
        """Print the output on standard output; on a terminal a diff has colours."""
        if self.edited and is_terminal(sys.stdout):
            say(diff(self.edited, self.file, colour=True), safe=True)
        else:
            say(self.output())

    def facts(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        best = self.filled.best
        result: dict[str, Any] = {"text": self.filled.text, "holes": best.holes, "lengths": best.lengths}
        if self.edited:
            result |= {"span": self.edited.span, "diff": self.edited.diff(self.file)}
        result |= {"mean_entropy": best.mean_entropy, "converged": self.filled.converged}
        result |= {
            "steps": self.filled.steps,
            "seconds": self.filled.seconds,
            "prompt_tokens": best.result.prompt_tokens,
        }
        trials = self.filled.trials
        shown = ("lengths", "mean_entropy", "evidence")
        result["trials"] = [{name: getattr(trial, name) for name in shown} for trial in trials]
        return result

    def figures(self) -> list[str]:
        return fill_figures(self.filled)

    def write(self) -> None:
        """Write the edited text to its file, unless that was changed meanwhile."""
        if self.edited is not None and self.replaces is not None:
            if read_regular(self.file) != self.replaces.encode():
                raise Error(f"{self.file}: this file was changed meanwhile, and is left as it is")
            write_whole(self.file, self.edited.text.encode())
