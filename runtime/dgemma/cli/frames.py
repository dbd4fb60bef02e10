"""Frames: pictures of a canvas after one step, for a terminal and for recordings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dgemma.chat.answer_parser import MARKS
from dgemma.cli.palette import LEVELS, level
from dgemma.detokenizer import Detokenizer

if TYPE_CHECKING:
    from dgemma.config import Config
    from dgemma.events import Step
    from dgemma.tokenizer import Tokenizer

KEPT = 1000  # cells of finished canvases that a frame shows before the canvas: about one screen
BARS = "▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_PART = re.compile(r"\n|[^\S\n]+|[^\s]+")


Look: TypeAlias = str  # how a text is drawn: one of LOOKS
# "done": of a finished canvas; "sure": accepted; "mark": a control token; "u0" and up: uncertain, by level of entropy.
LOOKS = ("done", "sure", "mark", *(f"u{i}" for i in range(LEVELS)))
Line: TypeAlias = list[tuple[str, Look]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One token of a canvas."""

    text: str  # text that is safe for a terminal; of a mark its name
    entropy: float = 0.0  # of the position, in nats
    accepted: bool = True
    mark: bool = False  # the token is a mark, not text of the answer
    done: bool = False  # the canvas is finished

    @property
    def look(self) -> Look:
        if self.mark or self.done:
            return "mark" if self.mark else "done"
        return "sure" if self.accepted else f"u{level(self.entropy)}"


@dataclass(frozen=True, slots=True)
class Frame:
    """A canvas after one step, up to and including its first end id."""

    block: int
    index: int
    steps: int  # the most steps of a canvas
    cells: tuple[Cell, ...]
    before: tuple[Cell, ...]  # cells of the finished canvases before this one
    accepted: int  # the number of accepted positions
    length: int  # the number of positions of the canvas
    means: tuple[float, ...]  # the mean entropy of each step of this canvas so far, in nats
    converged: bool

    @property
    def status(self) -> str:
        return (
            f"canvas {self.block + 1} · step {self.index + 1} of {self.steps} at most · entropy {self.means[-1]:.3f}"
            f" · {self.accepted} of {self.length} accepted"
        )

    @property
    def sparkline(self) -> str:
        """One bar of text for the mean entropy of each step; the highest entropy of the canvas is a full bar."""
        return sparkline(self.means)


def sparkline(values: Sequence[float]) -> str:
    most = max([*values, 1e-9])
    return "".join(BARS[min(int(value / most * len(BARS)), len(BARS) - 1)] for value in values)


class Framer:
    """Makes the frames of one answer."""

    def __init__(self, tokenizer: Tokenizer, config: Config, steps: int) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._ends = set(config.end_ids)
        self._pad = tokenizer.pad_id
        self._marks = {self._detokenizer.id(mark) for mark in MARKS} - {None}
        self._steps = steps
        self._before: tuple[Cell, ...] = ()
        self._means: tuple[float, ...] = ()

    def frame(self, step: Step) -> Frame:
        if step.index == 0:
            self._means = ()
        self._means += (step.mean_entropy,)
        ids = step.canvas.tolist()
        length = next((i + 1 for i, token in enumerate(ids) if token in self._ends), len(ids))
        entropy, accepted = step.entropy.tolist(), step.accepted.tolist()
        cells = tuple(
            self._cell(token, text, entropy[i], accepted[i] or step.converged)
            for i, (token, text) in enumerate(self._detokenizer.texts(ids[:length]))
        )
        return Frame(
            step.block,
            step.index,
            self._steps,
            cells,
            self._before,
            sum(accepted),
            len(ids),
            self._means,
            step.converged,
        )

    def finished(self, ids: Sequence[int]) -> None:
        """Add a finished canvas. ids: its tokens, without an end id."""
        cells = tuple(self._cell(token, text, 0.0, True, done=True) for token, text in self._detokenizer.texts(ids))
        self._before = (self._before + cells)[-KEPT:]

    def _cell(self, token: int, text: str, entropy: float, accepted: bool, done: bool = False) -> Cell:
        mark = self._detokenizer.plain(token) == "" or token in self._marks or token in self._ends
        if mark:
            text = "·" if token == self._pad else self._detokenizer.name(token)
        return Cell(shown(text), entropy, accepted, mark, done)


def shown(text: str) -> str:
    """Return a text with a dot in place of each control character."""
    return _CONTROL.sub("·", text.expandtabs(4))


def lines(cells: Iterable[Cell], columns: int) -> list[Line]:
    """Return cells as lines of at most `columns` columns, broken between words where possible."""
    from rich.cells import cell_len

    out: list[Line] = [[]]
    width = 0
    for word in _words(cells):
        text = "".join(part for part, _ in word)
        if text == "\n":
            out.append([])
            width = 0
            continue
        room = cell_len(text)
        if width and width + room > columns:
            if text.isspace():
                continue  # at the end of a line
            out.append([])
            width = 0
        if room <= columns:
            _add(out[-1], word)
            width += room
            continue
        for part, look in word:  # longer than a line
            for character in part:
                room = cell_len(character)
                if width + room > columns and width:
                    out.append([])
                    width = 0
                _add(out[-1], [(character, look)])
                width += room
    return out


def _words(cells: Iterable[Cell]) -> Iterable[Line]:
    """Yield newlines, runs of spaces, and words. A word may have parts of several cells."""
    word: Line = []
    for cell in cells:
        look = cell.look
        for part in _PART.findall(cell.text):
            if part.isspace() or (word and word[-1][0].isspace()):
                if word:
                    yield word
                word = []
            word.append((part, look))
    if word:
        yield word


def _add(line: Line, word: Line) -> None:
    for text, look in word:
        if line and line[-1][1] == look:
            line[-1] = (line[-1][0] + text, look)
        else:
            line.append((text, look))
