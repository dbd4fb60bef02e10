"""Displays on standard error while a model works: nothing, a line of progress, or the canvas."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from dgemma.cli.frames import Cell, Frame, Look, lines, shown
from dgemma.cli.live_region import Region
from dgemma.cli.palette import of_terminal
from dgemma.ui.terminal import is_terminal
from dgemma.ui.terminal import shown as named

if TYPE_CHECKING:
    from rich.text import Text

    from dgemma.events import Result

FRAME = 0.08  # the shortest time in seconds that --visual shows a step
PATIENCE = 0.3  # seconds before the first line of progress
PACE = 0.1  # seconds between two updates of the line


class Silent:
    """A display that shows nothing; the base class of the others.

    A display is a context manager; at its end the screen is as before.
    """

    holds = False  # whether the display shows text before it is printed

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        pass

    def encoded(self, done: int, total: int) -> None:
        """Show that `done` of the prompt's `total` tokens are encoded."""

    def step(self, frame: Frame) -> None:
        """Show a canvas after a denoising step."""

    def pend(self, text: str, thought: bool = False) -> None:
        """Set the final text before the canvas that is not printed yet. thought: it is the model's thought."""

    def hide(self) -> None:
        """Clear the drawing, so that something else can be printed; the next step draws again."""


class Steps(Silent):
    """Prints one line for each step, for terminals that cannot move the cursor up."""

    def step(self, frame: Frame) -> None:
        sys.stderr.write(frame.status + "\n")


class Progress(Silent):
    """Shows final text that is not printed yet, and one line of progress if the work takes longer."""

    holds = True

    def __init__(self) -> None:
        from rich.console import Console

        self._region = Region(Console(stderr=True, highlight=False))
        self._pending: tuple[Cell, ...] = ()
        self._started = self._shown = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.hide()

    def encoded(self, done: int, total: int) -> None:
        self._status(f"prompt: {done} of {total} tokens")

    def step(self, frame: Frame) -> None:
        self._status(frame.status)

    def pend(self, text: str, thought: bool = False) -> None:
        self._pending = (Cell(shown(named(text)), mark=thought, done=True),) if text else ()

    def hide(self) -> None:
        self._region.clear()

    def _status(self, line: str) -> None:
        now = time.monotonic()
        if (self._pending or now - self._started >= PATIENCE) and now - self._shown >= PACE:
            self._shown = now
            self._draw(self._pending, f"{line} · {now - self._started:.0f} s")

    def _draw(self, cells: tuple[Cell, ...], status: str) -> None:
        console = self._region.console
        room = console.height - 2  # two rows are for the status line and the cursor
        drawn = [self._line(line) for line in lines(cells, console.width)[-room:]] if cells and room > 0 else []
        self._region.draw([*drawn, styled(status)])

    def _line(self, line: list[tuple[str, Look]]) -> Text:
        from rich.text import Text

        return Text.assemble(*((text, self._style(look)) for text, look in line))

    def _style(self, look: Look) -> str:
        """Return rich's style for a look.

        Accepted tokens are bold, marks are dim. Uncertain tokens have a colour by their entropy; on a terminal with few
        colours they are dim too.
        """
        if look in ("done", "mark"):
            return "" if look == "done" else "dim"
        if look == "sure":
            return "bold"
        console = self._region.console
        if console.no_color or console.color_system in (None, "standard"):
            return "dim"
        return of_terminal().colour(look)


class CanvasDisplay(Progress):
    """Draws the canvas in place: accepted tokens stand out, the others have the colour of their entropy."""

    def __init__(self) -> None:
        super().__init__()
        self._due = 0.0

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pause()
        super().__exit__(kind, value, at)

    def step(self, frame: Frame) -> None:
        self._pause()
        spark = frame.sparkline if self._region.console.encoding.startswith("utf") else ""
        room = self._region.console.width - len(frame.status) - 1
        self._draw(
            self._pending + frame.cells, f"{frame.status} {spark[-room:]}" if room > 3 and spark else frame.status
        )
        self._due = time.monotonic() + FRAME

    def hide(self) -> None:
        self._pause()
        super().hide()

    def _pause(self) -> None:
        time.sleep(max(0.0, self._due - time.monotonic()))


def styled(line: str, style: str = "dim") -> Text:
    from rich.text import Text

    return Text(line, style)


def display(visual: bool, quiet: bool) -> Silent:
    """Return the display that fits standard error: Silent where it is no terminal."""
    if not is_terminal(sys.stderr) or (quiet and not visual):
        return Silent()
    from rich.console import Console

    if Console(stderr=True).is_dumb_terminal:
        return Steps() if visual else Silent()
    return CanvasDisplay() if visual else Progress()


def figures(result: Result) -> list[str]:
    """Return the lines that are printed at the end: figures, and hints where the answer was cut or has a fault."""
    n = [block.steps for block in result.blocks]
    steps = count(n[0], "step") if min(n) == max(n) else f"{min(n)} to {max(n)} steps"
    canvases = f"{count(len(n), 'canvas')} of {steps}"
    failed = sum(not block.converged for block in result.blocks)
    ended = "converged" if result.converged else f"{failed} of {count(len(n), 'canvas')} not converged"
    speed = f"{result.tokens_per_second:.0f}" if result.tokens_per_second >= 10 else f"{result.tokens_per_second:.2f}"
    lines = [f"{count(len(result.ids), 'token')}, {canvases}, {result.seconds:.2f} s, {speed} tokens/s, {ended}"]
    if result.finish_reason == "length":
        lines.append("cut at --max-tokens; a higher one lets the answer go on")
    again = f"drawn again {count(result.retries, 'time')}, at last from seed {result.seed}" if result.retries else ""
    if result.fault is not None:
        what = {"empty": "the answer is empty", "loop": "the answer ends in a loop"}[result.fault]
        lines.append(f"{what}, {again}" if again else f"{what}; --retries N draws it again from other seeds")
    elif again:
        lines.append(again)
    return lines


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"
