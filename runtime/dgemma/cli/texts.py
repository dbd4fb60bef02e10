"""dg-run on a text of the user's: filling it, or editing it. What the command line asks for, and how it is answered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

from dgemma.cli.edit import diff, passage
from dgemma.cli.files import read_file
from dgemma.cli.fill import fill_figures, pinned_pieces
from dgemma.cli.speaker import say
from dgemma.errors import Error
from dgemma.files.output import check_target, write_whole
from dgemma.files.regular import read_regular
from dgemma.infill.edit import Edited
from dgemma.infill.fill import Filled, Hole, pieces_of
from dgemma.model import Model
from dgemma.session import Prompt
from dgemma.ui.terminal import is_terminal


@dataclass(frozen=True, slots=True)
class Task:
    """The flags of fill.py and edit.py."""

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
        """Takes its flags out of what the command was given, and refuses half of a task; None where there is none."""
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
        """Refuses what other flags add to it: a prompt, one from standard input, a template's parts."""
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
    """A text that was filled or edited. replaces: what the file held, if the edited text goes into it."""

    filled: Filled
    edited: Edited | None
    file: str
    replaces: str | None

    def output(self) -> str:
        """The text, or the diff of an edit."""
        return diff(self.edited, self.file, colour=False) if self.edited else self.filled.text

    def say(self) -> None:
        """On standard output; a diff is coloured on a terminal."""
        if self.edited and is_terminal(sys.stdout):
            say(diff(self.edited, self.file, colour=True), safe=True)
        else:
            say(self.output())

    def facts(self) -> dict[str, Any]:
        """For --json."""
        best = self.filled.best
        told: dict[str, Any] = {"text": self.filled.text, "holes": best.holes, "lengths": best.lengths}
        if self.edited:
            told |= {"span": self.edited.span, "diff": self.edited.diff(self.file)}
        told |= {"mean_entropy": best.mean_entropy, "converged": self.filled.converged}
        told |= {"steps": self.filled.steps, "seconds": self.filled.seconds, "prompt_tokens": best.result.prompt_tokens}
        trials = self.filled.trials
        shown = ("lengths", "mean_entropy", "evidence")
        told["trials"] = [{name: getattr(trial, name) for name in shown} for trial in trials]
        return told

    def figures(self) -> list[str]:
        return fill_figures(self.filled)

    def write(self) -> None:
        """Writes the edited text to its file, unless that was changed meanwhile."""
        if self.edited is not None and self.replaces is not None:
            if read_regular(self.file) != self.replaces.encode():
                raise Error(f"{self.file}: this file was changed meanwhile, and is left as it is")
            write_whole(self.file, self.edited.text.encode())
