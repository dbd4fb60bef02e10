"""The picture of a canvas at one step, for a terminal and for recordings."""

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

KEPT = 1000  # cells of finished canvases that are kept: about as many as a page holds
BARS = "▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_PART = re.compile(r"\n|[^\S\n]+|[^\s]+")


Look: TypeAlias = str  # how text is drawn: one of LOOKS
LOOKS = ("done", "sure", "mark", *(f"u{i}" for i in range(LEVELS)))  # finished; accepted; no text; uncertain, by level
Line: TypeAlias = list[tuple[str, Look]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One token of a canvas."""

    text: str  # what a terminal may show; marks by their names
    entropy: float = 0.0  # of its position, nats
    accepted: bool = True
    mark: bool = False  # it is a mark, which is no text of the answer
    done: bool = False  # of a finished canvas

    @property
    def look(self) -> Look:
        if self.mark or self.done:
            return "mark" if self.mark else "done"
        return "sure" if self.accepted else f"u{level(self.entropy)}"


@dataclass(frozen=True, slots=True)
class Frame:
    """A canvas after one step, up to its first end id and with it."""

    block: int
    index: int
    steps: int  # the most steps of a canvas
    cells: tuple[Cell, ...]
    before: tuple[Cell, ...]  # canvases finished before
    accepted: int  # how many of `length` positions are accepted
    length: int
    means: tuple[float, ...]  # mean entropy of each step of this canvas until now, nats
    converged: bool

    @property
    def status(self) -> str:
        return (
            f"canvas {self.block + 1} · step {self.index + 1} of {self.steps} at most · entropy {self.means[-1]:.3f}"
            f" · {self.accepted} of {self.length} accepted"
        )

    @property
    def sparkline(self) -> str:
        """A bar per step for its mean entropy; the highest bar of the canvas is full."""
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
        """Note that a canvas is committed: its ids, without an end id."""
        cells = tuple(self._cell(token, text, 0.0, True, done=True) for token, text in self._detokenizer.texts(ids))
        self._before = (self._before + cells)[-KEPT:]

    def _cell(self, token: int, text: str, entropy: float, accepted: bool, done: bool = False) -> Cell:
        mark = self._detokenizer.plain(token) == "" or token in self._marks or token in self._ends
        if mark:
            text = "·" if token == self._pad else self._detokenizer.name(token)
        return Cell(shown(text), entropy, accepted, mark, done)


def shown(text: str) -> str:
    """Return a text without what a terminal would obey."""
    return _CONTROL.sub("·", text.expandtabs(4))


def lines(cells: Iterable[Cell], columns: int) -> list[Line]:
    """Return cells in lines of at most so many columns, broken between words where that goes."""
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
    """Yield newlines, spaces and what is between them, each of which may go over several cells."""
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
