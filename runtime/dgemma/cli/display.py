"""Displays on standard error while a model works: nothing, a line of progress, or the canvas."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from dgemma.cli.frames import Cell, Frame, Look, lines, shown
from dgemma.cli.interrupts import restored_at_once
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
LONG = 1.0  # seconds of a step from which on --visual shows how long it takes
STOPPING = "stopping, with what is finished; Ctrl-C again ends at once"


class Silent:
    """A display that shows nothing; the base class of the others.

    A display is a context manager; at its end the screen is as before.
    """

    holds = False  # whether the display shows text before it is printed

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        pass

    def doing(self, what: str) -> None:
        """Show what is done before there are steps, such as "opening model.gguf"."""

    def encoded(self, done: int, total: int) -> None:
        """Show that `done` of the prompt's `total` tokens are encoded."""
        self.doing(f"prompt: {done} of {total} tokens")

    def step(self, frame: Frame) -> None:
        """Show a canvas after a denoising step."""

    def pend(self, text: str, thought: bool = False) -> None:
        """Set the final text before the canvas that is not printed yet. thought: it is the model's thought."""

    def stopping(self) -> None:
        """Show that Ctrl-C was heard. Any thread may call it."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Clear the screen, for something else to be printed there within the block."""
        yield


class Steps(Silent):
    """Prints one line for each step, for terminals that cannot move the cursor up."""

    def step(self, frame: Frame) -> None:
        sys.stderr.write(frame.status + "\n")


class Progress(Silent):
    """Shows final text that is not printed yet, and one line of progress if the work takes longer.

    The line is drawn again as time passes, by a thread of its own.
    """

    holds = True

    def __init__(self) -> None:
        from rich.console import Console

        self._region = Region(Console(stderr=True, highlight=False))
        self._pending: tuple[Cell, ...] = ()
        self._what = ""  # what is done now
        self._stopping = False
        self._started = time.monotonic()
        self._drawn = ("", self._started)  # the line that stands there, and since when
        self._lock = threading.RLock()  # of all that is here
        self._done = threading.Event()
        self._restored = restored_at_once(self._clear)
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._restored.__enter__()
        self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._clock.join()
        with self.aside():
            self._what = ""
        self._restored.__exit__(None, None, None)

    def doing(self, what: str) -> None:
        with self._lock:
            self._what = what
            self._show()

    def step(self, frame: Frame) -> None:
        self.doing(frame.status)

    def pend(self, text: str, thought: bool = False) -> None:
        with self._lock:
            self._pending = (Cell(shown(named(text)), mark=thought, done=True),) if text else ()

    def stopping(self) -> None:
        with self._lock:
            self._stopping = True
            self._drawn = ("", 0.0)
            self._what = self._what or "stopping"
            self._show()

    @contextmanager
    def aside(self) -> Iterator[None]:
        with self._lock:
            self._clear()
            yield

    def _clear(self) -> None:
        self._region.clear()
        self._drawn = ("", self._drawn[1])

    def _tick(self) -> None:
        while not self._done.wait(PACE):
            with self._lock:
                if self._what:
                    self._show()

    def _show(self) -> None:
        """Draw what is done and for how long, unless that stands there, or stood there a moment ago."""
        now = time.monotonic()
        line = f"{STOPPING if self._stopping else self._what} · {now - self._started:.0f} s"
        patient = self._stopping or self._pending or now - self._started >= PATIENCE
        if patient and line != self._drawn[0] and now - self._drawn[1] >= PACE:
            self._drawn = (line, now)
            self._draw(self._pending, line)

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
        self._canvas: tuple[Cell, ...] = ()  # of the last step
        self._status, self._since = "", 0.0  # what stands below it, and since when

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pause()
        super().__exit__(kind, value, at)

    def step(self, frame: Frame) -> None:
        self._pause()
        spark = frame.sparkline if self._region.console.encoding.startswith("utf") else ""
        room = self._region.console.width - len(frame.status) - 1
        with self._lock:
            self._canvas = self._pending + frame.cells
            self._status = f"{frame.status} {spark[-room:]}" if room > 3 and spark else frame.status
            self._what, self._since = frame.status, time.monotonic()
            self._draw(self._canvas, STOPPING if self._stopping else self._status)
        self._due = time.monotonic() + FRAME

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._pause()
        with super().aside():
            self._canvas = ()
            yield

    def _show(self) -> None:
        """Draw the last step again once the next one takes a while."""
        if not self._status:
            super()._show()
            return
        waited = time.monotonic() - self._since
        line = STOPPING if self._stopping else f"{self._what} · {waited:.0f} s"
        if line != self._drawn[0] and (self._stopping or waited >= LONG):
            self._drawn = (line, time.monotonic())
            self._draw(self._canvas, line)

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
    if result.finish_reason == "stopped":
        kept = f"{count(len(result.blocks), 'finished canvas')} of {count(len(result.ids), 'token')} kept"
        return [f"stopped by Ctrl-C after {result.seconds:.2f} s; {kept}"]
    n = [block.steps for block in result.blocks]
    steps = count(n[0], "step") if min(n) == max(n) else f"{min(n)} to {max(n)} steps"
    canvases = f"{count(len(n), 'canvas')} of {steps}"
    failed = sum(not block.converged for block in result.blocks)
    ended = "converged" if result.converged else f"{failed} of {count(len(n), 'canvas')} not converged"
    speed = f"{result.tokens_per_second:.0f}" if result.tokens_per_second >= 10 else f"{result.tokens_per_second:.2f}"
    taken = f"{result.seconds:.2f} s, {speed} tokens/s"
    lines = [f"{count(len(result.ids), 'token')}, {canvases}, {taken}, {ended}, seed {result.seed}"]
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
