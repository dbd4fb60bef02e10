"""Files on a command line: types for options that read or write a file, and a check that no output is an input.

Every option that names a file has one of the types of this module. Command calls check_files() for all of them before
the work begins, so no command has to check its own outputs.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from dgemma.errors import UsageError
from dgemma.files.bundled import named
from dgemma.files.output import Kind, check_distinct, check_target
from dgemma.hub.names import PREFIX
from dgemma.units import size_text

STDIN = "-"
MOST = 256 << 20  # the most bytes of a prompt, or of a text to fill or edit


class InputFile(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in click 8.2 and later
    """The type of an option for a file that a command reads; the value is the text that was given.

    The text may also mean something else, such as hf:owner/name. folder: it may be a folder, whose files are read.
    """

    name = "file"

    def __init__(self, folder: bool = False) -> None:
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return str(value)


class ModelFile(InputFile):
    """The type of an option for a model; the value is the text that was given, or the path of a bundled model."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return named(str(value))


class InputPath(InputFile):
    """The type of an option for a file that a command reads; the value is a Path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Path(value)


class OutputFile(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in click 8.2 and later
    """The type of an option for a file that a command writes.

    kind: only an existing file of this kind is replaced; None: the command appends to the file, and checks it itself.
    more: returns the other files that are written together with this one.
    """

    name = "file"

    def __init__(self, kind: Kind | None, more: Callable[[Path], Iterable[Path]] = lambda path: ()) -> None:
        self.kind = kind
        self._more = more

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if not path.name or os.fspath(value).endswith(os.sep) or os.fspath(value) == STDIN:
            self.fail(f"{os.fspath(value)!r} names no file", param, ctx)
        return path

    def all(self, path: Path) -> list[Path]:
        return [path, *self._more(path)]


class OutputBeside(click.Option):
    """A flag that makes the command write a file whose name is made from another parameter's value."""

    def __init__(self, *arguments: Any, of: str, beside: Callable[[str], str], kind: Kind, **more: Any) -> None:
        super().__init__(*arguments, **{**more, "is_flag": True})
        self.of, self.kind = of, kind
        self._beside = beside

    def target(self, values: dict[str, Any]) -> Path | None:
        """Return the file that is written for these values of the command's parameters, or None."""
        of: str | None = values.get(self.of)
        if not values.get(self.name or "") or of is None or of.startswith(PREFIX):  # a file that is not known yet
            return None
        return Path(self._beside(of))


class InPlace(click.Option):
    """A flag that makes a command write to a file that it reads."""

    def __init__(self, *arguments: Any, of: str, **more: Any) -> None:
        super().__init__(*arguments, **{**more, "is_flag": True})
        self.of = of

    def target(self, values: dict[str, Any]) -> Path | None:
        of: str | None = values.get(self.of)
        return Path(of) if values.get(self.name or "") and of is not None else None


def standard_input() -> TextIO:
    """Return sys.stdin. Raises UsageError where the process was started without one."""
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    return sys.stdin


def read_file(name: str) -> bytes:
    """Return the bytes of a file, or of standard input for -.

    Raises UsageError for more than MOST bytes, so that a file such as /dev/zero does not fill the memory.
    """
    if name == STDIN:
        data = standard_input().buffer.read(MOST + 1)
    else:
        with open(name, "rb") as opened:
            data = opened.read(MOST + 1)
    if len(data) > MOST:
        raise UsageError(f"{'standard input' if name == STDIN else name}: more than {size_text(MOST)}")
    return data


def check_files(command: click.Command, values: dict[str, Any]) -> None:
    """Raise where an output of the command cannot or must not be written.

    It must not be an input, another output or a file that a standard stream is connected to, nor an existing file of
    another kind.
    """
    if values.get("dry_run"):
        return
    reads = [
        (what, path)
        for what, path, type_ in _given(command, values, InputFile)
        if type_.folder or not os.path.isdir(path)
    ]
    streams = open_streams()
    for param in command.params:
        if isinstance(param, InPlace) and (path := param.target(values)) is not None:
            check_distinct([(param.opts[0], path)], streams)
    reads += streams
    writes = list(_outputs(command, values))
    check_distinct([(what, path) for what, path, _ in writes], reads)
    for _, path, kind in writes:
        check_target(path, kind)


def _outputs(command: click.Command, values: dict[str, Any]) -> Iterator[tuple[str, Path, Kind | None]]:
    for what, path, type_ in _given(command, values, OutputFile):
        for each in type_.all(path):
            yield what, each, type_.kind
    for param in command.params:
        if isinstance(param, OutputBeside) and (path := param.target(values)) is not None:
            yield param.opts[0], path, param.kind


def _given(command: click.Command, values: dict[str, Any], type_: type[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name for messages, file, type) of each parameter of this type that was given."""
    for param in command.params:
        if isinstance(param.type, type_):
            value = values.get(param.name or "")
            name = param.human_readable_name if isinstance(param, click.Argument) else max(param.opts, key=len)
            for each in value if isinstance(value, tuple) else (value,):
                if each is not None and not (isinstance(param.type, InputFile) and each == STDIN):
                    yield name, each, param.type


def open_streams() -> list[tuple[str, str]]:
    """Return (name, path) of each standard stream that is connected to a regular file, as by `< FILE` or `> FILE`."""
    found = []
    streams = (("standard input", sys.stdin), ("standard output", sys.stdout), ("standard error", sys.stderr))
    for number, (name, stream) in enumerate(streams):
        if stream is not None:
            try:
                regular = stat.S_ISREG(os.fstat(number).st_mode)
            except OSError:
                continue
            if regular:
                found.append((name, f"/dev/fd/{number}"))
    return found
