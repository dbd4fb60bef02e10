"""Records a canvas: the same pages become a terminal session, an animated drawing, or a moving picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import click

from dgemma.cli.frames import Frame, Line, lines
from dgemma.files.output import MARK, Kind, marked_kind, write_whole

WIDEST, NARROWEST, TALLEST = 80, 40, 30  # characters of a page
FASTEST, SLOWEST, HELD = 0.15, 0.5, 3.0  # seconds that a step is shown: as long as it took, within these; the last one


@dataclass(frozen=True, slots=True)
class Page:
    """One step as it is drawn: lines of at most `columns` characters, and what stands below them."""

    lines: list[Line]
    status: str
    means: tuple[float, ...]  # mean entropy of the canvas's steps, nats
    seconds: float  # how long it is shown


@dataclass(frozen=True, slots=True)
class Recording:
    """Pages of one size."""

    pages: list[Page]
    columns: int
    rows: int  # of the text; the status and the bars of the means are below


Writer = Callable[[Recording], bytes]

RECORDING: Kind = marked_kind("a recording of dg-run", MARK.encode())


def writer(path: Path) -> Writer:
    """Return the writer of the kind of file that a path's name asks for.

    Refuses other names, and what cannot be written here.
    """
    if path.suffix == ".cast":
        from dgemma.cli.record.cast import cast

        return cast
    if path.suffix == ".svg":
        from dgemma.cli.record.svg import svg

        return svg
    if path.suffix == ".gif":
        from dgemma.cli.record.gif import gif, refuse_gif

        refuse_gif()
        return gif
    raise click.UsageError(f"--record {path}: its name must end in .cast, .svg or .gif")


class Recorder:
    """Keeps the frames of an answer, and writes them to a file at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._make = writer(path)
        self._frames: list[Frame] = []
        self._took: list[float] = []
        self._since = monotonic()

    def step(self, frame: Frame) -> None:
        now = monotonic()
        self._frames.append(frame)
        self._took.append(now - self._since)
        self._since = now

    def write(self) -> None:
        """Write the file, whole or not at all; without a step there is no file."""
        if self._frames:
            write_whole(self._path, self._make(recording(self._frames, self._took)), RECORDING)


def recording(frames: Sequence[Frame], took: Sequence[float]) -> Recording:
    """Return frames as pages of the size that they need. took: seconds of work for each step."""
    drawn = [lines((*frame.before, *frame.cells), WIDEST) for frame in frames]
    widest = max(_width(line) for page in drawn for line in page)
    columns = min(max(widest, NARROWEST, *(len(frame.status) for frame in frames)), WIDEST)
    rows = min(max(map(len, drawn)), TALLEST)
    shown = [min(max(seconds, FASTEST), SLOWEST) for seconds in took[1:]] + [
        HELD
    ]  # a step is seen while the next works
    pages = [
        Page(page[-rows:], frame.status, frame.means, seconds)
        for frame, page, seconds in zip(frames, drawn, shown, strict=True)
    ]
    return Recording(pages, columns, rows)


def _width(line: Line) -> int:
    from rich.cells import cell_len

    return sum(cell_len(text) for text, _ in line)
