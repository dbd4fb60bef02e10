"""The prompts for measuring fidelity.

For a model the first shipped set is used that its vocabulary is made for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeAlias

from dgemma.chat.messages import read, text_of
from dgemma.errors import UsageError
from dgemma.model import Model
from dgemma.session import Messages

Given: TypeAlias = str | Messages
PER_LEVEL = 2  # Sudokus of each number of blanks
WORD = re.compile(r"[^\W\d_]{3,}")
SPELLED = 2  # letters per token: below this, a vocabulary has no words of the text, and spells them in letters


@dataclass(frozen=True)
class Puzzle:
    """A Sudoku that the bundled model was not trained on."""

    blanks: int
    prompt: str  # nine rows, each with its newline
    solution: str


@cache
def puzzles() -> tuple[Puzzle, ...]:
    """Return the shipped Sudokus: 100 for each number of blanks, sorted by it."""
    found = []
    for line in data("sudoku.txt").splitlines():
        if not line.startswith("#"):
            blanks, puzzle, solution = line.split()
            found.append(Puzzle(int(blanks), puzzle.replace("/", "\n") + "\n", solution.replace("/", "\n") + "\n"))
    return tuple(found)


def data(name: str) -> str:
    """Return the text of a shipped file."""
    return files("dgemma.eval").joinpath("data", name).read_text(encoding="utf-8")


@cache
def sudokus() -> tuple[Given, ...]:
    """Return the first puzzle of each level, then the second of each: any number of them has all levels."""
    levels: dict[int, list[str]] = {}
    for puzzle in puzzles():
        levels.setdefault(puzzle.blanks, []).append(puzzle.prompt)
    return tuple(prompts[turn] for turn in range(PER_LEVEL) for prompts in levels.values())


@cache
def texts() -> tuple[Given, ...]:
    return tuple(json.loads(data("prompts.json")))


@cache
def tidy() -> tuple[Given, ...]:
    """Return prompts that the bundled model `tidy` was not trained on."""
    return tuple(json.loads(data("tidy-prompts.json")))


SETS = {"text": texts, "tidy": tidy, "sudoku": sudokus}


def choose(model: Model) -> tuple[str, Sequence[Given]]:
    """Return the name and the prompts of the first set that the model's vocabulary can read. Raises UsageError."""
    for name, prompts in SETS.items():
        if reads(model, [text for prompt in prompts() for text in contents(prompt)]):
            return name, prompts()
    raise UsageError(
        f"{model.path}: its vocabulary reads none of the shipped prompts ({', '.join(SETS)}); give prompts"
    )


def contents(prompt: Given) -> list[str]:
    """Return the texts of a prompt. A message that only calls a tool has none."""
    return [prompt] if isinstance(prompt, str) else [text for message in read(prompt) if (text := text_of(message))]


def reads(model: Model, texts: Iterable[str]) -> bool:
    """Return whether the vocabulary is made for texts like these.

    That is so if decoding the ids of a text gives the same text, without unknown tokens, and if words are not spelled
    letter by letter.
    """
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    letters = tokens = 0
    for text in texts:
        ids = encode(text, special=False)
        if model.tokenizer.unk_id in ids or decode(ids) != text:
            return False
        words = WORD.findall(text)
        letters += sum(map(len, words))
        tokens += sum(len(encode(word, special=False)) for word in words)
    return letters >= SPELLED * tokens
