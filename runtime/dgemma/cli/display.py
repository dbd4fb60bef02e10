"""What a person watches while a model works: nothing, a line of progress, or the canvas. All on standard error."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING

from dgemma.events import Block, Result, Step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from dgemma.model import Model

FRAME = 0.08  # seconds that --visual shows a step at least
PATIENCE = 0.3  # seconds before there is a line of progress
PACE = 0.1  # seconds between two lines
ENOUGH = 20000  # characters, more than a screen holds
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey


class Silent:
    """Shows nothing; the others show more. A context manager, which leaves the screen as it was."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        pass

    def encoded(self, done: int, total: int) -> None:
        """`done` of the prompt's `total` tokens are encoded."""

    def step(self, step: Step) -> None:
        """A canvas was denoised once more."""

    def block(self, block: Block) -> None:
        """A canvas is finished."""


class Progress(Silent):
    """One line, once the work takes long enough to wonder."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._live: Live | None = None
        self._began = self._shown = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def encoded(self, done: int, total: int) -> None:
        self._say(f"prompt: {done} of {total} tokens")

    def step(self, step: Step) -> None:
        self._say(status(step, self._steps))

    def _say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._began >= PATIENCE and now - self._shown >= PACE:
            self._shown = now
            self._draw(styled(f"{line} · {now - self._began:.0f} s"))

    def _draw(self, what: RenderableType) -> None:
        self._screen().update(what, refresh=True)

    def _screen(self) -> Live:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self._live


class Canvas(Progress):
    """The canvas in place: certain tokens stand out, the others are dim. What was finished before stands above it."""

    def __init__(self, model: Model, steps: int) -> None:
        super().__init__(steps)
        self._model = model
        self._ends = set(model.config.end_ids)
        self._before = ""
        self._due = 0.0

    def step(self, step: Step) -> None:
        from rich.console import Group

        self._pause()
        console = self._screen().console
        room = console.height - 2  # for the canvas, between the status line and the cursor's
        lines = self.text(step).wrap(console, console.width)[-room:] if room > 0 else []
        head = f"{status(step, self._steps)} · {int(step.accepted.sum())} of {len(step.accepted)} accepted"
        self._draw(Group(styled(head), *lines))
        self._due = time.monotonic() + FRAME

    def block(self, block: Block) -> None:
        self._before = (self._before + self._plain(block.ids))[-ENOUGH:]

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pause()
        super().__exit__(kind, value, at)

    def _pause(self) -> None:
        time.sleep(max(0.0, self._due - time.monotonic()))

    def text(self, step: Step) -> Text:
        """What stands on the canvas, up to an end id, after the canvases before it."""
        text = styled(self._before, "")
        ids = step.canvas.tolist()
        length = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        for sure, run in groupby(range(length), lambda i: step.converged or bool(step.accepted[i])):
            text.append(self._plain([ids[i] for i in run]), "bold" if sure else "dim")
        return text

    def _plain(self, ids: list[int]) -> str:
        return _CONTROL.sub("·", self._model.tokenizer.decode(ids))


def styled(line: str, style: str = "dim") -> Text:
    from rich.text import Text

    return Text(line, style, no_wrap=style == "dim", overflow="ellipsis" if style == "dim" else "fold")


def status(step: Step, steps: int) -> str:
    return f"canvas {step.block + 1} · step {step.index + 1} of {steps} at most · entropy {step.mean_entropy:.3f}"


@contextmanager
def display(model: Model, steps: int, terminal: bool, visual: bool) -> Iterator[Silent]:
    """The display for standard error: nothing where it is no terminal."""
    with Silent() if not terminal else Canvas(model, steps) if visual else Progress(steps) as shown:
        yield shown


def figures(result: Result) -> list[str]:
    """What is told at the end: a line of figures, and a hint where the answer was cut."""
    n = [block.steps for block in result.blocks]
    steps = count(n[0], "step") if min(n) == max(n) else f"{min(n)} to {max(n)} steps"
    canvases = f"{count(len(n), 'canvas')} of {steps}"
    failed = sum(not block.converged for block in result.blocks)
    ended = "converged" if result.converged else f"{failed} of {count(len(n), 'canvas')} not converged"
    speed = f"{result.tokens_per_second:.0f}" if result.tokens_per_second >= 10 else f"{result.tokens_per_second:.2f}"
    lines = [f"{count(len(result.ids), 'token')}, {canvases}, {result.seconds:.2f} s, {speed} tokens/s, {ended}"]
    if result.finish_reason == "length":
        lines.append("cut at --max-tokens; a higher one lets the answer go on")
    return lines


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"
