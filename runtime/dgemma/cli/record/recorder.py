"""Records the frames of an answer as pages, for a terminal session (.cast), an animated .svg or a .gif."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import click

from dgemma.cli.frames import Frame, Line, lines
from dgemma.files.output import MARK, Kind, marked_kind, write_whole

WIDEST, NARROWEST, TALLEST = 80, 40, 30  # the most and fewest columns of a page, and the most rows
FASTEST, SLOWEST = 0.15, 0.5  # seconds: a step is shown as long as it took, but within these bounds
HELD = 3.0  # seconds that the last step is shown


@dataclass(frozen=True, slots=True)
class Page:
    """The drawing of one step."""

    lines: list[Line]  # lines of text, of at most Recording.columns columns
    status: str  # the line below the text
    means: tuple[float, ...]  # mean entropy of the canvas's steps in nats, drawn as bars below the status
    seconds: float  # how long the page is shown


@dataclass(frozen=True, slots=True)
class Recording:
    """Pages of the same size."""

    pages: list[Page]
    columns: int
    rows: int  # rows of text; the status and the bars are below them


Writer = Callable[[Recording], bytes]

RECORDING: Kind = marked_kind("a recording of dg-run", MARK.encode())


def writer(path: Path) -> Writer:
    """Return the writer for the ending of a path: .cast, .svg or .gif.

    Raises UsageError for another ending, Error for .gif without Pillow.
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
    """Collects the frames of an answer, and writes them to a file at the end."""

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
        """Write the file, complete or not at all; without a step no file is made."""
        if self._frames:
            write_whole(self._path, self._make(recording(self._frames, self._took)), RECORDING)


def recording(frames: Sequence[Frame], took: Sequence[float]) -> Recording:
    """Return frames as pages of the size that fits all. took: seconds of work for each step."""
    drawn = [lines((*frame.before, *frame.cells), WIDEST) for frame in frames]
    widest = max(_width(line) for page in drawn for line in page)
    columns = min(max(widest, NARROWEST, *(len(frame.status) for frame in frames)), WIDEST)
    rows = min(max(map(len, drawn)), TALLEST)
    # A step is shown as long as the next step took: in a live session it is on the screen during that time.
    shown = [min(max(seconds, FASTEST), SLOWEST) for seconds in took[1:]] + [HELD]
    pages = [
        Page(page[-rows:], frame.status, frame.means, seconds)
        for frame, page, seconds in zip(frames, drawn, shown, strict=True)
    ]
    return Recording(pages, columns, rows)


def _width(line: Line) -> int:
    from rich.cells import cell_len

    return sum(cell_len(text) for text, _ in line)
